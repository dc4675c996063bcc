"""The loss and the gradients of its inputs, computed together in the forward pass.

The loss is the last operation of a forward pass, so its incoming gradient is one number g: dh and dW are computed while
the logits exist, and the backward multiplies them by g. Saved for backward: dh [n, D], and dW [V, D] if the head is
trained. Of the logits [n, V] only a part exists at a time:

    vocabulary_slices.py    torch, on any device: one slice of the vocabulary at a time
    row_chunks.py           Triton, on a GPU: a few rows at a time

In both, the platform's GEMM rounds the logits of 16-bit inputs to 16 bits, and they are converted to float32 before
the softmax. A model in that dtype does the same at inference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..dispatch import choose_backend, is_traced, without_autocast
from . import row_chunks, torch_ops, vocabulary_slices
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
    """L = sum of cross-entropies; the equations are in vocabulary_slices.py and row_chunks.py."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, on_gpu: bool) -> Tensor:
        """hidden [n, D], weight [V, D], labels [n] -> L []."""
        wants_h, wants_w = ctx.needs_input_grad[:2]
        compute = row_chunks.loss_and_gradients if on_gpu else vocabulary_slices.loss_and_gradients
        with without_autocast(hidden):
            loss, dh, dw = compute(hidden, weight, labels, wants_hidden=wants_h, wants_weight=wants_w)
        ctx.save_for_backward(dh, dw)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """g [] -> (dh, dW), each only if asked for."""
        dh, dw = ctx.saved_tensors
        # g stays float32, since a loss scale of 65536 overflows float16; a 0-dim tensor does not change the dtype of dh
        return None if dh is None else dh * g, None if dw is None else dw * g, None, None
