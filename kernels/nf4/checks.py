"""The one error of `kernels.nf4` and `quant`, and what arguments must be.

Past these checks, and those of `QuantizedTensor`, no kernel reads or writes out of bounds.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..dispatch import has_tangent
from .codebook import TABLES, Kind

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class QuantizationError(ValueError):
    """An argument or a file is not what it must be; the message says what was got, what was wanted, and what to do."""


def check_kind(kind: str) -> Kind:
    """Return `kind`, or raise QuantizationError naming the two there are."""
    if not isinstance(kind, str) or kind not in TABLES:
        raise QuantizationError(f"kind={kind!r} is not a 4-bit code: use 'nf4' or 'fp4'")
    return kind


def check_block_size(block_size: int) -> None:
    """Raise QuantizationError unless blocks may have this size."""
    if not isinstance(block_size, int) or block_size not in BLOCK_SIZES:
        raise QuantizationError(f"block_size={block_size}: use one of {', '.join(map(str, BLOCK_SIZES))}")


def check_weight(w: Tensor) -> None:
    """Raise QuantizationError unless `w` can be quantized, but for its values."""
    _check_tensor("w", w)
    if w.dtype not in FLOATS:
        raise QuantizationError(f"w is {w.dtype}: quantize takes float32, float16 or bfloat16; convert it first")
    if w.numel() == 0:
        raise QuantizationError(f"w has shape {list(w.shape)}, no elements: there is nothing to quantize")
    _check_memory("w", w)


def check_values(name: str, t: Tensor) -> None:
    """Raise QuantizationError unless `t` has values to look at."""
    if t.is_meta:
        raise QuantizationError(f"{name} is on meta, where tensors have no values: load it first")


def check_absmax(absmax: Tensor) -> None:
    """Raise QuantizationError unless `absmax` can be quantized a second time, but for its values."""
    _check_tensor("absmax", absmax)
    if absmax.dtype != torch.float32 or absmax.dim() != 1 or absmax.numel() == 0:
        raise QuantizationError(f"absmax is {absmax.dtype} {list(absmax.shape)}: wanted float32 [blocks]")
    _check_memory("absmax", absmax)


def check_matrix(shape: Sequence[int]) -> None:
    """Raise QuantizationError unless a weight of this shape can be multiplied."""
    if len(shape) != 2:
        raise QuantizationError(f"shape={list(shape)}: the weight of a product has shape [N, K]")


def check_x(x: Tensor, features: int, device: torch.device, *, name: str = "x") -> None:
    """Raise QuantizationError unless `x` is [..., features] and can be multiplied by a weight on `device`."""
    _check_tensor(name, x)
    if x.dim() == 0 or x.shape[-1] != features:
        raise QuantizationError(f"{name} has shape {list(x.shape)}: wanted [..., {features}]")
    if x.dtype not in (*FLOATS, torch.float64):
        raise QuantizationError(f"{name} is {x.dtype}: wanted float32, float16, bfloat16 or float64")
    if x.device != device:
        raise QuantizationError(f"{name} is on {x.device}, packed on {device}: move them together")
    if x.requires_grad and torch.is_grad_enabled():
        raise QuantizationError(
            f"{name} requires a gradient, and this product has none: use quant.QuantizedLinear, or torch.no_grad()"
        )
    if has_tangent(x):
        raise QuantizationError(f"{name} has a tangent, and this product no forward-mode derivative")


def check_bias(bias: Tensor | None, out_features: int, x: Tensor) -> None:
    """Raise QuantizationError unless `bias` can be added to a product with `x`."""
    if bias is not None:
        _check_tensor("bias", bias)
    if bias is not None and (tuple(bias.shape), bias.dtype, bias.device) != ((out_features,), x.dtype, x.device):
        raise QuantizationError(
            f"bias is {bias.dtype} {list(bias.shape)} on {bias.device}: wanted {x.dtype} [{out_features}] on {x.device}"
        )


def check_part(name: str, part: Tensor, dtype: torch.dtype, numel: int, device: torch.device | None) -> None:
    """Raise QuantizationError unless a part of a QuantizedTensor has this dtype, size and device."""
    if not isinstance(part, Tensor):
        raise QuantizationError(f"{name} is {part!r}: wanted a {dtype} tensor of {numel}")
    if part.dtype != dtype:
        raise QuantizationError(f"{name} is {part.dtype}: wanted {dtype}")
    if part.numel() != numel:
        raise QuantizationError(
            f"{name} has {part.numel()} elements, but shape and block_size ask for {numel}: "
            "it is truncated, or belongs to another tensor"
        )
    if part.device != device:
        raise QuantizationError(f"{name} is on {part.device}, packed on {device}: move them together")
    _check_memory(name, part)


def _check_tensor(name: str, t: Tensor) -> None:
    if not isinstance(t, Tensor):
        raise QuantizationError(f"{name} is a {type(t).__name__}: wanted a tensor")
    if t.layout != torch.strided or t.is_nested:
        kind = "nested" if t.is_nested else str(t.layout)
        raise QuantizationError(f"{name} is {kind}: wanted an ordinary, dense tensor")


def _check_memory(name: str, t: Tensor) -> None:
    """Raise QuantizationError unless the elements of `t` lie in memory in their order, and as they are."""
    if not t.is_contiguous():
        raise QuantizationError(
            f"{name} {list(t.shape)} is not contiguous (strides {t.stride()}): pass {name}.contiguous()"
        )
    if not torch.compiler.is_compiling() and t.is_neg():  # torch.compile cannot ask; the operation it records does
        raise QuantizationError(f"{name} is a negative that torch has not written out: pass {name}.resolve_neg()")


def check_out(out: Tensor, dtype: torch.dtype, shape: Sequence[int], parts: Sequence[Tensor | None]) -> None:
    """Raise QuantizationError unless what `parts` decode to, of `shape` and `dtype`, can be written into `out`."""
    _check_tensor("out", out)
    device = next(part.device for part in parts if part is not None)
    got, want = (tuple(out.shape), out.dtype, out.device), (tuple(shape), dtype, device)
    if got != want:
        raise QuantizationError(
            f"out is {got[1]} {list(got[0])} on {got[2]}: wanted {want[1]} {list(want[0])} on {want[2]}"
        )
    _check_memory("out", out)
    if out.requires_grad and torch.is_grad_enabled():
        raise QuantizationError("out requires a gradient, and what is written there has none: pass out.detach()")
    if any(_overlap(out, part) for part in parts if part is not None):
        raise QuantizationError("out shares memory with what is decoded into it: pass memory of its own")


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two contiguous tensors have a byte in common."""
    if a.untyped_storage()._cdata != b.untyped_storage()._cdata:
        return False
    (a_begin, a_end), (b_begin, b_end) = (
        (t.storage_offset() * t.element_size(), t.storage_offset() * t.element_size() + t.nbytes) for t in (a, b)
    )
    return a_begin < b_end and b_begin < a_end
