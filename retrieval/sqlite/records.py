"""What a store takes and gives, and the SQL between that and the tables of schema.sql.

Every function works inside the caller's transaction.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..documents.read import Document
from ..errors import CorruptStoreError, DocumentError
from ..splitter import Chunk


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
    """What a store holds; `dim` is None until the first vector, `bytes` is the size of store.sqlite3."""

    documents: int
    chunks: int
    dim: int | None
    metric: str
    embedder_id: str
    chunk_size: int
    chunk_overlap: int
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
    db: sqlite3.Connection, document: Document, metadata: str, chunks: Sequence[Chunk], vectors: NDArray[np.float32]
) -> bool:
    """Write a document with its chunks and vectors [len(chunks), D]; True if it replaced one of the same
    uri.
    """
    replaced = delete_document(db, document.uri)
    document_id = db.execute(
        "INSERT INTO documents (uri, sha256, text, metadata) VALUES (?, ?, ?, ?)",
        (document.uri, document.sha256, document.text, metadata),
    ).lastrowid
    for ordinal, (chunk, vector) in enumerate(zip(chunks, vectors.astype("<f4", copy=False), strict=True)):
        chunk_id = db.execute(
            "INSERT INTO chunks (document_id, ordinal, start_char, end_char) VALUES (?, ?, ?, ?)",
            (document_id, ordinal, chunk.start, chunk.end),
        ).lastrowid
        db.execute("INSERT INTO vectors (chunk_id, vector) VALUES (?, ?)", (chunk_id, vector.tobytes()))
    return replaced


def write_metadata(db: sqlite3.Connection, uri: str, metadata: str) -> bool:
    """Replace a document's metadata; False if it was the same already."""
    cursor = db.execute("UPDATE documents SET metadata = ? WHERE uri = ? AND metadata <> ?", (metadata, uri, metadata))
    return cursor.rowcount > 0


def delete_document(db: sqlite3.Connection, uri: str) -> bool:
    """Delete a document; its chunks and vectors go with it by the foreign keys. False if there was none."""
    return db.execute("DELETE FROM documents WHERE uri = ?", (uri,)).rowcount > 0


def load_document(db: sqlite3.Connection, uri: str) -> Document | None:
    """The document of that name, or None."""
    row = db.execute("SELECT uri, text, sha256, metadata FROM documents WHERE uri = ?", (uri,)).fetchone()
    return None if row is None else Document(row[0], row[1], row[2], json.loads(row[3]))


def load_hits(db: sqlite3.Connection, found: Sequence[tuple[int, float]]) -> list[Hit]:
    """Hits for (chunk id, score) pairs, in their order; each document's text is read once.

    Raises CorruptStoreError: a vector without a chunk, or a span outside of its document.
    """
    documents: dict[int, tuple[str, str, str, dict[str, object]]] = {}
    hits = []
    for chunk_id, score in found:
        span = db.execute("SELECT document_id, start_char, end_char FROM chunks WHERE id = ?", (chunk_id,)).fetchone()
        if span is None:
            raise CorruptStoreError(f"vectors: chunk {chunk_id} is in no document: index the documents again")
        document_id, start, end = span
        if document_id not in documents:
            row = db.execute(
                "SELECT uri, sha256, text, metadata FROM documents WHERE id = ?", (document_id,)
            ).fetchone()
            if row is None:
                raise CorruptStoreError(f"chunks: chunk {chunk_id} has no document: index the documents again")
            documents[document_id] = (row[0], row[1], row[2], json.loads(row[3]))
        uri, sha256, text, metadata = documents[document_id]
        if end > len(text):
            raise CorruptStoreError(f"{uri}: chunk {chunk_id} ends at {end} of {len(text)}: index the document again")
        hits.append(Hit(text[start:end], score, uri, start, end, sha256, metadata, chunk_id))
    return hits


def read_dim(db: sqlite3.Connection) -> int | None:
    """The vectors' dimension, None before the first one."""
    (value,) = db.execute("SELECT value FROM meta WHERE key = 'dim'").fetchone()
    return int(value) if value else None


def read_uris(db: sqlite3.Connection) -> list[str]:
    """All documents' names, sorted."""
    return [uri for (uri,) in db.execute("SELECT uri FROM documents ORDER BY uri")]


def read_stats(db: sqlite3.Connection, size: int) -> Stats:
    """Counts and settings; `size` is the file's size in bytes."""
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
        format_version=int(meta["format_version"]),
        bytes=size,
    )
