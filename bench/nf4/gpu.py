"""The same work on a GPU, beside bitsandbytes' CUDA functions and cuBLAS. Not run yet by anyone: no GPU was at hand.

    python bench/bench_nf4.py --only gpu

Time is taken by events in the GPU's queue with the caches emptied before each call (harness/timing.py). Two limits are
measured beside the rest: a copy, for what moves bytes, and a large dense GEMM, for what multiplies. Quantizing ends by
asking whether all weights were finite, so its time includes one wait for the GPU, as bitsandbytes' does not.

Device and timer are arguments: a test runs all of this on the CPU with a timer of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from harness.timing import Timer, cuda_timer, interleave, statistics_of
from nf4 import competitor, products
from qlorag.kernels import nf4
from qlorag.kernels.nf4 import reference
from torch import Tensor

COPY = "copy of as many bytes"


@dataclass(frozen=True)
class Sizes:
    """What is measured; the defaults are for a GPU."""

    shape: tuple[int, int] = (4096, 4096)
    wide: tuple[int, int] = (11008, 4096)
    few: tuple[int, ...] = (1, 4, 8, 16)
    many: tuple[int, ...] = (128, 512, 2048)
    gemm: int = 8192
    repeats: int = 30


DEVICE, SIZES = "cuda", Sizes()


def job() -> dict[str, Any]:
    """For a process of its own, where there is a GPU."""
    device = torch.device(DEVICE)
    return measure(device, cuda_timer(device), torch.cuda.get_device_name(device), SIZES)


def measure(device: torch.device, timer: Timer, name: str, sizes: Sizes) -> dict[str, Any]:
    """One row per operation and candidate, with its share of the limit that binds it."""
    peak = dense_peak(device, timer, sizes.gemm)
    few = products.few_rows([sizes.shape, sizes.wide], [*sizes.few], sizes.repeats, device=device, timer=timer)
    many = products.many_rows(sizes.shape, [*sizes.many], sizes.repeats, device=device, timer=timer)
    decoded = [row for dtype in (torch.bfloat16, torch.float32) for row in decode(device, timer, dtype, sizes)]
    copied = max(row["gb_per_s"] for row in decoded if row["candidate"] == COPY)
    for row in few:
        speed = row["packed_gb_per_s"]
        row["of_copy"] = None if speed is None else speed / copied
    for row in many:
        row["of_gemm"] = row["tflop_per_s"] / peak
    return {
        "device": name,
        "bitsandbytes": competitor.why_not() or "compared with",
        "copy_gb_per_s": copied,
        "gemm_tflop_per_s": peak,
        "dequantize": decoded,
        "quantize": encode(device, timer, sizes),
        "few_rows": few,
        "many_rows": many,
    }


def dense_peak(device: torch.device, timer: Timer, size: int) -> float:
    """TFLOP/s of torch's product of two bfloat16 matrices [size, size]: the best of seven, after one to warm up."""
    a = torch.randn(size, size, device=device).bfloat16()
    out = torch.empty_like(a)
    torch.mm(a, a, out=out)
    return 2 * size**3 / min(timer(lambda: torch.mm(a, a, out=out)) for _ in range(7)) / 1e12


def decode(device: torch.device, timer: Timer, dtype: torch.dtype, sizes: Sizes) -> list[dict[str, Any]]:
    """Rows of decoding a weight. Raises SystemExit: a result is not the reference's, bit for bit."""
    weight = products.Weight.normal(sizes.shape, dtype, device)
    out = torch.full(sizes.shape, float("nan"), dtype=dtype, device=device)
    q = weight.q
    want = reference.dequantize(q, dtype)
    candidates: dict[str, Callable[[], Tensor]] = {"qlorag, out=": lambda: nf4.dequantize(q, dtype=dtype, out=out)}
    if not competitor.why_not():
        import bitsandbytes.functional as bnb

        state = competitor.state(q.absmax, q.nested, shape=sizes.shape, block_size=64, dtype=dtype)
        column = q.packed.view(-1, 1)
        candidates["bitsandbytes dequantize_4bit"] = lambda: bnb.dequantize_4bit(column, state)
    for name, run in candidates.items():
        if not torch.equal(run(), want):
            raise SystemExit(f"{name}: {dtype} result differs from the reference; a wrong result is not timed")
    moved = weight.nbytes + out.nbytes
    source, target = torch.zeros(2, moved // 2, dtype=torch.uint8, device=device)
    candidates[COPY] = lambda: target.copy_(source)
    rows = [statistics_of(name, seconds) for name, seconds in interleave(candidates, sizes.repeats, timer).items()]
    copied = next(row["ms"] for row in rows if row["candidate"] == COPY)
    return [
        row
        | {
            "dtype": str(dtype).removeprefix("torch."),
            "gb_per_s": moved / row["ms"] / 1e6,
            "of_copy": copied / row["ms"],
        }
        for row in rows
    ]


def encode(device: torch.device, timer: Timer, sizes: Sizes) -> list[dict[str, Any]]:
    """Rows of quantizing a bfloat16 weight twice. Raises SystemExit: our codes are not the reference's."""
    w = torch.randn(sizes.shape, generator=torch.Generator().manual_seed(0)).bfloat16().to(device)

    def ours(backend: str | None = None) -> tuple[Tensor, Tensor]:
        q = nf4.quantize(w, backend=backend)
        return q.packed, q.absmax

    if not all(torch.equal(a, b) for a, b in zip(ours(), ours("reference"), strict=True)):
        raise SystemExit("qlorag: codes differ from the reference; a wrong result is not timed")
    candidates: dict[str, Callable[[], Any]] = {"qlorag": ours}
    if not competitor.why_not():
        import bitsandbytes.functional as bnb

        # Its CUDA kernel breaks ties otherwise than its CPU rule, so its codes are not compared.
        candidates["bitsandbytes"] = lambda: bnb.quantize_4bit(
            w, blocksize=64, quant_type="nf4", compress_statistics=True
        )
    rows = [statistics_of(name, seconds) for name, seconds in interleave(candidates, sizes.repeats, timer).items()]
    return [row | {"gelem_per_s": w.numel() / row["ms"] / 1e6} for row in rows]
