"""The training loop's heart: examples in, one optimizer step at a time, numbers out. No files, no terminal.

    examples of the step = a pure function of (seed, step)                        data.batch_indices
    pack      -> ids [1, T], lengths, rows that carry a label, their labels       at most 15 tokens of padding
    hidden    = decoder(ids)                                                      [T, D]
    loss      = linear_cross_entropy(hidden[rows], head, labels) / labels in the whole step
    backward, clip to a norm, AdamW with warm-up and cosine

The loss is the mean over all labelled tokens of a step, however many micro-batches it is spread over: every
micro-batch divides its *sum* by the step's total. A mean of micro-batch means would weigh short answers more, and
accumulation would change the gradient.

Everything random in a step (dropout) is drawn from a generator seeded by (seed, step). So a run that is continued at
step k repeats, bit for bit, what the uninterrupted run did from there on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...kernels.cross_entropy import linear_cross_entropy
from ...lora import trainable_parameters
from ...models import Decoder
from ...models.decoder.generate import peak_memory_bytes
from ...quant.adamw8bit import AdamW8bit
from ..data.examples import Example, batch_indices
from ..errors import TrainingError
from .optimizers import AdamW, clip_gradients

BAD_STEPS_IN_A_ROW = 3
OPTIMIZERS: dict[str, type[AdamW | AdamW8bit]] = {"adamw": AdamW, "adamw8bit": AdamW8bit}

# T is rounded up to a multiple of this. Every new T makes the platform's GEMM library build and keep new kernels: 24
# steps of some 180 tokens grew a process by 180 MB, and by 25 MB when rounded. Matrix units work on 16 rows anyway.
TOKEN_MULTIPLE = 16


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


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did. `skipped` says that loss or gradient was not finite and nothing was changed."""

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


@dataclass(frozen=True)
class Batch:
    """Examples laid end to end.

    ids:     int64 [1, T]; each example without its last token, which predicts nothing; then the padding.
    lengths: tokens of each example, then of the padding if there is any; their sum is T.
    tokens:  T without the padding, which is a sequence of its own that nobody attends to and no label is in.
    rows:    int64 [n], the positions whose next token is trained.  labels: int64 [n], those next tokens.
    """

    ids: Tensor
    lengths: list[int]
    tokens: int
    rows: Tensor
    labels: Tensor


def pack(examples: Sequence[Example]) -> Batch:
    """One packed batch. An example whose mask marks only its first token contributes no label."""
    ids: list[int] = []
    rows: list[int] = []
    labels: list[int] = []
    lengths: list[int] = []
    for example in examples:
        start, n = len(ids), len(example.ids) - 1
        if n < 1:
            continue
        ids += example.ids[:-1]
        lengths.append(n)
        trained = [t for t in range(n) if example.mask[t + 1]]
        rows += [start + t for t in trained]
        labels += [example.ids[t + 1] for t in trained]
    tokens = len(ids)
    if padding := -tokens % TOKEN_MULTIPLE:
        ids += [0] * padding
        lengths.append(padding)
    return Batch(torch.tensor([ids], dtype=torch.int64), lengths, tokens, torch.tensor(rows, dtype=torch.int64),
                 torch.tensor(labels, dtype=torch.int64))  # fmt: skip


def summed_loss(model: Decoder, batch: Batch) -> Tensor:
    """Cross-entropy summed over a batch's labels; a scalar that can be differentiated."""
    hidden = model.hidden(batch.ids, lengths=batch.lengths)[0]  # [T, D]
    return linear_cross_entropy(hidden[batch.rows], model.lm_head.weight, batch.labels)


@torch.no_grad()
def mean_loss(model: Decoder, examples: Sequence[Example], *, batch_size: int = 4) -> float:
    """Mean cross-entropy over all trained tokens of the examples, in nats. Dropout is off while it runs."""
    was_training = model.training
    model.eval()
    total, labels = 0.0, 0
    for begin in range(0, len(examples), batch_size):
        batch = pack(examples[begin : begin + batch_size])
        if len(batch.labels):
            total += summed_loss(model, batch).item()
            labels += len(batch.labels)
    model.train(was_training)
    if not labels:
        raise TrainingError("no token of the given examples is trained, so there is no loss to measure")
    return total / labels


def perplexity(loss: float) -> float:
    """exp(loss): among how many equally likely tokens the model hesitates."""
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

    model:    with adapters attached; `step` is how many updates were made (set it, with the optimizer, to resume).
    examples: the training set; a step's examples depend on (settings.seed, step) alone.
    Raises TrainingError: nothing to train, or nothing to train on.
    """

    def __init__(self, model: Decoder, examples: Sequence[Example], settings: TrainSettings) -> None:
        if not examples:
            raise TrainingError("no examples to train on")
        self.model, self.examples, self.settings = model, examples, settings
        self.parameters = dict(trainable_parameters(model))
        if not self.parameters:
            raise TrainingError("no parameter of the model is trainable: attach an adapter first")
        self.optimizer = OPTIMIZERS[settings.optimizer](self.parameters, weight_decay=settings.weight_decay)
        self.step = 0
        self._bad = 0

    def take_step(self) -> StepReport:
        """One update. Raises TrainingError: three steps in a row had no finite loss or gradient."""
        s, began = self.settings, time.perf_counter()
        size = s.batch_size * s.grad_accumulation
        chosen = [
            self.examples[i] for i in batch_indices(len(self.examples), batch_size=size, seed=s.seed, step=self.step)
        ]
        batches = [pack(chosen[i : i + s.batch_size]) for i in range(0, size, s.batch_size)]
        trained = sum(len(b.labels) for b in batches)
        torch.manual_seed(dropout_seed(s.seed, self.step))
        self.model.train()
        self.optimizer.zero_grad()
        loss = 0.0
        for batch in batches:
            part = summed_loss(self.model, batch) / trained
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
        return StepReport(self.step, loss, rate, norm, tokens, trained, time.perf_counter() - began,
                          peak_memory_bytes(), skipped=not finite)  # fmt: skip

    def _count_bad(self, finite: bool, loss: float, norm: float, chosen: Sequence[Example]) -> None:
        self._bad = 0 if finite else self._bad + 1
        if self._bad >= BAD_STEPS_IN_A_ROW:
            lines = sorted({example.line for example in chosen})
            raise TrainingError(
                f"step {self.step + 1}: loss {loss} and gradient norm {norm} were not finite {self._bad} times in a "
                f"row (last rows: lines {', '.join(map(str, lines))}): nothing was updated by them; lower the "
                "learning rate or look at these rows"
            )
