"""Searching a store: exact, through HNSW, and hnswlib by itself; then adding, and opening again.

    python bench/bench_retrieval.py [--n 50000] [--dim 384] [--queries 200] [--k 10] [--M 16] [--ef 128]

The vectors are clustered as those of texts are (random centres, noise around them), from a fixed seed.
Queries are asked one at a time, as questions come. A store's search includes reading the vectors and
texts of the hits from SQLite, hnswlib's does not. Recall is against float64 brute force in numpy; a wrong
exact result ends the run. "open" is opening and the first search, which loads what later ones keep in memory.
"""

from __future__ import annotations

import argparse
import os
import platform
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import hnswlib
import numpy as np
from harness import child
from qlorag.retrieval import Document, HnswConfig, Store

CHUNKS_PER_DOCUMENT = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=20_000, help="vectors, in whole hundreds (default %(default)s)")
    parser.add_argument("--dim", type=int, default=384, help="their dimension (default %(default)s)")
    parser.add_argument("--queries", type=int, default=200, help="(default %(default)s)")
    parser.add_argument("--k", type=int, default=10, help="results per query (default %(default)s)")
    parser.add_argument("--M", type=int, default=16, help="links per node (default %(default)s)")
    parser.add_argument("--ef", type=int, default=128, help="candidates per search (default %(default)s)")
    parser.add_argument("--json", type=Path, help="write the results there")
    args = parser.parse_args()
    n = args.n // CHUNKS_PER_DOCUMENT * CHUNKS_PER_DOCUMENT
    config = HnswConfig(M=args.M, ef=args.ef)
    vectors, queries = clustered(n, args.queries, args.dim)
    wanted = brute_force(vectors, queries, args.k)

    machine = platform.processor() or platform.machine()
    print(f"{machine}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    versions = {"numpy": np.__version__, "hnswlib": version("hnswlib"), "SQLite": sqlite3.sqlite_version}
    print(f"python {platform.python_version()}, " + ", ".join(f"{k} {v}" for k, v in versions.items()))
    print(f"n={n} dim={args.dim} k={args.k} M={args.M} ef_construction={config.ef_construction} ef={args.ef}\n")
    columns = (
        ("median ms", 11),
        ("p95 ms", 9),
        ("queries/s", 11),
        ("recall", 8),
        ("build s", 9),
        ("open s", 8),
    )
    print("search          " + "".join(f"{title:>{width}}" for title, width in columns))

    def open_store(path: Path, exact_below: int, **options: object) -> Store:
        return Store.open(
            path,
            embedder=lambda texts: vectors[[int(text) for text in texts]],
            embedder_id="numbers",
            chunk_size=1,
            chunk_overlap=0,
            exact_below=exact_below,
            hnsw=config,
            **options,  # type: ignore[arg-type]
        )

    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "store"
        with open_store(path, 10**9) as store:
            documents = [
                Document(f"document {i}", " ".join(map(str, range(i, i + CHUNKS_PER_DOCUMENT))))
                for i in range(0, n, CHUNKS_PER_DOCUMENT)
            ]
            add_seconds, _ = timed(lambda: store.add(documents))
            megabytes = store.stats().bytes / 1e6

        for name, exact_below in (("store, exact", 10**9), ("store, hnsw", 1)):
            build_seconds = None
            if exact_below == 1:
                with open_store(path, exact_below) as store:
                    build_seconds, _ = timed(store.build_index)
            began = time.perf_counter()
            with open_store(path, exact_below, read_only=True) as store:
                store.search_vector(queries[0], k=args.k)  # loads what later searches keep in memory
                open_seconds = time.perf_counter() - began
                row = report(
                    name,
                    lambda q, store=store: [int(hit.text) for hit in store.search_vector(q, k=args.k)],
                    queries,
                    wanted,
                    build_seconds,
                    open_seconds,
                    exact=exact_below > 1,
                )
                rows.append(row)

    raw = hnswlib.Index(space="cosine", dim=args.dim)
    raw.init_index(n, M=args.M, ef_construction=config.ef_construction)
    build_seconds, _ = timed(lambda: raw.add_items(vectors))
    raw.set_ef(args.ef)
    alone = report(
        "hnswlib alone",
        lambda q: raw.knn_query(q, k=args.k, num_threads=1)[0][0].tolist(),
        queries,
        wanted,
        build_seconds,
        None,
        exact=False,
    )
    rows.append(alone)
    print(
        f"\nadd: {n} chunks in {len(documents)} documents, {add_seconds:.2f} s, "
        f"{n / add_seconds:.0f} chunks/s, {1e3 * add_seconds / len(documents):.1f} ms per durable document "
        f"(embedding not included); store.sqlite3 {megabytes:.0f} MB"
    )
    if args.json:
        settings = {key: value for key, value in vars(args).items() if key != "json"}
        child.write_json(args.json, {"settings": settings, "rows": rows, "add_chunks_per_s": n / add_seconds})


def clustered(n: int, queries: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """float32 [n, dim] and [queries, dim] around the same sqrt(n) centres."""
    random = np.random.default_rng(0)
    centres = random.normal(size=(max(1, int(n**0.5)), dim)).astype(np.float32)
    which = random.integers(0, len(centres), n + queries)
    rows = centres[which] + random.normal(size=(n + queries, dim)).astype(np.float32)
    return rows[:n], rows[n:]


def brute_force(vectors: np.ndarray, queries: np.ndarray, k: int) -> list[list[int]]:
    unit = vectors.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    return [np.argsort(-(unit @ q.astype(np.float64)), kind="stable")[:k].tolist() for q in queries]


def timed(action: Callable[[], object]) -> tuple[float, object]:
    began = time.perf_counter()
    result = action()
    return time.perf_counter() - began, result


def report(
    name: str,
    search: Callable[[np.ndarray], list[int]],
    queries: np.ndarray,
    wanted: list[list[int]],
    build_seconds: float | None,
    open_seconds: float | None,
    *,
    exact: bool,
) -> dict[str, object]:
    seconds, found = [], 0
    for query, right in zip(queries, wanted, strict=True):
        took, got = timed(lambda q=query: search(q))
        seconds.append(took)
        found += len(set(got) & set(right))  # type: ignore[call-overload]
        if exact and got != right:
            raise SystemExit(f"{name}: {got}, wanted {right}: not timing a wrong result")
    recall = found / sum(map(len, wanted))
    p95 = sorted(seconds)[int(0.95 * len(seconds))]
    median = statistics.median(seconds)
    cells = ["" if x is None else f"{x:.2f}" for x in (build_seconds, open_seconds)]
    row = f"{name:<16}{1e3 * median:>11.2f}{1e3 * p95:>9.2f}{1 / median:>11.0f}{recall:>8.3f}"
    print(row + f"{cells[0]:>9}{cells[1]:>8}")
    return {
        "name": name,
        "median_s": median,
        "p95_s": p95,
        "queries_per_s": 1 / median,
        "recall": recall,
        "build_s": build_seconds,
        "open_s": open_seconds,
    }


if __name__ == "__main__":
    main()
