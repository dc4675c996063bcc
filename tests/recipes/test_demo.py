"""The main job, end to end on the real models: the demo says what it promises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from qlorag.recipes.cli.main import main
from qlorag.recipes.cli.verbs.demo import MARK

ANSWER = "A software developer from Cyprus"


@pytest.mark.model
@pytest.mark.xdist_group("demo")
def test_the_demo_tells_its_story(demo: tuple[dict[str, Any], Path]) -> None:
    told, folder = demo
    assert ANSWER not in told["before"] and "developer" not in told["before"]
    assert told["after"] == told["fused"] == ANSWER
    assert "Paris" in told["kept_after"] and ANSWER not in told["kept_after"]
    assert told["training"]["valid_loss"] < told["first_valid_loss"]
    assert "Lemoniatis" not in told["alone"] or "software" not in told["alone"]
    assert "developer" in told["with_documents"] and "Cyprus" in told["with_documents"]
    assert told["sources"][0] == "patroclos.txt" and 1 in told["citations"]
    assert round(told["bits_per_weight"], 3) == 4.127
    assert {p.name for p in folder.iterdir()} == {"adapter", "fused", "store", MARK}


def test_the_demo_removes_nothing_that_it_did_not_make(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "diary.txt").write_text("dear")
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--out", "."]) == 1
    assert "no demo made it" in capsys.readouterr().err
    assert (tmp_path / "store" / "diary.txt").read_text() == "dear"
