"""Block quantization to 4 bits: NF4 and FP4, double quantization (see README.md)."""

from __future__ import annotations

from .codebook import DYNAMIC, FP4, NF4, Kind, check_kind
from .errors import QuantizationError
from .ops import BLOCK_SIZES, BackendStatus, available_backends, dequantize, quantize, quantize_absmax
from .reference import Nested

__all__ = [
    "BLOCK_SIZES",
    "DYNAMIC",
    "FP4",
    "NF4",
    "BackendStatus",
    "Kind",
    "Nested",
    "QuantizationError",
    "available_backends",
    "check_kind",
    "dequantize",
    "quantize",
    "quantize_absmax",
]
