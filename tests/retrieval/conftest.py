"""A deterministic embedder without a model: words hashed into 64 counters, shared words mean nearness."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qlorag.retrieval import Store

DIM = 64


class BagOfWords:
    """list[str] -> float32 [n, 64]; counts its calls and the texts it was given."""

    def __init__(self) -> None:
        self.calls = 0
        self.texts = 0

    def __call__(self, texts: list[str]) -> np.ndarray:
        self.calls += 1
        self.texts += len(texts)
        out = np.full((len(texts), DIM), 1e-3, np.float32)  # no text is the zero vector
        for row, text in zip(out, texts, strict=True):
            for word in text.lower().split():
                row[zlib.crc32(word.strip(".,?!").encode()) % DIM] += 1
        return out


@pytest.fixture
def embedder() -> BagOfWords:
    return BagOfWords()


@pytest.fixture
def open_store(tmp_path: Path, embedder: BagOfWords) -> Callable[..., Store]:
    """Open `tmp_path/store` with the fake embedder; any argument can be given."""

    def open_(path: Path | None = None, **options: Any) -> Store:
        options = {"embedder": embedder, "embedder_id": "bag-of-words"} | options
        return Store.open(path or tmp_path / "store", **options)

    return open_


@pytest.fixture(autouse=True)
def _log_level(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="qlorag.retrieval")
