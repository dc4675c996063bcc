"""4-bit block quantization on a GPU:   absmax = max |w| of the block,  code = nearest(table, w / absmax)

The place of a number among the 15 thresholds is found in 4 comparisons, one per bit, as in quantize.c: the thresholds
form a binary tree, and the path taken so far looks up the next one. The rule is reference.py's to the bit: a whole
block is multiplied by the reciprocal of its absmax, the ragged last one divides, and a tie goes to the lower place.
Magnitudes are compared as integers, whose order puts infinity above every number and NaN above infinity, so that the
largest of them tells whether all is finite.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_decode import look_up

TINY = tl.constexpr(1e-38)  # reference.TINY


@triton.jit
def quantize_kernel(
    w,  # [numel], float32, float16 or bfloat16
    tree,  # float32 [4, 16]: level l of the thresholds, indexed by the first l decisions (gpu.decision_tree)
    codes,  # uint8 [16], of the paths
    packed,  # uint8 [ceil(numel / 2)]
    absmax,  # float32 [blocks]
    first,  # block of this launch
    numel,
    packed_bytes,  # ceil(numel / 2)
    BLOCK_SIZE: tl.constexpr,
    BLOCKS: tl.constexpr,  # of one program
    RAGGED: tl.constexpr,  # this launch is the last block, which is not whole
):
    block = first + tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    i = block[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]  # [BLOCKS, BLOCK_SIZE]
    x = tl.load(w + i, mask=i < numel, other=0, eviction_policy="evict_first").to(tl.float32)
    magnitude = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    largest = magnitude.to(tl.float32, bitcast=True)  # [BLOCKS]
    # A NaN is no less than TINY, so it stays: the caller finds it in absmax.
    divisor = tl.where(largest < TINY, TINY, largest)
    tl.store(absmax + block, divisor if RAGGED else largest, mask=block * BLOCK_SIZE < numel)
    if RAGGED:
        scaled = tl.div_rn(x, tl.broadcast_to(divisor[:, None], x.shape))
    else:
        scaled = x * tl.div_rn(1.0, divisor)[:, None]
    # Not clamped to [-1, 1]: what rounding put outside is beyond the outermost threshold as well.
    path = (scaled > tl.load(tree)).to(tl.int32)
    path |= (scaled > tl.where(path == 0, tl.load(tree + 16), tl.load(tree + 17))).to(tl.int32) << 1
    path |= (scaled > look_up(tl.load(tree + 32 + tl.arange(0, 16)), path)).to(tl.int32) << 2
    path |= (scaled > look_up(tl.load(tree + 48 + tl.arange(0, 16)), path)).to(tl.int32) << 3
    code = tl.reshape(look_up(tl.load(codes + tl.arange(0, 16)).to(tl.int32), path), [BLOCKS, BLOCK_SIZE // 2, 2])
    high, low = tl.split(code)
    byte = block[:, None] * (BLOCK_SIZE // 2) + tl.arange(0, BLOCK_SIZE // 2)[None, :]
    tl.store(packed + byte, (high << 4 | low).to(tl.uint8), mask=byte < packed_bytes)
