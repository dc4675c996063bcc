"""What a training run shows: lines for every report, and a live bar on a terminal."""

from __future__ import annotations

import contextlib
import math
import sys
from collections import deque
from collections.abc import Iterator
from statistics import mean

from rich.progress import Progress, TaskID, TextColumn

from ..training.observer import RunObserver, RunResult, RunStart
from ..training.trainer import StepReport, perplexity
from .display import Display, count, size

LEAST_STEPS, LAST_STEPS = 5, 10  # a collapse is told from at least and at most so many steps
NO_GRADIENT, DEAD_STEPS = 1e-3, 2  # a norm that moves nothing, and how many of the last steps may not have it
LEARNED = 0.1  # nats: below this a vanishing gradient is what success looks like


class TrainingProgress(RunObserver):
    """Prints what a run does."""

    def __init__(self, display: Display) -> None:
        self._display = display
        self._bar: tuple[Progress, TaskID] | None = None
        self._vocab_size = 0
        self._first_loss: float | None = None
        self._last: deque[StepReport] = deque(maxlen=LAST_STEPS)

    def started(self, start: RunStart) -> None:
        """Says what is trained on what."""
        self._vocab_size = start.vocab_size
        if start.step:
            self._display.say(f"going on after step {start.step}")
        self._display.say(
            f"{start.quantize or 'dense'} base, {start.layers} layers adapted: {count(start.trainable)} of "
            f"{count(start.parameters)} parameters trainable ({100 * start.trainable / start.parameters:.2f} %)"
        )
        self._display.say(
            f"{start.examples} training examples, {start.summary}; {start.valid_examples} validation examples"
        )

    @contextlib.contextmanager
    def steps(self, start: RunStart) -> Iterator[None]:
        """Shows a live bar with loss and speed on a terminal; elsewhere the printed lines are enough."""
        with self._display.progress(TextColumn("loss {task.fields[loss]}  {task.fields[rate]} tok/s")) as progress:
            task = progress.add_task("training", total=start.iters, completed=start.step, loss="-", rate="-")
            self._bar = (progress, task)
            yield
        self._bar = None

    def stepped(self, report: StepReport) -> None:
        """Moves the bar."""
        if not report.skipped:
            self._first_loss = report.loss if self._first_loss is None else self._first_loss
            self._last.append(report)
        if self._bar is not None:
            progress, task = self._bar
            rate = f"{report.tokens_per_second:.0f}"
            progress.update(task, completed=report.step, loss=f"{report.loss:.3f}", rate=rate)

    def reported(self, report: StepReport) -> None:
        """Prints a line."""
        skipped = "  NOT APPLIED: loss or gradient is not finite" if report.skipped else ""
        self._display.say(
            f"step {report.step:5d}  loss {report.loss:.3f}  lr {report.learning_rate:.2e}  "
            f"grad {report.grad_norm:.2f}  {report.tokens_per_second:.0f} tok/s  "
            f"peak {size(report.peak_memory_bytes)}{skipped}"
        )

    def validated(self, step: int, loss: float) -> None:
        """Prints a line."""
        self._display.say(f"step {step:5d}  valid loss {loss:.3f}  perplexity {perplexity(loss):.2f}")

    def stopping(self) -> None:
        """Says that the signal was understood."""
        print("\nstopping after this step (again to stop at once)", file=sys.stderr)

    def ended(self, result: RunResult) -> None:
        """Says where everything is, and how to go on; or that the run came to nothing."""
        if why := self._collapse():
            self._display.say(
                f"this run collapsed: {why}. What it saved is of no use: train again with a lower --learning-rate "
                "(1e-4 is usual for LoRA) and some --warmup",
                style="yellow",
            )
        if result.stopped_by is None:
            self._display.say(f"adapter in {result.adapter_path}, losses in {result.adapter_path / 'loss.png'}")
            return
        self._display.say(
            f"stopped after step {result.steps} of {result.iters}; the adapter so far is in {result.checkpoint}. "
            "To go on: the same command with --resume"
        )

    def _collapse(self) -> str:
        """How the last steps show that nothing was learned; "" if they do not."""
        if self._first_loss is None or len(self._last) < LEAST_STEPS:
            return ""
        loss, dead = mean(r.loss for r in self._last), sum(r.grad_norm < NO_GRADIENT for r in self._last)
        if loss > self._first_loss + 1:
            guess = f"; a guess among all {self._vocab_size} tokens has {math.log(self._vocab_size):.1f}"
            return f"the loss rose from {self._first_loss:.1f} to {loss:.1f}{guess}"
        if dead >= DEAD_STEPS and loss > max(LEARNED, self._first_loss / 2):
            return f"the gradient is 0 in {dead} of the last {len(self._last)} steps, and the loss is still {loss:.1f}"
        return ""
