"""What an adapter is, in numbers: rank, scale, dropout and which layers carry it.

LoRA (arXiv:2106.09685, section 4.1) replaces a frozen weight W [N, K] by W + s B A, A [R, K], B [N, R], with

    s = alpha / R            the paper's scale: alpha fixes the step size while R is varied
    s = alpha / sqrt(R)      rsLoRA (arXiv:2312.03732): the scale under which large ranks keep learning

Names follow the papers; `peft_config.py` maps them to PEFT's spelling (`lora_alpha`, `use_rslora`, ...). The
two patterns give single layers another rank or alpha, by PEFT's rule.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from .errors import AdapterError

ALL_LINEAR = "all-linear"

_Value = TypeVar("_Value", int, float)


def scaling(r: int, alpha: float, *, rslora: bool = False) -> float:
    """The scale s = alpha / R, or alpha / sqrt(R) with `rslora` (arXiv:2312.03732, theorem 3.2)."""
    return alpha / math.sqrt(r) if rslora else alpha / r


@dataclass(frozen=True)
class LoRAConfig:
    """Which layers get an adapter, and of what size.

    r:             rank R of the update, >= 1.
    alpha:         numerator of the scale.
    dropout:       probability in [0, 1) that an input of the LoRA branch is zeroed in training; the base's
                   input is never zeroed.
    targets:       "all-linear" (every linear layer but the output head), or a list of names, each a whole
                   module path or its end ("q_proj", "self_attn.q_proj"), or one string: a regular expression
                   that must match the whole path.
    num_layers:    adapt only the last `num_layers` blocks (`...layers.<i>...`); None means the whole model.
    rslora:        divide alpha by sqrt(R) instead of R.
    exclude:       names or one regular expression, as in `targets`; excluded layers are never adapted.
    rank_pattern:  {pattern: r} for layers that differ; a pattern is a regular expression for the end of the
                   path, starting after a dot ("down_proj", "layers.3.mlp.up_proj"); the first match applies.
    alpha_pattern: {pattern: alpha}, likewise.
    Raises AdapterError: a value is outside its range, or a pattern is not a regular expression.
    """

    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: str | Sequence[str] = ALL_LINEAR
    num_layers: int | None = None
    rslora: bool = False
    exclude: str | Sequence[str] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_rank("r", self.r)
        check_alpha("alpha", self.alpha)
        check_dropout("dropout", self.dropout)
        if not self.targets:
            raise AdapterError("targets is empty: name layers, or use targets='all-linear'")
        if self.num_layers is not None and self.num_layers < 1:
            raise AdapterError(f"num_layers={self.num_layers}: want at least 1; without it the whole model is adapted")
        for pattern, rank in self.rank_pattern.items():
            check_rank(f"rank_pattern[{pattern!r}]", rank)
        for pattern, alpha in self.alpha_pattern.items():
            check_alpha(f"alpha_pattern[{pattern!r}]", alpha)
        for name in ("targets", "exclude"):
            value = getattr(self, name)
            if isinstance(value, str):
                check_regex(name, value)
        for name in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(self, name):
                check_regex(name, pattern)

    def rank_of(self, path: str) -> int:
        """R of the layer at `path`."""
        return _first_match(self.rank_pattern, path, self.r)

    def alpha_of(self, path: str) -> float:
        """alpha of the layer at `path`."""
        return _first_match(self.alpha_pattern, path, self.alpha)


def _first_match(patterns: Mapping[str, _Value], path: str, default: _Value) -> _Value:
    """PEFT's rule (`get_pattern_key`): the first key that matches the end of the path, starting after a dot."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default


def check_rank(name: str, value: object) -> None:
    """Raise AdapterError unless `value` is an integer >= 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise AdapterError(f"{name}={value!r}: a rank is an integer of at least 1")


def check_alpha(name: str, value: object) -> None:
    """Raise AdapterError unless `value` is a finite number other than 0 (0 would switch the adapter off)."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 < abs(value) <= sys.float_info.max:  # type: ignore[arg-type]
        raise AdapterError(f"{name}={value!r}: alpha is a finite number other than 0, often 2 x the rank")


def check_dropout(name: str, value: object) -> None:
    """Raise AdapterError unless `value` is a probability in [0, 1)."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < 1:
        raise AdapterError(f"{name}={value!r}: a dropout probability is at least 0 and less than 1")


def check_regex(name: str, pattern: str) -> None:
    """Raise AdapterError unless `pattern` compiles."""
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:  # the latter two: counts and nesting beyond re's limits
        raise AdapterError(f"{name}={pattern!r} is not a regular expression: {error}") from error
