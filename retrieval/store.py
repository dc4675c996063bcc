"""A durable store of documents, their chunks and their vectors, searched by meaning.

The folder of a store:

    store.sqlite3                    the only truth (sqlite/schema.sql); -wal and -shm are beside it while it is open
    store.lock                       the process that may write
    index-*.hnsw, manifest.json      a cache (index/), built again when it is missing or not trusted

A document is stored whole or not at all. Chunking and embedding come first, outside of any transaction; then
one transaction writes the document's text, chunks and vectors, in place of what was stored under the same
uri, and `add` counts it as done only after COMMIT has returned with the data on the disk.

An embedder is a callable, list[str] -> float32 [n, D], and `embedder_id` names it: vectors of two embedders
cannot be compared, even if their dimensions agree, so a store refuses every other one. An embedder that is a method
of an object with `count_tokens` and `window` (models.Encoder has both) brings its own counter and the longest chunk
that it reads whole: of a longer one it would see only the beginning, so there is none.

A Store belongs to the thread that opened it. One process writes at a time; any number may read meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import numpy as np

from .documents.read import Document
from .errors import (
    EmbedderError,
    EmbedderMismatchError,
    QueryError,
    ReadOnlyError,
    StoreError,
    StoreNotFoundError,
)
from .index.exact import Float32, check_vectors
from .index.hnswlib_index import MANIFEST, HnswConfig
from .index.search import Searcher
from .ingest import (
    Embedder,
    Prepared,
    check_window,
    counter_and_window,
    embed_group,
    name_of,
    prepare,
)
from .splitter import Chunk, TokenCounter, count_words, split_text
from .sqlite import records
from .sqlite.database import (
    check_nothing_lost,
    create_database,
    exists,
    record_change,
)
from .sqlite.locking import WriterLock
from .sqlite.open_file import OpenFile
from .sqlite.records import AddReport, Hit, Stats
from .sqlite.upgrade import upgrade

Progress = Callable[[int, "int | None"], None]
"""(documents done, of how many, if known). When it is called, the first `done` documents are on the disk."""

DATABASE = "store.sqlite3"
CHUNK_SIZE, CHUNK_OVERLAP = 256, 20  # of a new store
UNKNOWN = "unknown"  # the counter of a store that was made before counters were named
EXACT_BELOW = 20_000  # chunks; an exact search of so many takes milliseconds


class Store:
    """Made by `Store.open`. Use it in a `with` statement, or call `close`."""

    def __init__(
        self,
        folder: Path,
        *,
        lock: WriterLock | None,
        embedder: Embedder | None,
        count_tokens: TokenCounter,
        exact_below: int,
        hnsw: HnswConfig,
        dim: int | None,
    ) -> None:
        self._folder = folder
        self._file = folder / DATABASE
        self._lock = lock
        self._embedder = embedder
        self._count_tokens = count_tokens
        self._exact_below = exact_below
        self._hnsw = hnsw
        self._dim = dim  # as the caller says; what is stored counts more
        self._searcher: Searcher | None = None
        self._closed = False
        self._open_file = OpenFile(self._file, read_only=lock is None)

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        embedder: Embedder | None = None,
        embedder_id: str | None = None,
        dim: int | None = None,
        chunk_size: int | None = None,
        chunk_overlap: int | None = None,
        count_tokens: TokenCounter | None = None,
        read_only: bool = False,
        exact_below: int = EXACT_BELOW,
        hnsw: HnswConfig | None = None,
    ) -> Store:
        """Open the store in a folder; unless `read_only`, make it if there is none and be its one writer.

        embedder:      list[str] -> float32 [n, D]; without it, only `add` and `search` are refused.
        embedder_id:   a fingerprint of the embedder (weights, tokenizer, pooling); needed to make a store.
        dim:           D, if known: a store of another dimension is refused now, not at the first vector.
        chunk_size:    in tokens, fixed when the store is made; by default what the embedder reads at once, or 256.
        chunk_overlap: in tokens, fixed when the store is made (20, or less if chunk_size is not above it).
        count_tokens:  by default the embedder's own counter; where it has none, words are counted. Its name is kept in
                       the store, which refuses another one.
        exact_below:   number of chunks from which searches go through HNSW.
        Raises StoreNotFoundError, LockedError, ReadOnlyError, CorruptStoreError, FormatVersionError.
        Raises EmbedderMismatchError: the store holds another embedder's vectors, or chunks of another size or counter.
        Raises EmbedderError: chunks of that size are longer than what the embedder reads.
        """
        if embedder is not None and not embedder_id:
            raise EmbedderError("embedder_id is missing: give a fingerprint that changes when the embedder does")
        folder = Path(path)
        file = folder / DATABASE
        own_counter, window = counter_and_window(embedder)
        counter = count_tokens or own_counter or count_words
        lock = None if read_only else WriterLock(folder)
        try:
            if not exists(file):
                check_nothing_lost(file, MANIFEST)
                if read_only:
                    raise StoreNotFoundError(f"{file}: no store here: index some documents into it first")
                if not embedder_id:
                    raise EmbedderError(f"{folder}: a new store needs an embedder_id: name the embedder it is for")
                size = (window or CHUNK_SIZE) if chunk_size is None else chunk_size
                check_window(size, window)
                overlap = min(CHUNK_OVERLAP, size - 1) if chunk_overlap is None else chunk_overlap
                split_text("", size=size, overlap=overlap)  # refuses impossible settings
                create_database(
                    file, embedder_id=embedder_id, chunk_size=size, chunk_overlap=overlap, counter=name_of(counter)
                )
            elif lock is not None:
                upgrade(file)
            store = cls(
                folder,
                lock=lock,
                embedder=embedder,
                count_tokens=counter,
                exact_below=exact_below,
                hnsw=hnsw or HnswConfig(),
                dim=dim,
            )
        except BaseException:  # ctrl-C too: the lock must not stay held
            if lock is not None:
                lock.release()
            raise
        try:
            store._check_settings(embedder_id=embedder_id, dim=dim, chunk_size=chunk_size, chunk_overlap=chunk_overlap)
            if embedder is not None and lock is not None:
                store._check_settings(counter=name_of(counter))
                check_window(int(store._open_file.meta["chunk_size"]), window)
        except BaseException:  # ctrl-C too: the lock must not stay held
            store.close()
            raise
        return store

    def close(self) -> None:
        """Close the files and let the next writer in. A second call does nothing."""
        if not self._closed:
            self._closed = True
            self._open_file.close()
            if self._lock is not None:
                self._lock.release()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def add(self, documents: Iterable[Document], *, progress: Progress | None = None) -> AddReport:
        """Store the documents in order, each whole or not at all, and durable when `progress` counts it.

        A document whose uri and sha256 are stored already is not embedded again; one whose sha256 changed
        replaces the stored one. An error leaves stored what `progress` has counted.

        Raises EmbedderError: no embedder, or vectors with NaN, inf, only zeros or a wrong shape (nothing of
        that batch is stored). ReadOnlyError. DocumentError: metadata that JSON cannot hold. What the embedder
        raises.
        """
        self._check_writable()
        total = len(documents) if isinstance(documents, Sized) else None
        counts = {"added": 0, "replaced": 0, "unchanged": 0}
        chunks = done = 0
        for group in prepare(documents, is_stored=self._is_stored, split=self._split):
            vectors = self._embed(group)  # [chunks of the group, D]
            at = 0
            for prepared in group:
                rows = vectors[at : at + len(prepared.chunks or ())]
                at += len(rows)
                counts[self._commit(prepared, rows)] += 1
                done += 1
                if progress is not None:
                    progress(done, total)
            chunks += at
        return AddReport(**counts, chunks=chunks)

    def delete(self, uri: str) -> bool:
        """Remove a document with its chunks and vectors; False if there is none of that name."""
        self._check_writable()
        with self._open_file.writing():
            deleted = records.delete_document(self._open_file.db, uri)
            if deleted:
                record_change(self._open_file.db)
        return deleted

    def search(self, query: str, *, k: int = 5, score_threshold: float | None = None) -> list[Hit]:
        """The k chunks nearest to the query, or all there are; best first, equal scores by chunk id.

        score_threshold: leave out hits whose cosine is below it. An empty list means: nothing found.
        Raises QueryError: an empty query, k < 1, a threshold that is no number. EmbedderError: as in `add`.
        """
        if not query.strip():
            raise QueryError("empty query: ask something")
        _check_limits(k, score_threshold)
        with self._reading():
            dim = records.read_dim(self._open_file.db)
        if dim is None:  # nothing was ever stored
            return []
        answer = self._require_embedder()([query])
        vector = check_vectors(answer, count=1, dim=dim, what="query")[0]
        return self.search_vector(vector, k=k, score_threshold=score_threshold)

    def search_vector(
        self, vector: Float32 | list[float], *, k: int = 5, score_threshold: float | None = None
    ) -> list[Hit]:
        """As `search`, for a query that is a vector already: [D], of any length but zero."""
        _check_limits(k, score_threshold)
        with self._reading():
            dim = records.read_dim(self._open_file.db)
            if dim is None:
                return []
            query = check_vectors([vector], count=1, dim=dim, what="query")[0].astype(np.float64)
            searcher = self._searcher_for(dim)
            build = self._lock is not None and searcher.wants_build(self._open_file.db)
        if build:
            self.build_index()
        with self._reading():
            found = searcher.top_k(self._open_file.db, query / np.linalg.norm(query), k)
            if score_threshold is not None:
                found = [(chunk_id, score) for chunk_id, score in found if score >= score_threshold]
            return records.load_hits(self._open_file.db, found)

    def build_index(self) -> None:
        """Build and publish the HNSW index now, not in the first search that needs it. Uses all cores."""
        self._check_writable()
        with self._reading():
            dim = records.read_dim(self._open_file.db)
            if dim is None:
                return
            sha256 = self._searcher_for(dim).build(self._open_file.db)
        with self._open_file.writing():
            record_change(self._open_file.db, index_sha256=sha256)
        self._searcher_for(dim).published()

    def __len__(self) -> int:
        """The number of documents."""
        return self.stats().documents

    def uris(self) -> list[str]:
        """The documents' names, sorted."""
        with self._reading():
            return records.read_uris(self._open_file.db)

    def get(self, uri: str) -> Document | None:
        """A stored document, or None."""
        with self._reading():
            return records.load_document(self._open_file.db, uri)

    def stats(self) -> Stats:
        """What the store holds and how it was made."""
        with self._reading():
            files = (entry for entry in self._folder.iterdir() if entry.is_file())
            return records.read_stats(self._open_file.db, sum(entry.stat().st_size for entry in files))

    def _is_stored(self, document: Document) -> bool:
        with self._reading():
            return records.read_sha256(self._open_file.db, document.uri) == document.sha256

    def _split(self, text: str) -> list[Chunk]:
        size, overlap = int(self._open_file.meta["chunk_size"]), int(self._open_file.meta["chunk_overlap"])
        return split_text(text, size=size, overlap=overlap, count_tokens=self._count_tokens)

    def _embed(self, group: list[Prepared]) -> Float32:
        with self._reading():
            dim = records.read_dim(self._open_file.db)
        return embed_group(self._require_embedder(), group, dim=dim or self._dim)

    def _commit(self, prepared: Prepared, vectors: Float32) -> str:
        """One transaction: the document as it is now, or nothing of it. Returns the key to count it under."""
        document, metadata, chunks = prepared
        with self._open_file.writing():
            if chunks is None:
                if records.write_metadata(self._open_file.db, document.uri, metadata):
                    record_change(self._open_file.db)
                return "unchanged"
            replaced = records.write_document(self._open_file.db, document, metadata, chunks, vectors)
            record_change(self._open_file.db, **({"dim": str(vectors.shape[1])} if chunks else {}))
        return "replaced" if replaced else "added"

    def _require_embedder(self) -> Embedder:
        if self._embedder is None:
            raise EmbedderError(f"{self._folder}: opened without an embedder: pass embedder= and embedder_id=")
        return self._embedder

    def _searcher_for(self, dim: int) -> Searcher:
        if self._searcher is None:
            self._searcher = Searcher(self._folder, dim=dim, exact_below=self._exact_below, config=self._hnsw)
        return self._searcher

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """A consistent snapshot for the statements inside."""
        if self._closed:
            raise StoreError(f"{self._folder}: the store is closed: open it again")
        wanted = self._open_file.meta["embedder_id"]
        if self._open_file.follow():  # a reader's file was replaced
            self._searcher = None
            self._check_settings(embedder_id=wanted)
        with self._open_file.reading():
            yield

    def _check_writable(self) -> None:
        if self._closed:
            raise StoreError(f"{self._folder}: the store is closed: open it again")
        if self._lock is None:
            raise ReadOnlyError(f"{self._folder}: the store is open for reading: open it without read_only=True")

    def _check_settings(self, **wanted: object) -> None:
        """Refuse an embedder or chunk settings other than those of the stored vectors; None asks for
        nothing.
        """
        for name, value in wanted.items():
            stored = self._open_file.meta[name]
            if value is not None and stored and str(value) != stored and stored != UNKNOWN:
                raise EmbedderMismatchError(
                    f"{self._file}: {name}={stored} in the store, {value} given: "
                    f"open it with {stored}, or index the documents into another folder"
                )


def _check_limits(k: int, score_threshold: float | None) -> None:
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise QueryError(f"k={k!r}: ask for at least one hit")
    if score_threshold is not None and not math.isfinite(score_threshold):
        raise QueryError(f"score_threshold={score_threshold}: give a cosine in -1...1, or None")
