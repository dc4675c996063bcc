"""What the Triton kernels of this folder share: scales, and codes to numbers.

The look-up is `tl.gather` from the 16 table entries, which the compiler keeps in shared memory: 16 banks, so no two
threads of a warp are in each other's way. A tree of 15 selects takes twice to three times the instructions
(`python bench/machine_code/sass.py` counts them).

A weight is read in words of 32 bits, 8 codes each. Byte i of a word holds element 2i in its high nibble, so element e
is found at bit 8 (e // 2) + 4 (1 - e % 2). `unpack` shifts them out and joins them in their own order. Joined, the 8
codes of a word stay with the thread that read it; broadcasting the word against a vector of shifts is shorter, but then
the compiler spreads them over 8 threads, and every sum and every store pays for bringing them together again.
"""

from __future__ import annotations

import triton
import triton.language as tl

NESTED_BLOCK_SIZE = tl.constexpr(256)  # reference.NESTED_BLOCK_SIZE
WORD = tl.constexpr(8)  # codes in 32 bits


@triton.jit
def load_scales(absmax, nested_absmax, nested_offset, dynamic, block, mask, NESTED: tl.constexpr):
    """float32 scales of the blocks numbered `block`, of any shape; finite, and of no use, where `mask` is false.

    The product and the sum of a double-quantized scale are rounded each, as in reference.py: fma(a, b, 0) is a
    product that no compiler may fuse with the sum after it.
    """
    if NESTED:
        code = tl.load(absmax + block, mask=mask, other=0, eviction_policy="evict_last").to(tl.int32)
        second = tl.load(nested_absmax + block // NESTED_BLOCK_SIZE, mask=mask, other=0, eviction_policy="evict_last")
        first = tl.load(dynamic + code, eviction_policy="evict_last")
        return tl.fma(first, second, 0.0) + tl.load(nested_offset)
    else:
        return tl.load(absmax + block, mask=mask, other=0)


@triton.jit
def look_up(table, codes):
    """table[codes], of the table's dtype; codes: int32 of any shape, table: a block, 2^n entries."""
    flat = tl.reshape(codes, [codes.numel])
    return tl.reshape(tl.gather(table, flat, 0), codes.shape)


@triton.jit
def unpack(words):
    """int32 [A, B] -> the codes in their order, int32 [A, 8 B]."""
    even = tl.join(tl.join(words >> 4, words >> 20), tl.join(words >> 12, words >> 28))  # [A, B, e / 4, e / 2 % 2]
    odd = tl.join(tl.join(words, words >> 16), tl.join(words >> 8, words >> 24))
    return tl.reshape(tl.join(even, odd) & 15, [words.shape[0], words.shape[1] * WORD])


@triton.jit
def load_words(packed, row, unit, n, units, UNIT: tl.constexpr, UNITS: tl.constexpr):
    """int32 [R, UNITS * UNIT / 8]: words of W [n, units * UNIT] in rows `row` [R], from unit number `unit` on.

    Outside of W they are 0.
    """
    word = unit * (UNIT // WORD) + tl.arange(0, UNITS * UNIT // WORD)
    limit = units * (UNIT // WORD)
    inside = (row < n)[:, None] & (word < limit)[None, :]
    at = row.to(tl.int64)[:, None] * limit + word[None, :]
    return tl.load(packed + at, mask=inside, other=0, eviction_policy="evict_first")


@triton.jit
def load_unit_scales(
    absmax, nested_absmax, nested_offset, dynamic,
    row, unit, n, units, BLOCK_SIZE: tl.constexpr, UNIT: tl.constexpr, UNITS: tl.constexpr, NESTED: tl.constexpr,
):  # fmt: skip
    """float32 [R, UNITS]: the scales of the same units; of no use outside of W."""
    units_here = unit + tl.arange(0, UNITS)
    inside = (row < n)[:, None] & (units_here < units)[None, :]
    index = row.to(tl.int64)[:, None] * units + units_here[None, :]
    return load_scales(absmax, nested_absmax, nested_offset, dynamic, index // (BLOCK_SIZE // UNIT), inside, NESTED)


@triton.jit
def decode_tile(
    packed, absmax, nested_absmax, nested_offset, dynamic, table,
    row, unit, n, units, BLOCK_SIZE: tl.constexpr, UNIT: tl.constexpr, UNITS: tl.constexpr, NESTED: tl.constexpr,
):  # fmt: skip
    """float32 [R, UNITS * UNIT] of W, not yet rounded; finite outside of W, where x is 0.

    UNIT divides both a row of W and a block, so that one scale serves a unit.
    """
    values = look_up(table, unpack(load_words(packed, row, unit, n, units, UNIT, UNITS)))
    scales = load_unit_scales(
        absmax, nested_absmax, nested_offset, dynamic, row, unit, n, units, BLOCK_SIZE, UNIT, UNITS, NESTED
    )  # fmt: skip
    if UNITS == 1:
        return values * scales
    w = tl.reshape(values, [row.shape[0], UNITS, UNIT]) * scales[:, :, None]
    return tl.reshape(w, [row.shape[0], UNITS * UNIT])
