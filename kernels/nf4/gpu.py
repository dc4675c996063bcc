"""The launches of the Triton kernels. Arguments have been checked in ops.py.

Triton is imported by the first launch, so that a machine without a GPU never loads it. With TRITON_INTERPRET=1 set
before that, the kernels run on tensors of the CPU, in numpy: slow, and how they are tested where there is no GPU.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dispatch import launching_on, processors
from .checks import Packed
from .codebook import Kind, dynamic_table, table, thresholds
from .errors import QuantizationError
from .reference import name_nonfinite

TILE = 4096  # elements of one program of quantize and dequantize: 16 bytes of packed input to each of 128 threads
FEW_ROWS = 2  # of x; with 4, tensor cores need fewer instructions although 12 of their 16 rows idle (ROOFLINE.md)
MAX_SPLITS = 32


def quantize(w: Tensor, *, kind: Kind, block_size: int) -> tuple[Tensor, Tensor]:
    """As reference.quantize."""
    from .triton_quantize import quantize_kernel

    w = w.detach()
    numel = w.numel()
    packed = torch.empty((numel + 1) // 2, dtype=torch.uint8, device=w.device)
    absmax = torch.empty(-(-numel // block_size), dtype=torch.float32, device=w.device)
    tree, codes = decision_tree(kind, w.device)
    with launching_on(w):
        whole = numel // block_size
        at_once = TILE // block_size
        arguments = (w, tree, codes, packed, absmax)
        if whole:
            quantize_kernel[(-(-whole // at_once),)](
                *arguments, 0, whole * block_size, whole * block_size // 2,
                BLOCK_SIZE=block_size, BLOCKS=at_once, RAGGED=False,
            )  # fmt: skip
        if numel % block_size:
            quantize_kernel[(1,)](
                *arguments, whole, numel, packed.numel(), BLOCK_SIZE=block_size, BLOCKS=1, RAGGED=True
            )  # fmt: skip
    if not torch.isfinite(absmax).all():
        raise QuantizationError(name_nonfinite(w))
    return packed, absmax


@lru_cache(maxsize=16)
def decision_tree(kind: Kind, device: torch.device) -> tuple[Tensor, Tensor]:
    """(float32 [4, 16] thresholds by level and path, uint8 [16] code of each path): see quantize.c.

    The first decision is bit 0 of a path, so a path read backwards is the place among the thresholds.
    """
    bounds, codes = (part.tolist() for part in thresholds(kind, torch.device("cpu")))
    place = [int(f"{path:04b}"[::-1], 2) for path in range(16)]
    tree = torch.zeros(4, 16, device="cpu")
    for level in range(4):
        for path in range(1 << level):
            tree[level, path] = bounds[place[path] + (8 >> level) - 1]
    return tree.to(device), torch.tensor([codes[p] for p in place], dtype=torch.uint8, device=device)


def _scales(w: Packed) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four arguments that load_scales takes; where there is no double quantization three are not read."""
    dynamic = dynamic_table(w.absmax.device)
    return (w.absmax, w.nested.absmax, w.nested.offset, dynamic) if w.nested else (w.absmax, dynamic, dynamic, dynamic)


def dequantize(w: Packed, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    """As ops.dequantize."""
    from .triton_dequantize import dequantize_kernel

    if out is None:
        out = torch.empty(w.shape, dtype=dtype, device=w.packed.device)
    with launching_on(out):
        dequantize_kernel[(-(-w.numel // TILE),)](
            w.packed, *_scales(w), table(w.kind, out.device), out, w.numel, (w.numel + 1) // 2,
            BLOCK_SIZE=w.block_size, NESTED=w.nested is not None, TILE=TILE,
        )  # fmt: skip
    return out


def unit_of(in_features: int, block_size: int) -> int:
    """Elements of a row that share one scale for certain, wherever blocks begin: 64, 32, or 0 where it is fewer."""
    for unit in (64, 32):
        if in_features % unit == 0 and block_size % unit == 0:
            return unit
    return 0


class Plan(NamedTuple):
    """How a product is divided among programs."""

    few: bool  # rows of x
    rows: int  # of W in one program (backward: in one step)
    units: int  # of each row of W in one step (backward: in one program)
    bm: int  # rows of x in one program
    per_split: int  # units of K (backward: rows of N) in one program
    splits: int
    warps: int


def plan_forward(m: int, n: int, units: int, unit: int, processors: int) -> Plan:
    """The plan of y [m, n] = x Wᵀ: enough programs to fill the card, or K is split."""
    few = m <= FEW_ROWS
    if few:
        # Registers hold rows x units x bm sums: as many as leave room for several programs on a processor.
        bm = _power_of_2(m)
        rows, step = 8, min(16 // bm, _power_of_2(units)) * 64 // unit
        if units % step and step > 1 and units < 4 * step:
            step //= 2  # fewer idle units at the end of a short row
    else:
        rows, step, bm = 64, 64 // unit, max(16, min(128, _power_of_2(m)))
    programs = -(-n // rows) * (1 if few else -(-m // bm))
    per_split, splits = _split(units, step, programs, processors * (4 if few else 1))
    return Plan(few, rows, step, bm, per_split, splits, 8 if bm == 128 else 4)


def plan_backward(m: int, n: int, units: int, unit: int, processors: int) -> Plan:
    """The plan of dx [m, K] = dy W: as the forward, with the sum running over N."""
    rows, step, bm = 64, 64 // unit, max(16, min(128, _power_of_2(m)))
    programs = -(-units // step) * -(-m // bm)
    per_split, splits = _split(n, rows, programs, processors)
    return Plan(False, rows, step, bm, per_split, splits, 8 if bm == 128 else 4)


def _power_of_2(m: int) -> int:
    return 1 << (m - 1).bit_length()


def _split(length: int, step: int, programs: int, wanted: int) -> tuple[int, int]:
    """(length of a part, a multiple of `step`; number of parts) such that parts x programs is about `wanted`."""
    steps = -(-length // step)
    parts = max(1, min(wanted // programs, steps // 4, MAX_SPLITS))
    per_split = -(-steps // parts) * step
    return per_split, -(-length // per_split)


def matmul(x: Tensor, w: Packed) -> Tensor:
    """Y = x Wᵀ: x [..., K] -> y [..., N]; both K and block_size are multiples of 32."""
    from .triton_matmul import few_rows_kernel, many_rows_kernel

    n, k = w.shape
    unit = unit_of(k, w.block_size)
    flat = x.reshape(-1, k).contiguous()
    m = flat.shape[0]
    plan = plan_forward(max(m, 1), n, k // unit, unit, processors(x.device))
    y, sums = _results(flat, n, plan.splits)
    programs = -(-n // plan.rows)
    arguments = (flat, *_weight(w), sums, m, n, k // unit, plan.per_split)
    options = {**_options(w, unit), "UNITS": plan.units, "BM": plan.bm, "num_warps": plan.warps}
    with launching_on(x):
        if m and plan.few:
            few_rows_kernel[(programs, plan.splits)](*arguments, **options, ROWS=plan.rows)
        elif m:
            grid = (-(-m // plan.bm), programs, plan.splits)
            many_rows_kernel[grid](*arguments, **options, BN=plan.rows)
        _add_splits(sums, y, plan.splits)
    return y.view(*x.shape[:-1], n)


def matmul_backward(dy: Tensor, w: Packed) -> Tensor:
    """Dx = dy W: dy [..., N] -> dx [..., K]; both K and block_size are multiples of 32."""
    from .triton_matmul import backward_kernel

    n, k = w.shape
    unit = unit_of(k, w.block_size)
    flat = dy.reshape(-1, n).contiguous()
    m = flat.shape[0]
    plan = plan_backward(max(m, 1), n, k // unit, unit, processors(dy.device))
    dx, sums = _results(flat, k, plan.splits)
    options = {**_options(w, unit), "UNITS": plan.units, "BM": plan.bm, "num_warps": plan.warps}
    with launching_on(dy):
        if m:
            backward_kernel[(-(-m // plan.bm), -(-(k // unit) // plan.units), plan.splits)](
                flat, *_weight(w), sums, m, n, k // unit, plan.per_split,
                **options, BN=plan.rows,
            )  # fmt: skip
        _add_splits(sums, dx, plan.splits)
    return dx.view(*dy.shape[:-1], k)


def _weight(w: Packed) -> tuple[Tensor, ...]:
    return (_words(w.packed), *_scales(w), table(w.kind, w.packed.device))


def _options(w: Packed, unit: int) -> dict[str, Any]:
    return {"BLOCK_SIZE": w.block_size, "UNIT": unit, "NESTED": w.nested is not None}


def _words(packed: Tensor) -> Tensor:
    """Packed bytes as int32; where they do not begin on a word (a slice of a larger tensor), a copy at each call."""
    flat = packed.view(-1)
    return (flat if flat.data_ptr() % 4 == 0 else flat.clone()).view(torch.int32)


def _results(x: Tensor, columns: int, splits: int) -> tuple[Tensor, Tensor]:
    """The result [m, columns], and where the programs write: the result itself, or float32 sums of each split."""
    y = x.new_empty(x.shape[0], columns)
    return y, y if splits == 1 else x.new_empty(splits, *y.shape, dtype=torch.float32)


def _add_splits(sums: Tensor, out: Tensor, splits: int) -> None:
    from .triton_matmul import add_splits_kernel

    if splits > 1 and out.numel():
        add_splits_kernel[(-(-out.numel() // 1024),)](sums, out, out.numel(), SPLITS=splits, TILE=1024)
