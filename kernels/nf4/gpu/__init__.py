"""The Triton kernels for a GPU, and their launches. Triton itself is imported by the first launch."""

from __future__ import annotations

from .launches import QUANTIZE_TILE, TILE, dequantize, matmul, matmul_backward, quantize
from .plan import FEW_ROWS, Plan, plan_backward, plan_forward, unit_of

__all__ = [
    "FEW_ROWS",
    "QUANTIZE_TILE",
    "TILE",
    "Plan",
    "dequantize",
    "matmul",
    "matmul_backward",
    "plan_backward",
    "plan_forward",
    "quantize",
    "unit_of",
]
