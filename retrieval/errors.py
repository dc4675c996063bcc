"""Every error that this package raises on purpose, one class per kind of fault.

A message is one line: which file, what was found, what was wanted, what to do.
"""

from __future__ import annotations


class StoreError(ValueError):
    """Base of all errors of this package: catch this one to catch them all."""


class DocumentError(StoreError):
    """A file or a `Document` cannot be taken as text."""


class SplitError(StoreError):
    """Impossible chunk settings, or a token counter that answers nonsense."""


class EmbedderError(StoreError):
    """The embedder is missing, or returned vectors that no cosine is defined for."""


class EmbedderMismatchError(StoreError):
    """The store holds another embedder's vectors, or was made with other settings."""


class QueryError(StoreError):
    """A search that cannot be answered: empty query, k < 1, a threshold that is not a number."""


class StoreNotFoundError(StoreError):
    """There is no store in the folder."""


class CorruptStoreError(StoreError):
    """The database file is damaged, cut short, empty or not ours. It is never recreated over."""


class FormatVersionError(StoreError):
    """The database was written in a format this code does not know."""


class LockedError(StoreError):
    """Another process (named in the message) is writing to the store."""


class ReadOnlyError(StoreError):
    """A write was asked of a store that is open for reading."""
