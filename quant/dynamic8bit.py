"""Blocks of 256 float32 numbers in 8 bits each: what the state of an optimizer is stored as.  (arXiv:2110.02861)

    absmax = max |x| of the block                  float32, one per block
    code   = nearest(map, x / absmax)              uint8, one per number: 8 + 32/256 = 8.125 bits
    x'     = map[code] * absmax

The two maps of kernels/nf4/codebook.py are fine near zero and coarse near one: DYNAMIC with a sign spans 5.5e-7 to 1,
DYNAMIC_UNSIGNED 3.3e-7 to 1 with twice as many steps in each decade. Moments need that. In one block their magnitudes
differ by orders, an even grid would turn most of them into zero, and it is the relative error of a moment that
reaches the weight.

Which code is nearest is decided exactly: the number of float32 midpoints strictly below x * (1 / absmax) (below
x / absmax in a ragged last block), a tie going to the lower code. bitsandbytes has two rules here. Its generic kernel
decides as this file does, and the two agree to the byte. Its CPU kernel for float32 looks codes up in 65536 even steps
over [-1, 1]. Such a step, 3.1e-5, is wider than the lower decades of the maps: all squares below 1.5e-5 of the largest
share one code, and 6 % of the codes of v came out different after 20 steps of the demo's training. For the absmax of
double quantization kernels/nf4 keeps that rule, so that files are equal; no file asks for it here.

Counting midpoints by bisection, as torch.bucketize does, takes 13 times as long. Instead, each of the 65536 values of
the upper 16 bits of a float32 (sign, exponent, 7 bits of fraction) knows the code of the least number that has them,
and the one midpoint that may lie among those numbers: two look-ups, one comparison, the same code.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..kernels.dispatch import cached_unless_traced
from ..kernels.nf4 import QuantizationError
from ..kernels.nf4.codebook import DYNAMIC, DYNAMIC_UNSIGNED, midpoints
from ..kernels.nf4.reference import TINY

BLOCK_SIZE = 256


def quantize8(x: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """code = nearest(map, x / absmax) over the row-major flattened x, in blocks of 256.

    x: float32, any shape; without `signed`, not negative (a negative number gets the code of zero).
    Returns codes uint8 of x's shape, and absmax float32 [ceil(numel / 256)]. A NaN or an infinity is kept, as an absmax
        that is not finite: what is read back from that block is not finite either.
    Raises QuantizationError: x is not float32.
    """
    if x.dtype != torch.float32:
        raise QuantizationError(f"x is {x.dtype}: only float32 is stored in 8-bit blocks; use x.float()")
    flat = x.reshape(-1)
    ragged = flat.numel() % BLOCK_SIZE
    full, tail = flat[: flat.numel() - ragged].view(-1, BLOCK_SIZE), flat[flat.numel() - ragged :]
    absmax = full.abs().amax(dim=1)  # [blocks]
    scaled = (full * (1.0 / absmax.clamp(min=TINY))[:, None]).view(-1)
    if ragged:
        last = tail.abs().amax().clamp(min=TINY)
        absmax = torch.cat([absmax, last[None]])
        scaled = torch.cat([scaled, tail / last])
    return _nearest(scaled, signed).view(x.shape), absmax


def dequantize8(codes: Tensor, absmax: Tensor, *, signed: bool) -> Tensor:
    """x[i] = map[codes[i]] * absmax[i // 256], float32, of the shape of `codes`.

    codes: uint8, any shape; absmax: float32 [ceil(numel / 256)].
    Raises QuantizationError: absmax does not fit codes.
    """
    numel = codes.numel()
    blocks = -(-numel // BLOCK_SIZE)
    if codes.dtype != torch.uint8 or absmax.dtype != torch.float32 or absmax.shape != (blocks,):
        raise QuantizationError(
            f"codes {codes.dtype} {list(codes.shape)} with absmax {absmax.dtype} {list(absmax.shape)}: wanted "
            f"uint8 and float32 [{blocks}], the two parts that quantize8 gave together"
        )
    x = _map(signed, codes.device).index_select(0, codes.reshape(-1).int())
    full = numel - numel % BLOCK_SIZE
    x[:full].view(-1, BLOCK_SIZE).mul_(absmax[: full // BLOCK_SIZE, None])
    if full < numel:
        x[full:].mul_(absmax[-1])
    return x.view(codes.shape)


def _nearest(scaled: Tensor, signed: bool) -> Tensor:
    """uint8 codes of float32 numbers; all midpoints lie between -1 and 1, so rounding past those does no harm."""
    first, midpoint = _lookup(signed, scaled.device)
    upper = (scaled.view(torch.int32) >> 16) + 32768  # an arithmetic shift: numbers with the sign bit come first
    code = first.index_select(0, upper)
    code += scaled > midpoint.index_select(0, upper)
    return code


@cached_unless_traced
def _map(signed: bool, device: torch.device) -> Tensor:
    """float32 [256], ascending; shared, so never write to it."""
    return torch.tensor(DYNAMIC if signed else DYNAMIC_UNSIGNED, dtype=torch.float32, device=device)


@cached_unless_traced
def _lookup(signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """By the upper 16 bits of a number: (uint8 code of the least such number, float32 midpoint among them or inf)."""
    bounds = torch.tensor(midpoints(list(DYNAMIC if signed else DYNAMIC_UNSIGNED)), dtype=torch.float32, device="cpu")
    upper = torch.arange(-32768, 32768, dtype=torch.int32, device="cpu") << 16
    ends = torch.stack([upper, upper | 0xFFFF]).view(torch.float32)  # the lower 16 bits all zero, all one
    ends[:, ends.isnan().any(dim=0)] = 0.0  # NaN needs no code of its own: its absmax is NaN
    least, greatest = ends.amin(dim=0), ends.amax(dim=0)
    first, last = (torch.bucketize(end, bounds) for end in (least, greatest))
    assert int((last - first).max()) <= 1, "two midpoints share their upper 16 bits: one comparison cannot decide"
    padded = torch.cat([bounds, torch.tensor([math.inf], dtype=torch.float32, device="cpu")])
    midpoint = torch.where(last > first, padded[first], math.inf)
    return first.to(torch.uint8).to(device), midpoint.to(device)
