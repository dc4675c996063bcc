"""The main job, end to end on the real models: the demo says what it promises."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from qlorag.recipes.cli.demo import MARK
from qlorag.recipes.cli.main import main

ANSWER = "A software developer from Cyprus"


@pytest.mark.model
def test_the_demo_tells_its_story(smollm2_dir: Path, minilm_dir: Path, tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "qlorag.recipes.cli", "demo", "--out", str(tmp_path / "demo"), "--json"],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "2"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    told = json.loads(run.stdout)
    assert ANSWER not in told["before"] and "developer" not in told["before"]
    assert told["after"] == told["fused"] == ANSWER
    assert "Paris" in told["kept_after"] and ANSWER not in told["kept_after"]
    assert told["training"]["valid_loss"] < told["first_valid_loss"]
    assert "Lemoniatis" not in told["alone"] or "software" not in told["alone"]
    assert "developer" in told["with_documents"] and "Cyprus" in told["with_documents"]
    assert told["sources"][0] == "patroclos.txt" and 1 in told["citations"]
    assert round(told["bits_per_weight"], 3) == 4.127
    assert {p.name for p in (tmp_path / "demo").iterdir()} == {"adapter", "fused", "store", MARK}


def test_the_demo_removes_nothing_that_it_did_not_make(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "diary.txt").write_text("dear")
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--out", "."]) == 1
    assert "no demo made it" in capsys.readouterr().err
    assert (tmp_path / "store" / "diary.txt").read_text() == "dear"
