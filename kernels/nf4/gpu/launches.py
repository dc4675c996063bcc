"""The launches of the Triton kernels. Arguments have been checked in checks.py.

Triton is imported by the first launch, so that a machine without a GPU never loads it. With TRITON_INTERPRET=1 set
before that, the kernels run on tensors of the CPU, in numpy: slow, and how they are tested where there is no GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...dispatch import launching_on, processors
from ..checks import QuantizationError
from ..codebook import BUCKETS, Kind, buckets, dynamic_table, table, thresholds
from ..reference import name_nonfinite
from ..tensor import QuantizedTensor
from .plan import Plan, plan_backward, plan_forward

TILE = 4096  # elements of one program of dequantize: 16 bytes of packed input to each of 128 threads
QUANTIZE_TILE = 8192  # 64 elements share the addresses and barriers of a thread: 96 registers; 128 elements, 170


def quantize(w: Tensor, *, kind: Kind, block_size: int) -> tuple[Tensor, Tensor]:
    """As reference.quantize."""
    from .triton_quantize import quantize_kernel

    w = w.detach()
    numel = w.numel()
    packed = torch.empty((numel + 1) // 2, dtype=torch.uint8, device=w.device)
    absmax = torch.empty(-(-numel // block_size), dtype=torch.float32, device=w.device)
    _, codes = thresholds(kind, w.device)
    options = {"BLOCK_SIZE": block_size, "BUCKETS": BUCKETS[kind], "IN_ORDER": kind == "nf4"}
    whole = numel // block_size
    length = whole * block_size
    with launching_on(w):
        if whole:
            at_once = QUANTIZE_TILE // block_size
            words = packed[: length // 2].view(torch.int32)  # a block is 16 bytes or more
            quantize_kernel[(-(-whole // at_once),)](
                w, buckets(kind, w.device), codes, words, absmax, 0, length, length // 2,
                BLOCKS=at_once, RAGGED=False, **options,
            )  # fmt: skip
        if numel > length:
            quantize_kernel[(1,)](
                w, buckets(kind, w.device), codes, packed, absmax, whole, numel, packed.numel(),
                BLOCKS=1, RAGGED=True, **options,
            )  # fmt: skip
    if not torch.isfinite(absmax).all():
        raise QuantizationError(name_nonfinite(w))
    return packed, absmax


def _scales(q: QuantizedTensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four arguments that load_scales takes; where there is no double quantization three are not read."""
    dynamic = dynamic_table(q.absmax.device)
    return (q.absmax, q.nested.absmax, q.nested.offset, dynamic) if q.nested else (q.absmax, dynamic, dynamic, dynamic)


def dequantize(q: QuantizedTensor, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    """As reference.dequantize."""
    from .triton_dequantize import dequantize_kernel

    if out is None:
        out = torch.empty(q.shape, dtype=dtype, device=q.packed.device)
    with launching_on(out):
        dequantize_kernel[(-(-q.numel // TILE),)](
            q.packed, *_scales(q), table(q.kind, out.device), out, q.numel, (q.numel + 1) // 2,
            BLOCK_SIZE=q.block_size, NESTED=q.nested is not None, TILE=TILE,
        )  # fmt: skip
    return out


def matmul(x: Tensor, q: QuantizedTensor) -> Tensor:
    """y = x Wᵀ: x [..., K] -> y [..., N]; both K and block_size are multiples of 32."""
    from .triton_matmul import few_rows_kernel, many_rows_kernel

    n, k = q.shape
    flat = x.resolve_neg().reshape(-1, k).contiguous()
    m = flat.shape[0]
    plan = plan_forward(max(m, 1), n, k, q.block_size, x.dtype, processors(x.device))
    y, sums = _results(flat, n, plan.splits)
    programs = -(-n // plan.rows)
    arguments = (flat, *_weight(q), sums, m, n, k // plan.unit, plan.per_split)
    options = _options(q, plan)
    with launching_on(x):
        if m and plan.few:
            few_rows_kernel[(programs, plan.splits)](*arguments, **options, ROWS=plan.rows)
        elif m:
            grid = (-(-m // plan.bm), programs, plan.splits)
            many_rows_kernel[grid](*arguments, **options, BN=plan.rows)
        _add_splits(sums, y, plan.splits)
    return y.view(*x.shape[:-1], n)


def matmul_backward(dy: Tensor, q: QuantizedTensor) -> Tensor:
    """dx = dy W: dy [..., N] -> dx [..., K]; both K and block_size are multiples of 32."""
    from .triton_matmul import backward_kernel

    n, k = q.shape
    flat = dy.resolve_neg().reshape(-1, n).contiguous()
    m = flat.shape[0]
    plan = plan_backward(max(m, 1), n, k, q.block_size, dy.dtype, processors(dy.device))
    dx, sums = _results(flat, k, plan.splits)
    with launching_on(dy):
        if m:
            units = k // plan.unit
            backward_kernel[(-(-m // plan.bm), -(-units // plan.units), plan.splits)](
                flat, *_weight(q), sums, m, n, units, plan.per_split, **_options(q, plan), BN=plan.rows
            )
        _add_splits(sums, dx, plan.splits)
    return dx.view(*dy.shape[:-1], k)


def _weight(q: QuantizedTensor) -> tuple[Tensor, ...]:
    return (_words(q.packed), *_scales(q), table(q.kind, q.packed.device))


def _options(q: QuantizedTensor, plan: Plan) -> dict[str, Any]:
    sizes = {"UNIT": plan.unit, "UNITS": plan.units, "BM": plan.bm, "num_warps": plan.warps}
    return {"BLOCK_SIZE": q.block_size, "NESTED": q.nested is not None, **sizes}


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
