"""From documents to what a transaction writes: split, group into batches, embed, check. No database here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from .documents.read import Document
from .errors import EmbedderError
from .index.exact import Float32, check_vectors
from .splitter import Chunk, TokenCounter, count_words
from .sqlite.records import encode_metadata

Embedder = Callable[[list[str]], Any]
"""Texts -> float32 [n, D], or anything that numpy sees as such."""

_BATCH = 256  # texts per call of the embedder: full batches for it, bounded memory for us


class Prepared(NamedTuple):
    """A document on its way into the store; `chunks` is None if it is stored already, unchanged."""

    document: Document
    metadata: str
    chunks: list[Chunk] | None


def counter_and_window(embedder: Embedder | None) -> tuple[TokenCounter | None, int | None]:
    """What the object behind an embedder says of itself: its token counter, and how many tokens it reads."""
    owner = getattr(embedder, "__self__", embedder)
    counter, window = getattr(owner, "count_tokens", None), getattr(owner, "window", None)
    return counter if callable(counter) else None, window if isinstance(window, int) else None


def check_window(chunk_size: int, window: int | None) -> None:
    """Raise EmbedderError if the embedder would read only the beginning of a chunk."""
    if window is not None and chunk_size > window:
        raise EmbedderError(
            f"chunk_size={chunk_size}: the embedder reads {window} tokens of a text, the rest would never be found: "
            f"give at most {window}"
        )


def name_of(counter: TokenCounter) -> str:
    """What a counter is called in a store: "words", or the class or function that it comes from."""
    if counter is count_words:
        return "words"
    owner = getattr(counter, "__self__", None)
    return type(owner).__name__ if owner is not None else getattr(counter, "__qualname__", type(counter).__name__)


def prepare(
    documents: Iterable[Document],
    *,
    is_stored: Callable[[Document], bool],
    split: Callable[[str], list[Chunk]],
) -> Iterator[list[Prepared]]:
    """Documents with their chunks, in order, grouped until a batch of texts is full.

    No group has a uri twice: whether the second is a change depends on the first being stored.
    """
    group: dict[str, Prepared] = {}
    texts = 0
    for document in documents:
        if document.uri in group or texts >= _BATCH or len(group) >= _BATCH:
            yield list(group.values())
            group, texts = {}, 0
        chunks = None if is_stored(document) else split(document.text)
        group[document.uri] = Prepared(document, encode_metadata(document), chunks)
        texts += len(chunks or ())
    if group:
        yield list(group.values())


def embed_group(embedder: Embedder, group: list[Prepared], *, dim: int | None) -> Float32:
    """The vectors of all chunks of a group, in order: [chunks, D], or [0, 0] if there are none.

    Raises EmbedderError, which names the documents: a wrong shape, NaN, inf, or a vector of zeros.
    """
    texts = [chunk.text for prepared in group for chunk in prepared.chunks or ()]
    uris = [prepared.document.uri for prepared in group if prepared.chunks]
    parts: list[Float32] = []
    for at in range(0, len(texts), _BATCH):
        part = texts[at : at + _BATCH]
        what = uris[0] if len(uris) == 1 else f"{uris[0]} ... {uris[-1]}"
        parts.append(check_vectors(embedder(part), count=len(part), dim=dim, what=what))
        dim = parts[-1].shape[1]
    return np.concatenate(parts) if parts else np.empty((0, 0), np.float32)
