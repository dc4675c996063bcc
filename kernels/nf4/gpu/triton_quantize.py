"""4-bit block quantization on a GPU:   absmax = max |w| of the block,  code = nearest(table, w / absmax)

A code is the number of thresholds below x = w / absmax. They are 15, and a tree of comparisons finds the place of x
among them in 4 steps (quantize.c). Here it is found in one. [-1, 1] is cut into even buckets, so many that each holds
at most one threshold (codebook.buckets): one fma and one `and` give the bucket of x, a look-up gives the threshold in
it and how many are below it, and one comparison decides. An element takes 13 instructions instead of 34 (sm_90,
`python bench/machine_code/sass.py --only quantize`). What made the difference:

- The bucket is read off the bits of x * c + 1.5 * 2^23, whose last place is 1. A conversion to an integer would run at
  a quarter of the rate. Two more bits than the bucket needs are kept: shifted by 2, the bits are a byte offset already.
- x > t is the sign bit of t - x, which one instruction shifts and adds; a comparison takes a predicate and a select.
- Threshold and count are one look-up in one table: the two of an element need one address, and without a barrier
  between all the first and all the second, a thread keeps 50 registers less.
- A thread holds whole words of codes and adds their nibbles up; single bytes would be brought together later.
- The reciprocal of absmax takes some 15 instructions in each thread that needs it. A block lies in memory in chunks of
  32, of which a thread takes 8 elements of *each*: so fewer threads share a block, and fewer steps of the maximum
  cross threads. A chunk of a 16-bit type is 64 bytes, two sectors of memory, both read by one instruction.

The rule is reference.py's to the bit: a whole block is multiplied by the reciprocal of its absmax, the ragged last one
divides, and a tie goes to the lower place. t - x is exact enough for that: it is 0 only where t = x. But x must be the
rounded product, so it is written fma(w, 1 / absmax, 0), which no compiler may fuse with the subtraction.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_decode import WORD, look_up

TINY = tl.constexpr(1e-38)  # reference.TINY
CHUNK = tl.constexpr(32)  # elements of a block that lie side by side in one step; divides every block size
# Added to a number below 2^22 it leaves the nearest integer, plus 2, in the low bits (see codebook.bucket_of).
MIDDLE = tl.constexpr(1.5 * 2**23 + 2)


@triton.jit
def largest_of_4(x):
    """float32 [A, B, C] -> the largest magnitude of each 4 in a row, [A, B, C / 4]; NaN where there is one."""
    even, odd = tl.split(tl.reshape(tl.abs(x), [x.shape[0], x.shape[1], x.shape[2] // 4, 2, 2]))
    first, second = tl.split(tl.maximum(even, odd, propagate_nan=tl.PropagateNan.ALL))
    return tl.maximum(first, second, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def quantize_kernel(
    w,  # [numel], float32, float16 or bfloat16
    buckets,  # int32 [2, BUCKETS]: codebook.buckets
    codes,  # uint8 [16]: the code of each place among the thresholds, read unless IN_ORDER
    packed,  # uint8 [ceil(numel / 2)]; as int32 [numel / 8] unless RAGGED
    absmax,  # float32 [blocks]
    first,  # block of this launch
    numel,  # where this launch ends
    packed_bytes,  # ceil(numel / 2), read if RAGGED
    BLOCK_SIZE: tl.constexpr,
    BLOCKS: tl.constexpr,  # of one program
    BUCKETS: tl.constexpr,
    IN_ORDER: tl.constexpr,  # a place is its own code
    RAGGED: tl.constexpr,  # this launch is the last block, which is not whole
):
    CHUNKS: tl.constexpr = BLOCK_SIZE // CHUNK
    table = tl.load(buckets + tl.arange(0, 2 * BUCKETS))
    block = first + tl.program_id(0).to(tl.int64) * BLOCKS
    start = block * BLOCK_SIZE
    left = tl.minimum(numel - start, BLOCKS * BLOCK_SIZE).to(tl.int32)
    row = tl.arange(0, BLOCKS)
    inside = row * BLOCK_SIZE < left
    chunk = tl.arange(0, CHUNKS)[:, None, None] * CHUNK + row[None, :, None] * BLOCK_SIZE  # [CHUNKS, BLOCKS, 1]
    i = chunk + tl.arange(0, CHUNK)[None, None, :]  # [CHUNKS, BLOCKS, CHUNK]
    if RAGGED:
        loaded = tl.load(w + start + i, mask=i < left, other=0)
    else:
        loaded = tl.load(w + start + i, mask=inside[None, :, None], eviction_policy="evict_first")
    if loaded.dtype == tl.bfloat16:  # the bits of a float32 but for the low half: one instruction, `to` takes two
        x = (loaded.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        x = loaded.to(tl.float32)

    # As integers, magnitudes have the same order, infinity above every number and NaN above infinity.
    magnitude = tl.max(tl.max(largest_of_4(x).to(tl.int32, bitcast=True), axis=0), axis=1)
    largest = magnitude.to(tl.float32, bitcast=True)  # [BLOCKS]
    # A NaN is no less than TINY, so it stays: the caller finds it in absmax.
    divisor = tl.where(largest < TINY, TINY, largest)
    tl.store(absmax + block + row, divisor if RAGGED else largest, mask=inside)
    if RAGGED:
        scaled = tl.div_rn(x, tl.broadcast_to(divisor[None, :, None], x.shape))
    else:
        scaled = tl.fma(x, tl.broadcast_to(tl.div_rn(1.0, divisor)[None, :, None], x.shape), 0.0)

    # Not clamped to [-1, 1]: what rounding put outside is in the outermost buckets as well.
    bits = tl.fma(scaled, 2.0 * BUCKETS - 4, MIDDLE).to(tl.int32, bitcast=True)
    bucket = (bits >> 2) & (BUCKETS - 1)
    threshold, below = tl.split(look_up(table, tl.join(bucket, bucket + BUCKETS)))
    difference = threshold.to(tl.float32, bitcast=True) - scaled
    code = below + (difference.to(tl.uint32, bitcast=True) >> 31).to(tl.int32)
    if not IN_ORDER:
        code = look_up(tl.load(codes + tl.arange(0, 16)).to(tl.int32), code & 15)

    high, low = tl.split(tl.reshape(code, [CHUNKS, BLOCKS, CHUNK // 2, 2]))
    byte = high * 16 + low
    if RAGGED:
        at = chunk // 2 + tl.arange(0, CHUNK // 2)[None, None, :]
        tl.store(packed + start // 2 + at, byte.to(tl.uint8), mask=at < packed_bytes - start // 2)
    else:
        even, odd = tl.split(tl.reshape(byte, [CHUNKS, BLOCKS, CHUNK // WORD, 2, 2]))
        first_half, second_half = tl.split(odd * 256 + even)
        at = chunk // WORD + tl.arange(0, CHUNK // WORD)[None, None, :]
        tl.store(packed + start // WORD + at, second_half * 65536 + first_half, mask=inside[None, :, None])
