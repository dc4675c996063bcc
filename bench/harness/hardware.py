"""The machine: what it is, and what it reaches. Every percentage in this folder is a percentage of these peaks.

    python bench/harness/hardware.py [--threads N] [--json FILE]

    read       a sum over an array much larger than the caches         GB/s: bytes read, none written
    GEMM       a product of two square matrices, float32 and bfloat16  GFLOP/s: 2 n^3 each

A peak is the best of its repeats, not the median: it stands for what the hardware allows. All of it is about the
processor; a GPU's peaks are measured where it is (nf4/gpu.py).
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # bench/, from which its files import each other

from harness import child

PACKAGES = ("torch", "numpy", "transformers", "peft", "bitsandbytes", "sentence-transformers", "hnswlib")
READ_BYTES = 512 * 2**20
GEMM_SIZE = 2048
REPEATS = 7


def describe() -> dict[str, Any]:
    """The machine and what is installed on it."""
    return {
        "cpu": _cpu_name(),
        "processors": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def measure_peaks() -> dict[str, Any]:
    """Job for a child: the processor's peaks at that child's number of threads."""
    import torch

    memory = torch.ones(READ_BYTES // 4)

    def best(action: Callable[[], Any]) -> float:
        seconds = []
        for _ in range(REPEATS):
            began = time.perf_counter()
            action()
            seconds.append(time.perf_counter() - began)
        return min(seconds)

    def gemm(dtype: torch.dtype) -> float:
        x = torch.randn(GEMM_SIZE, GEMM_SIZE).to(dtype)
        out = torch.empty_like(x)
        return 2 * GEMM_SIZE**3 / best(lambda: torch.mm(x, x, out=out)) / 1e9

    return {
        "device": _cpu_name(),
        "threads": torch.get_num_threads(),
        "instructions": _instructions(),
        "read_gb_per_s": READ_BYTES / best(memory.sum) / 1e9,
        "float32_gflop_per_s": gemm(torch.float32),
        "bfloat16_gflop_per_s": gemm(torch.bfloat16),
        "gemm_size": GEMM_SIZE,
    }


def machine(threads: int) -> dict[str, Any]:
    """`describe`, and under "peaks" `measure_peaks` from a process of its own.

    "load_before" says how busy the machine was: on a busy one every figure is wrong.
    """
    load = os.getloadavg()[0]
    found = child.run(__file__, child.Job("measure_peaks", {}), threads=threads)
    found.pop("peak_rss_mib")
    return describe() | {"peaks": found | {"load_before": load}}


def heading(machine: dict[str, Any]) -> str:
    """What stands above every table: device, peaks, versions."""
    peaks = machine["peaks"]
    lines = [
        f"{peaks['device']}, {peaks['threads']} threads ({peaks['instructions']}), load {peaks['load_before']:.1f}",
        f"peaks: read {peaks['read_gb_per_s']:.1f} GB/s; GEMM {peaks['float32_gflop_per_s']:.0f} GFLOP/s float32, "
        f"{peaks['bfloat16_gflop_per_s']:.0f} bfloat16",
        ", ".join(f"{name} {number}" for name, number in machine["versions"].items()),
    ]
    return "\n".join(lines)


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _instructions() -> str:
    """The vector instructions torch uses, and whether bfloat16 products have instructions of their own."""
    import torch

    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    bf16 = [name for name in ("avx512_bf16", "amx_bf16", "arm_bf16") if capabilities.get(name)]
    return " ".join([torch.backends.cpu.get_cpu_capability(), *bf16])


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=child.default_threads(), help="default: %(default)s")
    parser.add_argument("--json", type=Path, help="write the results there")
    args = parser.parse_args()
    found = machine(args.threads)
    print(heading(found))
    if args.json:
        child.write_json(args.json, found)


if __name__ == "__main__":
    child.serve(measure_peaks)
    main()
