"""A tensor stored in 4 bits per element, with everything needed to decode it.

bits per weight = 4  +  8 / block_size + 32 / (256 block_size)     double quantization: 4.127 at block size 64
                  4  + 32 / block_size                             float32 absmax:      4.5
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..kernels import nf4
from ..kernels.nf4 import Kind, Nested, QuantizationError


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """w[i] = table[code[i]] * absmax[i // block_size], over the row-major flattened `shape`."""

    packed: Tensor  # uint8 [ceil(numel / 2)], element 2i in the high nibble of byte i
    absmax: Tensor  # float32 [blocks], or uint8 [blocks] if double-quantized
    nested_absmax: Tensor | None  # float32 [ceil(blocks / 256)] if double-quantized
    nested_offset: Tensor | None  # float32 [] if double-quantized
    kind: Kind
    block_size: int
    shape: tuple[int, ...]
    dtype: torch.dtype  # of the tensor that was quantized; what dequantize gives unless told otherwise

    @property
    def double_quant(self) -> bool:
        return self.nested_absmax is not None

    @property
    def nested(self) -> Nested | None:
        """The two nested parts together, as the kernels take them."""
        if self.nested_absmax is None and self.nested_offset is None:
            return None
        if self.nested_absmax is None or self.nested_offset is None:
            missing = "nested_absmax" if self.nested_absmax is None else "nested_offset"
            raise QuantizationError(f"{missing} is missing: a double-quantized tensor needs both nested parts")
        return Nested(self.nested_absmax, self.nested_offset)

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """All stored state; the code tables are shared by all tensors and not counted."""
        parts = (self.packed, self.absmax, self.nested_absmax, self.nested_offset)
        return sum(part.nbytes for part in parts if part is not None)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.numel

    def to(self, device: torch.device | str) -> QuantizedTensor:
        """The same tensor on `device`."""
        return replace(
            self,
            packed=self.packed.to(device),
            absmax=self.absmax.to(device),
            nested_absmax=None if self.nested_absmax is None else self.nested_absmax.to(device),
            nested_offset=None if self.nested_offset is None else self.nested_offset.to(device),
        )


def quantize(w: Tensor, *, kind: str = "nf4", block_size: int = 64, double_quant: bool = True) -> QuantizedTensor:
    """Quantize `w` to 4 bits, and with `double_quant` its absmax to 8.

    w: float32, float16 or bfloat16, any shape, contiguous, all finite.
    Raises QuantizationError: w cannot be quantized (the message says why), or no such kind or block_size.
    """
    packed, absmax = nf4.quantize(w, kind=kind, block_size=block_size)
    nested: Nested | None = None
    if double_quant:
        absmax, nested = nf4.quantize_absmax(absmax)
    return QuantizedTensor(
        packed=packed,
        absmax=absmax,
        nested_absmax=None if nested is None else nested.absmax,
        nested_offset=None if nested is None else nested.offset,
        kind=nf4.check_kind(kind),
        block_size=block_size,
        shape=tuple(w.shape),
        dtype=w.dtype,
    )


def dequantize(
    q: QuantizedTensor,
    *,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The tensor that `q` stands for, of `q.shape`, rounded once to `dtype` (default `q.dtype`).

    out: contiguous tensor of that shape and dtype to write into. backend: see kernels.nf4.dequantize.
    Raises QuantizationError: the parts of `q` do not fit each other, or `out` does not fit.
    """
    return nf4.dequantize(
        q.packed,
        q.absmax,
        shape=q.shape,
        kind=q.kind,
        block_size=q.block_size,
        dtype=dtype or q.dtype,
        nested=q.nested,
        out=out,
        backend=backend,
    )
