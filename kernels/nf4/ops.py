"""The operations, their argument checks, and the choice of backend.

Every backend of an operation gives the same bits, so the choice is only about speed. `backend=None` takes the
C kernel for tensors on the CPU when it could be compiled, and the reference for everything else; a backend
that is named must run, or QuantizationError says why it cannot. Arguments are checked here, once, for all
backends: past `_check_packed` no kernel can read or write out of bounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..native import NativeBuildError
from . import cpu, reference
from .codebook import Kind, check_kind
from .errors import QuantizationError
from .reference import NESTED_BLOCK_SIZE, Nested

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


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
    _check_block_size(block_size)
    if w.dtype not in FLOATS:
        raise QuantizationError(
            f"w is {w.dtype}: quantize takes float32, float16 or bfloat16; convert it first"
        )
    if w.numel() == 0:
        raise QuantizationError(f"w has shape {list(w.shape)}, no elements: there is nothing to quantize")
    if not w.is_contiguous():
        raise QuantizationError(
            f"w with shape {list(w.shape)} and strides {w.stride()} is not contiguous: pass w.contiguous()"
        )
    return QUANTIZE[choose_backend(w.device, w.dtype, backend)](w, kind=known, block_size=block_size)


def quantize_absmax(absmax: Tensor, *, backend: str | None = None) -> tuple[Tensor, Nested]:
    """8-bit codes of `absmax - mean(absmax)`, and what decodes them: double quantization.

    absmax: float32 [blocks], contiguous. Returns codes uint8 [blocks] and Nested.
    Raises QuantizationError: wrong dtype or shape, not finite, or a named backend that cannot run.
    """
    if absmax.dtype != torch.float32 or absmax.dim() != 1 or absmax.numel() == 0:
        raise QuantizationError(f"absmax is {absmax.dtype} {list(absmax.shape)}: wanted float32 [blocks]")
    if not absmax.is_contiguous():
        raise QuantizationError(
            f"absmax is not contiguous (strides {absmax.stride()}): pass absmax.contiguous()"
        )
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
    _check_packed(packed, absmax, nested, shape, block_size)
    if dtype not in (*FLOATS, torch.float64):
        raise QuantizationError(f"dtype={dtype}: dequantize gives float32, float16, bfloat16 or float64")
    if out is not None:
        _check_out(out, shape, dtype, packed.device)
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
    result = reference.dequantize(
        packed.view(-1), absmax, shape=shape, kind=kind, block_size=block_size, dtype=dtype
    )
    return result if out is None else out.copy_(result)


QUANTIZE = {"c": cpu.quantize, "reference": reference.quantize}
QUANTIZE_ABSMAX = {"c": cpu.quantize_absmax, "reference": reference.quantize_absmax}
Dequantize = Callable[
    [Tensor, Tensor, "Nested | None", tuple[int, ...], Kind, int, torch.dtype, "Tensor | None"], Tensor
]
DEQUANTIZE: dict[str, Dequantize] = {"c": cpu.dequantize, "reference": _dequantize_reference}


def choose_backend(device: torch.device, dtype: torch.dtype, backend: str | None) -> str:
    """The backend to use: `backend` itself if it can run, else the fastest that can."""
    if backend is None:
        return "c" if _why_not_c(device, dtype) is None else "reference"
    if backend not in DEQUANTIZE:
        raise QuantizationError(f"backend={backend!r} does not exist: there are {', '.join(DEQUANTIZE)}")
    if backend == "c" and (why := _why_not_c(device, dtype)) is not None:
        raise QuantizationError(f"backend='c' cannot run: {why}")
    return backend


def _why_not_c(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return f"the tensors are on {device}, and it runs on the CPU"
    if dtype not in FLOATS:
        return f"dtype={dtype}, and it gives float32, float16 or bfloat16"
    try:
        cpu.library()
    except NativeBuildError as error:
        return str(error)
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
        for operation in ("nf4.quantize", "nf4.dequantize")
        for status in (
            BackendStatus(operation, "c", why is None, detail),
            BackendStatus(operation, "reference", True, "plain torch, any device"),
        )
    ]


def _check_block_size(block_size: int) -> None:
    if block_size not in BLOCK_SIZES:
        raise QuantizationError(f"block_size={block_size}: use one of {', '.join(map(str, BLOCK_SIZES))}")


def _check_packed(
    packed: Tensor, absmax: Tensor, nested: Nested | None, shape: Sequence[int], block_size: int
) -> None:
    _check_block_size(block_size)
    if not shape or min(shape) < 1:
        raise QuantizationError(f"shape={list(shape)}: every dimension must be at least 1")
    numel = math.prod(shape)
    blocks = -(-numel // block_size)
    _check_part("packed", packed, torch.uint8, (numel + 1) // 2, packed.device)
    if nested is None:
        if absmax.dtype == torch.uint8:
            raise QuantizationError(
                "absmax is uint8 but nested is missing: pass nested=Nested(absmax, offset)"
            )
        _check_part("absmax", absmax, torch.float32, blocks, packed.device)
    else:
        _check_part("absmax", absmax, torch.uint8, blocks, packed.device)
        nested_blocks = -(-blocks // NESTED_BLOCK_SIZE)
        _check_part("nested.absmax", nested.absmax, torch.float32, nested_blocks, packed.device)
        _check_part("nested.offset", nested.offset, torch.float32, 1, packed.device)


def _check_part(name: str, part: Tensor, dtype: torch.dtype, numel: int, device: torch.device) -> None:
    if part.dtype != dtype:
        raise QuantizationError(f"{name} is {part.dtype}: wanted {dtype}")
    if part.numel() != numel:
        raise QuantizationError(
            f"{name} has {part.numel()} elements, but shape and block_size ask for {numel}: "
            "it is truncated, or belongs to another tensor"
        )
    if part.device != device:
        raise QuantizationError(f"{name} is on {part.device}, packed on {device}: move them together")
    if not part.is_contiguous():
        raise QuantizationError(
            f"{name} is not contiguous (strides {part.stride()}): pass {name}.contiguous()"
        )


def _check_out(out: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
    got, want = (tuple(out.shape), out.dtype, out.device), (tuple(shape), dtype, device)
    if got != want:
        raise QuantizationError(
            f"out is {got[1]} {list(got[0])} on {got[2]}: wanted {want[1]} {list(want[0])} on {want[2]}"
        )
    if not out.is_contiguous():
        raise QuantizationError(f"out is not contiguous (strides {out.stride()})")
