"""A low-rank update with its gradient by hand; `lora.LoRALinear` is this beside its base layer.

    x̃  = m ⊙ x / (1 - p)              m is 0 or 1, drawn from a seed (dropout.py); without dropout x̃ = x
    h  = s x̃ Aᵀ                        [M,K]@[K,R]; M rows, the product of all leading dimensions; s = alpha / R
    y  = base + h Bᵀ                   [M,N] + [M,R]@[R,N]

    dbase = dy
    g  = s dy B                        [M,N]@[N,R]
    dx = m / (1 - p) ⊙ g A             [M,R]@[R,K]; the base layer adds its own dy W
    dA = gᵀ x̃                          [R,M]@[M,K]
    dB = dyᵀ h                         [N,M]@[M,R]

1 / (1 - p) is a number, so it joins s: the code has x̃ = m ⊙ x and s / (1 - p).

*Two thin products, never B A.* x Aᵀ and then Bᵀ cost M R (K + N) multiplications; computing B A would cost N R K and
then a second full layer.

*Saved for backward*: x in its own dtype, which dA needs (q, k and v share one x); A and B; and h, R/K of the size of x,
about a percent, which saves backward one reading of x. The dropout mask is not saved: it is drawn again from its seed.
base is neither saved nor written to.

*Precision.* The products run in one dtype, which x, A and B are converted to. A and B are often float32 over a 16-bit
base, because an optimizer's step is smaller than half a unit in the last place of a 16-bit weight. The sum is taken in
the wider of that dtype and base's (by Triton in float32), then rounded once to base's.

*Fused on a GPU*: only the sum with h Bᵀ. R is small, so h Bᵀ costs little arithmetic, but as an operation of its own it
writes [M, N], which the sum then reads: 4 M N numbers are moved instead of 2 M N. (torch.addmm copies base first, and
moves as many.) The other products have nothing to be fused with and run on the platform's GEMM.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..dispatch import FLOATS, check_together, choose_backend, is_traced, without_autocast
from .dropout import draw_mask, masked


def add_lora(
    base: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float,
    dropout: float = 0.0,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """The sum base + scaling * (dropout(x) Aᵀ) Bᵀ                             (arXiv:2106.09685, equation 3)

    base:    [..., N], the layer's own output.  x: [..., K], its input. Of any float dtype.
    lora_A:  [R, K].  lora_B: [N, R].  Of any float dtype.
    scaling: alpha / R.
    dropout: probability with which an element of x counts as 0; the others are divided by 1 - dropout.
    seed:    of the dropout mask: the same seed draws the same mask.
    dtype:   of the products; that of x if None.
    backend: "triton", "torch", or None for Triton on a GPU (unless torch records the operations) and torch elsewhere.
    Returns y [..., N] in the dtype of base.
    Raises ValueError: shapes or numbers do not fit, or a named backend cannot run.
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
    if not (isinstance(scaling, float | int) and math.isfinite(scaling)):
        raise ValueError(f"scaling={scaling!r}, wanted a finite number")
    if not (isinstance(dropout, float | int) and 0 <= dropout < 1):
        raise ValueError(f"dropout={dropout!r}, wanted a number from 0 to less than 1")
    check_together(base=base, x=x, lora_A=lora_A, lora_B=lora_B)
    products = x.dtype if dtype is None else dtype
    if products not in (*FLOATS, torch.float64):
        raise ValueError(f"dtype={products}, wanted float32, float16, bfloat16 or float64")

    def obstacle() -> str | None:
        return None if products in FLOATS else f"dtype={products}, and it takes float32, float16 or bfloat16"

    named = "torch" if backend is None and is_traced() else backend
    on_gpu = choose_backend(base, named, obstacle=obstacle) == "triton"
    y: Tensor = AddLoRAFunction.apply(  # type: ignore[no-untyped-call]
        base, x, lora_A, lora_B, scaling, dropout, seed, products, on_gpu
    )
    return y


class AddLoRAFunction(torch.autograd.Function):
    """y = base + s (x̃ Aᵀ) Bᵀ; see the module for the equations."""

    @staticmethod
    def forward(
        ctx: Any,
        base: Tensor,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        s: float,
        p: float,
        seed: int,
        dtype: torch.dtype,
        on_gpu: bool,
    ) -> Tensor:
        """base [..., N], x [..., K] -> y [..., N]; products run in `dtype`, p and seed make the mask."""
        mask, s = draw_mask(x, p, seed, s)
        ctx.s, ctx.p, ctx.seed = s, p, seed
        with without_autocast(x):
            z = F.linear(_rows(masked(x, mask), dtype), A.to(dtype))  # [M, R]
            if on_gpu:
                from .triton_kernels import add_product

                y = add_product(base, z, B, s)
                ctx.save_for_backward(x, A, B, z.mul_(s))
                return y
            h = z.mul_(s)
            ctx.save_for_backward(x, A, B, h)
            wide = torch.promote_types(base.dtype, dtype)
            y = _rows(base, wide, copy=True).addmm_(h.to(wide), B.to(wide).t())  # [M, N]
            return y.to(base.dtype).view(base.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """dy [..., N] -> (dbase, dx, dA, dB), each only if asked for."""
        x, A, B, h = ctx.saved_tensors
        wants_base, wants_x, wants_A, wants_B = ctx.needs_input_grad[:4]
        dtype = h.dtype
        mask, _ = draw_mask(x, ctx.p, ctx.seed, 1.0)
        d = _rows(dy, dtype)
        dx = dA = dB = None
        with without_autocast(x):
            if wants_x or wants_A:
                g = torch.mm(d, B.to(dtype)).mul_(ctx.s)  # [M, R]
            if wants_x:
                dx = masked(torch.mm(g, A.to(dtype)).to(x.dtype).view(x.shape), mask)  # [..., K]
            if wants_A:
                dA = torch.mm(g.t(), _rows(masked(x, mask), dtype)).to(A.dtype)  # [R, K]
            if wants_B:
                dB = torch.mm(d.t(), h).to(B.dtype)  # [N, R]
        return dy if wants_base else None, dx, dA, dB, None, None, None, None, None


def _rows(x: Tensor, dtype: torch.dtype, *, copy: bool = False) -> Tensor:
    """[..., K] -> [M, K] in `dtype`; a view where that is possible, unless a copy is asked for."""
    rows = x.reshape(-1, x.shape[-1])
    return rows.to(dtype, copy=True, memory_format=torch.contiguous_format) if copy else rows.to(dtype)
