"""Speed of embedding, beside sentence-transformers and the machine's own matrix product.

    python bench/bench_embed.py [--model DIR] [--texts 512] [--threads 2] [--repeats 5] [--json FILE]

Texts of 20 to 150 words from Python's own documentation topics are embedded in float32 by both libraries, in
one interleaved run, in a new order each round; figures are medians, the spread is the slowest and the fastest
round. Both are given the same list and keep their own defaults (sentence-transformers: batches of 32).

GFLOP/s counts what the texts need, no padding: per layer 2 (4 D^2 + 2 D F) for a token, and 4 L^2 D for the
attention of a text of L tokens. "of peak" is the share of what torch reached in the same rounds on a float32
matrix product of 2048^3. Peak RSS is that of a fresh process that loads one library and embeds the list once.
Nothing is timed before every pair of vectors agrees to a cosine of 0.99999.

Much of the speed-up is padding that is not computed, and so depends on the texts: sentence-transformers sorts by
characters, and the same number of characters is more tokens in a table than in prose. The last line says how many
times the tokens it computes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch

Encode = Callable[[list[str]], np.ndarray]
PEAK_SIZE = 2048


def make_texts(count: int) -> list[str]:
    """Runs of 20 to 150 consecutive words, the same in every run on one Python version."""
    words = " ".join(topics[name] for name in sorted(topics)).split()
    rng = random.Random(0)
    sizes = [rng.randint(20, 150) for _ in range(count)]
    return [" ".join(words[start : start + n]) for n in sizes for start in [rng.randrange(len(words) - n)]]


def load_ours(folder: Path) -> Encode:
    from qlorag.models import load_encoder

    return load_encoder(folder).encode


def load_theirs(folder: Path) -> Encode:
    os.environ["HF_HUB_OFFLINE"] = "1"
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu")
    return lambda texts: model.encode(texts, show_progress_bar=False)


LIBRARIES = {"qlorag": load_ours, "sentence-transformers": load_theirs}


def gflop(folder: Path, texts: list[str]) -> tuple[float, int, int]:
    """(arithmetic that the texts need, their tokens, the same when padded as sentence-transformers does)."""
    from qlorag.models import load_encoder

    encoder = load_encoder(folder)
    c, lengths = encoder.config, [len(ids) for ids in encoder.tokenize(texts)]
    d, f = c.hidden_size, c.intermediate_size
    flop = c.num_layers * sum(2 * (4 * d * d + 2 * d * f) * n + 4 * n * n * d for n in lengths)
    by_characters = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    batches = [by_characters[i : i + 32] for i in range(0, len(texts), 32)]
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    return flop / 1e9, sum(lengths), padded


def peak_rss_mib(library: str, folder: Path, count: int, threads: int) -> float | None:
    if not Path("/proc/self/status").exists():  # only Linux tells
        return None
    command = [sys.executable, __file__, "--only", library, "--model", str(folder)]
    command += ["--texts", str(count), "--threads", str(threads)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def only(library: str, folder: Path, texts: list[str]) -> None:
    LIBRARIES[library](folder)(texts)
    # Not getrusage: on Linux a child's ru_maxrss starts at its parent's size.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print(int(status["VmHWM"].split()[0]) / 1024)


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())


def measure(folder: Path, texts: list[str], repeats: int, threads: int) -> dict[str, Any]:
    """Raises SystemExit: the two libraries disagree."""
    encoders = {name: load(folder) for name, load in LIBRARIES.items()}
    a, b = (encode(texts) for encode in encoders.values())  # the warm-up too
    cosine = float(((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min())
    if not cosine >= 0.99999:
        raise SystemExit(f"not timed: smallest cosine {cosine:.7f} between the two libraries, wanted 0.99999")

    x = torch.randn(PEAK_SIZE, PEAK_SIZE, generator=torch.Generator().manual_seed(0))
    out = torch.empty_like(x)
    candidates: dict[str, Callable[[], Any]] = {
        name: lambda encode=encode: encode(texts) for name, encode in encoders.items()
    }
    candidates["matrix product"] = lambda: [torch.mm(x, x, out=out) for _ in range(10)]
    candidates["matrix product"]()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    order = random.Random(0)
    for _ in range(repeats):
        for name in order.sample([*candidates], len(candidates)):
            start = time.perf_counter()
            candidates[name]()
            seconds[name].append(time.perf_counter() - start)

    work, tokens, padded = gflop(folder, texts)
    peak = 10 * 2 * PEAK_SIZE**3 / 1e9 / statistics.median(seconds.pop("matrix product"))
    rows = {}
    for name, times in seconds.items():
        median = statistics.median(times)
        rows[name] = {
            "texts_per_s": len(texts) / median,
            "spread": [len(texts) / max(times), len(texts) / min(times)],
            "gflop_per_s": work / median,
            "of_peak": work / median / peak,
            "peak_rss_mib": peak_rss_mib(name, folder, len(texts), threads),
        }
    ours, theirs = (np.array(seconds[name]) for name in LIBRARIES)
    return {
        "cosine": cosine,
        "tokens": tokens,
        "padded_tokens": padded,
        "gflop": work,
        "gemm_peak_gflop_per_s": peak,
        "limit_texts_per_s": len(texts) * peak / work,
        "libraries": rows,
        "speedup": float(np.median(theirs / ours)),  # of the same round, so that drift cancels
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="encoder folder (default: the pulled minilm-l6)")
    parser.add_argument("--texts", type=int, default=96, help="how many (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--only", choices=LIBRARIES, help=argparse.SUPPRESS)  # the child that measures memory
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folder: Path | None = args.model
    if folder is None:
        from qlorag.recipes.hub.pull import pull

        folder = pull("minilm-l6")
    texts = make_texts(args.texts)
    if args.only:
        only(args.only, folder, texts)
        return

    packages = ("torch", "sentence-transformers", "transformers", "tokenizers")
    result: dict[str, Any] = {
        "device": cpu_name(),
        "threads": args.threads,
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in packages},
        "texts": len(texts),
        "repeats": args.repeats,
        "dtype": "float32",
    } | measure(folder, texts, args.repeats, args.threads)

    versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    print(f"{result['device']}, {args.threads} threads; {versions}")
    print(
        f"{len(texts)} texts, {result['tokens']} tokens, {result['gflop']:.0f} GFLOP, float32; "
        f"smallest cosine {result['cosine']:.7f}"
    )
    print(f"{'':22} {'texts/s':>8} {'spread':>15} {'GFLOP/s':>8} {'of peak':>8} {'peak RSS':>10}")
    for name, row in result["libraries"].items():
        low, high = row["spread"]
        rss = "unknown" if row["peak_rss_mib"] is None else f"{row['peak_rss_mib']:.0f} MiB"
        print(
            f"{name:22} {row['texts_per_s']:8.1f} {f'{low:.1f}-{high:.1f}':>15} {row['gflop_per_s']:8.0f} "
            f"{row['of_peak']:8.0%} {rss:>10}"
        )
    limit, peak = result["limit_texts_per_s"], result["gemm_peak_gflop_per_s"]
    print(f"{'limit: matrix product':22} {limit:8.1f} {'':15} {peak:8.0f}")
    padding = result["padded_tokens"] / result["tokens"]
    print(f"speed-up {result['speedup']:.2f}x (median of the rounds' ratios), of which padding {padding:.2f}x")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
