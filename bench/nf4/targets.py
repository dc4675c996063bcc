"""What the NF4 kernels are asked to reach, beside what they reached: from the results of bench_nf4.py alone.

    targets(result)   the list, one entry per figure; a part that was not measured has none
    table(targets)    for a terminal
    page(results)     bench/nf4/TARGETS.md, from the committed results.json

Where bitsandbytes has two forms of a product that are correct, it stands here twice, each against the same target.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from harness.names import AS_DOCUMENTED, DENSE, KERNEL, OURS, OURS_DECODE, PUBLIC, REPACKED
from nf4.reasons import REASONS

GELEM = {"bfloat16": 12.0, "float32": 6.0}  # 10^9 elements decoded per second
AT_MOST_OF_ONE_ROW = {4: 2.2, 8: 4.0}
OF_DENSE = {128: 0.85, 512: 0.95}
BITS = 4.2
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Target:
    """One figure and what was asked of it: at least `target`, or `at_most` that."""

    work: str
    got: float
    target: float
    unit: str
    at_most: bool = False

    @property
    def met(self) -> bool:
        return self.got <= self.target if self.at_most else self.got >= self.target

    @property
    def verdict(self) -> str:
        """Met, or missed and by how much of the target."""
        if self.met:
            return "met"
        by = f"{abs(self.got - self.target) / self.target:.1%}" if self.target else f"{self.got:g}"
        return f"missed by {by}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"met": self.met}

    @classmethod
    def from_dict(cls, entry: dict[str, Any]) -> Target:
        return cls(entry["work"], entry["got"], entry["target"], entry["unit"], entry["at_most"])

    def cells(self) -> tuple[str, str, str, str]:
        sign = "≤" if self.at_most else "≥"
        return self.work, f"{self.got:.4g} {self.unit}", f"{sign} {self.target:g}", self.verdict


def targets(result: dict[str, Any]) -> list[Target]:
    """Those whose figures are in `result`."""
    return [
        *_dequantize(result.get("rows", [])),
        *_quantize(result.get("quantize", [])),
        *_few_rows(result.get("matmul", [])),
        *_beyond_cache(result.get("beyond_cache", [])),
        *_many_rows(result.get("many_rows", [])),
        *_exactness(result.get("exactness", [])),
        *_memory(result.get("memory")),
    ]


def _dequantize(rows: Rows) -> Iterator[Target]:
    for dtype, least in GELEM.items():
        ms = {row["candidate"]: row["ms"] for row in rows if row["dtype"] == dtype}
        if not ms:
            continue
        (ours,) = (row for row in rows if row["dtype"] == dtype and row["candidate"] == OURS_DECODE)
        work = f"dequantize {_size(ours)} to {dtype}, {_threads(ours)}"
        yield Target(work, ours["gelem_per_s"], least, "Gelem/s")
        yield Target(f"{work}, beside bitsandbytes' C kernel", ms[KERNEL] / ours["ms"], 1.3, "x")
        yield Target(f"{work}, beside its public function, as installed", ms[PUBLIC] / ours["ms"], 10, "x")


def _quantize(rows: Rows) -> Iterator[Target]:
    for ours in (row for row in rows if row["candidate"] == "qlorag C"):
        beside = next(row for row in rows if row["candidate"] == "bitsandbytes" and row["dtype"] == ours["dtype"])
        work = f"quantize {_size(ours)} from {ours['dtype']}, double, {_threads(ours)}, beside bitsandbytes"
        yield Target(work, beside["ms"] / ours["ms"], 20, "x")


def _few_rows(rows: Rows) -> Iterator[Target]:
    groups = dict.fromkeys((row["n"], row["k"], row["threads"], row["malloc"]) for row in rows if row["has_target"])
    for n, k, threads, malloc in groups:
        here = [r for r in rows if (r["n"], r["k"], r["threads"], r["malloc"]) == (n, k, threads, malloc)]
        ms = {(row["m"], row["candidate"]): row["ms"] for row in here}
        work = f"M={{}}, {n}x{k}, {_threads(here[0])}"
        for name in (AS_DOCUMENTED, REPACKED):
            if (1, name) in ms:
                least = 10 if malloc == "tuned" else 40
                ratio = ms[1, name] / ms[1, OURS]
                yield Target(f"{work.format(1)}, beside {name}, malloc {malloc}", ratio, least, "x")
        for m, most in AT_MOST_OF_ONE_ROW.items():
            if (m, OURS) in ms and malloc == "tuned":
                yield Target(work.format(m), ms[m, OURS] / ms[1, OURS], most, "x the time of M=1", at_most=True)


def _beyond_cache(rows: Rows) -> Iterator[Target]:
    for row in rows:
        work = f"M=1, {_size(row)}, beyond the cache, {_threads(row)}"
        yield Target(work, 100 * row["of_read"], 80, "% of read bandwidth")


def _many_rows(rows: Rows) -> Iterator[Target]:
    for ours in (row for row in rows if row["candidate"] == OURS and row["m"] in OF_DENSE):
        same = ("m", "n", "k", "direction", "threads")
        dense = next(r for r in rows if r["candidate"] == DENSE and all(r[key] == ours[key] for key in same))
        work = f"M={ours['m']}, {_size(ours)}, {ours['direction']}, {_threads(ours)}"
        yield Target(work, 100 * dense["ms"] / ours["ms"], 100 * OF_DENSE[ours["m"]], "% of dense GEMM")


def _exactness(found: Rows) -> Iterator[Target]:
    for one in found:
        if one["backend"] != "bitsandbytes":  # it is no backend of ours; what it gave is printed
            dtypes = ", ".join(one["differ"])
            work = f"same bits as the reference: {one['title']}, {one['values']:.0e} values of {dtypes}"
            yield Target(work, sum(one["differ"].values()), 0, "differ", at_most=True)


def _memory(found: dict[str, Any] | None) -> Iterator[Target]:
    if found:
        work = f"memory of a layer {found['size']}x{found['size']} in training"
        held = found["stored_bits"] + found["saved_bits"]
        yield Target(f"{work}: buffers and what autograd saves", held, BITS, "bits/weight", at_most=True)
        yield Target(f"{work}: growth of the process", found["resident_bits"], BITS, "bits/weight", at_most=True)


def _size(row: dict[str, Any]) -> str:
    return f"{row['n']}x{row['k']}"


def _threads(row: dict[str, Any]) -> str:
    return "one thread" if row["threads"] == 1 else f"{row['threads']} threads"


def table(found: list[Target]) -> str:
    """For a terminal."""
    lines = [("target", "reached", "asked", ""), *(target.cells() for target in found)]
    widths = [max(len(line[i]) for line in lines) for i in range(3)]
    return "\n".join(
        f"{work:{widths[0]}}  {got:>{widths[1]}}  {asked:>{widths[2]}}  {verdict}".rstrip()
        for work, got, asked, verdict in lines
    )


def page(results: dict[str, Any]) -> str:
    """TARGETS.md; says so where the results hold none."""
    head = """# The targets of the NF4 kernels

Written by `python bench/readme_tables.py` from `bench/results.json`; a test compares. `bench/bench_nf4.py` measures
them and says how, with the files beside this page.
"""
    result = results["results"].get("nf4", {})
    if "targets" not in result:
        return f"{head}\nNot in the committed results yet: `make bench` measures them.\n"
    found = [Target.from_dict(entry) for entry in result["targets"]]
    e = result["environment"]
    where = (
        f"{sum(target.met for target in found)} of {len(found)} met. {e['cpu']}, {e['kernel']}, products in bfloat16; "
        f"torch {e['torch']}, bitsandbytes {e['bitsandbytes']}; {results['date'][:10]}, commit {results['commit']}."
    )
    if "scratch_bytes" in (memory := result.get("memory") or {}):
        where += (
            f"\n\nMemory that is paid once and not per layer: {memory['scratch_bytes'] / 2**20:.0f} MiB. A weight "
            f"decoded to {memory['decoded_bytes'] / 2**20:.0f} MiB is part of it where there is no matrix unit."
        )
    rows = ["| work | reached | asked | |", "|---|---:|---:|---|"]
    rows += [f"| {' | '.join(target.cells())} |" for target in found]
    return "\n".join([head, where, "", *rows, "", *_why(found), gpu_line(result)]) + "\n"


def _why(found: list[Target]) -> list[str]:
    missed = [target.work for target in found if not target.met]
    texts = [f"- **{reason.what}.** {reason.why}" for reason in REASONS if any(map(reason.fits, missed))]
    return ["Why targets are missed, and what would reach them:", "", *texts, ""] if texts else []


def gpu_line(result: dict[str, Any]) -> str:
    """What a GPU reached, in a sentence."""
    gpu = result.get("gpu")
    if not gpu:
        return "GPU speed: not measured."
    best = {
        "decoding to bfloat16": next(
            r["of_copy"] for r in gpu["dequantize"] if r["candidate"].startswith(OURS) and r["dtype"] == "bfloat16"
        ),
        "one row": next(r["of_copy"] for r in gpu["few_rows"] if r["candidate"] == OURS and r["m"] == 1),
    }
    shares = ", ".join(f"{name} {share:.0%}" for name, share in best.items())
    return f"{gpu['device']}: {shares} of its copy bandwidth ({gpu['copy_gb_per_s']:.0f} GB/s)."
