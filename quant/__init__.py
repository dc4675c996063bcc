"""Tensors and linear layers stored in 4 bits (see README.md)."""

from __future__ import annotations

from ..kernels.nf4 import QuantizationError, QuantizedTensor, dequantize, quantize
from .adamw8bit import AdamW8bit
from .bnb_files import from_bnb, to_bnb
from .linear import QuantizedLinear
from .replace import quantize_linears

__all__ = [
    "AdamW8bit",
    "QuantizationError",
    "QuantizedLinear",
    "QuantizedTensor",
    "dequantize",
    "from_bnb",
    "quantize",
    "quantize_linears",
    "to_bnb",
]
