"""How a product is divided among the programs of a GPU: tiles of rows and columns, and parts of the sum."""

from __future__ import annotations

from typing import NamedTuple

import torch

FEW_ROWS = 2  # of x; with 4, tensor cores need fewer instructions although 12 of their 16 rows idle (ROOFLINE.md)
MAX_SPLITS = 32
SHORTEST = 256  # terms of a sum of many rows that are worth a program of their own


def unit_of(in_features: int, block_size: int) -> int:
    """Elements of a row that share one scale for certain, wherever blocks begin: 64, 32, or 0 where it is fewer."""
    for unit in (64, 32):
        if in_features % unit == 0 and block_size % unit == 0:
            return unit
    return 0


class Plan(NamedTuple):
    """How a product is divided among programs."""

    few: bool  # rows of x
    unit: int  # elements of a row of W that share one scale, as far as the kernel is told
    rows: int  # of W in one program (backward: in one step)
    units: int  # of each row of W in one step (backward: in one program)
    bm: int  # rows of x in one program
    per_split: int  # units of K (backward: rows of N) in one program
    splits: int
    warps: int


def plan_forward(m: int, n: int, k: int, block_size: int, dtype: torch.dtype, processors: int) -> Plan:
    """The plan of y [m, n] = x Wᵀ, W [n, k]: enough programs to fill the card, or K is split."""
    unit = unit_of(k, block_size)
    few = m <= FEW_ROWS
    if few:
        # Registers hold rows x units x bm sums: as many as leave room for several programs on a processor.
        bm, warps, units = _power_of_2(m), 4, k // unit
        rows, step = 8, min(16 // bm, _power_of_2(units)) * 64 // unit
        if units % step and step > 1 and units < 4 * step:
            step //= 2  # fewer idle units at the end of a short row
        shortest = 4 * step
    else:
        bm, deep, warps = _tile(m, dtype)
        unit = min(unit, deep)
        rows, step, shortest = 64, deep // unit, SHORTEST // unit
    programs = -(-n // rows) * (1 if few else -(-m // bm))
    per_split, splits = _split(k // unit, step, shortest, programs, processors * (4 if few else 1))
    return Plan(few, unit, rows, step, bm, per_split, splits, warps)


def plan_backward(m: int, n: int, k: int, block_size: int, dtype: torch.dtype, processors: int) -> Plan:
    """The plan of dx [m, k] = dy W: as the forward, with the sum running over N."""
    unit = unit_of(k, block_size)
    bm, deep, warps = _tile(m, dtype)
    programs = -(-k // 64) * -(-m // bm)
    per_split, splits = _split(n, deep, SHORTEST, programs, processors)
    return Plan(False, unit, deep, 64 // unit, bm, per_split, splits, warps)


def _tile(m: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """(rows of x in one program, terms of the sum in one step, warps); a program always has 64 columns of y.

    16-bit operands of tensor cores stay in shared memory, so registers hold the sums and the tile of W in passing.
    float32 has no tensor core (tf32 would cut it to 10 bits), and the compiler writes out all fma of a step, with what
    they need in registers: (rows + columns) of a thread x terms. 128 x 64 x 64 terms spilled 5 KB per thread, 32 x 64 x
    32 took 255 registers, all there are, and 32 x 64 x 16 takes 128, which leaves a processor four programs.
    """
    if dtype == torch.float32:
        return max(16, min(32, _power_of_2(m))), 16, 4
    bm = max(16, min(128, _power_of_2(m)))
    return bm, 64, 8 if bm == 128 else 4


def _power_of_2(m: int) -> int:
    return 1 << (m - 1).bit_length()


def _split(length: int, step: int, shortest: int, programs: int, wanted: int) -> tuple[int, int]:
    """(length of a part, a multiple of `step`; number of parts) such that parts x programs is about `wanted`."""
    parts = max(1, min(wanted // programs, length // shortest, MAX_SPLITS))
    per_split = -(-length // (parts * step)) * step
    return per_split, -(-length // per_split)
