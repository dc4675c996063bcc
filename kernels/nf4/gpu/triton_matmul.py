"""Products with a packed weight on a GPU:   y = x Wᵀ   and its backward   dx = dy W,   W [N, K]

Few rows of x are limited by reading W, so `few_rows_kernel` spends as little as it can per code: it shifts, looks up,
multiplies by the scale, and adds the product with x. No decoded weight leaves its registers. Its codes are not joined
as `unpack` joins them: a word is broadcast against 8 shifts with the element as the *first* axis, which the compiler
gives to registers and not to threads, and nothing has to be put back in order, since all that follows is a sum.

From some rows on, tensor cores pay: `many_rows_kernel` and `backward_kernel` decode a tile of W into registers, round
it once to the dtype of x, which makes it the same numbers as `dequantize`, and multiply. The backward needs no
transposed copy of W: a tile [N, K] of W is the right operand of dy W as it is.

All sum in float32. Where N is too small to fill a card, K (in the backward, N) is split over programs; each writes its
own sums, and `add_splits_kernel` adds them in order, so that a result is the same every time, which atomics would not
give.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_decode import WORD, decode_tile, load_unit_scales, load_words, look_up


@triton.jit
def few_rows_kernel(
    x,  # [M, K]
    packed,  # int32 [N K / 8]
    absmax,  # float32 [blocks], or uint8 [blocks] if NESTED
    nested_absmax,  # float32 [ceil(blocks / 256)], read if NESTED
    nested_offset,  # float32 [1], read if NESTED
    dynamic,  # float32 [256], read if NESTED
    table,  # float32 [16]
    sums,  # float32 [SPLITS, M, N], or y [M, N] itself in the dtype of x where SPLITS is 1
    m,
    n,
    units,  # K / UNIT
    units_per_split,  # a multiple of UNITS
    BLOCK_SIZE: tl.constexpr,
    UNIT: tl.constexpr,
    NESTED: tl.constexpr,
    BM: tl.constexpr,  # m, rounded up to a power of two
    ROWS: tl.constexpr,  # of W, in one program
    UNITS: tl.constexpr,  # of each row, in one step
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    begin = tl.program_id(1) * units_per_split
    entries = tl.load(table + tl.arange(0, 16))
    xrow = tl.arange(0, BM)
    e = tl.arange(0, WORD)
    shifts = (8 * (e // 2) + 4 * (1 - e % 2))[:, None, None]
    WORDS: tl.constexpr = UNITS * UNIT // WORD  # of a row, in one step
    # One sum per weight of a step, so that no thread waits for another before the end.
    total = tl.zeros([BM, WORD, ROWS, WORDS], tl.float32)
    for first in range(begin, min(begin + units_per_split, units), UNITS):
        words = load_words(packed, row, first, n, units, UNIT, UNITS)  # [ROWS, WORDS]
        values = look_up(entries, (words[None, :, :] >> shifts) & 15)  # [8, ROWS, WORDS]
        scales = load_unit_scales(
            absmax, nested_absmax, nested_offset, dynamic, row, first, n, units, BLOCK_SIZE, UNIT, UNITS, NESTED
        )  # fmt: skip
        spread = tl.broadcast_to(scales[:, :, None], [ROWS, UNITS, UNIT // WORD])
        w = values * tl.reshape(spread, [ROWS, WORDS])[None, :, :]
        k = (first * UNIT + tl.arange(0, WORDS) * WORD)[None, :] + e[:, None]  # [8, WORDS]
        mask = (xrow < m)[:, None, None] & (k < units * UNIT)[None, :, :]
        at = (xrow * (units * UNIT))[:, None, None] + k[None, :, :]
        xs = tl.load(x + at, mask=mask, other=0, eviction_policy="evict_last").to(tl.float32)  # [BM, 8, WORDS]
        total = tl.fma(tl.broadcast_to(xs[:, :, None, :], total.shape), tl.broadcast_to(w[None], total.shape), total)
    y = tl.sum(tl.sum(total, axis=3), axis=1)
    at = (tl.program_id(1) * m + xrow)[:, None] * n + row[None, :]
    tl.store(sums + at, y.to(sums.dtype.element_ty), mask=(xrow < m)[:, None] & (row < n)[None, :])


@triton.jit
def many_rows_kernel(
    x,  # [M, K]
    packed,  # int32 [N K / 8]
    absmax,  # float32 [blocks], or uint8 [blocks] if NESTED
    nested_absmax,  # float32 [ceil(blocks / 256)], read if NESTED
    nested_offset,  # float32 [1], read if NESTED
    dynamic,  # float32 [256], read if NESTED
    table,  # float32 [16]
    sums,  # float32 [SPLITS, M, N], or y [M, N] itself in the dtype of x where SPLITS is 1
    m,
    n,
    units,  # K / UNIT
    units_per_split,  # a multiple of UNITS
    BLOCK_SIZE: tl.constexpr,
    UNIT: tl.constexpr,
    NESTED: tl.constexpr,
    BM: tl.constexpr,  # rows of x, in one program
    BN: tl.constexpr,  # rows of W, in one program
    UNITS: tl.constexpr,  # of each row, in one step
):
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    begin = tl.program_id(2) * units_per_split
    entries = tl.load(table + tl.arange(0, 16))
    k_size = units * UNIT
    total = tl.zeros([BM, BN], tl.float32)
    for first in range(begin, min(begin + units_per_split, units), UNITS):
        k = first * UNIT + tl.arange(0, UNITS * UNIT)
        at = rows.to(tl.int64)[:, None] * k_size + k[None, :]
        xs = tl.load(x + at, mask=(rows < m)[:, None] & (k < k_size)[None, :], other=0)
        w = decode_tile(
            packed, absmax, nested_absmax, nested_offset, dynamic, entries,
            columns, first, n, units, BLOCK_SIZE, UNIT, UNITS, NESTED,
        )  # fmt: skip
        total = tl.dot(xs, tl.trans(w.to(x.dtype.element_ty)), total, input_precision="ieee")
    at = (tl.program_id(2).to(tl.int64) * m + rows)[:, None] * n + columns[None, :]
    tl.store(sums + at, total.to(sums.dtype.element_ty), mask=(rows < m)[:, None] & (columns < n)[None, :])


@triton.jit
def backward_kernel(
    dy,  # [M, N]
    packed,  # int32 [N K / 8]
    absmax,  # float32 [blocks], or uint8 [blocks] if NESTED
    nested_absmax,  # float32 [ceil(blocks / 256)], read if NESTED
    nested_offset,  # float32 [1], read if NESTED
    dynamic,  # float32 [256], read if NESTED
    table,  # float32 [16]
    sums,  # float32 [SPLITS, M, K], or dx [M, K] itself in the dtype of dy where SPLITS is 1
    m,
    n,
    units,  # K / UNIT
    rows_per_split,  # of W: a multiple of BN
    BLOCK_SIZE: tl.constexpr,
    UNIT: tl.constexpr,
    NESTED: tl.constexpr,
    BM: tl.constexpr,  # rows of dy, in one program
    BN: tl.constexpr,  # rows of W, in one step
    UNITS: tl.constexpr,  # of each row of W, in one program
):
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    unit = tl.program_id(1) * UNITS
    begin = tl.program_id(2) * rows_per_split
    entries = tl.load(table + tl.arange(0, 16))
    total = tl.zeros([BM, UNITS * UNIT], tl.float32)
    for first in range(begin, min(begin + rows_per_split, n), BN):
        reduced = first + tl.arange(0, BN)
        at = rows.to(tl.int64)[:, None] * n + reduced[None, :]
        dys = tl.load(dy + at, mask=(rows < m)[:, None] & (reduced < n)[None, :], other=0)
        w = decode_tile(
            packed, absmax, nested_absmax, nested_offset, dynamic, entries,
            reduced, unit, n, units, BLOCK_SIZE, UNIT, UNITS, NESTED,
        )  # fmt: skip
        total = tl.dot(dys, w.to(dy.dtype.element_ty), total, input_precision="ieee")
    k_size = units * UNIT
    k = tl.program_id(1) * (UNITS * UNIT) + tl.arange(0, UNITS * UNIT)
    at = (tl.program_id(2).to(tl.int64) * m + rows)[:, None] * k_size + k[None, :]
    tl.store(sums + at, total.to(sums.dtype.element_ty), mask=(rows < m)[:, None] & (k < k_size)[None, :])


@triton.jit
def add_splits_kernel(
    sums,  # float32 [SPLITS, numel]
    out,  # [numel]
    numel,
    SPLITS: tl.constexpr,
    TILE: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    part = sums + i
    total = tl.zeros([TILE], tl.float32)
    for _ in range(SPLITS):
        total += tl.load(part, mask=i < numel, other=0)
        part += numel
    tl.store(out + i, total.to(out.dtype.element_ty), mask=i < numel)
