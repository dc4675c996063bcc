"""What a training run says of itself: advice after one that came to nothing, and none after one that did not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from qlorag.lora.files import _write
from qlorag.models.files.folders import new_file, new_folder
from qlorag.recipes.cli.display import Display
from qlorag.recipes.cli.training_progress import TrainingProgress
from qlorag.recipes.training.metrics import MetricsLog
from qlorag.recipes.training.observer import RunResult, RunStart
from qlorag.recipes.training.trainer import StepReport

START = RunStart(0, 20, "nf4", 21, 10, 100, 8, 0, "8 examples", vocab_size=49152)


def advice(losses: list[float], norms: list[float], capsys: pytest.CaptureFixture[str]) -> str:
    progress = TrainingProgress(Display())
    progress.started(START)
    with progress.steps(START):
        for step, (loss, norm) in enumerate(zip(losses, norms, strict=True), 1):
            progress.stepped(StepReport(step, loss, 1e-4, norm, 10, 5, 0.1, 1000))
    out = Path("out")
    progress.ended(RunResult(out, out, len(losses), 20, None, losses[-1], None, None, 1.0, 1.0, 1))
    said = capsys.readouterr().out
    assert "adapter in out" in said
    return said


def test_a_loss_that_rose_is_named_with_that_of_a_guess(capsys: pytest.CaptureFixture[str]) -> None:
    said = advice([2.1, 4.0, *[10.7] * 10], [1.0] * 12, capsys)
    assert "this run collapsed: the loss rose from 2.1 to 10.7; a guess among all 49152 tokens has 10.8" in said
    assert "lower --learning-rate" in said


def test_a_gradient_of_nothing_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    said = advice([10.8, 9.0, *[10.3] * 10], [1.0, 1.0, *[0.0] * 9, 0.2], capsys)
    assert "this run collapsed: the gradient is 0 in 9 of the last 10 steps, and the loss is still 10.3" in said


@pytest.mark.parametrize(
    ("losses", "norms"),
    [
        ([2.0, 1.5, 1.0, 0.5, 0.4, 0.3, 0.3], [1.0] * 7),
        ([2.0, *[2.8, 1.4] * 5], [1.0] * 11),  # noise
        ([0.001] * 10, [1e-4] * 10),  # rows that were learned before
        ([3.0, *[0.02] * 10], [1e-4] * 11),  # learned by heart
        ([2.0] * 10, [1.0] * 9 + [1e-4]),  # one odd row
        ([2.0, 9.0, 9.0], [1.0] * 3),  # too few steps to tell
    ],
)
def test_a_run_that_learned_gets_no_advice(
    losses: list[float], norms: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "collapsed" not in advice(losses, norms, capsys)


def full_disk(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_full_disk_names_the_file_or_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log._file.close()
    log._file = open("/dev/full", "w")  # noqa: SIM115 (the log closes it)
    with pytest.raises(OSError, match=r"No space left on device: .*metrics\.jsonl"):
        log.add("train", step=1)
    with pytest.raises(OSError, match=r"No space left on device: .*a\.txt"), new_file(tmp_path / "a.txt"):
        full_disk()
    with pytest.raises(OSError, match=r"No space left on device: .*folder"), new_folder(tmp_path / "folder"):
        full_disk()
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match=r"No space left on device: .*adapter_config\.json"):
        _write(tmp_path / "adapter_config.json", b"{}")
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]
