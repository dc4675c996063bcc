"""Going on with a run or an adapter: no flag repeated, none contradicted, one run per folder, end tokens kept."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from qlorag.models import generate, load_tokenizer
from qlorag.recipes.cli.main import main
from qlorag.recipes.errors import TrainingError
from qlorag.recipes.hub.assemble import assemble
from qlorag.recipes.training.checkpoint import checkpoints
from qlorag.recipes.training.lock import only_run

Capture = pytest.CaptureFixture[str]
ROWS = [{"prompt": f"say {w}", "completion": w} for w in ("yes", "no", "maybe")]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def train(model: Path, data: Path, out: Path, *more: str) -> list[str]:
    flags = ["--dtype", "float32", "--num-layers", "1", "--rank", "2", "--batch-size", "2", "--save-every", "2"]
    return ["train", "--model", str(model), "--data", str(data), "--adapter-path", str(out), *flags, *more]


def failed(capsys: Capture, *argv: object) -> str:
    capsys.readouterr()
    assert main([str(a) for a in argv]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    return err


def test_a_finished_run_goes_on_with_no_flag_but_a_larger_iters(
    tiny_dir: Path, data: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "run"
    assert main(train(tiny_dir, data, out, "--iters", "4")) == 0
    resume = ["train", "--resume", "--adapter-path", out]
    assert "all 4 steps are taken: give a larger --iters" in failed(capsys, *resume)
    assert main([str(a) for a in (*resume, "--iters", "6", "--json")]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 6
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 2  # a flag of the first command
    assert main([str(a) for a in (*resume, "--iters", "7", "--rank", "2", "--steps-per-report", "1")]) == 0  # repeated


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--rank", "8"], "--rank 2, and 8 is given"),
        (["--iters", "3"], "--iters 4, and 3 is given"),
        (["--learning-rate", "1"], "--learning-rate 0.0002, and 1.0 is given"),
        (["--model", "elsewhere"], "and elsewhere is given"),
        (["--targets", "q_proj", "v_proj"], "--targets all-linear, and q_proj v_proj is given"),
    ],
)
def test_a_flag_that_contradicts_the_run_is_named(
    flags: list[str], named: str, tiny_dir: Path, data: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "run"
    assert main(train(tiny_dir, data, out, "--iters", "4")) == 0
    before = [p.name for p in checkpoints(out)]
    assert named in failed(capsys, "train", "--resume", "--adapter-path", out, *flags)
    assert [p.name for p in checkpoints(out)] == before


def test_without_resume_model_and_data_are_needed(tmp_path: Path, capsys: Capture) -> None:
    assert "--model and --data missing" in failed(capsys, "train", "--adapter-path", tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_second_run_into_the_folder_is_refused(tiny_dir: Path, data: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "qlorag.recipes.cli", *train(tiny_dir, data, out, "--iters", "100000")]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        while not checkpoints(out):
            assert first.poll() is None, first.communicate()
            time.sleep(0.05)
        error = failed(capsys, *train(tiny_dir, data, out, "--overwrite"))
        assert f"process {first.pid} is training into it" in error
        first.send_signal(signal.SIGHUP)  # its terminal is closed: it saves, as for SIGTERM
        _, err = first.communicate(timeout=60)
    finally:
        first.kill()
    assert first.returncode == 128 + signal.SIGHUP, err
    assert main(["train", "--resume", "--adapter-path", str(out), "--show-mask"]) == 0


def test_the_lock_leaves_no_folder_that_a_failed_run_made(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), only_run(tmp_path / "new"):
        with pytest.raises(TrainingError, match="is training into it"), only_run(tmp_path / "new"):
            pass
        raise RuntimeError
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    with only_run(tmp_path / "old"):
        pass
    assert (tmp_path / "old").exists()


def test_a_finished_adapter_is_trained_further(tiny_dir: Path, data: Path, tmp_path: Path, capsys: Capture) -> None:
    flags = ("--iters", "30", "--learning-rate", "0.01", "--steps-per-report", "0")
    assert main(train(tiny_dir, data, tmp_path / "a", *flags, "--json")) == 0
    first = json.loads(capsys.readouterr().out)["loss"]
    more = ["train", "--model", str(tiny_dir), "--data", str(data), "--adapter-path", str(tmp_path / "b")]
    more += ["--iters", "1", "--learning-rate", "1e-9", "--resume-adapter-file", str(tmp_path / "a")]
    assert main([*more, "--dtype", "float32", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] < first + 0.5  # it did not begin from nothing
    assert json.loads((tmp_path / "b" / "adapter_config.json").read_text())["r"] == 2  # the adapter's own rank
    assert "--rank, --targets with --resume-adapter-file" in failed(capsys, *more, "--targets", "q_proj", "--rank", "4")
    assert "no such folder" in failed(capsys, *more[:-1], "nowhere", "--overwrite")


def base_style(tiny_dir: Path, folder: Path) -> Path:
    """A folder in the style of Qwen's base models: turns end with a token at which its files do not stop."""
    shutil.copytree(tiny_dir, folder)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        config = json.loads((folder / name).read_text())
        changes: dict[str, Any] = {"eos_token_id": 0, "eos_token": "<|endoftext|>"}
        config |= {key: value for key, value in changes.items() if key in config}
        (folder / name).write_text(json.dumps(config))
    return folder


def test_the_end_that_training_taught_stops_generation(
    tiny_dir: Path, data: Path, tmp_path: Path, capsys: Capture
) -> None:
    model, out = base_style(tiny_dir, tmp_path / "base"), tmp_path / "adapter"
    assert load_tokenizer(model).eos_ids == {0}
    flags = ("--iters", "150", "--learning-rate", "0.01", "--rank", "8", "--num-layers", "3", "--steps-per-report", "0")
    assert main(train(model, data, out, *flags)) == 0
    assert "the rows end turns with <|im_end|>" in capsys.readouterr().out
    assert json.loads((out / "generation_config.json").read_text()) == {"eos_token_id": [0, 2]}
    loaded = assemble(str(model), adapter_path=str(out), dtype="float32")
    run = generate(loaded.model, loaded.tok, "say yes", max_tokens=20)
    assert ("".join(run), run.stats.finish_reason) == ("yes", "eos")
    fused = tmp_path / "fused"
    flags = ("--adapter-path", str(out), "--save-path", str(fused), "--dtype", "float32")
    assert main(["fuse", "--model", str(model), *flags]) == 0
    assert load_tokenizer(fused).eos_ids == {0, 2}
    alone = assemble(str(fused), dtype="float32")
    assert "".join(generate(alone.model, alone.tok, "say yes", max_tokens=20)) == "yes"


def test_a_run_on_a_template_that_prints_the_date_is_resumed_on_another_day(
    tiny_dir: Path, data: Path, tmp_path: Path
) -> None:
    model, out = tmp_path / "dated", tmp_path / "run"
    shutil.copytree(tiny_dir, model)
    config = json.loads((model / "tokenizer_config.json").read_text())
    config["chat_template"] = "{{ strftime_now('%d %b %Y %H:%M:%S.%f') }}" + config["chat_template"]
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    assert main(train(model, data, out, "--iters", "4")) == 0
    time.sleep(1.1)
    assert main(["train", "--resume", "--adapter-path", str(out), "--iters", "6"]) == 0
