"""Each operation as it runs: arguments checked, a backend chosen (backends.py), its function called.

ops.py calls these directly, and torch_ops.py registers them as operations of torch for what traces (torch.compile).

Products with a packed weight W [N, K]:   y = x Wᵀ   and its backward   dx = dy W.   The weight that a product in C
multiplies by is the float32 one of `dequantize` for x in float32 and float16. For x in bfloat16 it is rounded: to 15
bits, for most rows of x (cpu/fixed.c), or, from five rows on a matrix unit on, to bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import without_autocast
from . import cpu, gpu, reference, scratch
from .backends import choose_backend, why_not_c
from .checks import (
    FLOATS,
    QuantizationError,
    check_absmax,
    check_bias,
    check_block_size,
    check_kind,
    check_matrix,
    check_out,
    check_values,
    check_weight,
    check_x,
)
from .crossover import GPU_FUSED_ROWS, fused_rows
from .tensor import Nested, QuantizedTensor

QUANTIZE = {"triton": gpu.quantize, "c": cpu.quantize, "reference": reference.quantize}
# A 64th of the data: plain torch is fast enough for it on a GPU.
QUANTIZE_ABSMAX = {
    "triton": reference.quantize_absmax, "c": cpu.quantize_absmax, "reference": reference.quantize_absmax
}  # fmt: skip
DEQUANTIZE: dict[str, Callable[[QuantizedTensor, torch.dtype, Tensor | None], Tensor]] = {
    "triton": gpu.dequantize, "c": cpu.dequantize, "reference": reference.dequantize
}  # fmt: skip


def quantize_eager(
    w: Tensor, *, kind: str, block_size: int, double_quant: bool, backend: str | None = None
) -> QuantizedTensor:
    """As ops.quantize."""
    known = check_kind(kind)
    check_block_size(block_size)
    check_weight(w)
    check_values("w", w)
    packed, absmax = QUANTIZE[choose_backend(w.device, w.dtype, backend)](w, kind=known, block_size=block_size)
    nested = None
    if double_quant:
        absmax, nested = quantize_absmax_eager(absmax, backend=backend)
    return QuantizedTensor(
        packed=packed, absmax=absmax, nested=nested, shape=tuple(w.shape), kind=known, block_size=block_size,
        dtype=w.dtype,
    )  # fmt: skip


def quantize_absmax_eager(absmax: Tensor, *, backend: str | None = None) -> tuple[Tensor, Nested]:
    """As ops.quantize_absmax."""
    check_absmax(absmax)
    check_values("absmax", absmax)
    return QUANTIZE_ABSMAX[choose_backend(absmax.device, absmax.dtype, backend)](absmax)


def dequantize_eager(
    q: QuantizedTensor, *, dtype: torch.dtype, out: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """As ops.dequantize."""
    if dtype not in (*FLOATS, torch.float64):
        raise QuantizationError(f"dtype={dtype}: dequantize gives float32, float16, bfloat16 or float64")
    if out is not None:
        check_out(out, dtype, q.shape, q.parts)
    result = DEQUANTIZE[choose_backend(q.device, dtype, backend)](q, dtype, out)
    if out is not None and not out.is_inference():
        torch.autograd.graph.increment_version(out)  # so that autograd notices, should it have kept what was there
    return result


def matmul_eager(x: Tensor, q: QuantizedTensor, *, bias: Tensor | None = None, backend: str | None = None) -> Tensor:
    """As ops.matmul."""
    check_matrix(q.shape)
    n, k = q.shape
    check_x(x, k, q.device)
    check_bias(bias, n, x)
    obstacles = {"triton": _why_no_unit(q), "c": _why_not_fused(q)}
    if backend is None and x.numel() > fused_rows(x.dtype, x.device) * k:
        obstacles = {"triton": "x has many rows", "c": "x has many rows"}
    chosen = choose_backend(x.device, x.dtype, backend, obstacles=obstacles)
    if chosen == "reference":
        with without_autocast(x):
            return F.linear(x, _decode(q, x.dtype), bias)
    y = gpu.matmul(x, q) if chosen == "triton" else cpu.Matmul(q)(x)
    return y if bias is None else y.add_(bias)


def matmul_backward_eager(dy: Tensor, q: QuantizedTensor, *, backend: str | None = None) -> Tensor:
    """As ops.matmul_backward."""
    check_matrix(q.shape)
    n = q.shape[0]
    check_x(dy, n, q.device, name="dy")
    obstacles = {"triton": _why_no_unit(q), "c": _why_not_fused(q) or _why_no_backward(dy)}
    if backend is None and dy.numel() > GPU_FUSED_ROWS.get(dy.dtype, 0) * n:
        obstacles["triton"] = "dy has many rows"
    chosen = choose_backend(dy.device, dy.dtype, backend, obstacles=obstacles)
    if chosen == "triton":
        return gpu.matmul_backward(dy, q)
    if chosen == "c":
        return cpu.Matmul(q).backward(dy)
    with without_autocast(dy):
        return dy @ _decode(q, dy.dtype)


def prepare_matmul(q: QuantizedTensor) -> cpu.Matmul | None:
    """`matmul` in C over this W [N, K], looked up once for all calls; None where it cannot run.

    Raises QuantizationError: q is not a matrix.
    """
    check_matrix(q.shape)
    if why_not_c(q.device, torch.float32) or _why_not_fused(q):
        return None
    return cpu.Matmul(q)


def _decode(q: QuantizedTensor, dtype: torch.dtype) -> Tensor:
    """W in `dtype`, for immediate use: on the CPU the next call overwrites it."""
    out = scratch.take(q.shape, dtype) if q.device.type == "cpu" else None
    return DEQUANTIZE[choose_backend(q.device, dtype, None)](q, dtype, out)


def _why_no_backward(dy: Tensor) -> str | None:
    if dy.dtype == torch.bfloat16 and why_not_c(dy.device, torch.bfloat16) is None and cpu.has_matrix_unit():
        return None
    return "its C kernel takes bfloat16 on a processor with AMX: otherwise W is decoded, then multiplied"


def _why_no_unit(q: QuantizedTensor) -> str | None:
    if gpu.unit_of(q.shape[1], q.block_size) == 0:
        return f"K={q.shape[1]}, and it takes K that is a multiple of 32"
    return None


def _why_not_fused(q: QuantizedTensor) -> str | None:
    k = q.shape[1]
    if k % cpu.UNIT or k > cpu.MAX_IN_FEATURES or q.block_size < cpu.UNIT:
        return (
            f"K={k} and block_size={q.block_size}, and it takes K that is a multiple of {cpu.UNIT} "
            f"up to {cpu.MAX_IN_FEATURES}, and block_size from {cpu.UNIT}"
        )
    return None
