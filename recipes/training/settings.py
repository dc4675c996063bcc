"""How to optimize, as plain numbers. Nothing here needs torch, so that `qlorag train --help` is quick."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import TrainingError

OPTIMIZERS = ("adamw", "adamw8bit")


@dataclass(frozen=True)
class TrainSettings:
    """How to optimize.

    iters:         optimizer steps in all.
    batch_size:    examples in a micro-batch; grad_accumulation: micro-batches in a step.
    learning_rate: the peak, reached after `warmup` (a fraction of iters), then a cosine down to 0.
    clip:          largest global norm of the gradient; 0 turns clipping off.
    optimizer:     "adamw", or "adamw8bit", whose moments take a quarter of the memory (quant/adamw8bit.py).
    """

    iters: int = 100
    batch_size: int = 4
    grad_accumulation: int = 1
    learning_rate: float = 2e-4
    warmup: float = 0.1
    weight_decay: float = 0.0
    clip: float = 1.0
    seed: int = 0
    optimizer: str = "adamw"

    def __post_init__(self) -> None:
        checks = {
            "iters": (self.iters >= 1, "at least 1"),
            "batch_size": (self.batch_size >= 1, "at least 1"),
            "grad_accumulation": (self.grad_accumulation >= 1, "at least 1"),
            "learning_rate": (0 < self.learning_rate < math.inf, "above 0"),
            "warmup": (0 <= self.warmup <= 1, "a fraction from 0 to 1"),
            "weight_decay": (0 <= self.weight_decay < math.inf, "at least 0"),
            "clip": (0 <= self.clip < math.inf, "at least 0"),
            "seed": (0 <= self.seed < 2**31, "from 0 to 2147483647"),
            "optimizer": (self.optimizer in OPTIMIZERS, " or ".join(OPTIMIZERS)),
        }
        for name, (good, wanted) in checks.items():
            if not good:
                raise TrainingError(f"{name}={getattr(self, name)}, wanted {wanted}")
