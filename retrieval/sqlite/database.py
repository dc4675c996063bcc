"""The SQLite file: create it whole, open it only if it is sound, and say what is wrong with
it.

Journal mode is WAL with `synchronous=FULL`: a commit is on the disk when it returns, and readers keep a
consistent snapshot while one writer goes on. SQLite releases up to 3.51.2 can corrupt a WAL when two
connections write or checkpoint in the same instant; here only the holder of `store.lock` writes, and readers
open `mode=ro`, which cannot checkpoint.

A reader needs the `-shm` file beside a WAL database. In a folder it cannot write to, a store that was closed
properly has none, and is opened `immutable` instead; `Store` looks for changes of the file and opens it
again.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import CorruptStoreError, FormatVersionError, ReadOnlyError, StoreError
from .files import publish

FORMAT_VERSION = 2
_APPLICATION_ID = 0x716C6F72
_SQLITE_MAGIC = b"SQLite format 3\0"
_META_KEYS = {
    "format_version",
    "embedder_id",
    "dim",
    "metric",
    "chunk_size",
    "chunk_overlap",
    "counter",
    "documents",
    "chunks",
    "change_seq",
    "index_sha256",
}
_TABLES = {"meta", "documents", "texts", "chunks", "vectors"}
_RESTORE = "restore it from a copy, or index the documents again into another folder"


def exists(path: Path) -> bool:
    """Whether there is a database file.

    Raises StoreError: the folder cannot be looked into.
    """
    try:
        return path.exists()
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}: check its permissions") from error


def check_nothing_lost(path: Path, *leftovers: str) -> None:
    """Refuse to make an empty database where, by what else is in the folder, a full one has been.

    Raises CorruptStoreError.
    """
    for leftover in (_wal(path), *(path.with_name(name) for name in leftovers)):
        if leftover.exists():
            raise CorruptStoreError(f"{path}: missing, but {leftover.name} is there: {_RESTORE}")


def create_database(path: Path, *, embedder_id: str, chunk_size: int, chunk_overlap: int, counter: str) -> None:
    """Write an empty store under a temporary name and publish it: `path` never exists half-made."""
    settings = {"embedder_id": embedder_id, "chunk_size": chunk_size, "chunk_overlap": chunk_overlap}
    with building(path, **settings, counter=counter):
        pass


@contextmanager
def building(path: Path, **settings: object) -> Iterator[sqlite3.Connection]:
    """An empty store under a temporary name, to be filled; it becomes `path` when the block ends without an error."""
    meta = {
        "format_version": FORMAT_VERSION,
        "dim": "",
        "metric": "cosine",
        "documents": 0,
        "chunks": 0,
        "change_seq": 0,
        "index_sha256": "",
        **settings,
    }
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)  # left by a process that died here; we hold the writer's lock
    with translated_errors(path):
        connection = sqlite3.connect(temporary, isolation_level=None)
        try:
            connection.executescript(Path(__file__).with_name("schema.sql").read_text(encoding="utf-8"))
            connection.executemany("INSERT INTO meta VALUES (?, ?)", [(k, str(v)) for k, v in meta.items()])
            yield connection
            connection.execute("PRAGMA journal_mode = WAL")  # is remembered in the file
        finally:
            connection.close()
    publish(temporary, path)


def open_database(path: Path, *, read_only: bool) -> tuple[sqlite3.Connection, dict[str, str], bool]:
    """(connection, meta, whether it is an immutable snapshot) of an existing, sound database.

    Raises CorruptStoreError: empty, cut short, not SQLite, not a store, damaged. FormatVersionError: another
    format. Page damage that the opening does not touch surfaces as CorruptStoreError from the call that does.
    """
    try:
        _check_header(path)
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}: check its permissions") from error
    immutable = read_only and not os.access(path.parent, os.W_OK) and not _wal_size(path)
    mode = "mode=ro&immutable=1" if immutable else "mode=ro" if read_only else "mode=rw"
    with translated_errors(path):
        # Autocommit: transactions are begun explicitly. A reader may have to wait while another recovers the
        # WAL.
        connection = sqlite3.connect(f"{path.absolute().as_uri()}?{mode}", uri=True, isolation_level=None, timeout=30)
        try:
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA cell_size_check = ON")
            connection.execute("PRAGMA trusted_schema = OFF")
            connection.execute("BEGIN")  # one snapshot: a writer may commit between the counts and what they should be
            meta = _check_contents(path, connection)
            connection.execute("COMMIT")
        except BaseException:  # ctrl-C too: the file must not stay open
            connection.close()
            raise
    return connection, meta, immutable


def identity(path: Path) -> tuple[int, int] | None:
    """Which file is there now: another one after the file was removed or replaced. None: there is none."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def signature(path: Path) -> tuple[int, ...]:
    """Changes when the database file, or its WAL, is written or replaced."""
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns, _wal_size(path)


@contextmanager
def transaction(connection: sqlite3.Connection, kind: str, path: Path) -> Iterator[None]:
    """BEGIN DEFERRED (a consistent snapshot for reading) or BEGIN IMMEDIATE (for writing); all or nothing."""
    with translated_errors(path):
        connection.execute(f"BEGIN {kind}")
        try:
            yield
            connection.execute("COMMIT")
        except BaseException:  # whatever it was, Ctrl-C included: nothing of this transaction stays
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise


@contextmanager
def translated_errors(path: Path) -> Iterator[None]:
    """SQLite's errors as StoreErrors, with the file's name and what to do."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise CorruptStoreError(f"{path}: damaged (a text is not UTF-8): {_RESTORE}") from error
    except sqlite3.Error as error:
        text = str(error)
        # SQLITE_CORRUPT and SQLITE_NOTADB arrive as the bare class (error codes exist only from Python 3.11
        # on).
        if type(error) is sqlite3.DatabaseError or "decode to UTF-8" in text:
            raise CorruptStoreError(f"{path}: damaged ({text}): {_RESTORE}") from error
        if "readonly" in text:
            raise ReadOnlyError(f"{path}: {text}: open the store for writing where it can be written") from error
        advice = "free some space" if "full" in text else "check that the folder can be used"
        raise StoreError(f"{path}: {text}: {advice} and repeat, this step changed nothing") from error


def record_change(connection: sqlite3.Connection, **meta: str) -> None:
    """Count a change, which tells caches to look again, and set meta values, inside the caller's
    transaction.
    """
    connection.executemany("UPDATE meta SET value = ? WHERE key = ?", [(v, k) for k, v in meta.items()])
    connection.execute("UPDATE meta SET value = CAST(value AS INTEGER) + 1 WHERE key = 'change_seq'")


def _check_header(path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(100)
    if size == 0:
        raise CorruptStoreError(f"{path}: 0 bytes, wanted a SQLite database: {_RESTORE}")
    if len(header) < 100 or not header.startswith(_SQLITE_MAGIC):
        raise CorruptStoreError(f"{path}: not a SQLite database: {_RESTORE}")
    # https://www.sqlite.org/fileformat.html#the_database_header: page size at 16 (1 means 65536), page count
    # at 28, valid if the change counter at 24 equals the one at 92. With a WAL the file may rightly be behind
    # its header.
    page_size = int.from_bytes(header[16:18], "big")
    pages = int.from_bytes(header[28:32], "big")
    wanted = pages * (65536 if page_size == 1 else page_size)
    if header[24:28] == header[92:96] and size < wanted and not _wal_size(path):
        raise CorruptStoreError(f"{path}: cut short, {size} bytes of {wanted}: {_RESTORE}")


def _check_contents(path: Path, connection: sqlite3.Connection) -> dict[str, str]:
    (application_id,) = connection.execute("PRAGMA application_id").fetchone()
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if application_id != _APPLICATION_ID or "meta" not in tables:
        raise CorruptStoreError(f"{path}: a SQLite database, but not a store of this library: choose another folder")
    meta: dict[str, str] = dict(connection.execute("SELECT key, value FROM meta"))
    if meta.get("format_version") == "1":
        raise FormatVersionError(
            f"{path}: format_version=1, this code reads {FORMAT_VERSION}: open it for writing once, which upgrades it"
        )
    if meta.get("format_version") != str(FORMAT_VERSION):
        raise FormatVersionError(
            f"{path}: format_version={meta.get('format_version')}, this code reads {FORMAT_VERSION}: "
            "use the version of the library that wrote it, or index the documents again"
        )
    missing = sorted((_META_KEYS - meta.keys()) | (_TABLES - tables))
    if missing:
        raise CorruptStoreError(f"{path}: {', '.join(missing)} missing: {_RESTORE}")
    for key in ("dim", "chunk_size", "chunk_overlap", "documents", "chunks", "change_seq"):
        if not (meta[key].isdecimal() or (key == "dim" and meta[key] == "")):
            raise CorruptStoreError(f"{path}: meta {key}={meta[key]!r}, wanted a number: {_RESTORE}")
    for table in ("documents", "chunks"):
        (there,) = connection.execute(f"SELECT count(*) FROM {table}").fetchone()
        if there != int(meta[table]):
            raise CorruptStoreError(f"{path}: {there} rows of {table}, wanted {meta[table]}: {_RESTORE}")
    return meta


def _wal(path: Path) -> Path:
    return path.with_name(path.name + "-wal")


def _wal_size(path: Path) -> int:
    """0 if there is none; a reader leaves an empty one behind."""
    wal = _wal(path)
    return wal.stat().st_size if wal.exists() else 0
