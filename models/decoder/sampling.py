"""From logits to the next token: the usual filters, in the usual order, and a draw that a seed makes repeatable.

    repetition penalty -> temperature -> top-k -> top-p -> min-p -> draw

Each filter takes and returns logits [V]; what it removes becomes -inf. The order is that of transformers, so the
same settings mean the same distribution. Greedy (temperature 0) skips everything after the penalty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ModelError


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens.

    temperature:        0 is greedy; otherwise logits are divided by it.
    top_k:              keep the k likeliest tokens; 0 keeps all.
    top_p:              keep the likeliest tokens whose probabilities reach p; 1 keeps all.
    min_p:              keep tokens at least min_p times as likely as the likeliest; 0 keeps all.
    repetition_penalty: > 1 makes tokens already seen less likely    (arXiv:1909.05858); 1 is off.
    seed:               of the draws; None draws a new one each time.
    Raises ValueError: a number outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        checks = {
            "temperature": (self.temperature >= 0, "at least 0"),
            "top_k": (self.top_k >= 0, "at least 0"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
            "min_p": (0 <= self.min_p <= 1, "in [0, 1]"),
            "repetition_penalty": (self.repetition_penalty > 0, "above 0"),
            "seed": (self.seed is None or 0 <= self.seed < 2**63, "from 0 to 2^63 - 1"),
        }
        for name, (good, wanted) in checks.items():
            if not good:
                raise ValueError(f"{name}={getattr(self, name)}, wanted {wanted}")


class Sampler:
    """Draws tokens one after another by one setting."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    def __call__(self, logits: Tensor, seen: Sequence[int]) -> int:
        """logits: [V].  seen: ids of prompt and answer so far.  Returns the next id.

        Raises ModelError: the logits are not finite.
        """
        s = self.sampling
        logits = logits.float().cpu()
        if not torch.isfinite(logits.max()):  # the maximum of numbers among which is NaN is NaN
            raise ModelError(
                "the model's logits are NaN or infinite: its weights or its adapter are damaged (a training that "
                "diverged), or they overflow the dtype: try float32 or bfloat16"
            )
        logits = penalize(logits, seen, penalty=s.repetition_penalty)
        if s.temperature == 0:
            return int(logits.argmax())
        probabilities = self.distribution(logits)
        return int(torch.multinomial(probabilities, 1, generator=self._generator))

    def distribution(self, logits: Tensor) -> Tensor:
        """logits: float32 [V], already penalized. Returns probabilities [V] after temperature and all filters."""
        s = self.sampling
        logits = logits / s.temperature
        if 0 < s.top_k < logits.numel():
            logits = keep_top_k(logits, s.top_k)
        if s.top_p < 1:
            logits = keep_top_p(logits, s.top_p)
        if s.min_p > 0:
            logits = keep_min_p(logits, s.min_p)
        return logits.softmax(-1)


def penalize(logits: Tensor, seen: Sequence[int], *, penalty: float) -> Tensor:
    """Logits of seen tokens divided by the penalty if positive, multiplied if negative."""
    if penalty == 1.0 or not seen:
        return logits
    ids = torch.tensor(sorted(set(seen)))
    old = logits[ids]
    return logits.index_copy(0, ids, torch.where(old > 0, old / penalty, old * penalty))


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """The k largest logits, and those tied with the k-th."""
    return logits.masked_fill(logits < logits.topk(k).values[-1], float("-inf"))


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """The fewest largest logits whose probabilities add up to at least p."""
    ordered, index = logits.sort(descending=True)
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities  # what the larger ones add up to; 0 for the first
    return logits.index_fill(0, index[before >= p], float("-inf"))


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Logits whose probability is at least p times the largest."""
    probabilities = logits.softmax(-1)
    return logits.masked_fill(probabilities < p * probabilities.max(), float("-inf"))
