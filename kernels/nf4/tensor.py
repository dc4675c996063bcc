"""A packed weight as one value: a tensor stored in 4 bits per element, with everything needed to decode it.

    w[i] = table[code[i]] * absmax[i // block_size]                    over the row-major flattened tensor

    bits per weight = 4  +  8 / block_size + 32 / (256 block_size)     double quantization: 4.127 at block size 64
                      4  + 32 / block_size                             float32 absmax:      4.5

Every operation of this folder takes a `QuantizedTensor`, in Python and, as `packed_tensor` of common.c, in C. That its
parts fit each other is checked once, when it is made. Its tensors may be written to afterwards, but not resized.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import FLOATS, QuantizationError, check_block_size, check_kind, check_part
from .codebook import Kind

NESTED_BLOCK_SIZE = 256


class Nested(NamedTuple):
    """What turns 8-bit absmax codes back into float32."""

    absmax: Tensor  # float32 [ceil(blocks / 256)]
    offset: Tensor  # float32 [], the mean that was subtracted


@dataclass(frozen=True, eq=False, kw_only=True)
class QuantizedTensor:
    """w[i] = table[code[i]] * absmax[i // block_size], over the row-major flattened `shape`.

    Raises QuantizationError: its parts do not fit each other.
    """

    packed: Tensor  # uint8 [ceil(numel / 2)], element 2i in the high nibble of byte i
    absmax: Tensor  # float32 [blocks], or uint8 [blocks] with `nested`
    nested: Nested | None = None  # decodes absmax, if it is quantized too (double quantization)
    shape: tuple[int, ...]
    kind: Kind = "nf4"
    block_size: int = 64
    dtype: torch.dtype = torch.float32  # of the tensor that was quantized; what dequantize gives unless told otherwise

    def __post_init__(self) -> None:
        check_kind(self.kind)
        check_block_size(self.block_size)
        _check_shape(self.shape)
        if self.dtype not in FLOATS:
            raise QuantizationError(f"dtype={self.dtype}: float32, float16 or bfloat16 can be quantized")
        packed, absmax, nested, device = self.packed, self.absmax, self.nested, getattr(self.packed, "device", None)
        numel = math.prod(self.shape)
        blocks = -(-numel // self.block_size)
        check_part("packed", packed, torch.uint8, (numel + 1) // 2, device)
        if nested is None:
            if isinstance(absmax, Tensor) and absmax.dtype == torch.uint8:
                raise QuantizationError("absmax is uint8 but nested is missing: pass nested=Nested(absmax, offset)")
            check_part("absmax", absmax, torch.float32, blocks, device)
        else:
            if not isinstance(nested, Nested):
                raise QuantizationError(f"nested is a {type(nested).__name__}: wanted nf4.Nested(absmax, offset)")
            check_part("absmax", absmax, torch.uint8, blocks, device)
            check_part("nested.absmax", nested.absmax, torch.float32, -(-blocks // NESTED_BLOCK_SIZE), device)
            check_part("nested.offset", nested.offset, torch.float32, 1, device)

    @classmethod
    def from_parts(
        cls, parts: Sequence[Tensor | None], *, shape: tuple[int, ...], kind: Kind, block_size: int, dtype: torch.dtype
    ) -> QuantizedTensor:
        """The tensor that consists of `parts`, in the order of that property.

        Raises QuantizationError: one is missing, or they do not fit each other.
        """
        packed, absmax, nested_absmax, nested_offset = parts
        if packed is None or absmax is None:
            raise QuantizationError("packed or absmax is missing: every quantized tensor has both")
        nested = None
        if nested_absmax is not None and nested_offset is not None:
            nested = Nested(nested_absmax, nested_offset)
        elif nested_absmax is not None or nested_offset is not None:
            missing = "nested_absmax" if nested_absmax is None else "nested_offset"
            raise QuantizationError(f"{missing} is missing: a double-quantized tensor needs both nested parts")
        return cls(
            packed=packed, absmax=absmax, nested=nested, shape=shape, kind=kind, block_size=block_size, dtype=dtype
        )

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """All tensors: packed, absmax, nested absmax, nested offset; the last two None if there is no second step."""
        return self.packed, self.absmax, *(self.nested or (None, None))

    @property
    def nested_absmax(self) -> Tensor | None:
        return None if self.nested is None else self.nested.absmax

    @property
    def nested_offset(self) -> Tensor | None:
        return None if self.nested is None else self.nested.offset

    @property
    def double_quant(self) -> bool:
        return self.nested is not None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """All stored state; the code tables are shared by all tensors and not counted."""
        return sum(part.nbytes for part in self.parts if part is not None)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.numel

    def with_parts(self, parts: Sequence[Tensor | None]) -> QuantizedTensor:
        """The same shape, kind, block size and dtype over other tensors. Raises QuantizationError: they do not fit."""
        return self.from_parts(parts, shape=self.shape, kind=self.kind, block_size=self.block_size, dtype=self.dtype)

    def to(self, device: torch.device | str) -> QuantizedTensor:
        """The same tensor on `device`."""
        nested = None if self.nested is None else Nested(*(part.to(device) for part in self.nested))
        return replace(self, packed=self.packed.to(device), absmax=self.absmax.to(device), nested=nested)


def _check_shape(shape: tuple[int, ...]) -> None:
    if not isinstance(shape, tuple) or not all(isinstance(size, Integral) for size in shape):
        raise QuantizationError(f"shape={shape!r}: wanted a tuple of whole numbers")
    if any(size < 1 for size in shape):
        raise QuantizationError(f"shape={list(shape)}: every dimension must be at least 1")
