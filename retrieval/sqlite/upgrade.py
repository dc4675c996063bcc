"""Bring a store of an older format to this one: into a new file beside it, which then takes its place.

Format 1 kept a document's whole text in one row, and had no checksums, no counts and no name of the token counter.
Until the rename the old file is as it was; nothing is embedded again, and ids stay, so the HNSW index stays too.
"""

from __future__ import annotations

import logging
import sqlite3
from pathlib import Path

import numpy as np

from ..documents.read import Document
from ..splitter import Chunk
from .database import building, translated_errors
from .records import write_document

log = logging.getLogger(__name__)


def upgrade(path: Path) -> None:
    """Rewrite the store at `path` if its format is 1; the caller is its only writer.

    Raises CorruptStoreError, StoreError: it cannot be read, or there is no room for the new file.
    """
    with translated_errors(path):
        old = sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, isolation_level=None)
        try:
            if not _is_format_1(old):
                return
            log.warning("%s: bringing the store from format 1 to 2", path)
            old.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            meta = dict(old.execute("SELECT key, value FROM meta"))
            settings = {key: meta[key] for key in ("embedder_id", "chunk_size", "chunk_overlap")}
            with building(path, **settings, counter="unknown") as new:
                new.execute("BEGIN")
                _copy(old, new)
                for key in ("dim", "change_seq", "index_sha256"):
                    new.execute("UPDATE meta SET value = ? WHERE key = ?", (meta[key], key))
                new.execute("COMMIT")
                old.close()  # before the rename: closing it removes the WAL that belongs to its name
        finally:
            old.close()


def _is_format_1(db: sqlite3.Connection) -> bool:
    try:
        found = db.execute("SELECT value FROM meta WHERE key = 'format_version'").fetchone()
    except (sqlite3.Error, UnicodeDecodeError):  # no store, or a damaged one: the caller's next step says which
        return False
    return found is not None and found[0] == "1"


def _copy(old: sqlite3.Connection, new: sqlite3.Connection) -> None:
    """Every document with its chunks under their old ids, by the function that writes documents."""
    rows = old.execute("SELECT id, uri, sha256, text, metadata FROM documents ORDER BY id")
    query = (
        "SELECT chunks.id, start_char, end_char, vector FROM chunks JOIN vectors ON chunk_id = chunks.id "
        "WHERE document_id = ? ORDER BY ordinal"
    )
    for document_id, uri, sha256, text, metadata in rows:
        ids, chunks, vectors = [], [], []
        for chunk_id, start, end, blob in old.execute(query, (document_id,)).fetchall():
            ids.append(chunk_id)
            chunks.append(Chunk(text[start:end], start, end))
            vectors.append(np.frombuffer(blob, dtype="<f4"))
        matrix = np.stack(vectors) if vectors else np.empty((0, 0), np.float32)
        write_document(new, Document(uri, text, sha256), metadata, chunks, matrix, ids=ids)
    # An id is never used again, not even the last one of a document that is gone.
    last = old.execute("SELECT seq FROM sqlite_sequence WHERE name = 'chunks'").fetchone()
    if last is not None:
        new.execute("DELETE FROM sqlite_sequence WHERE name = 'chunks'")
        new.execute("INSERT INTO sqlite_sequence VALUES ('chunks', ?)", last)
