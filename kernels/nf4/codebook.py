"""The code tables of 4-bit and 8-bit block quantization, each made by its derivation.

A block-quantized weight is `table[code] * absmax`, so a table lists numbers in [-1, 1] and holds 1.0.

NF4 (QLoRA, arXiv:2305.14314, section 3): weights are close to normal, so the 16 numbers are quantiles of the
normal distribution: each code is then used about equally often. A symmetric set of 16 has no zero, and a zero
weight should stay zero, so there are 8 positive quantiles, the zero, and 7 negative ones.

FP4: a sign, two exponent bits and one mantissa bit, divided by the largest (12). No code theory, a baseline.

DYNAMIC (8-bit optimizers, arXiv:2110.02861): quantizes the absmax values themselves in double quantization.
A sign, a run of zeros as the exponent, a linear fraction in the bits that are left. DYNAMIC_UNSIGNED spends the
sign's bit on the fraction: for numbers that cannot be negative, such as an optimizer's mean of squares.

Every float32 here is equal, bit for bit, to the one bitsandbytes uses, so files are interchangeable. The
reference for those bits is `torch.linspace` in float32, whose last bit depends on whether the processor has a
fused multiply-add; `_linspace` below says in plain arithmetic what the fused form computes, so that the
tables are the same everywhere.
"""

from __future__ import annotations

import math
import struct
from functools import lru_cache
from itertools import pairwise
from statistics import NormalDist
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..dispatch import cached_unless_traced

Kind = Literal["nf4", "fp4"]

# The outermost quantile of NF4: the mean of 1 - 1/(2*15) and 1 - 1/(2*16), halfway between what 15 and what
# 16 equally likely codes would ask for. bitsandbytes writes it with seven digits, and the bits follow from
# those.
NF4_OFFSET = 0.9677083


def _f32(x: float) -> float:
    """Round to the nearest float32."""
    return float(struct.unpack("<f", struct.pack("<f", x))[0])


def _linspace(start: float, end: float, count: int) -> list[float]:
    """`count` float32 points; each counts from the nearer end, with a float32 step and one rounding."""
    start, end = _f32(start), _f32(end)
    step = _f32((end - start) / (count - 1))
    return [_f32(start + step * i) if i < count // 2 else _f32(end - step * (count - 1 - i)) for i in range(count)]


def _make_nf4() -> tuple[float, ...]:
    quantile = NormalDist().inv_cdf
    positive = [_f32(quantile(p)) for p in _linspace(NF4_OFFSET, 0.5, 9)[:-1]]  # the 9th is the zero
    negative = [_f32(-quantile(p)) for p in _linspace(NF4_OFFSET, 0.5, 8)[:-1]]
    values = sorted([*negative, 0.0, *positive])
    return tuple(_f32(v / values[-1]) for v in values)


def _make_fp4() -> tuple[float, ...]:
    # Bits "s e e m". The exponent counts down (1 -> 8, 2 -> 4, 3 -> 2); exponent 0 holds 0 and 1/16.
    magnitudes = [0.0, 0.0625] + [2.0 ** (4 - e) * (1 + m / 2) for e in (1, 2, 3) for m in (0, 1)]
    return tuple(_f32(v / 12) for v in magnitudes) + tuple(_f32((0.0 - v) / 12) for v in magnitudes)


def _make_dynamic(*, signed: bool) -> tuple[float, ...]:
    values = [0.0, 1.0]
    for i in range(7):  # 2**i steps between 0.1 and 1, twice as many without a sign, scaled to the decade 10**(i - 6)
        points = _linspace(0.1, 1.0, 2 ** (i if signed else i + 1) + 1)
        for low, high in pairwise(points):
            middle = _f32(_f32(_f32(low + high) / 2) * _f32(10.0 ** (i - 6)))
            values += [middle, -middle] if signed else [middle]
    return tuple(sorted(values))


NF4 = _make_nf4()
FP4 = _make_fp4()
DYNAMIC = _make_dynamic(signed=True)
DYNAMIC_UNSIGNED = _make_dynamic(signed=False)
TABLES: dict[Kind, tuple[float, ...]] = {"nf4": NF4, "fp4": FP4}


# The best common denominators up to 2^14, for a table in whole numbers (fixed.c). FP4's entries are multiples of 1/192,
# and this is one of 192. NF4's are not rational: of all, this one leaves the least error in a sum of 4096, where what
# the errors have in common counts 64 times as much as the rest; that is 4e-7 at most, for normal weights, even ones and
# even codes, and 1e-5 the rest. (With 2^14, 6e-6 and 2e-5: a sum of 4096 positive numbers would be off by 1e-3.)
DENOMINATORS: dict[Kind, int] = {"nf4": 15586, "fp4": 16320}


def ascending(kind: Kind) -> tuple[list[float], list[int]]:
    """The table in ascending order, and the code of each place in it (for NF4, the place itself)."""
    table = TABLES[kind]
    codes = sorted(range(16), key=lambda code: table[code])  # stable: FP4's code 0 (+0) stays before 8 (-0)
    return [table[code] for code in codes], codes


def midpoints(values: list[float]) -> list[float]:
    """Float32 midpoints of neighbours: a number is nearest to place #{midpoints strictly below it}."""
    return [_f32(_f32(a + b) / 2) for a, b in pairwise(values)]


@cached_unless_traced
def table(kind: Kind, device: torch.device) -> Tensor:
    """float32 [16] on `device`; shared, so never write to it."""
    return torch.tensor(TABLES[kind], dtype=torch.float32, device=device)


@cached_unless_traced
def thresholds(kind: Kind, device: torch.device) -> tuple[Tensor, Tensor]:
    """(float32 [15] ascending thresholds, uint8 [16] code of each interval) on `device`."""
    values, codes = ascending(kind)
    return (
        torch.tensor(midpoints(values), dtype=torch.float32, device=device),
        torch.tensor(codes, dtype=torch.uint8, device=device),
    )


# Even parts of [-1, 1] so small that none holds two thresholds. NF4's are 0.08 apart and more; FP4 has one on each side
# of 0, 1/384 away, and a third at 0.
BUCKETS: dict[Kind, int] = {"nf4": 32, "fp4": 512}


def bucket_of(x: float, count: int) -> int:
    """The bucket of a float32 in [-1, 1] among `count`: in ascending order, from 1 - count / 2 to count / 2 - 1.

    It is 4 / (2 count - 4) wide. Bucket 0 lies around 0: from -2.5 to 1.5 quarters of that.
    """
    return round(x * (2 * count - 4)) + 2 >> 2  # an exact product in float64, and `round` takes ties to even


@cached_unless_traced
def buckets(kind: Kind, device: torch.device) -> Tensor:
    """int32 [2, BUCKETS[kind]] on `device`: how a bucket, by its number modulo BUCKETS[kind], leads to a place.

    [0]: the bits of the threshold in it, a float32; infinity where there is none.
    [1]: how many thresholds lie in lower buckets. The place of x is that, plus one if x is above the threshold.
    """
    bounds, count = midpoints(ascending(kind)[0]), BUCKETS[kind]
    numbers = [bucket_of(bound, count) for bound in bounds]
    assert len({*numbers}) == len(bounds), f"two thresholds of {kind} in one of {count} buckets"
    inside = dict(zip(numbers, bounds, strict=True))
    order = [*range(count // 2), *range(-count // 2, 0)]
    threshold = torch.tensor([inside.get(number, math.inf) for number in order], dtype=torch.float32, device=device)
    below = [sum(other < number for other in numbers) for number in order]
    return torch.stack([threshold.view(torch.int32), torch.tensor(below, dtype=torch.int32, device=device)])


@cached_unless_traced
def dynamic_table(device: torch.device) -> Tensor:
    """float32 [256], the 8-bit dynamic map, ascending."""
    return torch.tensor(DYNAMIC, dtype=torch.float32, device=device)


@cached_unless_traced
def dynamic_grid(device: torch.device) -> Tensor:
    """uint8 [65536]: the code of each point of an even grid over [-1, 1] (see reference.quantize_absmax)."""
    return torch.from_numpy(grid_codes()).to(device, copy=True)


@lru_cache(maxsize=1)
def grid_codes() -> npt.NDArray[np.uint8]:
    """[65536]: as dynamic_grid, and made here, because a GPU divides by a constant in another way."""
    grid = np.arange(65536, dtype=np.float32) * np.float32(2) / np.float32(65535) - np.float32(1)
    codes: npt.NDArray[np.int64] = np.searchsorted(np.array(midpoints(list(DYNAMIC)), dtype=np.float32), grid)
    return codes.astype(np.uint8)
