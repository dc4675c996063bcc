"""Where pulled models live, and how a folder gets there whole.

`$QLORAG_HOME`, else `$XDG_CACHE_HOME/qlorag`, else `~/.cache/qlorag`. A model is the folder `models/<name>`
in it, and that name is the only sign that the model is complete: the folder is built under another name
beside it, every file is forced to the disk, and one rename makes it appear. A killed process leaves only
the other name, which the next pull of the same model clears. It may, because it holds the model's lock, and
the system drops a lock when its holder dies.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from ..models.save import fsync


def models_home(home: str | Path | None = None) -> Path:
    """The folder that holds pulled models; it need not exist yet."""
    if chosen := home or os.environ.get("QLORAG_HOME"):
        return Path(chosen).expanduser() / "models"
    cache = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification: a relative path is invalid and is to be ignored.
    base = Path(cache) if os.path.isabs(cache) else Path.home() / ".cache"
    return base / "qlorag" / "models"


@contextlib.contextmanager
def exclusive(folder: Path, *, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold the lock of a folder-to-be; if another process has it, call `on_wait` and wait."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _beside(folder, "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def new_folder(folder: Path, *, resume: bool = False) -> Iterator[Path]:
    """Yield a folder beside `folder`; when the block ends without an exception it becomes `folder`, at once.

    For use inside `exclusive(folder)`: what an earlier attempt left is cleared first.
    resume: it is kept instead, and a failure keeps what there is, so that a download can go on.
    """
    work = _beside(folder, "partial")
    if not resume:
        shutil.rmtree(work, ignore_errors=True)
    work.mkdir(exist_ok=resume)
    try:
        yield work
        _settle(work)
        work.rename(folder)
        fsync(folder.parent)
    except BaseException:  # ctrl-C too: nothing half-made stays behind
        if not resume:
            shutil.rmtree(work, ignore_errors=True)
        elif not any(work.iterdir()):
            work.rmdir()
        raise


def _settle(work: Path) -> None:
    """Force every file and folder to the disk, with the rights a plain `open` would have given it."""
    os.umask(mask := os.umask(0o077))  # the only way to read it is to set it
    for where, _, names in os.walk(work, topdown=False):
        for name in names:
            os.chmod(os.path.join(where, name), 0o666 & ~mask)  # safetensors writes 0600
            fsync(Path(where, name))
        fsync(Path(where))


def _beside(folder: Path, suffix: str) -> Path:
    return folder.with_name(f".{folder.name}.{suffix}")
