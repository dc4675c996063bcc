"""Products with a packed weight W [N, K]:   y = x Wᵀ   and its backward   dx = dy W.

For few rows no decoded weight exists. For many, W is decoded and the platform's GEMM multiplies: from some number of
rows on, that makes up for the decoding. Where, depends on the dtype and the machine; the tables below say up to how
many rows the fused product is taken, and the README how they were measured. A processor with a matrix unit multiplies
any number of rows of bfloat16 straight from the packed weight, forward and backward.

The weight that a product in C multiplies by is the float32 one of `dequantize` for x in float32 and float16. For x in
bfloat16 it is rounded: to 15 bits, for most rows of x (fixed.c), or, from five rows on a matrix unit on, to bfloat16.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import is_traced, without_autocast
from ..native import ISAS
from . import cpu, gpu, scratch
from .backends import choose_backend, why_not_c
from .checks import Packed, check_bias, check_packed, check_x
from .errors import QuantizationError
from .ops import DEQUANTIZE
from .reference import Nested

FUSED_ROWS = {torch.float32: 24, torch.float16: 16, torch.bfloat16: 128}  # on any processor, and these on some:
_OF_AVX512 = {torch.float32: 64, torch.float16: 24, torch.bfloat16: 128}
FUSED_ROWS_AT = {
    "avx2": FUSED_ROWS | {torch.float16: 128},
    "avx512": _OF_AVX512,
    "vnni": _OF_AVX512,
    "amx": _OF_AVX512 | {torch.bfloat16: sys.maxsize},
}
# On a GPU; not measured. A fused product decodes W once per 128 rows (float32: 32), dequantize and cuBLAS once in all.
GPU_FUSED_ROWS = {torch.float32: 32, torch.float16: 128, torch.bfloat16: 128}


def matmul(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    *,
    shape: Sequence[int],
    kind: str = "nf4",
    block_size: int = 64,
    nested: Nested | None = None,
    bias: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """y = x Wᵀ + b, where W [N, K] is what `dequantize` gives for the other arguments.

    x:       [..., K], float32, float16, bfloat16, or (reference only) float64.
    shape:   (N, K); packed, absmax, nested, kind, block_size as for dequantize.
    bias:    [N] in the dtype of x. A fused product rounds y before it adds the bias, the platform's GEMM after.
    backend: "triton" and "c" multiply the packed weight, in float32 sums. "reference" decodes it to the dtype
             of x first. None takes a fused one for few rows (FUSED_ROWS[dtype], GPU_FUSED_ROWS) where it can run.
    Returns y [..., N] in the dtype of x. It has no gradient: see quant.QuantizedLinear.
    Raises QuantizationError: an argument that does not fit, or a named backend that cannot run.
    """
    if backend is None and is_traced():
        from .torch_ops import nf4_matmul

        check_x(x, shape, packed.device)
        check_bias(bias, shape[0], x)
        parts = (packed, absmax, *(nested or (None, None)))
        recorded: Tensor = nf4_matmul(x, *parts, shape[0], kind, block_size)
        return recorded if bias is None else recorded + bias
    return matmul_now(
        x, packed, absmax, shape=shape, kind=kind, block_size=block_size, nested=nested, bias=bias, backend=backend
    )


def matmul_now(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    *,
    shape: Sequence[int],
    kind: str,
    block_size: int,
    nested: Nested | None,
    bias: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """`matmul`, whoever looks on."""
    w = check_packed(packed, absmax, nested, shape, kind, block_size)
    check_x(x, shape, packed.device)
    x = x.resolve_neg()
    check_bias(bias, shape[0], x)
    obstacles = {"triton": _why_no_unit(shape, block_size), "c": _why_not_fused(shape, block_size)}
    if backend is None and x.numel() > fused_rows(x.dtype, x.device) * shape[1]:
        obstacles = {"triton": "x has many rows", "c": "x has many rows"}
    chosen = choose_backend(x.device, x.dtype, backend, obstacles=obstacles)
    if chosen == "triton":
        y = gpu.matmul(x, w)
    elif chosen == "c":
        y = cpu.Matmul(w)(x.contiguous())
    else:
        with without_autocast(x):
            return F.linear(x, _decode(w, x.dtype), bias)
    return y if bias is None else y.add_(bias)


def matmul_backward(
    dy: Tensor,
    packed: Tensor,
    absmax: Tensor,
    *,
    shape: Sequence[int],
    kind: str = "nf4",
    block_size: int = 64,
    nested: Nested | None = None,
    backend: str | None = None,
) -> Tensor:
    """dx = dy W, the gradient of `matmul` with respect to x; W [N, K] is frozen and has none.

    dy:      [..., N], float32, float16, bfloat16, or (reference only) float64; the rest as for matmul.
    backend: "triton", and "c" on a processor with a matrix unit and in bfloat16, multiply the packed weight.
             "reference" decodes it to the dtype of dy first, as does None where neither of the two runs, or on a GPU
             for more than GPU_FUSED_ROWS[dtype] rows.
    Returns dx [..., K] in the dtype of dy.
    Raises QuantizationError: an argument that does not fit, or a named backend that cannot run.
    """
    if backend is None and is_traced():
        from .torch_ops import nf4_matmul_backward

        check_x(dy, _turned(shape), packed.device, name="dy")
        parts = (packed, absmax, *(nested or (None, None)))
        recorded: Tensor = nf4_matmul_backward(dy, *parts, shape[1], kind, block_size)
        return recorded
    return matmul_backward_now(
        dy, packed, absmax, shape=shape, kind=kind, block_size=block_size, nested=nested, backend=backend
    )


def matmul_backward_now(
    dy: Tensor,
    packed: Tensor,
    absmax: Tensor,
    *,
    shape: Sequence[int],
    kind: str,
    block_size: int,
    nested: Nested | None,
    backend: str | None = None,
) -> Tensor:
    """`matmul_backward`, whoever looks on."""
    w = check_packed(packed, absmax, nested, shape, kind, block_size)
    check_x(dy, _turned(shape), packed.device, name="dy")
    dy = dy.resolve_neg()
    obstacles = {
        "triton": _why_no_unit(shape, block_size),
        "c": _why_not_fused(shape, block_size) or _why_no_backward(dy),
    }
    if backend is None and dy.numel() > GPU_FUSED_ROWS.get(dy.dtype, 0) * shape[0]:
        obstacles["triton"] = "dy has many rows"
    chosen = choose_backend(dy.device, dy.dtype, backend, obstacles=obstacles)
    if chosen == "triton":
        return gpu.matmul_backward(dy, w)
    if chosen == "c":
        return cpu.Matmul(w).backward(dy.contiguous())
    with without_autocast(dy):
        return dy @ _decode(w, dy.dtype)


def _turned(shape: Sequence[int]) -> Sequence[int]:
    return (shape[1], shape[0]) if len(shape) == 2 else shape


def _decode(w: Packed, dtype: torch.dtype) -> Tensor:
    """W in `dtype`, for immediate use: on the CPU the next call overwrites it."""
    out = scratch.take(w.shape, dtype) if w.packed.device.type == "cpu" else None
    return DEQUANTIZE[choose_backend(w.packed.device, dtype, None)](w, dtype, out)


def prepare_matmul(
    packed: Tensor,
    absmax: Tensor,
    *,
    shape: Sequence[int],
    kind: str = "nf4",
    block_size: int = 64,
    nested: Nested | None = None,
) -> cpu.Matmul | None:
    """`matmul` in C over this W, its arguments checked once for all calls; None where it cannot run.

    Raises QuantizationError: an argument that does not fit.
    """
    w = check_packed(packed, absmax, nested, shape, kind, block_size)
    if len(shape) != 2:
        raise QuantizationError(f"shape={list(shape)}: the weight of a product has shape [N, K]")
    if why_not_c(packed.device, torch.float32) or _why_not_fused(shape, block_size):
        return None
    return cpu.Matmul(w)


def fused_rows(dtype: torch.dtype, device: torch.device) -> int:
    """Up to how many rows of x `matmul` multiplies W without decoding it first."""
    if device.type == "cuda":
        return GPU_FUSED_ROWS.get(dtype, 0)
    here = {} if why_not_c(device, torch.float32) else FUSED_ROWS_AT.get(ISAS[cpu.isa()], {})
    return here.get(dtype, FUSED_ROWS.get(dtype, 0))


def _multiplies_bfloat16(device: torch.device) -> bool:
    return why_not_c(device, torch.bfloat16) is None and cpu.has_matrix_unit()


def _why_no_backward(dy: Tensor) -> str | None:
    if dy.dtype == torch.bfloat16 and _multiplies_bfloat16(dy.device):
        return None
    return "its C kernel takes bfloat16 on a processor with AMX: otherwise W is decoded, then multiplied"


def _why_no_unit(shape: Sequence[int], block_size: int) -> str | None:
    if gpu.unit_of(shape[1], block_size) == 0:
        return f"K={shape[1]}, and it takes K that is a multiple of 32"
    return None


def _why_not_fused(shape: Sequence[int], block_size: int) -> str | None:
    if shape[1] % cpu.UNIT or shape[1] > cpu.MAX_IN_FEATURES or block_size < cpu.UNIT:
        return (
            f"K={shape[1]} and block_size={block_size}, and it takes K that is a multiple of {cpu.UNIT} "
            f"up to {cpu.MAX_IN_FEATURES}, and block_size from {cpu.UNIT}"
        )
    return None
