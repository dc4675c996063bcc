"""Tensors and linear layers stored in 4 bits (see README.md)."""

from __future__ import annotations

from ..kernels.nf4 import QuantizationError
from .linear import QuantizedLinear
from .replace import quantize_linears
from .tensor import QuantizedTensor, dequantize, quantize

__all__ = [
    "QuantizationError",
    "QuantizedLinear",
    "QuantizedTensor",
    "dequantize",
    "quantize",
    "quantize_linears",
]
