"""What a store takes and gives, and the SQL between that and the tables of schema.sql.

Every function works inside the caller's transaction.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..documents.read import Document
from ..errors import CorruptStoreError, DocumentError
from ..splitter import Chunk
from .checksums import check, checksum

PART = 16_384  # code points of a document's text in one row


@dataclass(frozen=True)
class Hit:
    """A chunk that answers a query: `text == document.text[start:end]`, score = cosine in [-1, 1]."""

    text: str
    score: float
    uri: str
    start: int
    end: int
    sha256: str
    metadata: Mapping[str, object]
    chunk_id: int


@dataclass(frozen=True)
class AddReport:
    """What `Store.add` did, in documents; `chunks` counts those that were embedded and written."""

    added: int
    replaced: int
    unchanged: int
    chunks: int


@dataclass(frozen=True)
class Stats:
    """What a store holds; `dim` is None until the first vector, `bytes` is the size of all files in its folder."""

    documents: int
    chunks: int
    dim: int | None
    metric: str
    embedder_id: str
    chunk_size: int
    chunk_overlap: int
    counter: str
    format_version: int
    bytes: int


def encode_metadata(document: Document) -> str:
    """The metadata as a JSON object.

    Raises DocumentError: it holds something that JSON cannot.
    """
    try:
        return json.dumps(dict(document.metadata), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DocumentError(f"{document.uri}: metadata: {error}: use what JSON can hold") from None


def read_sha256(db: sqlite3.Connection, uri: str) -> str | None:
    """The hash of a stored document, None if there is none of that name."""
    row = db.execute("SELECT sha256 FROM documents WHERE uri = ?", (uri,)).fetchone()
    return None if row is None else str(row[0])


def write_document(
    db: sqlite3.Connection,
    document: Document,
    metadata: str,
    chunks: Sequence[Chunk],
    vectors: NDArray[np.float32],
    *,
    ids: Sequence[int] | None = None,
) -> bool:
    """Write a document with its chunks and vectors [len(chunks), D]; True if it replaced one of the same uri.

    ids: of the chunks, where they are not to be new ones.
    """
    replaced = delete_document(db, document.uri)
    row = (document.uri, document.sha256, metadata, len(document.text))
    document_id = db.execute(
        "INSERT INTO documents (uri, sha256, metadata, characters, checksum) VALUES (?, ?, ?, ?, ?)",
        (*row, checksum(*row)),
    ).lastrowid
    assert document_id is not None
    for part, start in enumerate(range(0, len(document.text), PART)):
        text = document.text[start : start + PART]
        db.execute(
            "INSERT INTO texts VALUES (?, ?, ?, ?)", (document_id, part, text, checksum(document_id, part, text))
        )
    for ordinal, (chunk, vector) in enumerate(zip(chunks, vectors.astype("<f4", copy=False), strict=True)):
        span = (document_id, ordinal, chunk.start, chunk.end)
        chunk_id = db.execute(
            "INSERT INTO chunks (id, document_id, ordinal, start_char, end_char, checksum) VALUES (?, ?, ?, ?, ?, ?)",
            (None if ids is None else ids[ordinal], *span, checksum(*span)),
        ).lastrowid
        assert chunk_id is not None
        blob = vector.tobytes()
        db.execute("INSERT INTO vectors VALUES (?, ?, ?)", (chunk_id, blob, checksum(chunk_id, blob)))
    _count(db, documents=1, chunks=len(chunks))
    return replaced


def write_metadata(db: sqlite3.Connection, uri: str, metadata: str) -> bool:
    """Replace a document's metadata; False if it was the same already."""
    row = _document_row(db, "uri = ?", uri)
    if row is None or row.metadata == metadata:
        return False
    values = (uri, row.sha256, metadata, row.characters)
    db.execute("UPDATE documents SET metadata = ?, checksum = ? WHERE id = ?", (metadata, checksum(*values), row.id))
    return True


def delete_document(db: sqlite3.Connection, uri: str) -> bool:
    """Delete a document; its chunks and vectors go with it by the foreign keys. False if there was none."""
    row = db.execute("SELECT id FROM documents WHERE uri = ?", (uri,)).fetchone()
    if row is None:
        return False
    (chunks,) = db.execute("SELECT count(*) FROM chunks WHERE document_id = ?", row).fetchone()
    db.execute("DELETE FROM documents WHERE id = ?", row)
    _count(db, documents=-1, chunks=-chunks)
    return True


def _count(db: sqlite3.Connection, **changes: int) -> None:
    for key, change in changes.items():
        db.execute("UPDATE meta SET value = CAST(value AS INTEGER) + ? WHERE key = ?", (change, key))


class _DocumentRow(NamedTuple):
    id: int
    uri: str
    sha256: str
    metadata: str
    characters: int


def _document_row(db: sqlite3.Connection, condition: str, value: str | int) -> _DocumentRow | None:
    """A row of documents, its checksum seen to be right."""
    columns = "id, uri, sha256, metadata, characters, checksum"
    found = db.execute(f"SELECT {columns} FROM documents WHERE {condition}", (value,)).fetchone()
    if found is None:
        return None
    *row, stored = found
    check(stored, f"document {row[1]!a}", *row[1:])
    return _DocumentRow(*row)


def _read_part(db: sqlite3.Connection, row: _DocumentRow, part: int) -> str:
    found = db.execute("SELECT text, checksum FROM texts WHERE document_id = ? AND part = ?", (row.id, part)).fetchone()
    text, stored = found or ("", None)
    check(stored, f"the text of document {row.uri!a}", row.id, part, text)
    return str(text)


def load_document(db: sqlite3.Connection, uri: str) -> Document | None:
    """The document of that name, or None.

    Raises CorruptStoreError: it is damaged.
    """
    row = _document_row(db, "uri = ?", uri)
    if row is None:
        return None
    text = "".join(_read_part(db, row, part) for part in range(-(-row.characters // PART)))
    return Document(row.uri, text, row.sha256, json.loads(row.metadata))


def load_hits(db: sqlite3.Connection, found: Sequence[tuple[int, float]]) -> list[Hit]:
    """Hits for (chunk id, score) pairs, in their order; of a document only the parts that they lie in are read.

    Raises CorruptStoreError: a vector without a chunk, a span outside of its document, or a damaged row.
    """
    documents: dict[int, _DocumentRow] = {}
    parts: dict[tuple[int, int], str] = {}
    hits = []
    for chunk_id, score in found:
        columns = "document_id, ordinal, start_char, end_char, checksum"
        span = db.execute(f"SELECT {columns} FROM chunks WHERE id = ?", (chunk_id,)).fetchone()
        if span is None:
            raise CorruptStoreError(f"vectors: chunk {chunk_id} is in no document: index the documents again")
        document_id, ordinal, start, end, stored = span
        check(stored, f"chunk {chunk_id}", document_id, ordinal, start, end)
        if document_id not in documents:
            row = _document_row(db, "id = ?", document_id)
            if row is None:
                raise CorruptStoreError(f"chunks: chunk {chunk_id} has no document: index the documents again")
            documents[document_id] = row
        row = documents[document_id]
        if end > row.characters:
            raise CorruptStoreError(
                f"{row.uri}: chunk {chunk_id} ends at {end} of {row.characters}: index the document again"
            )
        first, last = start // PART, (end - 1) // PART
        for part in range(first, last + 1):
            if (document_id, part) not in parts:
                parts[document_id, part] = _read_part(db, row, part)
        joined = "".join(parts[document_id, part] for part in range(first, last + 1))
        text = joined[start - first * PART : end - first * PART]
        hits.append(Hit(text, score, row.uri, start, end, row.sha256, json.loads(row.metadata), chunk_id))
    return hits


def read_dim(db: sqlite3.Connection) -> int | None:
    """The vectors' dimension, None before the first one."""
    (value,) = db.execute("SELECT value FROM meta WHERE key = 'dim'").fetchone()
    return int(value) if value else None


def read_uris(db: sqlite3.Connection) -> list[str]:
    """All documents' names, sorted."""
    return [uri for (uri,) in db.execute("SELECT uri FROM documents ORDER BY uri")]


def read_stats(db: sqlite3.Connection, size: int) -> Stats:
    """Counts and settings; `size` is the size of the store's files in bytes."""
    meta = dict(db.execute("SELECT key, value FROM meta"))
    (documents,) = db.execute("SELECT count(*) FROM documents").fetchone()
    (chunks,) = db.execute("SELECT count(*) FROM chunks").fetchone()
    return Stats(
        documents=documents,
        chunks=chunks,
        dim=int(meta["dim"]) if meta["dim"] else None,
        metric=meta["metric"],
        embedder_id=meta["embedder_id"],
        chunk_size=int(meta["chunk_size"]),
        chunk_overlap=int(meta["chunk_overlap"]),
        counter=meta["counter"],
        format_version=int(meta["format_version"]),
        bytes=size,
    )
