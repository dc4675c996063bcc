"""One training run per folder: a second one would overwrite the first one's adapter, and both would end with success.

The kernel drops a `flock` when its holder ends, however it ends. The file stays, but in a folder that was made for a
run which then wrote nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from ..errors import TrainingError


@contextlib.contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """Hold the right to train into `folder`, which is made if need be.

    Raises TrainingError: another process has it.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / ".run.lock"
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "another one"
            raise TrainingError(
                f"{folder}: process {holder} is training into it: wait for that run, or choose another --adapter-path"
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        if made and list(folder.iterdir()) == [lock]:
            lock.unlink()
            folder.rmdir()
        os.close(descriptor)
