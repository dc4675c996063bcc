"""Training files to examples: JSON Lines, row shapes, token ids with labels."""

from __future__ import annotations

from .examples import Example, batch_indices, tokenize_rows
from .rows import Row, read_rows

__all__ = ["Example", "Row", "batch_indices", "read_rows", "tokenize_rows"]
