"""What binds each Triton kernel on each card, from its machine code and the cards' data sheets.

    python bench/machine_code/roofline.py     writes ROOFLINE.md beside this file

Four times per element, of W or of the result where there is no W, the longest of which is a bound that no schedule
beats:

    memory    bytes per element / bandwidth
    issue     instructions per element / (processors x 128 lanes x clock)
    shared    passes of shared memory per element / (processors x 32 lanes x clock)
    tensor    operations per element (2 for each row of x) / the card's dense bfloat16 rate, where tensor cores multiply

Latency, bank conflicts, occupancy and clocks that fall under load are not in it. Nothing here was measured on a GPU.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # bench/, from which its files import each other

from machine_code.sass import TARGETS, Compiled, compile_case  # noqa: E402
from machine_code.sass_cases import Case, page_cases  # noqa: E402


class Card(NamedTuple):
    """From NVIDIA's data sheets: boost clock, dense rates."""

    name: str
    target: str  # whose machine code stands for it
    processors: int
    gigahertz: float
    gigabytes: float  # per second
    teraflops: float  # of tensor cores, 16 bits with float32 sums
    lanes: int  # instructions issued per processor and clock


CARDS = (
    Card("T4", "sm_80", 40, 1.59, 320, 65, 64),
    Card("RTX 4090", "sm_80", 128, 2.52, 1008, 165, 128),
    Card("A100", "sm_80", 108, 1.41, 1555, 312, 128),
    Card("H100", "sm_90", 132, 1.755, 3350, 989, 128),
    Card("B200", "sm_100", 148, 1.85, 8000, 2250, 128),
)


def bounds(case: Case, compiled: Compiled, card: Card) -> dict[str, float]:
    """Picoseconds per element by what would bind."""
    clocks = card.processors * card.gigahertz  # processors x 1e9 / s
    found = {
        "memory": case.bytes_per_element / card.gigabytes * 1e3,
        "issue": (compiled.per_element or 0) / (clocks * card.lanes) * 1e3,
        "shared": (compiled.shared_per_element or 0) / (clocks * 32) * 1e3,
    }
    if case.tensor_cores:
        found["tensor"] = case.tensor_cores / card.teraflops
        # W is read from memory once; every BM rows of x decode it again, and find it in the cache.
    return found


def page(cases: list[Case], results: dict[str, dict[str, Compiled]]) -> str:
    """The page as markdown."""
    lines = [
        "# Roofline of the Triton kernels",
        "",
        "Written by `python bench/machine_code/roofline.py` from the machine code of the kernels:",
        "bfloat16 where the name says nothing else; NF4, block size 64, double-quantized (quantize: the codes and",
        "their float32 scales); rows of 4096, heads of 128.",
        "**GPU speed: not measured.**",
        "",
        "An *element* is one of W for the kernels of `kernels/nf4/`, and one of the result for the others: of y in",
        "`rms_norm`, `rope` and `lora`, of dx in the backward of `rms_norm`, of h in `swiglu`, forward and backward.",
        "",
        "## Machine code",
        "",
        "inst/elem: instructions of the hot loop per element, without the subroutine that a division calls for numbers",
        "at the ends of the range; shared: passes of shared memory per element; spill: bytes of stack and local memory",
        "per thread. Loads and stores as number x width in bits. For AMD, instructions per element are not counted.",
        "",
        "| kernel | target | registers | spill | inst/elem | shared | loads | stores | tensor cores |",
        "|---|---|---:|---:|---:|---:|---|---|---|",
    ]
    for case in cases:
        for target, c in results[case.name].items():
            per = "" if c.per_element is None else f"{c.per_element:.1f}"
            shared = "" if c.shared_per_element is None else f"{c.shared_per_element:.1f}"
            found = " | ".join(
                " ".join(f"{n}x{what}" for what, n in part.items()) for part in (c.loads, c.stores, c.tensor_cores)
            )
            lines.append(f"| {case.name} | {target} | {c.registers} | {c.spilled} | {per} | {shared} | {found} |")
    lines += [
        "",
        "## What binds",
        "",
        "Picoseconds per element by data sheet, for one pass over all of them (for a product of many rows, per 16, 32",
        "or 128 rows of x). The longest binds, in bold; *share* is what that leaves of the memory's speed. T4 and",
        "RTX 4090 are computed from the code for sm_80. float32 is multiplied without tensor cores. Bank conflicts are",
        "not counted: a look-up among 16 or 32 entries has none, FP4's quantize, among 512, has some. A share below",
        "100 % is bound by the instructions or by shared memory. A B200 has 2.4 times an H100's memory speed and 1.1",
        "times its processors, so that quantizing waits for them there.",
        "",
        "| kernel | card | memory | issue | shared | tensor | share |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for case in cases:
        for card in CARDS:
            times = bounds(case, results[case.name][card.target], card)
            longest = max(times, key=lambda name: times[name])
            cells = [
                "" if name not in times else f"**{times[name]:.2f}**" if name == longest else f"{times[name]:.2f}"
                for name in ("memory", "issue", "shared", "tensor")
            ]
            share = times["memory"] / times[longest]
            lines.append(f"| {case.name} | {card.name} | {' | '.join(cells)} | {share:.0%} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    cases = page_cases()
    results = {case.name: {name: compile_case(case, target) for name, target in TARGETS.items()} for case in cases}
    (HERE / "ROOFLINE.md").write_text(page(cases, results), encoding="utf-8")


if __name__ == "__main__":
    main()
