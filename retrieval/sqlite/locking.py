"""One writer per store: an advisory lock on the file `store.lock`, which names its holder.

The kernel drops a `flock` when its holder ends, however it ends, so no stale lock survives a crash. The file
itself stays: removing it would let two processes lock two different files of the same name. POSIX only.
Some network file systems ignore `flock`: a store on one of them must not be written from two machines.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from ..errors import LockedError, ReadOnlyError


class WriterLock:
    """The right to write in `folder`, which is made if need be; held from construction until `release`.

    Raises LockedError: someone else holds it, with their process id. ReadOnlyError: the folder cannot be
    written.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / "store.lock"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise ReadOnlyError(
                f"{path}: {error.strerror}: the store cannot be written here, open it with read_only=True"
            ) from error
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(self._descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(self._descriptor)
            raise LockedError(
                f"{path}: process {holder} is writing to this store: wait for it to end, or open with read_only=True"
            ) from error
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Unlock; a second call does nothing."""
        if self._descriptor >= 0:
            os.ftruncate(self._descriptor, 0)
            os.close(self._descriptor)
            self._descriptor = -1
