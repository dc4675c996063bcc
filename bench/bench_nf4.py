"""Speed of the NF4 kernels, beside the reference, bitsandbytes and the memory of the machine.

    python bench/bench_nf4.py [--size 4096 4096] [--threads 1] [--repeats 15] [--json FILE]

Candidates run in one interleaved loop, in a new order each round (a much slower one less often, in a loop of its
own); the figure is the median, the spread the 10th to the 90th percentile. Nothing is timed before its result equals
the reference, or for products, is at most twice as far as torch's from float64.

Dequantizing: GB/s counts each byte once: packed codes and scales read, result written. "of memory" is the share of
what torch's own copy of as many bytes reached in the same loop. bitsandbytes appears twice, because its public
function on a CPU is mostly page faults on a fresh result: "as installed" is `dequantize_4bit`; "C kernel, reused out"
calls its own C function into memory that is already there, which is also what a well-tuned malloc would give.

Quantizing: with double quantization, as QLoRA stores weights.

Multiplying few rows: once with malloc as installed and once tuned to keep freed memory, in a process each, because
that decides bitsandbytes' figure. The weight is the same one each time, so whatever fits in a cache stays there;
bench_generate.py has the figures of a whole model.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import logging
import math
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import child
import torch
import torch.nn.functional as F
from qlorag.kernels import nf4
from qlorag.kernels.nf4 import cpu, reference
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SMOLLM2 = [(576, 576), (192, 576), (1536, 576), (576, 1536)]  # the projections of SmolLM2-135M
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def interleave(candidates: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call: every candidate once per round, in a new order each round."""
    order = random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name in order.sample([*candidates], len(candidates)):
            start = time.perf_counter()
            candidates[name]()
            times[name].append(time.perf_counter() - start)
    return times


def bitsandbytes_kernel(packed: Tensor, absmax: Tensor, out: Tensor, block_size: int) -> Callable[[], None]:
    """bitsandbytes' own C function, called as its Python does, into `out`."""
    from bitsandbytes.cextension import lib

    function = getattr(lib, f"cdequantize_blockwise_cpu_nf4_{SHORT[out.dtype]}")
    arguments = (
        ctypes.c_void_p(packed.data_ptr()),
        ctypes.c_void_p(absmax.data_ptr()),
        ctypes.c_void_p(out.data_ptr()),
        ctypes.c_longlong(block_size),
        ctypes.c_longlong(out.shape[0]),
        ctypes.c_longlong(out.shape[1]),
    )
    return lambda: function(*arguments)


def measure(shape: tuple[int, int], dtype: torch.dtype, block_size: int, repeats: int) -> list[dict[str, Any]]:
    """One row per candidate. Raises SystemExit: a result is wrong."""
    import bitsandbytes.functional as bnb

    numel = math.prod(shape)
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    packed, absmax = nf4.quantize(w, block_size=block_size)
    codes, nested = nf4.quantize_absmax(absmax)
    scales = reference.dequantize_absmax(codes, nested)  # what bitsandbytes' kernel is given: already float32
    bnb_packed, state = bnb.quantize_4bit(w, blocksize=block_size, quant_type="nf4")
    state.absmax, state.dtype = scales, dtype

    def ours(backend: str, scales: Tensor, second: nf4.Nested | None, out: Tensor) -> Callable[[], Tensor]:
        options: dict[str, Any] = {"shape": shape, "block_size": block_size, "dtype": dtype, "nested": second}
        return lambda: nf4.dequantize(packed, scales, **options, out=out, backend=backend)

    outs = {name: torch.full(shape, float("nan"), dtype=dtype) for name in ("c", "plain", "reference", "bnb")}
    candidates: dict[str, Callable[[], Any]] = {
        "qlorag C, double-quantized, out=": ours("c", codes, nested, outs["c"]),
        "qlorag C, float32 absmax, out=": ours("c", scales, None, outs["plain"]),
        "qlorag C, double-quantized, fresh": lambda: nf4.dequantize(
            packed, codes, shape=shape, block_size=block_size, dtype=dtype, nested=nested, backend="c"
        ),
        "qlorag reference, out=": ours("reference", codes, nested, outs["reference"]),
        "bitsandbytes C kernel, reused out": bitsandbytes_kernel(packed, scales, outs["bnb"], block_size),
        "bitsandbytes dequantize_4bit, as installed": lambda: bnb.dequantize_4bit(bnb_packed, state),
    }
    want = reference.dequantize(packed, scales, shape=shape, kind="nf4", block_size=block_size, dtype=dtype)
    for name, run in candidates.items():
        got = run()
        got = got if isinstance(got, Tensor) else outs["bnb"]
        if not torch.equal(got, want):
            raise SystemExit(f"{name}: {dtype} result differs from the reference; a wrong result is not timed")

    # The memory of the machine: read the packed bytes, write as many bytes as the result has.
    moved = packed.nbytes + codes.nbytes + numel * dtype.itemsize
    source, target = torch.ones(moved // 2, dtype=torch.uint8), torch.empty(moved // 2, dtype=torch.uint8)
    candidates["copy of the same number of bytes"] = lambda: target.copy_(source)
    target.fill_(0)

    slow = {"qlorag reference, out=": candidates.pop("qlorag reference, out=")}  # it would empty the caches
    times = interleave(candidates, repeats) | interleave(slow, max(3, repeats // 5))
    memory = moved / statistics.median(times["copy of the same number of bytes"])
    rows = []
    for name, seconds in times.items():
        row = statistics_of(name, seconds)
        elements, moved_per_s = numel / row["ms"] / 1e6, moved / row["ms"] / 1e6
        row |= {
            "dtype": str(dtype).removeprefix("torch."),
            "gb_per_s": moved_per_s,
            "of_memory": moved_per_s * 1e9 / memory,
        }
        rows.append(row | {"gelem_per_s": None if name.startswith("copy") else elements})
    return rows


def statistics_of(name: str, seconds: list[float]) -> dict[str, Any]:
    deciles = statistics.quantiles(seconds, n=10)
    return {
        "candidate": name,
        "ms": statistics.median(seconds) * 1e3,
        "ms_best": min(seconds) * 1e3,
        "ms_p10": deciles[0] * 1e3,
        "ms_p90": deciles[-1] * 1e3,
    }


def measure_quantize(shape: tuple[int, int], dtype: torch.dtype, block_size: int, repeats: int) -> list[dict[str, Any]]:
    """One row per candidate. Raises SystemExit: a result is wrong."""
    import bitsandbytes.functional as bnb

    w = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)

    def ours(backend: str) -> tuple[Tensor, Tensor]:
        packed, absmax = nf4.quantize(w, block_size=block_size, backend=backend)
        return packed, nf4.quantize_absmax(absmax, backend=backend)[0]

    def theirs() -> tuple[Tensor, Tensor]:
        packed, state = bnb.quantize_4bit(w, blocksize=block_size, quant_type="nf4", compress_statistics=True)
        return packed.view(-1), state.absmax

    fast: dict[str, Callable[[], Any]] = {"qlorag C": lambda: ours("c")}
    slow: dict[str, Callable[[], Any]] = {"qlorag reference": lambda: ours("reference"), "bitsandbytes": theirs}
    want = slow["qlorag reference"]()
    for name, run in (fast | slow).items():
        if not all(torch.equal(a, b) for a, b in zip(run(), want, strict=True)):
            raise SystemExit(f"{name}: codes differ from the reference; a wrong result is not timed")
    times = interleave(fast, repeats) | interleave(slow, 3)
    rows = [statistics_of(name, seconds) for name, seconds in times.items()]
    return [
        row | {"dtype": str(dtype).removeprefix("torch."), "gelem_per_s": w.numel() / row["ms"] / 1e6} for row in rows
    ]


def measure_matmul(shapes: list[list[int]], rows: list[int], dtype: str, repeats: int) -> dict[str, Any]:
    """Job for a child: one row per shape, number of rows of x, and candidate."""
    return {
        "rows": [
            row
            for n, k in shapes
            for m in rows
            for row in measure_product(n, k, m, DTYPES[dtype], repeats if n * k > 1 << 22 else 10 * repeats)
        ]
    }


@torch.inference_mode()
def measure_product(n: int, k: int, m: int, dtype: torch.dtype, repeats: int) -> list[dict[str, Any]]:
    import bitsandbytes as bnb

    logging.disable(logging.WARNING)
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(0)).to(dtype)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(1)).to(dtype)
    packed, absmax = nf4.quantize(w)
    codes, nested = nf4.quantize_absmax(absmax)
    bnb_packed, state = bnb.functional.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=True)
    options: dict[str, Any] = {"shape": (n, k), "nested": nested}
    product = nf4.prepare_matmul(packed, codes, **options)
    if product is None:
        raise SystemExit(f"the fused product does not run here: {nf4.available_backends()}")
    scratch = torch.empty(n, k, dtype=dtype)
    dense = nf4.dequantize(packed, codes, dtype=dtype, **options)
    candidates: dict[str, Callable[[], Tensor]] = {
        "qlorag, packed weight": lambda: product(x),
        "qlorag, decoded into scratch, GEMM": lambda: F.linear(
            x, nf4.dequantize(packed, codes, dtype=dtype, out=scratch, **options)
        ),
        "bitsandbytes matmul_4bit": lambda: bnb.matmul_4bit(x, bnb_packed.t(), quant_state=state),
        "torch, dense weight": lambda: F.linear(x, dense),
    }
    exact = x.double() @ nf4.dequantize(packed, codes, dtype=torch.float64, **options).T
    errors = {name: (run().double() - exact).square().mean().sqrt().item() for name, run in candidates.items()}
    if errors["qlorag, packed weight"] > 2 * errors["torch, dense weight"]:
        raise SystemExit(f"{n}x{k}, {m} rows: errors {errors}; a wrong result is not timed")
    moved = packed.nbytes + codes.nbytes
    rows = [statistics_of(name, seconds) for name, seconds in interleave(candidates, repeats).items()]
    return [
        row | {"n": n, "k": k, "m": m, "error": errors[row["candidate"]], "packed_gb_per_s": moved / row["ms"] / 1e6}
        for row in rows
    ]


def environment(arguments: argparse.Namespace) -> dict[str, Any]:
    import bitsandbytes

    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return {
        "cpu": model,
        "kernel": cpu.describe(),
        "threads": torch.get_num_threads(),
        "shape": list(arguments.size),
        "block_size": arguments.block_size,
        "repeats": arguments.repeats,
        "torch": torch.__version__,
        "bitsandbytes": bitsandbytes.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def spread(row: dict[str, Any], digits: int = 2) -> str:
    ms, low, high, best = (f"{row[key]:7.{digits}f}" for key in ("ms", "ms_p10", "ms_p90", "ms_best"))
    return f"{ms} [{low} .. {high}] {best}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of the NF4 kernels")
    parser.add_argument("--size", type=int, nargs=2, default=(4096, 4096), metavar=("N", "K"))
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--dtype", choices=[*DTYPES], nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8], help="of x, in products")
    parser.add_argument("--json", type=Path, help="also write the rows there")
    arguments = parser.parse_args()
    if arguments.size[1] % arguments.block_size:
        raise SystemExit(
            f"--size: K={arguments.size[1]} is no multiple of --block-size {arguments.block_size}, "
            "where bitsandbytes' CPU kernel is wrong"
        )
    logging.disable(logging.WARNING)  # bitsandbytes announces an optional package
    torch.set_num_threads(arguments.threads)
    head = environment(arguments)
    print(" · ".join(f"{key} {value}" for key, value in head.items()))
    rows = []
    for name in arguments.dtype:
        print(f"\n{name:42}      ms  [p10 .. p90]      best Gelem/s    GB/s  of memory")
        for row in measure(tuple(arguments.size), DTYPES[name], arguments.block_size, arguments.repeats):
            rows.append(row)
            speed = f"{row['gelem_per_s']:7.2f}" if row["gelem_per_s"] else "      -"
            print(f"{row['candidate']:42} {spread(row)} {speed} {row['gb_per_s']:7.1f} {row['of_memory']:8.0%}")
    shape = tuple(arguments.size)
    print(f"\n{'quantize, double quantization':42}      ms  [p10 .. p90]      best Gelem/s")
    quantized = [
        row
        for name in arguments.dtype
        for row in measure_quantize(shape, DTYPES[name], arguments.block_size, arguments.repeats)
    ]
    for row in quantized:
        print(f"{row['dtype'] + ': ' + row['candidate']:42} {spread(row)} {row['gelem_per_s']:7.2f}")

    shapes = [shape, *SMOLLM2]
    products = []
    for malloc, variables in {"as installed": {}, "tuned": child.TUNED_MALLOC}.items():
        job = {"shapes": shapes, "rows": arguments.rows, "dtype": arguments.dtype[0], "repeats": arguments.repeats}
        found = child.run(__file__, child.Job("measure_matmul", job, variables), threads=arguments.threads)
        print(f"\n{f'multiply, {arguments.dtype[0]}, malloc {malloc}':42}      ms  [p10 .. p90]      best")
        for row in found["rows"]:
            products.append(row | {"malloc": malloc})
            title = f"[{row['m']}, {row['k']}] x [{row['n']}, {row['k']}]ᵀ"
            print(f"{title:26} {row['candidate']:36} {spread(row, 3)} {row['packed_gb_per_s']:7.1f}")

    if arguments.json:
        head_and_rows = {"environment": head, "rows": rows, "quantize": quantized, "matmul": products}
        arguments.json.write_text(json.dumps(head_and_rows, indent=2) + "\n")


if __name__ == "__main__":
    child.serve(measure_matmul)
    sys.exit(main())
