"""Products with a packed weight, timed: few rows, a weight beyond the caches, many rows and their gradient.

The functions take a device and a timer, so that bench_nf4.py runs the same code on the processor and on a GPU. Nothing
is timed before its error is at most twice that of torch's product with the decoded weight, both against float64.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from harness.names import DENSE, OURS
from harness.timing import Timer, check_products, interleave, return_freed, statistics_of, wall
from nf4 import competitor
from qlorag.kernels import nf4
from torch import Tensor

CPU = torch.device("cpu")
READ_BYTES = 512 * 2**20


@dataclass(frozen=True, eq=False)
class Weight:
    """W [n, k], double-quantized."""

    q: nf4.QuantizedTensor

    @classmethod
    def normal(cls, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Weight:
        w = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype).to(device)
        return cls(nf4.quantize(w))

    @classmethod
    def of_random_codes(cls, shape: tuple[int, int]) -> Weight:
        """For a weight too large to be quantized in a moment: every code equally often, scales near 1."""
        random = torch.Generator().manual_seed(0)
        n, k = shape
        packed = torch.randint(0, 256, (n * k // 2,), dtype=torch.uint8, generator=random)
        codes = torch.randint(0, 256, (n * k // 64,), dtype=torch.uint8, generator=random)
        nested = nf4.Nested(torch.rand(-(-codes.numel() // 256), generator=random) / 4, torch.tensor(1.0))
        return cls(nf4.QuantizedTensor(packed=packed, absmax=codes, nested=nested, shape=shape))

    @property
    def nbytes(self) -> int:
        """All but the offset, one number."""
        return self.q.nbytes - 4

    def rows(self, first: int, count: int) -> Weight:
        """A part of it: first * k must be a multiple of 64 * 256, where a block of both kinds begins."""
        q, k = self.q, self.q.shape[1]
        begin, end = first * k // 64, -(-(first + count) * k // 64)
        packed, absmax = q.packed[begin * 32 : end * 32], q.absmax[begin:end]
        assert q.nested is not None
        nested = nf4.Nested(q.nested.absmax[begin // 256 : -(-end // 256)], q.nested.offset)
        return Weight(replace(q, packed=packed, absmax=absmax, nested=nested, shape=(count, k)))

    def dense(self, dtype: torch.dtype) -> Tensor:
        """W decoded. In float64 it is the float32 one widened, which is how the reference defines it."""
        narrow = torch.float32 if dtype == torch.float64 else dtype
        return nf4.dequantize(self.q, dtype=narrow).to(dtype)

    def product(self) -> Callable[[Tensor], Tensor]:
        """x -> x Wᵀ for few rows: in C prepared once, as quant.QuantizedLinear does; on other backends unprepared."""
        prepared: Callable[[Tensor], Tensor] | None = nf4.prepare_matmul(self.q)
        return prepared or (lambda x: nf4.matmul(x, self.q))


def normal_x(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)).to(dtype).to(device)


Candidates = dict[str, Callable[[], Tensor]]


def _few(weight: Weight, x: Tensor, product: Callable[[Tensor], Tensor], dense: Tensor) -> Candidates:
    return {OURS: lambda: product(x), DENSE: lambda: F.linear(x, dense), **competitor.products(x, weight.q)}


def _forward(weight: Weight, x: Tensor, dense: Tensor) -> Candidates:
    return {OURS: lambda: nf4.matmul(x, weight.q), DENSE: lambda: F.linear(x, dense)}


def _backward(weight: Weight, dy: Tensor, dense: Tensor) -> Candidates:
    return {OURS: lambda: nf4.matmul_backward(dy, weight.q), DENSE: lambda: dy @ dense}


@torch.inference_mode()
def few_rows(
    shapes: list[tuple[int, int]],
    rows: list[int],
    repeats: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device = CPU,
    timer: Timer = wall,
) -> list[dict[str, Any]]:
    """One row per shape of W, number of rows of x, and candidate."""
    found = []
    for n, k in shapes:
        weight = Weight.normal((n, k), dtype, device)
        exact_weight, dense, product = weight.dense(torch.float64), weight.dense(dtype), weight.product()
        for m in rows:
            x = normal_x(m, k, dtype, device)
            candidates = _few(weight, x, product, dense)
            errors = check_products(candidates, x.double() @ exact_weight.T, DENSE)
            return_freed()
            for name, seconds in interleave(candidates, repeats, timer).items():
                row = statistics_of(name, seconds) | {"n": n, "k": k, "m": m, "error": errors[name]}
                # A dense weight has other bytes, and bitsandbytes decodes into them.
                speed = weight.nbytes / row["ms"] / 1e6 if name == OURS else None
                found.append(row | {"packed_gb_per_s": speed})
    return found


@torch.inference_mode()
def beyond_cache(size: int, repeats: int, *, read_bytes: int = READ_BYTES) -> dict[str, Any]:
    """One row of x times W [size, size], which is read from memory; beside it a sum over as good as all the caches.

    The two alternate strictly: each sum empties the caches of the weight, so no part of it is found there.
    Raises SystemExit: the first or last rows of y are wrong.
    """
    weight = Weight.of_random_codes((size, size))
    product = weight.product()
    x = normal_x(1, size, torch.bfloat16, CPU)
    some = min(size, 256)
    y = product(x)
    for first in (0, size - some):
        _check_part(weight.rows(first, some), x, y[:, first : first + some])
    memory = torch.ones(read_bytes // 4)
    memory.sum()
    reads, products = [], []
    for _ in range(repeats):
        reads.append(wall(memory.sum))
        products.append(wall(lambda: product(x)))
    read, row = read_bytes / statistics.median(reads) / 1e9, statistics_of(OURS, products)
    speed = weight.nbytes / row["ms"] / 1e6
    return row | {"n": size, "k": size, "m": 1, "gb_per_s": speed, "read_gb_per_s": read, "of_read": speed / read}


def _check_part(part: Weight, x: Tensor, y: Tensor) -> None:
    candidates = {OURS: lambda: y, DENSE: lambda: F.linear(x, part.dense(x.dtype))}
    check_products(candidates, x.double() @ part.dense(torch.float64).T, DENSE)


@torch.inference_mode()
def many_rows(
    shape: tuple[int, int],
    rows: list[int],
    repeats: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device = CPU,
    timer: Timer = wall,
) -> list[dict[str, Any]]:
    """One row per number of rows of x, direction, and candidate: ours, and torch's over the decoded weight."""
    weight = Weight.normal(shape, dtype, device)
    n, k = shape
    exact_weight, dense = weight.dense(torch.float64), weight.dense(dtype)
    found = []
    for m in rows:
        x, dy = normal_x(m, k, dtype, device), normal_x(m, n, dtype, device)
        directions = {
            "forward": (_forward(weight, x, dense), x.double() @ exact_weight.T),
            "backward": (_backward(weight, dy, dense), dy.double() @ exact_weight),
        }
        for direction, (candidates, exact) in directions.items():
            errors = check_products(candidates, exact, DENSE)
            for name, seconds in interleave(candidates, repeats, timer).items():
                row = statistics_of(name, seconds) | {"n": n, "k": k, "m": m, "error": errors[name]}
                found.append(row | {"direction": direction, "tflop_per_s": 2 * m * n * k / row["ms"] / 1e9})
    return found
