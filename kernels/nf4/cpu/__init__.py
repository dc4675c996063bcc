"""The C kernels for the CPU, and their calls."""

from __future__ import annotations

from .calls import DTYPES, MAX_IN_FEATURES, UNIT, Matmul, dequantize, quantize, quantize_absmax
from .compiled import best_isa, describe, has_matrix_unit, isa, library

__all__ = [
    "DTYPES",
    "MAX_IN_FEATURES",
    "UNIT",
    "Matmul",
    "best_isa",
    "dequantize",
    "describe",
    "has_matrix_unit",
    "isa",
    "library",
    "quantize",
    "quantize_absmax",
]
