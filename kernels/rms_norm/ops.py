"""RMSNorm with its gradient by hand:

    r  = 1 / sqrt(mean(x²) + eps)            one number per row, [..., 1], in float32
    n  = r x
    y  = w n                                 [..., D]

    dn = w dy
    dx = r (dn - n mean(dn n))               r depends on every x of the row: dr = -r³ x / D
    dw = sum over rows of dy n               only if the weight is trained

Saved for backward: x, in its own dtype, r, and the weight, which exists anyway. Autograd would save the float32 copy
of x from which the mean is computed: in bf16 twice the bytes.

Everything but y is float32. In y, n is first rounded to the dtype of x, as in Llama (reference.py). The backward
treats the rounding as the identity, as autograd does, and uses n before rounding.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..dispatch import FLOATS, check_together, choose_backend

MAX_COLUMNS = 8192  # the longest row that a Triton program holds in registers


def rms_norm(x: Tensor, weight: Tensor, *, eps: float, backend: str | None = None) -> Tensor:
    """Each row as weight * x / sqrt(mean(x^2) + eps)                          (arXiv:1910.07467, equation 4)

    x:       [..., D], float32, float16, bfloat16, or (torch only) float64.  weight: [D], of any of these.
    backend: "triton", "torch", or None for Triton on a GPU and torch elsewhere.
    Returns y [..., D] in the wider dtype of the two.
    Raises ValueError: the weight does not fit x, or a named backend cannot run.
    """
    if weight.ndim != 1 or x.shape[-1:] != weight.shape:
        raise ValueError(f"x {list(x.shape)} and weight {list(weight.shape)}, wanted [..., D] and [D]")
    if not (isinstance(eps, float | int) and 0 <= eps < math.inf):
        raise ValueError(f"eps={eps!r}, wanted a number from 0")
    check_together(x=x, weight=weight)
    on_gpu = choose_backend(x, backend, obstacle=lambda: _obstacle(x, weight)) == "triton"
    if not torch.is_grad_enabled():
        return _forward(x, weight, eps, on_gpu)[0]
    y: Tensor = RMSNormFunction.apply(x, weight, eps, on_gpu)  # type: ignore[no-untyped-call]
    return y


class RMSNormFunction(torch.autograd.Function):
    """y = w r x; see the module for the equations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, on_gpu: bool) -> Tensor:
        """x [..., D], weight [D] -> y [..., D]."""
        y, r = _forward(x, weight, eps, on_gpu)
        ctx.save_for_backward(x, weight, r)
        ctx.on_gpu = on_gpu
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """dy [..., D] -> (dx, dw), each only if asked for."""
        x, weight, r = ctx.saved_tensors
        wants_x, wants_w = ctx.needs_input_grad[:2]
        if ctx.on_gpu:
            from .triton_kernels import backward

            both = backward(dy, x, weight, r, wants_weight=wants_w)
            return both[0] if wants_x else None, both[1], None, None
        dx = dw = None
        n = x.to(r.dtype) * r
        if wants_w:
            dw = (dy.to(r.dtype) * n).sum_to_size(weight.shape).to(weight.dtype)  # [D]
        if wants_x:
            dn = dy.to(r.dtype) * weight
            dx = dn.sub_(n.mul_((dn * n).mean(-1, keepdim=True))).mul_(r).to(x.dtype)
        return dx, dw, None, None


def _forward(x: Tensor, weight: Tensor, eps: float, on_gpu: bool) -> tuple[Tensor, Tensor]:
    """y [..., D] and r [..., 1]."""
    if on_gpu:
        from .triton_kernels import forward

        return forward(x, weight, eps)
    wide = x.float() if x.dtype != torch.float64 else x
    r = (wide * wide).mean(-1, keepdim=True).add_(eps).rsqrt_()
    return weight * (wide * r).to(x.dtype), r


def _obstacle(x: Tensor, weight: Tensor) -> str | None:
    if x.shape[-1] > MAX_COLUMNS:
        return f"D={x.shape[-1]}, and it takes rows of up to {MAX_COLUMNS}"
    if weight.dtype not in FLOATS:
        return f"weight is {weight.dtype}, and it takes float32, float16 or bfloat16"
    return None
