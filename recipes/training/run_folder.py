"""The folder of a training run, and everything that a run writes into it.

ADAPTER_PATH/
    adapter_config.json, adapter_model.safetensors   the finished adapter, as PEFT reads it
    metrics.jsonl, loss.png                          what was measured
    checkpoints/step-0000050/                        what `--resume` goes on from
"""

from __future__ import annotations

import shutil
from pathlib import Path

from .adapter import PreparedModel
from .checkpoint import checkpoints, save_checkpoint
from .metrics import MetricsLog, plot_losses, read_metrics
from .trainer import Trainer


class RunFolder:
    """Writes what one run makes. A new run (trainer.step is 0) removes what an earlier one left.

    keep: newest checkpoints kept.
    Attributes: `metrics`, the open log of events.
    """

    def __init__(self, path: Path, prepared: PreparedModel, trainer: Trainer, *, keep: int) -> None:
        self.path, self.prepared, self.trainer, self.keep = path, prepared, trainer, keep
        self._first = trainer.step
        self._newest: tuple[int, Path] | None = None
        path.mkdir(parents=True, exist_ok=True)
        if not trainer.step:
            _remove_earlier_run(path)
        self.metrics = MetricsLog(path / "metrics.jsonl", resume_at=trainer.step)

    def checkpoint(self) -> Path:
        """The checkpoint of this step, written unless it was a moment ago."""
        step = self.trainer.step
        if self._newest is None or self._newest[0] != step:
            folder = save_checkpoint(
                self.trainer,
                self.path,
                settings=self.prepared.record,
                save_adapter=self.prepared.save_adapter,
                keep=self.keep,
            )
            self._newest = (step, folder)
        return self._newest[1]

    def finish(self, *, complete: bool) -> Path:
        """Writes the last checkpoint, the adapter if the run is complete, and the plot. Returns the checkpoint."""
        self.metrics.close()
        newest = self.checkpoint()
        if complete:
            self.prepared.save_adapter(self.path)
        plot_losses(self.metrics.path, self.path / "loss.png")  # last, since nothing depends on it
        return newest

    def tokens_per_second(self) -> float:
        """Over the steps of this run, without those before a resume."""
        steps = [e for e in read_metrics(self.metrics.path) if e["event"] == "train" and e["step"] > self._first]
        return float(sum(e["tokens"] for e in steps) / sum(e["seconds"] for e in steps))


def _remove_earlier_run(path: Path) -> None:
    """The adapter first: it must not be taken for the new run's."""
    for name in ("adapter_model.safetensors", "adapter_config.json", "loss.png"):
        (path / name).unlink(missing_ok=True)
    for old in checkpoints(path):
        shutil.rmtree(old)
