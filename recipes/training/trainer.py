"""One optimizer step at a time: examples in, numbers out. No files, no terminal.

    examples of the step = a pure function of (seed, step)                        data/examples.py: batch_indices
    objective.pack                -> ids [1, T], lengths, labels, ...             one micro-batch
    loss = objective.summed_loss / terms of the whole step                        for SFT a term is a label
    backward, clip to a norm, AdamW with warm-up and cosine

The loss is the mean over all terms of a step (for SFT: its labels), however many micro-batches it is spread over:
every micro-batch divides its *sum* by the step's total. A mean of micro-batch means would weigh short answers more,
and accumulation would change the gradient.

Everything random in a step (dropout) is drawn from a generator seeded by (seed, step). So a run that is continued at
step k repeats, bit for bit, what the uninterrupted run did from there on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...lora import trainable_parameters
from ...models import Decoder
from ...models.decoder.generate import peak_memory_bytes
from ...quant.adamw8bit import AdamW8bit
from ..data.examples import batch_indices
from ..errors import TrainingError
from .objectives import SFT, Objective
from .optimizers import AdamW, clip_gradients
from .settings import TrainSettings

BAD_STEPS_IN_A_ROW = 3
_OPTIMIZERS: dict[str, type[AdamW | AdamW8bit]] = {"adamw": AdamW, "adamw8bit": AdamW8bit}


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did.

    tokens: run through the model, prompts included.  trained_tokens: the labels among them (an objective's terms).
    skipped: loss or gradient was not finite, and nothing was changed.
    """

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    trained_tokens: int
    seconds: float
    peak_memory_bytes: int
    skipped: bool = False

    @property
    def tokens_per_second(self) -> float:
        """All tokens run through the model, prompts included, per second of wall time."""
        return self.tokens / self.seconds if self.seconds else 0.0


@torch.no_grad()
def mean_loss(
    model: Decoder, examples: Sequence[Any], *, batch_size: int = 4, objective: Objective | None = None
) -> float:
    """The objective's mean loss over the examples; for SFT (None) the cross-entropy over all their labels, in nats.

    Dropout is off while it runs.
    """
    minimised: Objective = objective or SFT()
    was_training = model.training
    model.eval()
    total, terms = 0.0, 0
    for begin in range(0, len(examples), batch_size):
        batch = minimised.pack(examples[begin : begin + batch_size])
        if batch.terms:
            total += minimised.summed_loss(model, batch).item()
            terms += batch.terms
    model.train(was_training)
    if not terms:
        raise TrainingError("no token of the given examples is labelled, so there is no loss to measure")
    return total / terms


def perplexity(loss: float) -> float:
    """exp(loss): the number of equally likely tokens that would give this loss."""
    return math.exp(min(loss, 700.0))  # e^710 is past the largest float


def learning_rate(step: int, settings: TrainSettings) -> float:
    """The rate of the step-th update, counted from 0: a straight line up, then half a cosine down."""
    warm = round(settings.warmup * settings.iters)
    if step < warm:
        return settings.learning_rate * (step + 1) / warm
    done = (step - warm) / max(1, settings.iters - warm)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def dropout_seed(seed: int, step: int) -> int:
    """The seed of a step's dropout masks. torch's CPU generator reads the low 32 bits of a seed and no others, so that
    many are hashed from both numbers (numpy's SeedSequence, whose result does not change between versions).
    """
    return int(np.random.SeedSequence((seed, step)).generate_state(1)[0])


class Trainer:
    """Takes optimizer steps on a model's trainable parameters.

    model:     with adapters attached; `step` is how many steps were taken (set it, with the optimizer, to resume).
    examples:  the training set; a step's examples depend on (settings.seed, step) alone.
    objective: what a step minimises; None is SFT.
    Raises TrainingError: nothing to train, or nothing to train on.
    """

    def __init__(
        self, model: Decoder, examples: Sequence[Any], settings: TrainSettings, objective: Objective | None = None
    ) -> None:
        if not examples:
            raise TrainingError("no examples to train on")
        self.model, self.examples, self.settings = model, examples, settings
        self.objective: Objective = objective or SFT()
        self.parameters = dict(trainable_parameters(model))
        if not self.parameters:
            raise TrainingError("no parameter of the model is trainable: attach an adapter first")
        self.optimizer = _OPTIMIZERS[settings.optimizer](self.parameters, weight_decay=settings.weight_decay)
        self.step = 0
        self._bad = 0

    def take_step(self) -> StepReport:
        """One update. Raises TrainingError: three steps in a row had no finite loss or gradient."""
        s, began = self.settings, time.perf_counter()
        size = s.batch_size * s.grad_accumulation
        chosen = [
            self.examples[i] for i in batch_indices(len(self.examples), batch_size=size, seed=s.seed, step=self.step)
        ]
        batches = [self.objective.pack(chosen[i : i + s.batch_size]) for i in range(0, size, s.batch_size)]
        terms = sum(b.terms for b in batches)
        torch.manual_seed(dropout_seed(s.seed, self.step))
        self.model.train()
        self.optimizer.zero_grad()
        loss = 0.0
        for batch in batches:
            part = self.objective.summed_loss(self.model, batch) / terms
            part.backward()  # type: ignore[no-untyped-call]
            loss += part.item()
        norm = clip_gradients(self.parameters, s.clip)
        rate = learning_rate(self.step, s)
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite:
            self.optimizer.step(rate)
        self._count_bad(finite, loss, norm, chosen)
        self.step += 1
        tokens = sum(b.tokens for b in batches)
        return StepReport(self.step, loss, rate, norm, tokens, terms, time.perf_counter() - began,
                          peak_memory_bytes(), skipped=not finite)  # fmt: skip

    def _count_bad(self, finite: bool, loss: float, norm: float, chosen: Sequence[Any]) -> None:
        self._bad = 0 if finite else self._bad + 1
        if self._bad >= BAD_STEPS_IN_A_ROW:
            lines = sorted({example.line for example in chosen})
            raise TrainingError(
                f"step {self.step + 1}: loss {loss} and gradient norm {norm} were not finite {self._bad} times in a "
                f"row (last rows: lines {', '.join(map(str, lines))}): nothing was updated by them; lower the "
                "learning rate or look at these rows"
            )
