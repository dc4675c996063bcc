"""The open database of a store, as long as it is the file of that name.

A file that is removed or replaced stays open for who has it, and what is written to it is lost. So every transaction
looks at the name first: a writer gets an error, before it acknowledges anything; a reader goes on with the new file.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import StoreError
from .database import identity, open_database, signature, transaction


class OpenFile:
    """Attributes: `db`, the connection; `meta`, the settings as they were when it was opened.

    Raises CorruptStoreError, FormatVersionError, StoreError: as `open_database`.
    """

    def __init__(self, path: Path, *, read_only: bool) -> None:
        self.path, self._read_only = path, read_only
        self.db: sqlite3.Connection
        self.meta: dict[str, str]
        self._open()

    def close(self) -> None:
        """Close the connection."""
        self.db.close()

    def follow(self) -> bool:
        """Whether a reader's file was another one by now, and was opened anew."""
        if not self._read_only:
            return False
        changed = self._immutable and signature(self.path) != self._signature  # its owner wrote to it meanwhile
        if not changed and (not self._is_another() or identity(self.path) is None):
            return False
        self.db.close()
        self._open()
        return True

    @contextmanager
    def reading(self) -> Iterator[None]:
        """A consistent snapshot for the statements inside. Raises StoreError: the file is gone or another one."""
        self._check()
        with transaction(self.db, "DEFERRED", self.path):
            yield

    @contextmanager
    def writing(self) -> Iterator[None]:
        """One durable transaction. Raises StoreError: the file is gone or another one; nothing was acknowledged."""
        self._check()
        with transaction(self.db, "IMMEDIATE", self.path):
            yield
            self._check()  # before COMMIT

    def _open(self) -> None:
        self._signature, self._identity = signature(self.path), identity(self.path)
        self.db, self.meta, self._immutable = open_database(self.path, read_only=self._read_only)

    def _is_another(self) -> bool:
        return identity(self.path) != self._identity

    def _check(self) -> None:
        if self._is_another():
            what = "removed" if identity(self.path) is None else "replaced by another file"
            raise StoreError(f"{self.path}: {what} while this store had it open: close the store and open it again")
