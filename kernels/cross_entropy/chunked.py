"""The same loss without the logits: a few rows at a time, the gradient taken while they are at hand.

    z   = h Wᵀ                               one chunk of rows, [c, V]
    L   = sum_i logsumexp(z_i) - z_i[label_i]
    dz  = softmax(z) - onehot(label)
    dh  = dz W                               [c, V] @ [V, D]
    dW  = dzᵀ h                              only if the head is trained

The loss is the last thing a step computes, so its incoming gradient is one number g: dh and dW are computed in the
forward pass, where z exists, and multiplied by g in the backward. No [n, V] tensor is ever kept, and z is never
computed twice (the idea of Liger-Kernel's fused linear cross-entropy, arXiv:2410.10989, section 3).

Memory: 2 chunks of logits, at most CHUNK_BYTES each, and dh [n, D]. With SmolLM2's vocabulary of 49,152, a batch of
1,024 labelled tokens would otherwise hold 200 MB of float32 logits, and as much again for their gradient.

On a GPU a Triton kernel takes a chunk's loss and writes dz in place of z (triton_kernels.py).

For 16-bit inputs z is rounded to 16 bits by the platform's GEMM and widened to float32 before the softmax; that is
what a model in that dtype computes at inference too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch import check_together, choose_backend

CHUNK_BYTES = 16 * 2**20  # of float32 logits; below glibc's 32 MiB mmap threshold, so chunks reuse warm pages


class LinearCrossEntropy(torch.autograd.Function):
    """L = sum of cross-entropies; see the module for the equations."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, on_gpu: bool) -> Tensor:
        wants_h, wants_w = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        dh = torch.empty_like(hidden) if wants_h else None
        dw = torch.zeros_like(weight, dtype=wide) if wants_w else None
        rows = max(1, CHUNK_BYTES // (4 * weight.shape[0]))
        for begin in range(0, hidden.shape[0], rows):
            h, y = hidden[begin : begin + rows], labels[begin : begin + rows]  # [c, D], [c]
            losses, dz = _loss_and_gradient(h @ weight.T, y, wide, on_gpu, gradient=wants_h or wants_w)  # [c], [c, V]
            loss += losses.sum()
            if dh is not None:
                dh[begin : begin + rows] = dz.to(weight.dtype) @ weight
            if dw is not None:
                dw += dz.to(wide).T @ h.to(wide)
        ctx.save_for_backward(dh, None if dw is None else dw.to(weight.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (g,) = grads
        dh, dw = ctx.saved_tensors
        return (
            None if dh is None else dh * g.to(dh.dtype),
            None if dw is None else dw * g.to(dw.dtype),
            None,
            None,
        )


def _loss_and_gradient(
    z: Tensor, labels: Tensor, wide: torch.dtype, on_gpu: bool, *, gradient: bool
) -> tuple[Tensor, Tensor]:
    """Losses [c] of the logits z [c, V], and with `gradient` dL/dz in the memory of z or of its wide copy."""
    if on_gpu:
        from .triton_kernels import loss_and_gradient

        return loss_and_gradient(z, labels, gradient=gradient), z
    z = z.to(wide)
    lse = z.logsumexp(-1)
    losses = lse - z.gather(1, labels[:, None])[:, 0]
    if gradient:
        z.sub_(lse[:, None]).exp_()  # softmax
        z[torch.arange(len(labels), device=labels.device), labels] -= 1
    return losses, z


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, *, backend: str | None = None) -> Tensor:
    """Summed cross-entropy of `hidden` through the output head, without the logits of all rows at once.

    hidden: [n, D], only the rows that have a label.  weight: [V, D], the head.  labels: int64 [n], each in 0 ... V-1.
    backend: "triton", "torch", or None for Triton on a GPU and torch elsewhere.
    Returns a scalar, float32 (float64 for float64 inputs). n = 0 gives 0.
    Raises ValueError: shapes do not fit, a label is outside the vocabulary, or a named backend cannot run.
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {list(hidden.shape)} and weight {list(weight.shape)}, wanted [n, D] and [V, D]")
    if labels.shape != hidden.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"labels {labels.dtype} {list(labels.shape)}, wanted int64, one for each of {len(hidden)} rows"
        )
    check_together(hidden=hidden, weight=weight, labels=labels)
    least, most = (int(labels.min()), int(labels.max())) if labels.numel() else (0, 0)
    if least < 0 or most >= weight.shape[0]:
        raise ValueError(
            f"labels go from {least} to {most}, wanted 0 to {weight.shape[0] - 1}: leave out rows without a label"
        )
    on_gpu = choose_backend(hidden, backend) == "triton"
    out: Tensor = LinearCrossEntropy.apply(hidden, weight, labels.contiguous(), on_gpu)  # type: ignore[no-untyped-call]
    return out
