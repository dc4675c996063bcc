"""Examples laid end to end: one batch [1, T] without padding between them, and where its labels are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...data.examples import Example

# T is rounded up to a multiple of this. Every new T makes the platform's GEMM library build and keep new kernels: 24
# steps of some 180 tokens grew a process by 180 MB, and by 25 MB when rounded. Matrix units work on 16 rows anyway.
TOKEN_MULTIPLE = 16


@dataclass(frozen=True)
class Batch:
    """Examples laid end to end.

    ids:     int64 [1, T]; each example without its last token, which predicts nothing; then the padding.
    lengths: tokens of each example, then of the padding if there is any; their sum is T.
    tokens:  T without the padding, which is a sequence of its own, attended to by no token and without a label.
    rows:    int64 [n], the positions whose next token is labelled.  labels: int64 [n], those next tokens.
    """

    ids: Tensor
    lengths: list[int]
    tokens: int
    rows: Tensor
    labels: Tensor

    @property
    def terms(self) -> int:
        """How many terms a loss summed over the labels has."""
        return len(self.labels)


def pack(examples: Sequence[Example]) -> Batch:
    """One packed batch. An example whose mask marks only its first token contributes no label."""
    ids: list[int] = []
    rows: list[int] = []
    labels: list[int] = []
    lengths: list[int] = []
    for example in examples:
        start, n = len(ids), len(example.ids) - 1
        if n < 1:
            continue
        ids += example.ids[:-1]
        lengths.append(n)
        labelled = [t for t in range(n) if example.mask[t + 1]]
        rows += [start + t for t in labelled]
        labels += [example.ids[t + 1] for t in labelled]
    tokens = len(ids)
    if padding := -tokens % TOKEN_MULTIPLE:
        ids += [0] * padding
        lengths.append(padding)
    return Batch(torch.tensor([ids], dtype=torch.int64), lengths, tokens, torch.tensor(rows, dtype=torch.int64),
                 torch.tensor(labels, dtype=torch.int64))  # fmt: skip
