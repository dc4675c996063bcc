"""Block quantization to 4 bits: NF4 and FP4, double quantization (see README.md)."""

from __future__ import annotations

from ..dispatch import BackendStatus
from .backends import available_backends
from .checks import BLOCK_SIZES, QuantizationError, check_kind
from .codebook import DYNAMIC, FP4, NF4, Kind
from .cpu import Matmul
from .crossover import FUSED_ROWS, fused_rows
from .eager import prepare_matmul
from .ops import dequantize, matmul, matmul_backward, quantize, quantize_absmax
from .tensor import Nested, QuantizedTensor
from .torch_ops import TransformedMatmul, nf4_matmul

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
    "QuantizedTensor",
    "TransformedMatmul",
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
