"""Where pulled models are kept, and the lock under which one is put there.

`$QLORAG_HOME`, else `$XDG_CACHE_HOME/qlorag`, else `~/.cache/qlorag`. A model is the folder `models/<name>`
in it, and that name is the only sign that the model is complete (models/files/folders.py). What a killed process
left beside it is cleared by the next pull of the same model, which may, because it holds the model's lock; the
system drops a lock when its holder dies.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from ...models.files.folders import beside


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
    with beside(folder, "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
