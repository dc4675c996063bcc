"""Find the k nearest chunks: exactly in small stores, through HNSW in large ones, with the same scores.

    n <  exact_below     ExactIndex: all unit vectors in memory, one matrix-vector product.
    n >= exact_below     HnswIndex for what it was built from, minus what was deleted since,
                         plus an ExactIndex for the tail: chunks that were added since.

Both give *candidates*; `rank` scores them in float64 with the vectors of the database, so a hit has the same
score on both paths, and the paths can differ only in which hits HNSW missed. A reader that finds no usable
index searches exactly: slower, never wrong.

What is in memory is kept between searches and follows the database's change_seq.
"""

from __future__ import annotations

import logging
import sqlite3
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .exact import ExactIndex, rank, read_chosen, read_vectors
from .hnswlib_index import HnswConfig, HnswIndex, UnusableIndexError, load_index, remove_other_indexes

log = logging.getLogger(__name__)

# An index is built again when this share of it was deleted or added since: each deleted point costs search
# steps (and lost links cost recall), each added one costs a row of the exact scan.
_STALE = 0.2


class Searcher:
    """The state of one open store's searches. `connection` is always inside the caller's snapshot."""

    def __init__(self, folder: Path, *, dim: int, exact_below: int, config: HnswConfig) -> None:
        self._folder = folder
        self._dim = dim
        self._exact_below = exact_below
        self._config = config
        self._seen: int | None = None  # the change_seq that the state below belongs to
        self._exact = ExactIndex(dim)  # everything, or what is not in the index
        self._index: HnswIndex | None = None
        self._sha256 = ""  # of the file that `_index` was loaded from or saved to
        # An index lost touch with live points; building the same again would not help.
        self._unreachable = False

    def top_k(self, connection: sqlite3.Connection, query: NDArray[np.float64], k: int) -> list[tuple[int, float]]:
        """The k best (chunk id, cosine), best first, ties by id. query: unit float64 [D]."""
        self._follow(connection)
        query32 = query.astype(np.float32)
        if self._index is not None:
            try:
                nearest = self._index.candidates(query32, k)
            except UnusableIndexError as error:
                log.warning("%s: searching exactly from now on: %s", self._folder, error)
                self._unreachable = True
                self._use_exact()
                self._exact.refresh(connection)
                return self.top_k(connection, query, k)
            ids, rows = read_chosen(connection, nearest, dim=self._dim)
            tail_ids, tail_rows = self._exact.candidates(query32, k)
            return rank(np.concatenate([ids, tail_ids]), np.concatenate([rows, tail_rows]), query, k)
        return rank(*self._exact.candidates(query32, k), query, k)

    def wants_build(self, connection: sqlite3.Connection) -> bool:
        """Whether the store is large enough for an index and has none, or one that is too old."""
        self._follow(connection)
        chunks = _count(connection)
        if chunks < max(1, self._exact_below) or self._unreachable:
            return False
        return self._index is None or (self._index.dead + self._exact.ids.size > _STALE * self._index.ids.size)

    def build(self, connection: sqlite3.Connection) -> str:
        """Build and publish the index; its SHA-256, or "" if there is nothing to build or the disk is full.

        The caller is the store's only writer, and records the SHA-256 in the database.
        """
        count = _count(connection)
        if count == 0:
            return ""
        batches = read_vectors(connection, after=0, dim=self._dim)
        index = HnswIndex.build(batches, count=count, dim=self._dim, config=self._config)
        self._index, self._exact, self._sha256 = index, ExactIndex(self._dim, after=index.last_id), ""
        try:
            self._sha256 = index.save(self._folder)
        except UnusableIndexError as error:
            log.warning("%s: the index stays in memory only: %s", self._folder, error)
        return self._sha256

    def published(self) -> None:
        """The database names our file now: older ones can go."""
        remove_other_indexes(self._folder, keep=self._sha256)

    def _follow(self, connection: sqlite3.Connection) -> None:
        meta = dict(connection.execute("SELECT key, value FROM meta WHERE key IN ('change_seq', 'index_sha256')"))
        seq = int(meta["change_seq"])
        if seq == self._seen:
            return
        if _count(connection) < max(1, self._exact_below) or self._unreachable:
            self._use_exact()
        else:
            self._use_index(connection, meta["index_sha256"])
        self._exact.refresh(connection)
        self._seen = seq

    def _use_index(self, connection: sqlite3.Connection, sha256: str) -> None:
        if sha256 != self._sha256 or self._index is None:
            try:
                self._index = load_index(self._folder, trusted_sha256=sha256, dim=self._dim, config=self._config)
            except UnusableIndexError as error:
                level = logging.WARNING if sha256 else logging.INFO  # never built is no fault
                log.log(level, "%s: no usable HNSW index, doing without: %s", self._folder, error)
                self._use_exact()
                return
            self._sha256 = sha256
        if self._exact.after != self._index.last_id:
            self._exact = ExactIndex(self._dim, after=self._index.last_id)
        if self._index.live != _count(connection, up_to=self._index.last_id):
            rows = connection.execute("SELECT id FROM chunks WHERE id <= ?", (self._index.last_id,)).fetchall()
            self._index.keep_only(np.array([chunk_id for (chunk_id,) in rows], dtype=np.int64))

    def _use_exact(self) -> None:
        self._index = None
        if self._exact.after != 0:
            self._exact = ExactIndex(self._dim)


def _count(connection: sqlite3.Connection, *, up_to: int | None = None) -> int:
    """Chunks in the store, or those with id <= up_to."""
    condition, values = ("", ()) if up_to is None else (" WHERE id <= ?", (up_to,))
    (count,) = connection.execute(f"SELECT count(*) FROM chunks{condition}", values).fetchone()
    return int(count)
