"""Speed of NF4 dequantization, beside the reference, bitsandbytes and the memory of the machine.

    python bench/bench_nf4.py [--size 4096 4096] [--threads 1] [--repeats 15] [--json FILE]

All candidates but the reference run in one interleaved loop, in a new order each round; the figure is the
median, the spread the 10th to the 90th percentile. GB/s counts each byte once: packed codes and scales read,
result written. "of memory" is the share of what torch's own copy of as many bytes reached in the same loop.

bitsandbytes appears twice, because its public function on a CPU is mostly page faults on a fresh result: "as
installed" is `dequantize_4bit`; "C kernel, reused out" calls its own C function into memory that is already
there, which is also what a well-tuned malloc would give. Nothing is timed before its result equals the
reference.
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

import torch
from qlorag.kernels import nf4
from qlorag.kernels.nf4 import cpu, reference
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
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


def measure(
    shape: tuple[int, int], dtype: torch.dtype, block_size: int, repeats: int
) -> list[dict[str, Any]]:
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
            raise SystemExit(
                f"{name}: {dtype} result differs from the reference; a wrong result is not timed"
            )

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
        deciles = statistics.quantiles(seconds, n=10)
        median = statistics.median(seconds)
        rows.append(
            {
                "candidate": name,
                "dtype": str(dtype).removeprefix("torch."),
                "ms": median * 1e3,
                "ms_best": min(seconds) * 1e3,
                "ms_p10": deciles[0] * 1e3,
                "ms_p90": deciles[-1] * 1e3,
                "gelem_per_s": None if name.startswith("copy") else numel / median / 1e9,
                "gb_per_s": moved / median / 1e9,
                "of_memory": moved / median / memory,
            }
        )
    return rows


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


def main() -> None:
    parser = argparse.ArgumentParser(description="NF4 dequantization speed")
    parser.add_argument("--size", type=int, nargs=2, default=(4096, 4096), metavar=("N", "K"))
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--dtype", choices=[*DTYPES], nargs="+", default=["bfloat16", "float32"])
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
            print(
                f"{row['candidate']:42} {row['ms']:7.2f} [{row['ms_p10']:6.2f} .. {row['ms_p90']:6.2f}] "
                f"{row['ms_best']:7.2f} {speed} {row['gb_per_s']:7.1f} {row['of_memory']:8.0%}"
            )
    if arguments.json:
        arguments.json.write_text(json.dumps({"environment": head, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
