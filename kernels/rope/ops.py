"""Rotary position embedding with its gradient by hand, in the half-split layout of Hugging Face's files:

    x = cat(x1, x2), c = cat(c1, c2), s = cat(s1, s2)          along d; ordinary tables have c1 = c2 and s1 = s2

    y1  = x1 c1 - x2 s1                                        [..., T, d/2]
    y2  = x2 c2 + x1 s2

    dx1 = dy1 c1 + dy2 s2                                      the transpose; for ordinary tables
    dx2 = dy2 c2 - dy1 s1                                      the rotation by the negative angle

Saved for backward: the tables, which all layers share; nothing of x. Autograd saves no more, but its backward fills two
tensors with zeros, copies the halves of dx into them and adds them: it reads or writes 15 tensors of the size of x.
The backward here reads or writes 5.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..dispatch import FLOATS, check_together, choose_backend, without_autocast


def rope(x: Tensor, cos: Tensor, sin: Tensor, *, backend: str | None = None) -> Tensor:
    """The rotation x * cos + cat(-x2, x1) * sin of x = cat(x1, x2)           (arXiv:2104.09864, section 3.4.2)

    x:        [..., T, d], d even: float32, float16, bfloat16, or (torch only) float64; any strides.
    cos, sin: [T, d], of any one of these dtypes; they get no gradient.
    backend:  "triton", "torch", or None for Triton on a GPU and torch elsewhere.
    Returns y [..., T, d] in the wider dtype of x and the tables.
    Raises ValueError: shapes or dtypes do not fit, or a named backend cannot run.
    """
    if cos.shape != x.shape[-2:] or sin.shape != cos.shape or cos.ndim != 2 or cos.shape[1] % 2:
        raise ValueError(
            f"x {list(x.shape)}, cos {list(cos.shape)} and sin {list(sin.shape)}, "
            "wanted [..., T, d], [T, d] and [T, d] with d even"
        )
    if cos.dtype != sin.dtype:
        raise ValueError(f"cos is {cos.dtype} and sin {sin.dtype}, wanted one dtype")
    check_together(x=x, cos=cos, sin=sin)
    on_gpu = choose_backend(x, backend, obstacle=lambda: _obstacle(cos)) == "triton"
    if not torch.is_grad_enabled():
        return _turn(x, cos, sin, on_gpu)
    y: Tensor = RopeFunction.apply(x, cos, sin, on_gpu)  # type: ignore[no-untyped-call]
    return y


class RopeFunction(torch.autograd.Function):
    """Rotates each pair (x1, x2); see the module for the equations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, on_gpu: bool) -> Tensor:
        """x [..., T, d], tables [T, d] -> y [..., T, d]."""
        ctx.save_for_backward(cos, sin)
        ctx.on_gpu, ctx.dtype = on_gpu, x.dtype
        return _turn(x, cos, sin, on_gpu)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """dy [..., T, d] -> dx [..., T, d]."""
        cos, sin = ctx.saved_tensors
        if ctx.on_gpu:
            from .triton_kernels import rotate

            return rotate(dy, cos, sin, dtype=ctx.dtype, inverse=True), None, None, None
        dx = dy * cos  # [..., T, d]
        (dx1, dx2), (dy1, dy2), (s1, s2) = dx.chunk(2, -1), dy.chunk(2, -1), sin.chunk(2, -1)
        dx1.addcmul_(dy2, s2)
        dx2.addcmul_(dy1, s1, value=-1)
        return dx.to(ctx.dtype), None, None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, on_gpu: bool) -> Tensor:
    if on_gpu:
        from .triton_kernels import rotate

        return rotate(x, cos, sin, dtype=torch.promote_types(x.dtype, cos.dtype), inverse=False)
    x1, x2 = x.chunk(2, -1)
    with without_autocast(x):  # under autocast to bfloat16 torch.cat refuses float16, and the reverse
        return (x * cos).add_(torch.cat((x2.neg(), x1), -1) * sin)  # rounded as in reference.py


def _obstacle(cos: Tensor) -> str | None:
    return None if cos.dtype in FLOATS else f"cos is {cos.dtype}, and it takes float32, float16 or bfloat16"
