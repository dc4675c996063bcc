"""Speed, exactness and memory of the NF4 kernels, beside the reference, bitsandbytes and the limits of the machine.

    python bench/bench_nf4.py [--only dequantize few ...] [--repeats 15] [--small] [--json FILE]

The last table holds the targets: what the kernels are asked to reach, what they reached, met or missed by how much.
nf4/targets.py computes it from the results above it. `--small` runs everything in seconds, to see that it runs; the
targets then mean nothing. Each part is measured in a process of its own, whose threads and malloc are stated:

dequantize  One thread. GB/s counts each byte once: packed codes and scales read, result written. "of memory" is the
            share of what torch's own copy of as many bytes reached in the same loop. bitsandbytes appears twice,
            because its public function on a CPU is mostly page faults on a fresh result: "as installed" is
            `dequantize_4bit`; "C kernel, reused out" calls its own C function into memory that is already there.
quantize    One thread, malloc tuned to keep freed memory, double quantization, as QLoRA stores weights.
few         Products with 1, 4 and 8 rows, bfloat16, on one thread and on the default number: once with malloc as
            installed (one row) and once tuned, because that decides bitsandbytes' figure; its product that
            rearranges the weight appears where the processor has it (nf4/competitor.py). What the checks before left
            free in malloc's heap is returned first: where 32 MiB lie there, malloc as installed is as good as tuned.
            The weight is the same one each time, so whatever fits in a cache stays there.
beyond      The same for one row and a weight of 138 MB, between sums that empty the caches and say how fast memory is.
many        128 and 512 rows, forward and backward, beside torch's product with the decoded weight; malloc tuned.
crossover   Up to how many rows the fused product is faster than decoding and torch's GEMM (nf4/crossover.py), one
            thread, malloc tuned.
exactness   Bits that differ from the reference over 10^7 numbers, a sixth of which are ties and their neighbours.
memory      Bits per weight of a layer in training (nf4/memory.py), malloc as installed.
gpu         Where there is one (nf4/gpu.py).

Candidates run in one interleaved loop, in a new order each round; the figure is the median, the spread the 10th to the
90th percentile. Nothing is timed before its result equals the reference, or for products, is at most twice as far as
torch's from float64.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nf4.cpu
import nf4.crossover
import nf4.gpu
import nf4.memory
import nf4.products
import nf4.targets
import torch
from harness import child
from harness.names import OURS
from qlorag.kernels.dispatch import why_no_triton
from qlorag.kernels.nf4 import cpu

PARTS = ("dequantize", "quantize", "few", "beyond", "many", "crossover", "exactness", "memory", "gpu")
MALLOC: dict[str, Mapping[str, str]] = {"as installed": {}, "tuned": child.TUNED_MALLOC}
SMOLLM2 = [(576, 576), (192, 576), (1536, 576), (576, 1536)]  # the projections of SmolLM2-135M


@dataclass(frozen=True)
class Sizes:
    """Those of the targets, or smaller ones to try this file out."""

    square: tuple[int, int] = (4096, 4096)
    wide: tuple[int, int] = (11008, 4096)
    beyond: int = 16384
    read_bytes: int = nf4.products.READ_BYTES
    values: int = 10_000_000
    layers: int = 24
    crossover_rows: tuple[int, ...] = nf4.crossover.ROWS
    crossover_shapes: tuple[tuple[int, int], ...] = nf4.crossover.SHAPES


SMALL = Sizes((256, 256), (512, 256), 512, 2**20, 20_000, 2, (4, 8), ((128, 128),))


def few(shapes: list[list[int]], rows: list[int], repeats: int) -> dict[str, Any]:
    """Job for a child."""
    return {"rows": nf4.products.few_rows([(n, k) for n, k in shapes], rows, repeats)}


def beyond(size: int, repeats: int, read_bytes: int) -> dict[str, Any]:
    """Job for a child."""
    return {"rows": [nf4.products.beyond_cache(size, repeats, read_bytes=read_bytes)]}


def many(shape: list[int], rows: list[int], repeats: int) -> dict[str, Any]:
    """Job for a child."""
    return {"rows": nf4.products.many_rows((shape[0], shape[1]), rows, repeats)}


def crossover(dtype: str, shapes: list[list[int]], rows: list[int], repeats: int) -> dict[str, Any]:
    """Job for a child."""
    return {"rows": nf4.crossover.measure(dtype, shapes, rows, repeats)}


def run(
    job: str,
    arguments: dict[str, Any],
    *,
    threads: int,
    malloc: str = "tuned",
    env: Mapping[str, str] = {},
    **more: Any,
) -> list[dict[str, Any]]:
    """The rows of a job in a process of its own, which say what it ran under."""
    answer = child.run(__file__, child.Job(job, arguments, {**MALLOC[malloc], **env}), threads=threads)
    return [{**row, "threads": threads, "malloc": malloc, **more} for row in answer["rows"]]


def all_few(sizes: Sizes, threads: list[int], repeats: int) -> list[dict[str, Any]]:
    """Adds "has_target": whether a target stands on the row, or it is only printed."""
    shapes = [sizes.square, sizes.wide]
    counts = [1, *nf4.targets.AT_MOST_OF_ONE_ROW]
    rows = []
    for n in threads:
        rows += run("few", {"shapes": shapes, "repeats": repeats, "rows": [1]}, threads=n, malloc="as installed")
        more = SMOLLM2 if n == 1 else []
        rows += run("few", {"shapes": shapes + more, "repeats": repeats, "rows": counts}, threads=n)
    return [row | {"has_target": (row["n"], row["k"]) in shapes} for row in rows]


def exactness(values: int) -> list[dict[str, Any]]:
    """Each backend that can run here, and bitsandbytes, against the reference."""
    job: dict[str, Any] = {"values": values, "dtypes": [*nf4.cpu.DTYPES]}
    kinds: dict[str, tuple[str, dict[str, Any], Mapping[str, str]]] = {
        "C": ("c", job, {}),
        "bitsandbytes on the CPU": ("bitsandbytes", job, {}),
    }
    if torch.cuda.is_available():
        kinds["Triton"] = ("triton", job, {})
    elif why_no_triton() is None:
        # In the interpreter of Triton 3.9, float32 is the only dtype that is rounded as on a GPU (tests/interpreter).
        kinds["Triton in its interpreter"] = ("triton", job | {"dtypes": ["float32"]}, {"TRITON_INTERPRET": "1"})

    def one(title: str) -> dict[str, Any]:
        backend, arguments, variables = kinds[title]
        job_of_it = child.Job("exactness", arguments | {"backend": backend}, variables)
        return {"title": title, **child.run(__file__, job_of_it, threads=1)}

    with ThreadPoolExecutor(child.default_threads()) as pool:  # nothing is timed here
        return [*pool.map(one, reversed(kinds))][::-1]  # the interpreter takes longest, so it begins


def environment(threads: list[int], repeats: int) -> dict[str, Any]:
    import bitsandbytes
    from harness.hardware import describe

    return {
        "cpu": describe()["cpu"],
        "kernel": cpu.describe(),
        "threads": threads,
        "repeats": repeats,
        "torch": torch.__version__,
        "bitsandbytes": bitsandbytes.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """A table: how the row is called, its times, and every figure it has besides."""
    print(f"\n{title:64}      ms  [p10 .. p90]      best")
    for row in rows:
        size = f"[{row['m']}, {row['k']}] x [{row['n']}, {row['k']}]ᵀ" if "m" in row else ""
        what = " ".join(str(row[key]) for key in ("dtype", "direction") if key in row)
        name = " ".join(filter(None, (size, what, row["candidate"])))
        ms, low, high, best = (f"{row[key]:8.3f}" for key in ("ms", "ms_p10", "ms_p90", "ms_best"))
        figures = [
            (row.get("gelem_per_s"), "{:.2f} Gelem/s"),
            (row.get("packed_gb_per_s") or row.get("gb_per_s"), "{:.1f} GB/s"),
            (row.get("of_memory") or row.get("of_copy"), "{:.0%} of a copy"),
            (row.get("of_read"), "{:.0%} of reading"),
            (row.get("tflop_per_s"), "{:.3g} TFLOP/s"),
            (row.get("of_gemm"), "{:.0%} of dense GEMM"),
        ]
        told = "  ".join(text.format(value) for value, text in figures if value is not None)
        print(f"{name:64}{ms} [{low} ..{high}]{best}  {told}".rstrip())


def show_few(title: str, rows: list[dict[str, Any]]) -> None:
    """A line per product, a column per candidate: median and spread in milliseconds, and the GB/s of ours."""
    names = [*dict.fromkeys(row["candidate"] for row in rows)]
    print(f"\n{title:42}{'GB/s':>6}" + "".join(f"{name:>38}" for name in names))
    for n, k, m in dict.fromkeys((row["n"], row["k"], row["m"]) for row in rows):
        here = {row["candidate"]: row for row in rows if (row["n"], row["k"], row["m"]) == (n, k, m)}
        cells = [f"{r['ms']:.3f} [{r['ms_p10']:.3f} .. {r['ms_p90']:.3f}]" if (r := here.get(x)) else "" for x in names]
        shape = f"[{m}, {k}] x [{n}, {k}]ᵀ"
        print(f"{shape:42}{here[OURS]['packed_gb_per_s']:6.1f}" + "".join(f"{cell:>38}" for cell in cells))


def measure(parts: list[str], sizes: Sizes, dtypes: list[str], block_size: int, repeats: int) -> dict[str, Any]:
    """Every part in turn, printed as it is found."""
    threads = sorted({1, child.default_threads()})
    result: dict[str, Any] = {"environment": environment(threads, repeats)}
    print(" · ".join(f"{key} {value}" for key, value in result["environment"].items()))
    n, k = sizes.square
    coding = {"shape": sizes.square, "dtypes": dtypes, "block_size": block_size, "repeats": repeats}
    if "dequantize" in parts:
        result["rows"] = run("dequantize", coding, threads=1, malloc="as installed", n=n, k=k)
        show(f"dequantize {n}x{k}, one thread", result["rows"])
    if "quantize" in parts:
        result["quantize"] = run("quantize", coding, threads=1, n=n, k=k)
        show(f"quantize {n}x{k}, double quantization, one thread", result["quantize"])
    if "few" in parts:
        result["matmul"] = all_few(sizes, threads, repeats)
        for t, malloc in dict.fromkeys((row["threads"], row["malloc"]) for row in result["matmul"]):
            here = [row for row in result["matmul"] if (row["threads"], row["malloc"]) == (t, malloc)]
            show_few(f"few rows, {t} threads, malloc {malloc}", here)
    if "beyond" in parts:
        job: dict[str, Any] = {"size": sizes.beyond, "repeats": repeats, "read_bytes": sizes.read_bytes}
        result["beyond_cache"] = [row for t in threads for row in run("beyond", job, threads=t)]
        for row in result["beyond_cache"]:
            show(f"beyond the cache, {row['threads']} threads, reading {row['read_gb_per_s']:.1f} GB/s", [row])
    if "many" in parts:
        job = {"shape": sizes.square, "rows": [*nf4.targets.OF_DENSE], "repeats": repeats}
        result["many_rows"] = [row for t in threads for row in run("many", job, threads=t)]
        for t in threads:
            show(f"many rows, bfloat16, {t} threads", [row for row in result["many_rows"] if row["threads"] == t])
    if "crossover" in parts:
        job = {"shapes": sizes.crossover_shapes, "rows": sizes.crossover_rows, "repeats": min(repeats, 7)}
        result["crossover"] = [
            row
            for level, dtype, env in nf4.crossover.variants()
            for row in run("crossover", job | {"dtype": dtype}, threads=1, env=env, level=level)
        ]
        print("\ntime of decoding and GEMM over that of the fused product, one thread")
        print(nf4.crossover.table(result["crossover"]))
    if "exactness" in parts:
        result["exactness"] = exactness(sizes.values)
        for one in result["exactness"]:
            print(f"bits beside the reference, {one['title']}: {one['values']} values, differ {one['differ']}")
    if "memory" in parts and not nf4.memory.STATM.exists():
        print(f"\nmemory of a layer in training: not measured, there is no {nf4.memory.STATM}")
    elif "memory" in parts:
        job = {"size": n, "layers": sizes.layers}
        result["memory"] = child.run(__file__, child.Job("layers", job), threads=child.default_threads())
        print("\nmemory of a layer in training: " + ", ".join(f"{k} {v:.5g}" for k, v in result["memory"].items()))
    if "gpu" in parts:
        result["gpu"] = on_gpu()
    return result


def on_gpu() -> dict[str, Any] | None:
    """What the GPU reaches, printed; None without one."""
    if not torch.cuda.is_available():
        print("\nGPU speed: not measured, torch.cuda.is_available() is False")
        return None
    found = child.run(__file__, child.Job("job", {}), threads=child.default_threads())
    show_gpu(found)
    return found


def show_gpu(found: dict[str, Any]) -> None:
    print(f"\n{found['device']}: copy {found['copy_gb_per_s']:.0f} GB/s, GEMM {found['gemm_tflop_per_s']:.0f} TFLOP/s")
    print(f"bitsandbytes: {found['bitsandbytes']}")
    for part in ("dequantize", "quantize", "few_rows", "many_rows"):
        show(f"{part}, on the GPU", found[part])


def layers(size: int, layers: int) -> dict[str, Any]:
    """Job for a child."""
    return nf4.memory.measure(size, layers)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=PARTS, nargs="+", default=[*PARTS], help="default: all of them")
    parser.add_argument("--size", type=int, nargs=2, metavar=("N", "K"), help="default: 4096 4096")
    parser.add_argument("--block-size", type=int, default=64, help="of decoding and quantizing, default: %(default)s")
    parser.add_argument("--dtype", choices=[*nf4.cpu.DTYPES], nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--repeats", type=int, default=15, help="at least 2, default: %(default)s")
    parser.add_argument("--small", action="store_true", help="everything in seconds; the figures mean nothing")
    parser.add_argument("--json", type=Path, help="write the results there")
    args = parser.parse_args()
    sizes = SMALL if args.small else Sizes()
    if args.size:
        sizes = Sizes(**{**vars(sizes), "square": tuple(args.size)})
    if sizes.square[1] % args.block_size:
        raise SystemExit(
            f"--size: K={sizes.square[1]} is no multiple of --block-size {args.block_size}, "
            "where bitsandbytes' CPU kernel is wrong"
        )
    result = measure(args.only, sizes, args.dtype, args.block_size, args.repeats)
    found = nf4.targets.targets(result)
    print(f"\n{nf4.targets.table(found)}\n{sum(target.met for target in found)} of {len(found)} met")
    if args.json:
        child.write_json(args.json, result | {"targets": [target.as_dict() for target in found]})


if __name__ == "__main__":
    child.serve(
        nf4.cpu.dequantize, nf4.cpu.quantize, nf4.cpu.exactness, few, beyond, many, crossover, layers, nf4.gpu.job
    )
    main()
