"""RMSNorm on a GPU: one program holds whole rows in registers (see ops.py for the equations).

The forward reads x once and writes y once. The backward reads x and dy once and writes dx once; it takes r from the
forward, so it sums once per row instead of twice. If the weight is trained, each program sums dw over its own rows in
float32 and writes it to a row of its own; torch sums these rows. With atomics, dw would differ from run to run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import launching_on, processors

TILE = 2048  # elements that a program holds at once, unless one row is longer


@triton.jit
def forward_kernel(
    x,  # [M, D]
    weight,  # [D]
    y,  # [M, D], in the wider dtype of the two
    rstd,  # float32 [M]: r
    rows,  # M
    columns,  # D
    eps,
    ROWS: tl.constexpr,  # in one program
    COLUMNS: tl.constexpr,  # D, rounded up to a power of two
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    at = row.to(tl.int64)[:, None] * columns + column[None, :]
    xs = tl.load(x + at, mask=inside, other=0).to(tl.float32)
    r = tl.rsqrt(tl.sum(xs * xs, axis=1) / columns + eps)
    tl.store(rstd + row, r, mask=row < rows)
    n = (xs * r[:, None]).to(x.dtype.element_ty).to(tl.float32)
    w = tl.load(weight + column, mask=column < columns, other=0, eviction_policy="evict_last").to(tl.float32)
    tl.store(y + at, (w[None, :] * n).to(y.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    dy,  # [M, D]
    x,  # [M, D]
    weight,  # [D]
    rstd,  # float32 [M]
    dx,  # [M, D], in the dtype of x
    dw,  # float32 [programs, D], written if WANTS_WEIGHT: the share of each program
    rows,  # M
    columns,  # D
    rows_per_program,  # a multiple of ROWS
    WANTS_WEIGHT: tl.constexpr,
    ROWS: tl.constexpr,  # at once
    COLUMNS: tl.constexpr,  # D, rounded up to a power of two
):
    begin = tl.program_id(0) * rows_per_program
    column = tl.arange(0, COLUMNS)
    w = tl.load(weight + column, mask=column < columns, other=0).to(tl.float32)[None, :]
    share = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(begin, min(begin + rows_per_program, rows), ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        at = row.to(tl.int64)[:, None] * columns + column[None, :]
        r = tl.load(rstd + row, mask=row < rows, other=0)[:, None]
        n = tl.load(x + at, mask=inside, other=0).to(tl.float32) * r
        dys = tl.load(dy + at, mask=inside, other=0).to(tl.float32)
        dn = dys * w
        dxs = (dn - n * (tl.sum(dn * n, axis=1) / columns)[:, None]) * r
        tl.store(dx + at, dxs.to(dx.dtype.element_ty), mask=inside)
        if WANTS_WEIGHT:
            share += dys * n
    if WANTS_WEIGHT:
        line = tl.program_id(0).to(tl.int64) * columns
        tl.store(dw + line + column, tl.sum(share, axis=0), mask=column < columns)


def tile(columns: int) -> dict[str, int]:
    """Launch parameters for rows of `columns` elements; a thread gets some 16 elements."""
    width = triton.next_power_of_2(max(columns, 16))
    rows = max(1, TILE // width)
    return {"ROWS": rows, "COLUMNS": width, "num_warps": min(16, rows * width // 512)}


def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x [..., D] -> y [..., D] and r, float32 [..., 1]. Arguments have been checked in ops.py."""
    y = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype), device=x.device)
    r = torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
    rows, columns = r.numel(), x.shape[-1]
    if y.numel():
        plan = tile(columns)
        with launching_on(x):
            forward_kernel[(-(-rows // plan["ROWS"]),)](
                x.contiguous(), weight.contiguous(), y, r, rows, columns, eps, **plan
            )
    return y, r


def backward(dy: Tensor, x: Tensor, weight: Tensor, r: Tensor, *, wants_weight: bool) -> tuple[Tensor, Tensor | None]:
    """dy [..., D] and what the forward saved -> dx [..., D] and dw [D] if wanted."""
    rows, columns = r.numel(), x.shape[-1]
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not dx.numel():
        return dx, torch.zeros_like(weight) if wants_weight else None
    plan = tile(columns)
    programs = min(-(-rows // plan["ROWS"]), 4 * processors(x.device))
    per_program = -(-rows // (programs * plan["ROWS"])) * plan["ROWS"]
    programs = -(-rows // per_program)
    shares = r.new_empty(programs, columns) if wants_weight else r  # not read where it is not wanted
    with launching_on(x):
        backward_kernel[(programs,)](
            dy.contiguous(), x.contiguous(), weight.contiguous(), r, dx, shares, rows, columns, per_program,
            WANTS_WEIGHT=wants_weight, **plan,
        )  # fmt: skip
    return dx, shares.sum(0).to(weight.dtype) if wants_weight else None
