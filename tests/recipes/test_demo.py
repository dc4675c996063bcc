"""The main job, end to end on the real models, trained once: the demo, and the README's commands one by one."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from qlorag.recipes.cli.main import main
from qlorag.recipes.cli.verbs.demo import MARK

ANSWER = "A software developer from Cyprus"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def demo(smollm2_dir: Path, minilm_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """What `qlorag demo --json` said, and the folder that it wrote."""
    folder = tmp_path_factory.mktemp("demo") / "demo"
    command = [sys.executable, "-m", "qlorag.recipes.cli", "demo", "--out", str(folder), "--json"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout), folder


@pytest.mark.model
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


def commands(script: str) -> list[list[str]]:
    lines = re.split(r"\n(?!\s)", script.replace("\\\n", " ").strip())
    return [shlex.split(line) for line in lines if line.strip()]


@pytest.mark.model
def test_the_readme_s_commands_run_as_written(demo: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    """Each of them; but the training is stopped once it is seen to be the demo's, whose adapter takes its place."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    (script,) = re.findall(r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    said: list[tuple[str, str]] = []
    for command in commands(script):
        if command[1] == "train":
            begins_as_the_demo(command, tmp_path, env, demo[1] / "adapter")
            said.append(("train", ""))
            continue
        run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert run.returncode == 0, (command, run.stderr[-2000:])
        said.append((command[1], run.stdout))
    verbs = ["pull", "inspect", "train", "evaluate", "generate", "fuse", "generate", "index", "search", "ask"]
    assert [verb for verb, _ in said] == verbs
    assert [out for verb, out in said if verb == "generate"] == [f"{ANSWER}\n"] * 2


def begins_as_the_demo(command: list[str], folder: Path, env: dict[str, str], trained: Path) -> None:
    """Two steps of a training whose settings, data and losses are those of `trained`, which then takes its place."""
    adapter = folder / command[command.index("--adapter-path") + 1]
    metrics = adapter / "metrics.jsonl"
    process = subprocess.Popen(
        command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count('"train"') >= 2):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output = process.communicate()[0]
    assert process.returncode == 128 + signal.SIGINT, output[-2000:]
    assert recorded(adapter) == recorded(trained)
    began, whole = losses(metrics), losses(trained / "metrics.jsonl")
    assert len(began) >= 3 and began == whole[: len(began)]
    shutil.rmtree(adapter)
    shutil.copytree(trained, adapter)


def recorded(adapter: Path) -> dict[str, Any]:
    """The settings in the newest checkpoint, which a run that is resumed must have too."""
    (*_, newest) = sorted((adapter / "checkpoints").iterdir())
    settings: dict[str, Any] = json.loads((newest / "trainer.json").read_text())["settings"]
    return settings


def losses(metrics: Path) -> list[tuple[str, int, float]]:
    events = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [(event["event"], event["step"], event["loss"]) for event in events]
