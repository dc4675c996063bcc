"""Up to how many rows of x a product multiplies the packed weight as it is.

For few rows no decoded weight exists. For many, W is decoded and the platform's GEMM multiplies: from some number of
rows on, that makes up for the decoding. Where, depends on the dtype and the processor. bench/CROSSOVER.md has the
measurements that these tables were read off, and how to repeat them.
"""

from __future__ import annotations

import sys

import torch

from ..native import ISAS
from . import cpu
from .backends import why_not_c

FUSED_ROWS = {torch.float32: 24, torch.float16: 16, torch.bfloat16: 128}  # on any processor, and with some ISAs more:
_WITH_AVX512 = {torch.float32: 64, torch.float16: 24, torch.bfloat16: 128}
FUSED_ROWS_AT = {
    "avx2": FUSED_ROWS | {torch.float16: 128},
    "avx512": _WITH_AVX512,
    "vnni": _WITH_AVX512,
    "amx": _WITH_AVX512 | {torch.bfloat16: sys.maxsize},
}
# On a GPU; not measured. A fused product decodes W once per 128 rows (float32: 32), dequantize and cuBLAS once in all.
GPU_FUSED_ROWS = {torch.float32: 32, torch.float16: 128, torch.bfloat16: 128}


def fused_rows(dtype: torch.dtype, device: torch.device) -> int:
    """Up to how many rows of x `matmul` multiplies W without decoding it first."""
    if device.type == "cuda":
        return GPU_FUSED_ROWS.get(dtype, 0)
    here = {} if why_not_c(device, torch.float32) else FUSED_ROWS_AT.get(ISAS[cpu.isa()], {})
    return here.get(dtype, FUSED_ROWS.get(dtype, 0))
