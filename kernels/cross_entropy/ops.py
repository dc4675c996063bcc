"""The loss with the gradients of its inputs, taken together in the forward pass.

The loss is the last thing a step computes, so its incoming gradient is one number g: dh and dW are computed while the
logits are at hand, and the backward multiplies them by g. Saved for backward: dh [n, D], and dW [V, D] if the head is
trained. Of the logits [n, V] only a part exists at a time:

    slices.py    torch, on any device: a slice of the vocabulary
    rows.py      Triton, on a GPU: a few rows

In either, for 16-bit inputs logits are rounded to 16 bits by the platform's GEMM and widened to float32 before the
softmax; that is what a model in that dtype computes at inference too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..dispatch import choose_backend, is_traced, without_autocast
from . import rows, slices, torch_ops
from .checks import check_arguments, check_labels


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, *, backend: str | None = None) -> Tensor:
    """Summed cross-entropy of `hidden` through the output head, without the logits of all rows at once.

    hidden: [n, D], only the rows that have a label.  weight: [V, D], the head.  labels: int64 [n], each in 0 ... V-1.
    backend: "triton", "torch", or None for Triton on a GPU and torch elsewhere.
    Returns a scalar, float32 (float64 for float64 inputs). n = 0 gives 0.
    Raises ValueError: shapes or dtypes do not fit, a label is outside the vocabulary, or a named backend cannot run.
    """
    check_arguments(hidden, weight, labels)
    if backend is None and is_traced():
        wants_h, wants_w = (torch.is_grad_enabled() and t.requires_grad for t in (hidden, weight))
        loss: Tensor = torch_ops.loss_and_gradients(hidden, weight, labels, wants_h, wants_w)[0]
        return loss
    check_labels(labels, weight.shape[0])
    on_gpu = choose_backend(hidden, backend) == "triton"
    out: Tensor = LinearCrossEntropy.apply(hidden, weight, labels.contiguous(), on_gpu)  # type: ignore[no-untyped-call]
    return out


class LinearCrossEntropy(torch.autograd.Function):
    """L = sum of cross-entropies; the equations are in slices.py and rows.py."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, on_gpu: bool) -> Tensor:
        """hidden [n, D], weight [V, D], labels [n] -> L []."""
        wants_h, wants_w = ctx.needs_input_grad[:2]
        compute = rows.loss_and_gradients if on_gpu else slices.loss_and_gradients
        with without_autocast(hidden):
            loss, dh, dw = compute(hidden, weight, labels, wants_hidden=wants_h, wants_weight=wants_w)
        ctx.save_for_backward(dh, dw)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """g [] -> (dh, dW), each only if asked for."""
        dh, dw = ctx.saved_tensors
        # g stays float32, as float16 does not hold a loss scale of 65536; a number alone does not widen the product
        return None if dh is None else dh * g, None if dw is None else dw * g, None, None
