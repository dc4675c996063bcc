"""Checks of the arguments of the loss."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import check_together


def check_arguments(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    """Raise ValueError: shapes, dtypes or devices do not fit."""
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {list(hidden.shape)} and weight {list(weight.shape)}, wanted [n, D] and [V, D]")
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype} and weight {weight.dtype}, wanted one dtype")
    if labels.shape != hidden.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"labels {labels.dtype} {list(labels.shape)}, wanted int64, one for each of {len(hidden)} rows"
        )
    check_together(hidden=hidden, weight=weight, labels=labels)


def check_labels(labels: Tensor, vocabulary: int) -> None:
    """Raise ValueError: a label is outside the vocabulary. This reads values, which a tracer does not have."""
    if labels.is_meta:
        raise ValueError("labels are on meta, where tensors have no values: load them first")
    least, most = (int(labels.min()), int(labels.max())) if labels.numel() else (0, 0)
    if least < 0 or most >= vocabulary:
        raise ValueError(
            f"labels go from {least} to {most}, wanted 0 to {vocabulary - 1}: leave out rows without a label"
        )
