"""4-bit block dequantization on a GPU:   out[i] = round(table[code[i]] * absmax[i / block_size])

One program decodes TILE elements: it reads TILE / 2 bytes in 16-byte loads, decodes their scales (double-quantized
ones too, so that no second kernel and no float32 absmax exist), looks the codes up, multiplies in float32 and rounds
once. 2.5 bytes move per bfloat16 element, and some 8 instructions are spent on it: memory is the limit on every card
(`python bench/machine_code/sass.py`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_decode import load_scales, look_up


@triton.jit
def dequantize_kernel(
    packed,  # uint8 [ceil(numel / 2)]
    absmax,  # float32 [blocks], or uint8 [blocks] if NESTED
    nested_absmax,  # float32 [ceil(blocks / 256)], read if NESTED
    nested_offset,  # float32 [1], read if NESTED
    dynamic,  # float32 [256], read if NESTED
    table,  # float32 [16]
    out,  # [numel], of any float type
    numel,
    packed_bytes,  # ceil(numel / 2); a launch knows whether it is a multiple of 16, and then loads 16 bytes at a time
    BLOCK_SIZE: tl.constexpr,
    NESTED: tl.constexpr,
    TILE: tl.constexpr,  # elements of one program, a multiple of BLOCK_SIZE
):
    BLOCKS: tl.constexpr = TILE // BLOCK_SIZE
    BYTES: tl.constexpr = BLOCK_SIZE // 2
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    scales = load_scales(
        absmax, nested_absmax, nested_offset, dynamic, block, block * BLOCK_SIZE < numel, NESTED
    )  # fmt: skip
    byte = block[:, None] * BYTES + tl.arange(0, BYTES)[None, :]
    pairs = tl.load(packed + byte, mask=byte < packed_bytes, other=0, eviction_policy="evict_first").to(tl.int32)
    codes = tl.reshape(tl.join(pairs >> 4, pairs & 15), [BLOCKS, BLOCK_SIZE])
    w = look_up(tl.load(table + tl.arange(0, 16)), codes) * scales[:, None]
    i = block[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    tl.store(out + i, w.to(out.dtype.element_ty), mask=i < numel)
