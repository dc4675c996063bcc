"""Rotary position embedding on a GPU (see ops.py for the equations).

x is read once and y written once, in the layout of x: queries are [B, T, H, d] viewed through a transpose, and y keeps
that layout. A program takes a few tokens and loops over heads, so that it reads the tables, twice the bytes of one
head, once for all of its heads. The backward is the same kernel with the two sines exchanged and negated.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import launching_on, processors

TILE = 1024  # pairs (x1, x2) at once: 8 to each of 128 threads, 16 bytes in 16 bits


@triton.jit
def rotate_kernel(
    x,  # [B, H, T, d], d contiguous
    cos,  # [T, d]
    sin,  # [T, d]
    y,  # as x, its strides too, of any dtype
    heads,  # H
    tokens,  # T
    batch_stride,  # of x and y, in elements
    head_stride,
    token_stride,
    HALF: tl.constexpr,  # d / 2
    WIDTH: tl.constexpr,  # d / 2, rounded up to a power of two
    TOKENS: tl.constexpr,  # at once
    INVERSE: tl.constexpr,
):
    blocks = tl.cdiv(tokens, TOKENS)
    token = (tl.program_id(0) % blocks) * TOKENS + tl.arange(0, TOKENS)
    i = tl.arange(0, WIDTH)
    inside = (token < tokens)[:, None] & (i < HALF)[None, :]
    entry = token.to(tl.int64)[:, None] * (2 * HALF) + i[None, :]
    c1 = tl.load(cos + entry, mask=inside, other=0).to(tl.float32)
    c2 = tl.load(cos + entry + HALF, mask=inside, other=0).to(tl.float32)
    s1 = tl.load(sin + entry, mask=inside, other=0).to(tl.float32)
    s2 = tl.load(sin + entry + HALF, mask=inside, other=0).to(tl.float32)
    if INVERSE:
        s1, s2 = -s2, -s1
    batch = (tl.program_id(0) // blocks).to(tl.int64) * batch_stride
    first = batch + tl.program_id(1).to(tl.int64) * head_stride
    at = first + token.to(tl.int64)[:, None] * token_stride + i[None, :]
    for _ in range(tl.program_id(1), heads, tl.num_programs(1)):
        x1 = tl.load(x + at, mask=inside, other=0).to(tl.float32)
        x2 = tl.load(x + at + HALF, mask=inside, other=0).to(tl.float32)
        tl.store(y + at, (x1 * c1 - x2 * s1).to(y.dtype.element_ty), mask=inside)
        tl.store(y + at + HALF, (x2 * c2 + x1 * s2).to(y.dtype.element_ty), mask=inside)
        at += tl.num_programs(1).to(tl.int64) * head_stride


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, dtype: torch.dtype, inverse: bool) -> Tensor:
    """x [..., T, d] -> y in `dtype`, or dy -> dx if `inverse`. Arguments have been checked in ops.py."""
    shape = x.shape
    x = x.flatten(0, -4) if x.ndim > 4 else x[(None,) * (4 - x.ndim)]  # [B, H, T, d]
    y = torch.empty_like(x, dtype=dtype)
    if y.stride() != x.stride() or x.stride(-1) != 1:  # x has gaps, or its elements overlap
        x = x.contiguous()
        y = torch.empty_like(x, dtype=dtype)
    if y.numel():
        batches, heads, tokens = x.shape[:3]
        half = x.shape[3] // 2
        width = triton.next_power_of_2(half)
        at_once = max(1, TILE // width)
        programs = batches * -(-tokens // at_once)
        walkers = max(1, min(heads, 4 * processors(x.device) // programs))
        with launching_on(x):
            rotate_kernel[(programs, walkers)](
                x, cos.contiguous(), sin.contiguous(), y, heads, tokens, *x.stride()[:3],
                HALF=half, WIDTH=width, TOKENS=at_once, INVERSE=inverse,
            )  # fmt: skip
    return y.reshape(shape)
