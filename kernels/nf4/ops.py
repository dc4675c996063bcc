"""The operations, their argument checks, and the choice of backend.

Every backend of an operation gives the same bits, so the choice is only about speed. `backend=None` takes the
C kernel for tensors on the CPU when it could be compiled, and the reference for everything else; a backend
that is named must run, or QuantizationError says why it cannot. Arguments are checked here, once, for all
backends: past checks.py no kernel can read or write out of bounds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..native import NativeBuildError
from . import cpu, reference
from .checks import FLOATS, check_absmax, check_block_size, check_out, check_packed, check_weight, check_x
from .codebook import Kind, check_kind
from .errors import QuantizationError
from .reference import Nested

# Up to so many rows of x the fused product is faster than decoding W and the platform's GEMM (README.md).
FUSED_ROWS = {torch.float32: 24, torch.float16: 16, torch.bfloat16: 12}


class BackendStatus(NamedTuple):
    """One line of `qlorag inspect --backends`."""

    operation: str
    backend: str
    available: bool
    detail: str  # how it runs, or why it cannot


def quantize(
    w: Tensor, *, kind: str = "nf4", block_size: int = 64, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Code = nearest(table, w / absmax), two codes to a byte (reference.py has the exact rule).

    w:       float32, float16 or bfloat16, any shape, contiguous, all finite.
    backend: "c", "reference", or None to choose.
    Returns packed uint8 [ceil(numel / 2)] and absmax float32 [ceil(numel / block_size)].
    Raises QuantizationError: wrong dtype, empty, not finite, no such kind or block_size, or a named backend
        that cannot run.
    """
    known = check_kind(kind)
    check_block_size(block_size)
    check_weight(w)
    return QUANTIZE[choose_backend(w.device, w.dtype, backend)](w, kind=known, block_size=block_size)


def quantize_absmax(absmax: Tensor, *, backend: str | None = None) -> tuple[Tensor, Nested]:
    """8-bit codes of `absmax - mean(absmax)`, and what decodes them: double quantization.

    absmax: float32 [blocks], contiguous. Returns codes uint8 [blocks] and Nested.
    Raises QuantizationError: wrong dtype or shape, not finite, or a named backend that cannot run.
    """
    check_absmax(absmax)
    return QUANTIZE_ABSMAX[choose_backend(absmax.device, absmax.dtype, backend)](absmax)


def dequantize(
    packed: Tensor,
    absmax: Tensor,
    *,
    shape: Sequence[int],
    kind: str = "nf4",
    block_size: int = 64,
    dtype: torch.dtype = torch.float32,
    nested: Nested | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """w[i] = table[code[i]] * absmax[i // block_size]      (QLoRA, arXiv:2305.14314, section 3)

    packed:  uint8 [ceil(numel / 2)]; element 2i sits in the high nibble of byte i.
    absmax:  float32 [ceil(numel / block_size)], or with `nested` uint8 of that length.
    shape:   of the result; numel is its product.
    dtype:   of the result: float32, float16, bfloat16, or (reference only) float64. The product is float32
             and is rounded once.
    out:     contiguous tensor of `shape` and `dtype` to write into: a fresh one costs page faults.
    backend: "c", "reference", or None to choose.
    Returns the result (`out` itself if given).
    Raises QuantizationError: an argument that does not fit, or a named backend that cannot run.
    """
    known = check_kind(kind)
    check_packed(packed, absmax, nested, shape, block_size)
    if dtype not in (*FLOATS, torch.float64):
        raise QuantizationError(f"dtype={dtype}: dequantize gives float32, float16, bfloat16 or float64")
    if out is not None:
        check_out(out, shape, dtype, packed.device)
    run = DEQUANTIZE[choose_backend(packed.device, dtype, backend)]
    return run(packed, absmax, nested, tuple(shape), known, block_size, dtype, out)


def _dequantize_reference(
    packed: Tensor,
    absmax: Tensor,
    nested: Nested | None,
    shape: tuple[int, ...],
    kind: Kind,
    block_size: int,
    dtype: torch.dtype,
    out: Tensor | None,
) -> Tensor:
    if nested is not None:
        absmax = reference.dequantize_absmax(absmax, nested)
    result = reference.dequantize(packed.view(-1), absmax, shape=shape, kind=kind, block_size=block_size, dtype=dtype)
    return result if out is None else out.copy_(result)


def matmul(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    *,
    shape: Sequence[int],
    kind: str = "nf4",
    block_size: int = 64,
    nested: Nested | None = None,
    backend: str | None = None,
) -> Tensor:
    """Y = x Wᵀ, where W [N, K] is what `dequantize` gives for the other arguments.

    x:       [..., K], float32, float16, bfloat16, or (reference only) float64.
    shape:   (N, K); packed, absmax, nested, kind, block_size as for dequantize.
    backend: "c" multiplies the packed weight, in float32 sums (matmul.c). "reference" decodes it to the dtype
             of x first. None takes "c" for up to FUSED_ROWS[dtype] rows where it can run.
    Returns y [..., N] in the dtype of x. It has no gradient: see quant.QuantizedLinear.
    Raises QuantizationError: an argument that does not fit, or a named backend that cannot run.
    """
    known = check_kind(kind)
    check_packed(packed, absmax, nested, shape, block_size)
    check_x(x, shape, packed.device)
    obstacle = _why_not_fused(shape, block_size)
    if backend is None and x.numel() > FUSED_ROWS.get(x.dtype, 0) * shape[1]:
        obstacle = "x has many rows"
    if choose_backend(x.device, x.dtype, backend, obstacle=obstacle) == "c":
        return cpu.Matmul(packed, absmax, nested, (shape[0], shape[1]), known, block_size)(x.contiguous())
    weight = dequantize(packed, absmax, shape=shape, kind=kind, block_size=block_size, dtype=x.dtype, nested=nested)
    return F.linear(x, weight)


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
    known = check_kind(kind)
    check_packed(packed, absmax, nested, shape, block_size)
    if _why_not_c(packed.device, torch.float32) or _why_not_fused(shape, block_size):
        return None
    return cpu.Matmul(packed, absmax, nested, (shape[0], shape[1]), known, block_size)


QUANTIZE = {"c": cpu.quantize, "reference": reference.quantize}
QUANTIZE_ABSMAX = {"c": cpu.quantize_absmax, "reference": reference.quantize_absmax}
Dequantize = Callable[
    [Tensor, Tensor, "Nested | None", tuple[int, ...], Kind, int, torch.dtype, "Tensor | None"], Tensor
]
DEQUANTIZE: dict[str, Dequantize] = {"c": cpu.dequantize, "reference": _dequantize_reference}


def choose_backend(
    device: torch.device, dtype: torch.dtype, backend: str | None, *, obstacle: str | None = None
) -> str:
    """The backend to use: `backend` itself if it can run, else the fastest that can.

    obstacle: why C cannot, or should not, run, apart from device, dtype and compiler.
    """
    if backend is None:
        return "c" if (obstacle or _why_not_c(device, dtype)) is None else "reference"
    if backend not in DEQUANTIZE:
        raise QuantizationError(f"backend={backend!r} does not exist: there are {', '.join(DEQUANTIZE)}")
    if backend == "c" and (why := obstacle or _why_not_c(device, dtype)) is not None:
        raise QuantizationError(f"backend='c' cannot run: {why}")
    return backend


def _why_not_c(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return f"the tensors are on {device}, and it runs on the CPU"
    if dtype not in FLOATS:
        return f"dtype={dtype}, and it takes float32, float16 or bfloat16"
    try:
        cpu.library()
    except NativeBuildError as error:
        return str(error)
    return None


def _why_not_fused(shape: Sequence[int], block_size: int) -> str | None:
    if shape[1] % cpu.UNIT or shape[1] > cpu.MAX_IN_FEATURES or block_size < cpu.UNIT:
        return (
            f"K={shape[1]} and block_size={block_size}, and it takes K that is a multiple of {cpu.UNIT} "
            f"up to {cpu.MAX_IN_FEATURES}, and block_size from {cpu.UNIT}"
        )
    return None


def available_backends() -> list[BackendStatus]:
    """What can run here, and how, or why not."""
    why = _why_not_c(torch.device("cpu"), torch.float32)
    detail = why or ""
    if why is None:
        try:
            detail = cpu.describe()
        except QuantizationError as error:  # QLORAG_CPU_LEVEL is wrong
            why = detail = str(error)
    return [
        status
        for operation in ("nf4.quantize", "nf4.dequantize", "nf4.matmul")
        for status in (
            BackendStatus(operation, "c", why is None, detail),
            BackendStatus(operation, "reference", True, "plain torch, any device"),
        )
    ]
