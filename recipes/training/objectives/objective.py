"""The interface of an objective. `sft.py` is the shortest example of one; a new objective is a file beside it.

The trainer takes the mean of the loss over a whole step, so an objective gives sums:

    loss of a step = sum over micro-batches of summed_loss(model, batch) / sum over micro-batches of batch.terms
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from ....models import Decoder


class PackedBatch(Protocol):
    """One micro-batch, ready for the model.

    tokens: run through the model, without padding.
    terms:  of the summed loss: labels for SFT, pairs for a preference objective, texts for a classifier.
    """

    @property
    def tokens(self) -> int: ...
    @property
    def terms(self) -> int: ...


class Objective(Protocol):
    """What a step minimises. What an example is, the objective alone knows, but each has a `line` for messages."""

    def pack(self, examples: Sequence[Any]) -> PackedBatch:
        """One micro-batch of the examples."""
        ...

    def summed_loss(self, model: Decoder, batch: Any) -> Tensor:
        """The loss summed over the terms of a batch that `pack` made; a scalar that can be differentiated."""
        ...

    def describe(self, example: Any) -> Any:
        """As JSON, what of an example decides its loss: a resumed run must see the same."""
        ...

    def summary(self, examples: Sequence[Any]) -> str:
        """How much the examples are, in words: "324 tokens of which 65 labelled"."""
        ...

    def settings(self) -> dict[str, Any]:
        """As JSON, the objective's own settings, which a resumed run must have, too. Keys are recorded as they are."""
        ...
