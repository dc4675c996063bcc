"""What a run reports as it happens. The command line prints it; another program may plot it, or ignore it."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from .trainer import StepReport


@dataclass(frozen=True)
class RunStart:
    """What a run begins with.

    step:      the step after which it goes on; 0 for a new run.  iters: the last step.
    quantize:  the base's 4-bit kind, None for a dense base.  layers: how many carry an adapter.
    trainable, parameters: of the model, a packed weight counted by its elements.
    summary:   of the training examples, in the objective's words.
    vocab_size: of the model: a loss of ln(vocab_size) is a guess among all its tokens.
    """

    step: int
    iters: int
    quantize: str | None
    layers: int
    trainable: int
    parameters: int
    examples: int
    valid_examples: int
    summary: str
    vocab_size: int


@dataclass(frozen=True)
class RunResult:
    """How a run ended.

    stopped_by: the number of the signal that stopped it; None for a run that reached its last step.
    checkpoint: the newest.  loss: of the last step.  The numbers are None where nothing was measured.
    """

    adapter_path: Path
    checkpoint: Path
    steps: int
    iters: int
    stopped_by: int | None
    loss: float | None
    first_valid_loss: float | None
    valid_loss: float | None
    seconds: float
    tokens_per_second: float | None
    peak_memory_bytes: int | None


class RunObserver:
    """Receives what a run does. This one does nothing with it: override what is of interest."""

    def started(self, start: RunStart) -> None:
        """Before the first step."""

    def steps(self, start: RunStart) -> AbstractContextManager[object]:
        """Entered before the first step and left after the last one, or when one fails."""
        return contextlib.nullcontext()

    def stepped(self, report: StepReport) -> None:
        """After every step."""

    def reported(self, report: StepReport) -> None:
        """After every `report_every`-th step, the last one, and each that was not applied."""

    def validated(self, step: int, loss: float) -> None:
        """After a validation."""

    def stopping(self) -> None:
        """When a signal asks for an end after the step that is under way. Called from the signal's handler."""

    def ended(self, result: RunResult) -> None:
        """After everything is written."""
