"""A low-rank update with its gradient by hand, the last product and the sum in one pass:

    z  = x Aᵀ                                [M,K]@[K,R]; M rows, the product of all leading dimensions
    y  = base + s z Bᵀ                       [M,N] + [M,R]@[R,N]

    dbase = dy
    g  = s dy B                              [M,N]@[N,R]
    dx = g A                                 [M,R]@[R,K]; the base layer adds its own dy W
    dA = gᵀ x                                [R,M]@[M,K]
    dB = s dyᵀ z                             [N,M]@[M,R]

Saved for backward: x, z (R/K of x, a percent or so), A and B. base is not, and not written to.

The products run in the dtype of x, which A and B are converted to: they are often float32 over a 16-bit base, because
an optimizer's step is smaller than half a unit in the last place of a 16-bit weight. z is rounded to that dtype; y is
summed in float32 and rounded once.

Only the last line of the forward has a Triton kernel. R is small, so z Bᵀ costs little arithmetic, but as an operation
of its own it writes [M, N], which the sum then reads: 4 M N numbers are moved instead of 2 M N. (torch.addmm copies
base first, and moves as many.) z, g, dx, dA and dB are products with nothing to add, left to the platform's GEMM.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..dispatch import check_together, choose_backend, without_autocast


def add_lora(
    base: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, *, scaling: float, backend: str | None = None
) -> Tensor:
    """The sum base + scaling * (x Aᵀ) Bᵀ                                      (arXiv:2106.09685, equation 3)

    base:    [..., N], the layer's own output.  x: [..., K], its input, dropout applied if there is any; both of
             one dtype: float32, float16, bfloat16, or (torch only) float64.
    lora_A:  [R, K].  lora_B: [N, R].  Of any float dtype.
    scaling: alpha / R.
    backend: "triton", "torch", or None for Triton on a GPU and torch elsewhere.
    Returns y [..., N] in the dtype of base.
    Raises ValueError: shapes or dtypes do not fit, or a named backend cannot run.
    """
    shapes = (lora_B.shape[:1], x.shape[-1:], lora_A.shape[:1])
    if (
        (lora_A.ndim, lora_B.ndim) != (2, 2)
        or (base.shape[-1:], lora_A.shape[1:], lora_B.shape[1:]) != shapes
        or base.shape[:-1] != x.shape[:-1]
    ):
        raise ValueError(
            f"base {list(base.shape)}, x {list(x.shape)}, lora_A {list(lora_A.shape)}, lora_B {list(lora_B.shape)}, "
            "wanted [..., N], [..., K], [R, K], [N, R]"
        )
    if base.dtype != x.dtype:
        raise ValueError(f"base is {base.dtype} and x {x.dtype}, wanted one dtype: convert x")
    if not (isinstance(scaling, float | int) and math.isfinite(scaling)):
        raise ValueError(f"scaling={scaling!r}, wanted a finite number")
    check_together(base=base, x=x, lora_A=lora_A, lora_B=lora_B)
    on_gpu = choose_backend(base, backend) == "triton"
    y: Tensor = AddLoRAFunction.apply(base, x, lora_A, lora_B, scaling, on_gpu)  # type: ignore[no-untyped-call]
    return y


class AddLoRAFunction(torch.autograd.Function):
    """y = base + s (x Aᵀ) Bᵀ; see the module for the equations."""

    @staticmethod
    def forward(
        ctx: Any, base: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, on_gpu: bool
    ) -> Tensor:
        """base [..., N], x [..., K] -> y [..., N]."""
        ctx.scaling = scaling
        with without_autocast(x):
            z = F.linear(_rows(x), lora_A.to(x.dtype))  # [M, R]
            ctx.save_for_backward(x, z, lora_A, lora_B)
            if on_gpu:
                from .triton_kernels import add_product

                return add_product(base, z, lora_B, scaling)
            y = torch.addmm(_rows(base), z, lora_B.to(x.dtype).T, alpha=scaling)  # [M, N]
            return y.view(base.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """dy [..., N] -> (dbase, dx, dA, dB), each only if asked for."""
        x, z, lora_A, lora_B = ctx.saved_tensors
        wants_base, wants_x, wants_A, wants_B = ctx.needs_input_grad[:4]
        d = _rows(dy)
        dx = dA = dB = None
        with without_autocast(x):
            if wants_x or wants_A:
                g = torch.mm(d, lora_B.to(d.dtype)).mul_(ctx.scaling)  # [M, R]
            if wants_x:
                dx = torch.mm(g, lora_A.to(d.dtype)).view(x.shape)  # [..., K]
            if wants_A:
                dA = torch.mm(g.T, _rows(x)).to(lora_A.dtype)  # [R, K]
            if wants_B:
                dB = torch.mm(d.T, z).mul_(ctx.scaling).to(lora_B.dtype)  # [N, R]
        return dy if wants_base else None, dx, dA, dB, None, None


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
