"""Block quantization to 4 bits: NF4 and FP4, double quantization (see README.md)."""

from __future__ import annotations

from ..dispatch import BackendStatus
from .backends import available_backends
from .checks import BLOCK_SIZES
from .codebook import DYNAMIC, FP4, NF4, Kind, check_kind
from .cpu import Matmul
from .errors import QuantizationError
from .ops import dequantize, quantize, quantize_absmax
from .products import FUSED_ROWS, fused_rows, matmul, matmul_backward, prepare_matmul
from .reference import Nested
from .torch_ops import nf4_matmul

__all__ = [
    "BLOCK_SIZES",
    "DYNAMIC",
    "FP4",
    "FUSED_ROWS",
    "NF4",
    "BackendStatus",
    "Kind",
    "Matmul",
    "Nested",
    "QuantizationError",
    "available_backends",
    "check_kind",
    "dequantize",
    "fused_rows",
    "matmul",
    "matmul_backward",
    "nf4_matmul",
    "prepare_matmul",
    "quantize",
    "quantize_absmax",
]
