"""The loss as a registered torch operation, for torch.compile: it reads the labels, which a tracer cannot."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch import choose_backend
from . import row_chunks, vocabulary_slices
from .checks import check_labels

NAMESPACE = __name__.split(".")[0]


def _loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, wants_hidden: bool, wants_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    check_labels(labels, weight.shape[0])
    on_gpu = choose_backend(hidden, None) == "triton"
    compute = row_chunks.loss_and_gradients if on_gpu else vocabulary_slices.loss_and_gradients
    hidden, weight, labels = hidden.detach(), weight.detach(), labels.contiguous()
    loss, dh, dw = compute(hidden, weight, labels, wants_hidden=wants_hidden, wants_weight=wants_weight)
    return loss, hidden.new_empty(0) if dh is None else dh, weight.new_empty(0) if dw is None else dw


# The loss [], dL/dhidden [n, D] and dL/dweight [V, D]; a gradient that is not wanted is empty.
loss_and_gradients = torch.library.custom_op(
    f"{NAMESPACE}::linear_cross_entropy",
    _loss,
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor labels, bool wants_hidden, bool wants_weight)"
    " -> (Tensor, Tensor, Tensor)",
)


@loss_and_gradients.register_fake
def _(hidden, weight, labels, wants_hidden, wants_weight):  # type: ignore[no-untyped-def]
    loss = hidden.new_empty((), dtype=torch.promote_types(hidden.dtype, torch.float32))
    dh = torch.empty_like(hidden) if wants_hidden else hidden.new_empty(0)
    return loss, dh, torch.empty_like(weight) if wants_weight else weight.new_empty(0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.wants_hidden, ctx.wants_weight = inputs[3:]
    ctx.save_for_backward(*output[1:])


def _gradient(ctx: Any, g: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    # The outputs dh and dw are not differentiable, so their incoming gradients are ignored.
    dh, dw = ctx.saved_tensors
    return (
        dh * g if ctx.wants_hidden else None,
        dw * g if ctx.wants_weight else None,
        *[None] * 3,
    )


loss_and_gradients.register_autograd(_gradient, setup_context=_save)
