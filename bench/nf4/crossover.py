"""Up to how many rows the fused product is the faster one, beside decoding W and the platform's GEMM.

What FUSED_ROWS and FUSED_ROWS_AT in kernels/nf4/crossover.py say, measured: each dtype with each instruction set (ISA)
that this processor has, and torch's GEMM held to the same one.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Mapping
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import Any

import torch
from harness.timing import check_products, interleave
from nf4.products import CPU, Weight, normal_x
from qlorag.kernels import nf4
from qlorag.kernels.native.isa import ISAS, isas_up_to
from qlorag.kernels.nf4 import cpu
from qlorag.kernels.nf4.crossover import FUSED_ROWS, FUSED_ROWS_AT
from torch import Tensor

ROWS = (4, 8, 16, 24, 32, 64, 128, 256)
SHAPES = ((1536, 576), (2048, 2048), (4096, 4096))
FUSED, DECODED = "fused", "decoded, then GEMM"
DTYPES = ("float32", "float16", "bfloat16")
GEMM = {"avx2": "AVX2", "avx512": "AVX512_CORE", "vnni": "AVX512_CORE_BF16"}  # what oneDNN calls them
MKL = {"avx2": "AVX2"}  # and MKL, which multiplies float32


def variants() -> list[tuple[str, str, Mapping[str, str]]]:
    """The ISA, the dtype and the variables of each process: all that this processor can run."""
    best = cpu.best_isa()
    found: list[tuple[str, str, Mapping[str, str]]] = [(ISAS[best], dtype, {}) for dtype in DTYPES]
    for level in reversed(isas_up_to(best)[:-1]):
        if level in GEMM:
            held = {"QLORAG_CPU_LEVEL": level, "ONEDNN_MAX_CPU_ISA": GEMM[level]}
            held |= {"MKL_ENABLE_INSTRUCTIONS": MKL[level]} if level in MKL else {}
            found += [(level, dtype, held) for dtype in (DTYPES if level == "avx2" else DTYPES[2:])]
    return found


def _candidates(weight: Weight, x: Tensor) -> dict[str, Callable[[], Tensor]]:
    c, reference = (partial(nf4.matmul, x, weight.q, backend=backend) for backend in ("c", "reference"))
    return {FUSED: c, DECODED: reference}  # which decodes in C too


@torch.inference_mode()
def measure(dtype: str, shapes: list[list[int]], rows: list[int], repeats: int) -> list[dict[str, Any]]:
    """One row per shape [n, k] of W and number of rows of x: how many times as fast the fused product is."""
    kind: torch.dtype = getattr(torch, dtype)
    found = []
    for n, k in shapes:
        weight = Weight.normal((n, k), kind, CPU)
        exact_weight = weight.dense(torch.float64)
        for m in rows:
            x = normal_x(m, k, kind, CPU)
            candidates = _candidates(weight, x)
            check_products(candidates, x.double() @ exact_weight.T, DECODED)
            ms = {name: statistics.median(s) * 1e3 for name, s in interleave(candidates, repeats).items()}
            row = {"n": n, "k": k, "m": m, "dtype": dtype, "fused_ms": ms[FUSED], "decoded_ms": ms[DECODED]}
            found.append(row | {"times_as_fast": ms[DECODED] / ms[FUSED]})
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """A line per process and shape, a column per number of rows; above 1, the fused product is the faster one."""
    counts = [*dict.fromkeys(row["m"] for row in rows)]
    lines = [f"{'':44}" + "".join(f"{m:>7}" for m in counts) + "   fused up to"]
    for (level, dtype, n, k), line in groupby(rows, itemgetter("level", "dtype", "n", "k")):
        most = FUSED_ROWS_AT.get(level, FUSED_ROWS)[getattr(torch, dtype)]
        limit = "any" if most == sys.maxsize else str(most)
        cells = "".join(f"{row['times_as_fast']:7.2f}" for row in line)
        lines.append(f"{f'{dtype}, {level}, [m, {k}] x [{n}, {k}]ᵀ':44}{cells}{limit:>14}")
    return "\n".join(lines)
