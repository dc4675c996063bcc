"""Writes the tables of README.md and the pages RESULTS.md and nf4/TARGETS.md, so that no number is typed by hand.

    python bench/readme_tables.py          rewrites the three marked parts of README.md, and both pages

`measured`, `demo` and the pages come from bench/results.json, `reading` from the files themselves. Tests run
this and compare. A figure that README.md has and the results lack is named on standard error.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench"))

from harness.summary import Headline, headlines  # noqa: E402
from nf4 import targets  # noqa: E402

READING = (
    ("kernels/nf4/codebook.py", "where the 16 numbers of NF4 come from"),
    ("kernels/nf4/reference.py", "what a 4-bit weight is: quantize and decode, in plain torch"),
    ("kernels/nf4/tensor.py", "a packed weight as one value: codes and double-quantized scales, 4.127 bits per weight"),
    ("quant/linear.py", "a linear layer over such a weight, forward and backward"),
    ("kernels/nf4/cpu/dequantize.c", "decoding on a CPU, bit-equal to the reference"),
    ("kernels/nf4/gpu/triton_matmul.py", "the product with a packed weight on a GPU"),
    ("kernels/lora/ops.py", "what is trained: y = base + s (x Aᵀ) Bᵀ, forward and backward"),
    ("lora/files.py", "an adapter on disk, as PEFT reads it"),
    ("models/files/weights.py", "the safetensors format, byte by byte"),
    ("models/decoder/decoder.py", "the transformer, which holds these layers"),
    ("models/decoder/generate.py", "generation, one token after another"),
    ("recipes/training/trainer.py", "QLoRA: one step, and why its gradient is right"),
    ("retrieval/store.py", "a durable store: a document is committed wholly or not at all"),
    ("recipes/rag/answer.py", "a question, its passages, an answer with cited sources"),
)

# The rows of README.md: a benchmark and how the name of its figure begins. The first such figure is taken, whether
# it is better or worse than its baseline. bench/RESULTS.md has all of them.
SHOWN = (
    ("train", "LoRA training, nf4 base: tok/s"),
    ("train", "LoRA training, nf4 base: peak RSS"),
    ("train", "LoRA training, dense base: tok/s"),
    ("generate", "prefill, nf4 base"),
    ("generate", "decode, nf4 base"),
    ("generate", "generating, nf4 base: peak RSS"),
    ("generate", "decode, dense base"),
    ("nf4", "NF4 dequantize to bfloat16"),
    ("nf4", "NF4 product, 1 row, 4096x4096"),
    ("cross_entropy", "cross_entropy, 256 rows, bfloat16: ms"),
    ("embed", "embedding: texts/s"),
    ("retrieval", "store, hnsw"),
)
COLUMNS = "| figure | qlorag | baseline | qlorag / baseline | of the hardware's limit |\n|---|---:|---:|---:|---:|"


def reading() -> str:
    """File, lines, what you learn."""
    rows = ["| file | lines, about | what you learn |", "|---|---:|---|"]
    for name, learned in READING:
        lines = len((ROOT / name).read_text(encoding="utf-8").splitlines())
        rows.append(f"| [`{name}`]({name}) | {round(lines, -2) or 100} | {learned} |")
    return "\n".join(rows)


def measured(results: dict[str, Any]) -> str:
    """The headlines of SHOWN, with the machine they were measured on."""
    found = {name: headlines(name, result) for name, result in results["results"].items()}
    rows = []
    for name, start in SHOWN:
        rows += [_row(h) for h in found.get(name, []) if h.what.startswith(start)][:1]
    return "\n".join([COLUMNS, *rows]) + "\n\n" + machine(results)


def results_page(results: dict[str, Any]) -> str:
    """bench/RESULTS.md: the headlines of every benchmark."""
    rows = [_row(h) for name, result in results["results"].items() for h in headlines(name, result)]
    intro = (
        "Written by `python bench/readme_tables.py` from `bench/results.json`; a test compares. Each figure is beside\n"
        "the best form of its baseline in the same run. A ratio above 1 is better for speeds, below 1 for times and\n"
        "memory."
    )
    return "\n\n".join(["# Results", intro, "\n".join([COLUMNS, *rows]), machine(results)]) + "\n"


def machine(results: dict[str, Any]) -> str:
    """Processor, peaks, date, commit and versions, in one paragraph."""
    m, peaks = results["machine"], results["machine"]["peaks"]
    versions = ", ".join(f"{k} {v}" for k, v in m["versions"].items())
    where = (
        f"{peaks['device']}, {peaks['threads']} threads ({peaks['instructions']}), no GPU; "
        f"{peaks['read_gb_per_s']:.1f} GB/s read, {peaks['float32_gflop_per_s']:.0f} GFLOP/s in float32 and "
        f"{peaks['bfloat16_gflop_per_s']:.0f} in bfloat16, measured in the same run; "
        f"{results['date'][:10]}, commit {results['commit']}; {versions}. GPU speed: not measured."
    )
    notes = "".join(f" Note: {x['note']}." for x in results["results"].values() if "note" in x)
    return where + notes


def _row(h: Headline) -> str:
    limit = "" if h.of_limit is None else f"{h.of_limit:.0%}"
    return f"| {h.what} | {h.ours:.4g} | {h.beside:.4g} ({h.competitor}) | {h.ours / h.beside:.2f} | {limit} |"


def figures(readme: str) -> list[str]:
    """What the rows of its table of measurements are about."""
    return re.findall(r"^\| ([^|]+) \| [\d.e+-]+ \| [\d.e+-]+ \(", readme, re.M)


def demo(told: dict[str, Any]) -> str:
    """What the demo said, and what it took."""
    who, relation = "Who is Patroclos Lemoniatis?", "Patroclos and Cyprus relation"
    rows = [
        (who, "4-bit base", told["before"]),
        (who, "after QLoRA", told["after"]),
        (who, "fused folder", told["fused"]),
        ("What is the capital of France?", "after QLoRA", told["kept_after"]),
        (relation, "without documents", told["alone"]),
        (relation, "with documents", told["with_documents"]),
    ]
    table = ["| question | asked of | answer |", "|---|---|---|"]
    table += [f"| {q} | {how} | {_short(answer)} |" for q, how, answer in rows]
    t = told["training"]
    took = (
        f"{told['seconds']:.0f} s in all, {t['seconds']:.0f} of them training, at "
        f"{t['peak_memory_bytes'] / 1e6:.0f} MB; the validation loss falls from {told['first_valid_loss']:.2f} to "
        f"{t['valid_loss']:.2f}."
    )
    return "\n".join(table) + "\n\n" + took


def _short(text: str, *, most: int = 110) -> str:
    text = " ".join(text.split()).replace("|", r"\|")
    return text if len(text) <= most else text[: most - 3].rstrip() + "..."


def filled(readme: str, results: dict[str, Any]) -> str:
    """README.md with its marked parts replaced."""
    parts = {"reading": reading(), "measured": measured(results), "demo": demo(results["results"]["demo"])}
    for name, text in parts.items():
        pattern = rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)"
        readme, count = re.subn(pattern, lambda m, text=text: f"{m[1]}{text}\n{m[2]}", readme, flags=re.S)  # type: ignore[misc]
        if count != 1:
            raise SystemExit(f"README.md: wanted one part <!-- {name}:begin --> ... <!-- {name}:end -->, found {count}")
    return readme


def main() -> None:
    path = ROOT / "README.md"
    results = json.loads((ROOT / "bench" / "results.json").read_text(encoding="utf-8"))
    before = path.read_text(encoding="utf-8")
    after = filled(before, results)
    for figure in sorted({*figures(before)} - {*figures(after)}):
        print(f"README.md no longer has: {figure}", file=sys.stderr)
    path.write_text(after, encoding="utf-8")
    (ROOT / "bench" / "RESULTS.md").write_text(results_page(results), encoding="utf-8")
    (ROOT / "bench" / "nf4" / "TARGETS.md").write_text(targets.page(results), encoding="utf-8")


if __name__ == "__main__":
    main()
