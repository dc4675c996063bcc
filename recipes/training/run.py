"""A training run: steps until the last one or a signal, with validations, checkpoints and reports in between.

A run joins parts, each with one subject:

    adapter.py      the model with its adapter          run_folder.py   what is written
    objectives/     what a step minimises               signals.py      ctrl-C and SIGTERM
    trainer.py      one step                            observer.py     what is reported
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...lora import count_parameters
from .adapter import PreparedModel
from .checkpoint import restore_optimizer
from .metrics import train_event
from .objectives import Objective
from .observer import RunObserver, RunResult, RunStart
from .run_folder import RunFolder
from .settings import TrainSettings
from .signals import stop_signals
from .trainer import StepReport, Trainer, mean_loss


class TrainingRun:
    """One run: a prepared model, an objective, its examples, and the folder that receives everything."""

    def __init__(
        self,
        prepared: PreparedModel,
        examples: Sequence[Any],
        valid: Sequence[Any],
        *,
        objective: Objective,
        settings: TrainSettings,
        out: Path,
    ) -> None:
        self.prepared, self.valid, self.objective = prepared, valid, objective
        self.settings, self.out = settings, out
        self.trainer = Trainer(prepared.model, examples, settings, objective)
        if prepared.resumed_from is not None:
            restore_optimizer(self.trainer, prepared.resumed_from, step=prepared.step)

    def run(
        self, observer: RunObserver, *, report_every: int, evaluate_every: int, save_every: int, keep: int
    ) -> RunResult:
        """Trains to the end, or until interrupted.

        report_every, evaluate_every, save_every: steps between reports, validations and checkpoints; 0 for none.
        keep: newest checkpoints kept.
        """
        trainer, last = self.trainer, None
        folder = RunFolder(self.out, self.prepared, trainer, keep=keep)
        start = self._start()
        observer.started(start)
        began = time.perf_counter()
        first_valid_loss = valid_loss = None
        with stop_signals(observer.stopping) as stopped, observer.steps(start):
            if not trainer.step:
                first_valid_loss = valid_loss = self._validate(folder, observer)
            while trainer.step < self.settings.iters and not stopped:
                last = trainer.take_step()
                folder.metrics.add("train", **train_event(last))
                observer.stepped(last)
                at_end = last.step == self.settings.iters
                if report_every and (last.step % report_every == 0 or at_end or last.skipped):
                    observer.reported(last)
                if evaluate_every and (last.step % evaluate_every == 0 or at_end):
                    valid_loss = self._validate(folder, observer)
                if save_every and last.step % save_every == 0 and not at_end:
                    folder.checkpoint()
        newest = folder.finish(complete=not stopped)
        result = RunResult(
            adapter_path=self.out,
            checkpoint=newest,
            steps=trainer.step,
            iters=self.settings.iters,
            stopped_by=stopped[0] if stopped else None,
            first_valid_loss=first_valid_loss,
            valid_loss=valid_loss,
            seconds=time.perf_counter() - began,
            **_measured(last, folder),
        )
        observer.ended(result)
        return result

    def _validate(self, folder: RunFolder, observer: RunObserver) -> float | None:
        if not self.valid:
            return None
        model, size = self.prepared.model, self.settings.batch_size
        loss = mean_loss(model, self.valid, batch_size=size, objective=self.objective)
        folder.metrics.add("valid", step=self.trainer.step, loss=loss)
        observer.validated(self.trainer.step, loss)
        return loss

    def _start(self) -> RunStart:
        trainable, total = count_parameters(self.prepared.model)
        examples = self.trainer.examples
        return RunStart(
            step=self.trainer.step,
            iters=self.settings.iters,
            quantize=self.prepared.quantize,
            layers=len(self.prepared.layers),
            trainable=trainable,
            parameters=total,
            examples=len(examples),
            valid_examples=len(self.valid),
            summary=self.objective.summary(examples),
            vocab_size=self.prepared.model.config.vocab_size,
        )


def _measured(last: StepReport | None, folder: RunFolder) -> dict[str, Any]:
    """The last step's loss and memory, and the speed of all; None if no step was taken."""
    if last is None:
        return {"loss": None, "tokens_per_second": None, "peak_memory_bytes": None}
    return {
        "loss": last.loss,
        "tokens_per_second": folder.tokens_per_second(),
        "peak_memory_bytes": last.peak_memory_bytes,
    }
