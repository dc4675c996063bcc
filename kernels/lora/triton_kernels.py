"""The low-rank update on a GPU:   y = base + s z Bᵀ   in one pass (see ops.py for the equations).

A program multiplies BM rows of z with BN rows of B on tensor cores, which want a common dimension of at least 16: a
smaller rank is filled up with zeros. A large one is taken in steps. base is read and y written once; sums are float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import launching_on

BM, BN = 64, 64
# Columns of z at once. float32 is not for tensor cores: with 64, threads would hold more than their registers do.
STEPS = {torch.float32: 16, torch.float16: 64, torch.bfloat16: 64}


@triton.jit
def add_product_kernel(
    base,  # [M, N]
    z,  # [M, R], in the dtype of base
    lora_b,  # [N, R]
    y,  # [M, N], in the dtype of base
    m,
    n,
    scaling,
    RANK: tl.constexpr,  # R
    STEP: tl.constexpr,  # columns of z at once, a power of two of at least 16
    BM: tl.constexpr,  # rows of z, in one program
    BN: tl.constexpr,  # rows of B, in one program
):
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    update = tl.zeros([BM, BN], tl.float32)
    for first in range(0, RANK, STEP):
        r = first + tl.arange(0, STEP)
        zs = tl.load(z + row[:, None] * RANK + r[None, :], mask=(row < m)[:, None] & (r < RANK)[None, :], other=0)
        mask = (column < n)[:, None] & (r < RANK)[None, :]
        bs = tl.load(lora_b + column[:, None] * RANK + r[None, :], mask=mask, other=0).to(z.dtype.element_ty)
        update = tl.dot(zs, tl.trans(bs), update, input_precision="ieee")
    at = row[:, None] * n + column[None, :]
    inside = (row < m)[:, None] & (column < n)[None, :]
    total = tl.load(base + at, mask=inside, other=0).to(tl.float32) + scaling * update
    tl.store(y + at, total.to(y.dtype.element_ty), mask=inside)


def add_product(base: Tensor, z: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """base [..., N], z [M, R], lora_b [N, R] -> y [..., N]. Arguments have been checked in ops.py."""
    base = base.contiguous()
    y = torch.empty_like(base)
    (m, rank), n = z.shape, base.shape[-1]
    if y.numel():
        with launching_on(base):
            add_product_kernel[(-(-m // BM), -(-n // BN))](
                base, z, lora_b.contiguous(), y, m, n, scaling,
                RANK=rank, STEP=min(STEPS[z.dtype], max(16, triton.next_power_of_2(rank))), BM=BM, BN=BN,
            )  # fmt: skip
    return y
