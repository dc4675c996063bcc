"""Quantize and dequantize: their argument checks, and the choice of backend (backends.py).

Arguments are checked here, once, for all backends: past checks.py no kernel can read or write out of bounds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..dispatch import is_traced
from . import cpu, gpu, reference
from .backends import choose_backend
from .checks import FLOATS, Packed, check_absmax, check_block_size, check_out, check_packed, check_values, check_weight
from .codebook import check_kind
from .errors import QuantizationError
from .reference import Nested


def quantize(
    w: Tensor, *, kind: str = "nf4", block_size: int = 64, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """code = nearest(table, w / absmax), two codes to a byte (reference.py has the exact rule).

    w:       float32, float16 or bfloat16, any shape, contiguous, all finite.
    backend: "triton", "c", "reference", or None to choose.
    Returns packed uint8 [ceil(numel / 2)] and absmax float32 [ceil(numel / block_size)].
    Raises QuantizationError: wrong dtype, empty, not finite, no such kind or block_size, or a named backend
        that cannot run.
    """
    if backend is None and is_traced():
        from .torch_ops import nf4_quantize

        recorded: tuple[Tensor, Tensor] = nf4_quantize(w.detach(), kind, block_size)
        return recorded
    return quantize_now(w, kind=kind, block_size=block_size, backend=backend)


def quantize_now(w: Tensor, *, kind: str, block_size: int, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """`quantize`, whoever looks on."""
    known = check_kind(kind)
    check_block_size(block_size)
    check_weight(w)
    check_values("w", w)
    return QUANTIZE[choose_backend(w.device, w.dtype, backend)](w, kind=known, block_size=block_size)


def quantize_absmax(absmax: Tensor, *, backend: str | None = None) -> tuple[Tensor, Nested]:
    """8-bit codes of `absmax - mean(absmax)`, and what decodes them: double quantization.

    absmax: float32 [blocks], contiguous. Returns codes uint8 [blocks] and Nested.
    Raises QuantizationError: wrong dtype or shape, not finite, or a named backend that cannot run.
    """
    if backend is None and is_traced():
        from .torch_ops import nf4_quantize_absmax

        codes, *nested = nf4_quantize_absmax(absmax.detach())
        return codes, Nested(*nested)
    return quantize_absmax_now(absmax, backend=backend)


def quantize_absmax_now(absmax: Tensor, *, backend: str | None = None) -> tuple[Tensor, Nested]:
    """`quantize_absmax`, whoever looks on."""
    check_absmax(absmax)
    check_values("absmax", absmax)
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
    backend: "triton", "c", "reference", or None to choose.
    Returns the result (`out` itself if given).
    Raises QuantizationError: an argument that does not fit, or a named backend that cannot run.
    """
    if backend is None and out is None and is_traced():
        from .torch_ops import nf4_dequantize

        parts = (packed, absmax, *(nested or (None, None)))
        recorded: Tensor = nf4_dequantize(*parts, list(shape), kind, block_size, dtype)
        return recorded
    return dequantize_now(
        packed, absmax, shape=shape, kind=kind, block_size=block_size, dtype=dtype, nested=nested, out=out,
        backend=backend,
    )  # fmt: skip


def dequantize_now(
    packed: Tensor,
    absmax: Tensor,
    *,
    shape: Sequence[int],
    kind: str,
    block_size: int,
    dtype: torch.dtype,
    nested: Nested | None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """`dequantize`, whoever looks on."""
    w = check_packed(packed, absmax, nested, shape, kind, block_size)
    if dtype not in (*FLOATS, torch.float64):
        raise QuantizationError(f"dtype={dtype}: dequantize gives float32, float16, bfloat16 or float64")
    if out is not None:
        check_out(out, dtype, w)
    result = DEQUANTIZE[choose_backend(packed.device, dtype, backend)](w, dtype, out)
    if out is not None and not out.is_inference():
        torch.autograd.graph.increment_version(out)  # so that autograd notices, should it have kept what was there
    return result


def _dequantize_reference(w: Packed, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    absmax, nested = w.absmax.view(-1), w.nested
    if nested is not None:
        absmax = reference.dequantize_absmax(absmax, Nested(nested.absmax.view(-1), nested.offset.view(())))
    result = reference.dequantize(
        w.packed.view(-1), absmax, shape=w.shape, kind=w.kind, block_size=w.block_size, dtype=dtype
    )
    return result if out is None else out.copy_(result)


QUANTIZE = {"triton": gpu.quantize, "c": cpu.quantize, "reference": reference.quantize}
# A 64th of the data: plain torch is fast enough for it on a GPU.
QUANTIZE_ABSMAX = {
    "triton": reference.quantize_absmax, "c": cpu.quantize_absmax, "reference": reference.quantize_absmax
}  # fmt: skip
DEQUANTIZE: dict[str, Callable[[Packed, torch.dtype, Tensor | None], Tensor]] = {
    "triton": gpu.dequantize, "c": cpu.dequantize, "reference": _dequantize_reference
}  # fmt: skip
