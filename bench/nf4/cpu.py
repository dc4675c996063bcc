"""Decoding and quantizing on the processor, timed; and whether all backends give the same bits, counted.

`dequantize`, `quantize` and `exactness` are jobs for a process of their own (child.py).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from harness.names import COPY, KERNEL, OURS_DECODE, PUBLIC
from harness.timing import interleave, return_freed, statistics_of
from nf4 import competitor
from qlorag.kernels import nf4
from qlorag.kernels.nf4 import reference
from qlorag.kernels.nf4.codebook import thresholds
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CPU = torch.device("cpu")


def dequantize(shape: list[int], dtypes: list[str], block_size: int, repeats: int) -> dict[str, Any]:
    """One row per dtype and candidate. Raises SystemExit: a result is wrong."""
    rows = [row for name in dtypes for row in _dequantize((shape[0], shape[1]), DTYPES[name], block_size, repeats)]
    return {"rows": rows}


def _dequantize(shape: tuple[int, int], dtype: torch.dtype, block_size: int, repeats: int) -> list[dict[str, Any]]:
    why = competitor.why_not()
    if why:
        raise SystemExit(why)
    import bitsandbytes.functional as bnb

    numel = math.prod(shape)
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    q = nf4.quantize(w, block_size=block_size)
    assert q.nested is not None
    scales = reference.dequantize_absmax(q.absmax, q.nested)  # what bitsandbytes' kernel is given: already float32
    theirs = competitor.state(scales, None, shape=shape, block_size=block_size, dtype=dtype)
    plain, column = replace(q, absmax=scales, nested=None), q.packed.view(-1, 1)

    def ours(backend: str, q: nf4.QuantizedTensor, out: Tensor | None) -> Callable[[], Tensor]:
        return lambda: nf4.dequantize(q, dtype=dtype, out=out, backend=backend)

    outs = {name: torch.full(shape, float("nan"), dtype=dtype) for name in ("c", "plain", "reference", "bnb")}
    candidates: dict[str, Callable[[], Any]] = {
        OURS_DECODE: ours("c", q, outs["c"]),
        "qlorag C, float32 absmax, out=": ours("c", plain, outs["plain"]),
        "qlorag C, double-quantized, fresh": ours("c", q, None),
        "qlorag reference, out=": ours("reference", q, outs["reference"]),
        KERNEL: competitor.kernel(q.packed, scales, outs["bnb"], block_size),
        PUBLIC: lambda: bnb.dequantize_4bit(column, theirs),
    }
    want = reference.dequantize(q, dtype)
    for name, run in candidates.items():
        got = run()
        got = got if isinstance(got, Tensor) else outs["bnb"]
        if not torch.equal(got, want):
            raise SystemExit(f"{name}: {dtype} result differs from the reference; a wrong result is not timed")

    # The memory of the machine: read the packed bytes, write as many bytes as the result has.
    moved = q.packed.nbytes + q.absmax.nbytes + numel * dtype.itemsize
    source, target = torch.ones(moved // 2, dtype=torch.uint8), torch.zeros(moved // 2, dtype=torch.uint8)
    candidates[COPY] = lambda: target.copy_(source)

    return_freed()
    slow = {"qlorag reference, out=": candidates.pop("qlorag reference, out=")}  # it would empty the caches
    times = interleave(candidates, repeats) | interleave(slow, max(2, repeats // 5))
    memory = moved / statistics.median(times[COPY])
    rows = []
    for name, seconds in times.items():
        row = statistics_of(name, seconds)
        rows.append(
            row
            | {
                "dtype": str(dtype).removeprefix("torch."),
                "gb_per_s": moved / row["ms"] / 1e6,
                "of_memory": moved / row["ms"] * 1e3 / memory,
                "gelem_per_s": None if name == COPY else numel / row["ms"] / 1e6,
            }
        )
    return rows


def quantize(shape: list[int], dtypes: list[str], block_size: int, repeats: int) -> dict[str, Any]:
    """One row per dtype and candidate, with double quantization. Raises SystemExit: a result is wrong."""
    rows = [row for name in dtypes for row in _quantize((shape[0], shape[1]), DTYPES[name], block_size, repeats)]
    return {"rows": rows}


def _quantize(shape: tuple[int, int], dtype: torch.dtype, block_size: int, repeats: int) -> list[dict[str, Any]]:
    import bitsandbytes.functional as bnb

    w = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)

    def ours(backend: str) -> tuple[Tensor, Tensor]:
        q = nf4.quantize(w, block_size=block_size, backend=backend)
        return q.packed, q.absmax

    def theirs() -> tuple[Tensor, Tensor]:
        packed, state = bnb.quantize_4bit(w, blocksize=block_size, quant_type="nf4", compress_statistics=True)
        return packed.view(-1), state.absmax

    fast: dict[str, Callable[[], Any]] = {"qlorag C": lambda: ours("c")}
    slow: dict[str, Callable[[], Any]] = {"qlorag reference": lambda: ours("reference"), "bitsandbytes": theirs}
    want = slow["qlorag reference"]()
    for name, run in (fast | slow).items():
        if not all(torch.equal(a, b) for a, b in zip(run(), want, strict=True)):
            raise SystemExit(f"{name}: codes differ from the reference; a wrong result is not timed")
    # Each slow call lasts as long as some sixty fast ones, which then get a share of every part of the loop.
    times: dict[str, list[float]] = {name: [] for name in (fast | slow)}
    for _ in range(3):
        for name, seconds in (interleave(slow, 1) | interleave(fast, max(1, repeats // 3))).items():
            times[name] += seconds
    rows = [statistics_of(name, seconds) for name, seconds in times.items()]
    return [
        row | {"dtype": str(dtype).removeprefix("torch."), "gelem_per_s": w.numel() / row["ms"] / 1e6} for row in rows
    ]


def difficult(values: int, dtype: torch.dtype) -> Tensor:
    """At least `values` numbers: blocks of random ones at scales of 2^-20 to 2^20, and blocks of ties.

    A tie lies exactly between two of the 16 values: an absmax that is a power of two keeps the division exact. Its two
    neighbours in float32 stand beside it. In 16 bits most ties round away, which is what a model's weights do too.
    """
    blocks = -(-values // 64)
    random = torch.Generator().manual_seed(2)
    w = torch.randn(blocks, 64, generator=random)
    ties = thresholds("nf4", CPU)[0]
    beside = [torch.nextafter(ties, torch.full_like(ties, side)) for side in (-2.0, 2.0)]
    pattern = torch.cat([torch.ones(1), ties, *beside, -ties, torch.zeros(3)])  # [64]
    w[::4] = pattern
    exponents = torch.randint(-20, 21, (blocks, 1), generator=random)
    # In float16 the smallest weights would be subnormal and the largest infinite.
    return (w * torch.exp2(exponents.float() / (1 if dtype != torch.float16 else 4))).to(dtype).view(-1)


def exactness(values: int, backend: str, dtypes: list[str]) -> dict[str, Any]:
    """How many of `values` numbers, per dtype, `backend` quantizes or decodes to other bits than the reference.

    backend: "c", "triton" (on the GPU, or interpreted where TRITON_INTERPRET=1), or "bitsandbytes".
    """
    device = torch.device("cuda" if backend == "triton" and torch.cuda.is_available() else "cpu")
    found: dict[str, Any] = {"backend": backend, "device": device.type, "values": 0, "differ": {}}
    for name in dtypes:
        dtype = DTYPES[name]
        w = difficult(values, dtype)
        want = _ours(w, "reference")
        got = _theirs(w) if backend == "bitsandbytes" else _ours(w.to(device), backend)
        found["values"] = w.numel()
        found["differ"][name] = sum(_differing(a, b.cpu()) for a, b in zip(want, got, strict=True))
    return found


def _differing(a: Tensor, b: Tensor) -> int:
    """How many are other bits: a zero has a sign."""
    a, b = (t.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[t.element_size()]) for t in (a, b))
    return 0 if torch.equal(a, b) else max(1, int((a != b).sum().item()))


def _ours(w: Tensor, backend: str) -> tuple[Tensor, ...]:
    q = nf4.quantize(w, backend=backend)
    absmax = nf4.quantize(w, double_quant=False, backend=backend).absmax
    out = nf4.dequantize(q, out=torch.full_like(w, float("nan")), backend=backend)
    return q.packed, absmax, q.absmax, out


def _theirs(w: Tensor) -> tuple[Tensor, ...]:
    import bitsandbytes.functional as bnb

    packed, plain = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4")
    column, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=True)
    # Of a flat tensor it makes a row.
    return packed.view(-1), plain.absmax, state.absmax, bnb.dequantize_4bit(column, state).view(-1)
