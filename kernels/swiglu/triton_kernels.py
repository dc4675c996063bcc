"""SwiGLU on a GPU, element by element (see ops.py for the equations).

The forward reads g and u and writes h; torch's two operations write silu(g) and read it again. The backward reads dh,
g and u and writes dg and du; σ is computed once for both. All arithmetic is float32, rounded once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import launching_on

TILE = 2048  # elements of one program: 16 to each of 128 threads, in two 16-byte loads


@triton.jit
def forward_kernel(
    gate,  # [numel]
    up,  # [numel]
    h,  # [numel]
    numel,
    TILE: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    g = tl.load(gate + i, mask=i < numel, other=0).to(tl.float32)
    u = tl.load(up + i, mask=i < numel, other=0).to(tl.float32)
    tl.store(h + i, (g * tl.sigmoid(g) * u).to(h.dtype.element_ty), mask=i < numel)


@triton.jit
def backward_kernel(
    dh,  # [numel]
    gate,  # [numel]
    up,  # [numel]
    dgate,  # [numel]
    dup,  # [numel]
    numel,
    TILE: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    d = tl.load(dh + i, mask=i < numel, other=0).to(tl.float32)
    g = tl.load(gate + i, mask=i < numel, other=0).to(tl.float32)
    u = tl.load(up + i, mask=i < numel, other=0).to(tl.float32)
    s = tl.sigmoid(g)
    tl.store(dup + i, (d * (g * s)).to(dup.dtype.element_ty), mask=i < numel)
    tl.store(dgate + i, (d * u * (s * (1 + g * (1 - s)))).to(dgate.dtype.element_ty), mask=i < numel)


def forward(gate: Tensor, up: Tensor) -> Tensor:
    """gate, up [..., F] -> h [..., F]. Arguments have been checked in ops.py."""
    gate, up = gate.contiguous(), up.contiguous()
    h = torch.empty_like(gate)
    if numel := h.numel():
        with launching_on(h):
            forward_kernel[(-(-numel // TILE),)](gate, up, h, numel, TILE=TILE)
    return h


def backward(dh: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """dh, gate, up [..., F] -> dgate, dup [..., F]."""
    dh, gate, up = dh.contiguous(), gate.contiguous(), up.contiguous()
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    if numel := dh.numel():
        with launching_on(dh):
            backward_kernel[(-(-numel // TILE),)](dh, gate, up, dgate, dup, numel, TILE=TILE)
    return dgate, dup
