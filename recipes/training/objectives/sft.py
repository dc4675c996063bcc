"""Supervised fine-tuning: the cross-entropy of every labelled token, given the tokens before it.

    hidden = decoder(ids)                                         [T, D]
    loss   = sum over labels of -log softmax(hidden[row] headᵀ)[label]

The product with the head and the loss are fused (kernels/cross_entropy), so no logits [T, V] exist.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ....kernels.cross_entropy import linear_cross_entropy
from ....models import Decoder
from ...data.examples import Example
from .packing import Batch, pack


@dataclass(frozen=True)
class SFT:
    """The objective of `qlorag train`: examples with a label mask, all labels weighed alike."""

    def pack(self, examples: Sequence[Example]) -> Batch:
        """The examples laid end to end."""
        return pack(examples)

    def summed_loss(self, model: Decoder, batch: Batch) -> Tensor:
        """Cross-entropy summed over a batch's labels, in nats."""
        hidden = model.hidden(batch.ids, lengths=batch.lengths)[0]  # [T, D]
        return linear_cross_entropy(hidden[batch.rows], model.lm_head.weight, batch.labels)

    def describe(self, example: Example) -> list[Any]:
        """Its ids and its label mask."""
        return [example.ids, example.mask]

    def summary(self, examples: Sequence[Example]) -> str:
        """Their tokens and labels."""
        return f"{sum(len(e.ids) for e in examples)} tokens of which {sum(e.labels for e in examples)} labelled"

    def settings(self) -> dict[str, Any]:
        """It has none."""
        return {}
