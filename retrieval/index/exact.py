"""Vectors: what may be stored, their unit form in memory, and exact nearest neighbours.

Scores are cosines, q·v / (|q| |v|). Candidates are found with one float32 matrix-vector product, whose
rounding depends on the numpy build. So that this never shows, every candidate within the product's error
bound of the k-th is scored again in float64, row by row, and ranked by (score, then chunk id): equal vectors
get equal scores, and the answer does not depend on the machine.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CorruptStoreError, EmbedderError
from ..sqlite.checksums import check

Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]

_READ_BATCH = 4096


def check_vectors(vectors: Any, *, count: int, dim: int | None, what: str) -> Float32:
    """An embedder's answer as float32 [count, D].

    Raises EmbedderError: not a [count, dim] array of numbers, or a row that has NaN or inf or is all zeros.
    """
    try:
        array = np.asarray(vectors)
    except ValueError as error:
        raise EmbedderError(f"{what}: the embedder returned no rectangular array ({error})") from None
    if array.ndim != 2 or array.dtype.kind not in "fiu" or array.shape[0] != count or array.shape[1] == 0:
        raise EmbedderError(
            f"{what}: the embedder returned {array.dtype} {list(array.shape)}, wanted float32 [{count}, D]"
        )
    if dim is not None and array.shape[1] != dim:
        raise EmbedderError(
            f"{what}: the embedder returned D={array.shape[1]}, the store holds D={dim}: "
            "use the embedder the store was made with, or index into another folder"
        )
    with np.errstate(over="ignore"):  # a float64 beyond float32's range becomes inf and is refused below
        result = np.ascontiguousarray(array, dtype=np.float32)
    lengths = _lengths(result)
    bad = np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0)))
    if bad.size:
        kind = "all zeros" if lengths[bad[0]] == 0 else "NaN or inf"
        raise EmbedderError(f"{what}: the embedder's vector {bad[0]} of {count} is {kind}: nothing was stored")
    return result


def unit(vectors: Float32) -> Float32:
    """Rows divided by their lengths (computed in float64). [n, D] -> [n, D]"""
    return (vectors / _lengths(vectors)[:, None]).astype(np.float32)


def _lengths(vectors: Float32) -> NDArray[np.float64]:
    squares: NDArray[np.float64] = np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64)
    return np.sqrt(squares)


def read_vectors(connection: sqlite3.Connection, *, after: int, dim: int) -> Iterator[tuple[Int64, Float32]]:
    """Batches of (chunk ids [n], unit vectors [n, D]) with id > after, in id order.

    Raises CorruptStoreError: a stored vector has another length than dim, or is not a vector that `add`
    accepts.
    """
    cursor = connection.execute(
        "SELECT chunk_id, vector, checksum FROM vectors WHERE chunk_id > ? ORDER BY chunk_id", (after,)
    )
    while rows := cursor.fetchmany(_READ_BATCH):
        yield _decode(rows, dim)


def read_chosen(connection: sqlite3.Connection, ids: Int64, *, dim: int) -> tuple[Int64, Float32]:
    """(chunk ids, unit vectors [n, D]) of those among `ids` that exist; raises as `read_vectors`."""
    rows: list[tuple[int, bytes, int]] = []
    for at in range(0, ids.size, 500):  # old builds of SQLite take at most 999 parameters
        part = [int(chunk_id) for chunk_id in ids[at : at + 500]]
        marks = ", ".join("?" * len(part))
        columns = "chunk_id, vector, checksum"
        rows += connection.execute(f"SELECT {columns} FROM vectors WHERE chunk_id IN ({marks})", part).fetchall()
    return _decode(rows, dim)


def _decode(rows: list[tuple[int, bytes, int]], dim: int) -> tuple[Int64, Float32]:
    for chunk_id, blob, stored in rows:
        if not isinstance(blob, bytes) or len(blob) != 4 * dim:
            raise CorruptStoreError(f"vectors: chunk {chunk_id} has not {4 * dim} bytes: index its document again")
        check(stored, f"the vector of chunk {chunk_id}", chunk_id, blob)
    ids = np.array([chunk_id for chunk_id, _, _ in rows], dtype=np.int64)
    values = np.frombuffer(b"".join(blob for _, blob, _ in rows), dtype="<f4").reshape(-1, dim)
    lengths = _lengths(values)
    bad = np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0)))
    if bad.size:
        raise CorruptStoreError(f"vectors: chunk {ids[bad[0]]} is NaN, inf or zeros: index its document again")
    return ids, unit(values)


class ExactIndex:
    """Unit vectors in memory: those of all chunks with id > after, in id order."""

    def __init__(self, dim: int, *, after: int = 0) -> None:
        self.dim = dim
        self.after = after
        self.ids: Int64 = np.empty(0, np.int64)  # [n]
        self.rows: Float32 = np.empty((0, self.dim), np.float32)  # [n, D]

    def refresh(self, connection: sqlite3.Connection) -> None:
        """Follow the database: rows whose chunk is gone are dropped, new chunks are read and appended.

        Ids are never reused, so our ids can only have become fewer: comparing the counts is enough.
        """
        last = int(self.ids[-1]) if self.ids.size else self.after
        span = (self.after, last)
        (live,) = connection.execute("SELECT count(*) FROM chunks WHERE id > ? AND id <= ?", span).fetchone()
        if live != self.ids.size:
            rows = connection.execute("SELECT id FROM chunks WHERE id > ? AND id <= ?", span).fetchall()
            kept = np.isin(self.ids, np.array([chunk_id for (chunk_id,) in rows], dtype=np.int64))
            self.ids, self.rows = self.ids[kept], self.rows[kept]
        batches = list(read_vectors(connection, after=last, dim=self.dim))
        if batches:
            self.ids = np.concatenate([self.ids, *(ids for ids, _ in batches)])
            self.rows = np.concatenate([self.rows, *(rows for _, rows in batches)])

    def candidates(self, query: Float32, k: int) -> tuple[Int64, Float32]:
        """All rows that can be among the k nearest once scored exactly. query: unit [D]."""
        # Not `@`: one core already reads rows as fast as memory gives them, and the threads that BLAS starts
        # wait for each other on a busy machine (5,000 x 384 with both of 2 cores taken: 16 ms, not 0.5).
        scores = np.einsum("nd,d->n", self.rows, query)  # [n]
        if k >= scores.size:
            return self.ids, self.rows
        kth = np.partition(scores, scores.size - k)[scores.size - k]
        # A float32 dot product of unit vectors is off by at most about D 2^-24, hence two of them by D 2^-23.
        close = np.flatnonzero(scores >= kth - self.dim * 2.0**-23)
        return self.ids[close], self.rows[close]


def rank(ids: Int64, rows: Float32, query: NDArray[np.float64], k: int) -> list[tuple[int, float]]:
    """The k best (chunk id, cosine), best first, equal scores by chunk id. rows: unit [n, D]; query: unit
    [D].
    """
    scores = np.clip((rows.astype(np.float64) * query).sum(axis=1), -1.0, 1.0)  # [n]
    order = np.lexsort((ids, -scores))[:k]
    return [(int(ids[i]), float(scores[i])) for i in order]
