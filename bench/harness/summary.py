"""The few figures of each benchmark that answer its question, taken from its JSON: one function per benchmark.

A headline stands beside the competitor's best form for that very figure: its fastest variant for speed, its smallest
for memory, even where no single variant is both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from harness.names import DENSE, OURS


@dataclass(frozen=True)
class Headline:
    """what: the figure and its unit.  beside: the same of `competitor`, in the same run.

    of_limit: the share of what the hardware allows, where that is known.
    """

    what: str
    ours: float
    beside: float
    competitor: str
    of_limit: float | None = None

    def line(self) -> str:
        limit = "" if self.of_limit is None else f"{self.of_limit:.1%}"
        numbers = f"{self.ours:10.4g} {self.beside:10.4g} {self.ours / self.beside:8.2f} {limit:>9}"
        return f"{self.what:46} {numbers}  {self.competitor}"


def train(result: dict[str, Any]) -> Iterator[Headline]:
    for base, found in result["bases"].items():
        ours, *others = found["candidates"]
        fast, small = _most(others, "tokens_per_s"), _least(others, "peak_rss_mib")
        yield Headline(
            f"LoRA training, {base} base: tok/s",
            ours["tokens_per_s"],
            fast["tokens_per_s"],
            fast["name"],
            ours["of_limit"],
        )
        yield Headline(
            f"LoRA training, {base} base: peak RSS, MiB", ours["peak_rss_mib"], small["peak_rss_mib"], small["name"]
        )


def generate(result: dict[str, Any]) -> Iterator[Headline]:
    for base, found in result["bases"].items():
        ours, *others = found["candidates"]
        for stage in ("prefill", "decode"):
            key = f"{stage}_tokens_per_s"
            best = _most(others, key)
            share = ours[key] / found["limits"][stage]
            yield Headline(f"{stage}, {base} base: tok/s", ours[key], best[key], best["name"], share)
        small = _least(others, "peak_rss_mib")
        yield Headline(
            f"generating, {base} base: peak RSS, MiB", ours["peak_rss_mib"], small["peak_rss_mib"], small["name"]
        )


def load(result: dict[str, Any]) -> Iterator[Headline]:
    for row in result["rows"]:
        if "bound" in row:
            yield Headline(f"loading, {row['name']}: rise, MB", row["rise"] / 1e6, row["bound"] / 1e6, "the bound")


def embed(result: dict[str, Any]) -> Iterator[Headline]:
    ours, theirs = result["libraries"]["qlorag"], result["libraries"]["sentence-transformers"]
    name = "sentence-transformers"
    yield Headline("embedding: texts/s", ours["texts_per_s"], theirs["texts_per_s"], name, ours["of_peak"])
    if ours["peak_rss_mib"] and theirs["peak_rss_mib"]:  # not known on every system
        yield Headline("embedding: peak RSS, MiB", ours["peak_rss_mib"], theirs["peak_rss_mib"], name)


def nf4(result: dict[str, Any]) -> Iterator[Headline]:
    for dtype in dict.fromkeys(row["dtype"] for row in result.get("rows", [])):
        rows = [row for row in result["rows"] if row["dtype"] == dtype and row["gelem_per_s"]]
        ours = _most([row for row in rows if row["candidate"].startswith("qlorag")], "gelem_per_s")
        for theirs in (row for row in rows if row["candidate"].startswith("bitsandbytes")):
            yield Headline(
                f"NF4 dequantize to {dtype}: Gelem/s",
                ours["gelem_per_s"],
                theirs["gelem_per_s"],
                theirs["candidate"],
            )
    few = [row for row in result.get("matmul", []) if row["has_target"] and row["m"] == 1]
    for n, k in dict.fromkeys((row["n"], row["k"]) for row in few):
        here = [row for row in few if (row["n"], row["k"]) == (n, k)]
        best = _least([row for row in here if row["candidate"].startswith("bitsandbytes")], "ms")
        yield Headline(
            f"NF4 product, 1 row, {n}x{k}: per second",
            1e3 / _least([row for row in here if row["candidate"] == OURS], "ms")["ms"],
            1e3 / best["ms"],
            f"{best['candidate']}, malloc {best['malloc']}",
        )
    for direction in ("forward", "backward"):
        rows = [row for row in result.get("many_rows", []) if row["direction"] == direction and row["m"] == 512]
        if rows:
            ours, dense = (_most([row for row in rows if row["candidate"] == x], "tflop_per_s") for x in (OURS, DENSE))
            what = f"NF4 product, 512 rows, {direction}: TFLOP/s"
            yield Headline(what, ours["tflop_per_s"], dense["tflop_per_s"], DENSE)


def retrieval(result: dict[str, Any]) -> Iterator[Headline]:
    rows = {row["name"]: row for row in result["rows"]}
    n, alone = result["settings"]["n"], rows["hnswlib alone"]
    for name in ("store, exact", "store, hnsw"):
        row = rows[name]
        yield Headline(
            f"{name}, {n} x {result['settings']['dim']}: queries/s at recall {row['recall']:.3f}",
            row["queries_per_s"],
            alone["queries_per_s"],
            f"hnswlib alone, recall {alone['recall']:.3f}",
        )


def operation(name: str, result: dict[str, Any]) -> Iterator[Headline]:
    """One of kernels/ that operation.py measured."""
    ours, reference, *others = result["rows"]
    fast = _least([reference, *others], "ms")
    what = f"{name}, {result['tokens']} rows, {result['dtype']}"
    yield Headline(f"{what}: ms", ours["ms"], fast["ms"], fast["candidate"], ours["of_limit"])
    if reference["saved_bytes"]:
        yield Headline(
            f"{what}: KiB kept", ours["saved_bytes"] / 1024, reference["saved_bytes"] / 1024, reference["candidate"]
        )


def headlines(name: str, result: dict[str, Any]) -> list[Headline]:
    """Those of the benchmark `name`; none if it has no function here."""
    functions: dict[str, Callable[[dict[str, Any]], Iterator[Headline]]] = {
        "train": train,
        "generate": generate,
        "load": load,
        "embed": embed,
        "nf4": nf4,
        "retrieval": retrieval,
    }
    for each in ("rms_norm", "rope", "swiglu", "lora", "cross_entropy"):
        functions[each] = partial(operation, each)
    return list(functions[name](result)) if name in functions else []


def _most(rows: list[dict[str, Any]], key: str) -> dict[str, Any]:
    return max(rows, key=lambda row: float(row[key]))


def _least(rows: list[dict[str, Any]], key: str) -> dict[str, Any]:
    return min(rows, key=lambda row: float(row[key]))
