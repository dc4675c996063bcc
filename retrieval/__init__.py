"""Documents in, cited passages out: reading, splitting, a durable vector store, nearest-neighbour search."""

from .documents.read import Document, ReadReport, read_document, read_documents
from .errors import (
    CorruptStoreError,
    DocumentError,
    EmbedderError,
    EmbedderMismatchError,
    FormatVersionError,
    LockedError,
    QueryError,
    ReadOnlyError,
    SplitError,
    StoreError,
    StoreNotFoundError,
)
from .index.hnswlib_index import HnswConfig
from .splitter import Chunk, count_words, split_text
from .sqlite.records import AddReport, Hit, Stats
from .store import Store

__all__ = [
    "AddReport",
    "Chunk",
    "CorruptStoreError",
    "Document",
    "DocumentError",
    "EmbedderError",
    "EmbedderMismatchError",
    "FormatVersionError",
    "Hit",
    "HnswConfig",
    "LockedError",
    "QueryError",
    "ReadOnlyError",
    "ReadReport",
    "SplitError",
    "Stats",
    "Store",
    "StoreError",
    "StoreNotFoundError",
    "count_words",
    "read_document",
    "read_documents",
    "split_text",
]
