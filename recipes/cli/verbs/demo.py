"""`qlorag demo`: everything on real models, in a few minutes on a laptop.

A chat model of 135 million parameters is asked about a person it cannot know, and invents an answer. It is held in
4 bits and fine-tuned on twelve rows; it then knows. The adapter is fused into a folder of its own. Last, the model
as it was before is asked with and without documents. Every number shown is measured while it runs.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path
from typing import Any

from ...errors import UsageError
from ..display import Display, size
from ..flags import ENCODER, add_verb

MARK = ".made-by-qlorag-demo"
BUNDLED = Path(__file__).parents[2] / "bundled"  # rows and documents


def register(verbs: Any) -> None:
    """Adds the verb's flags."""
    p = add_verb(verbs, "demo", run_demo)
    p.add_argument("--out", default="out/demo", help="folder for adapter, fused model and store; made anew")


def run_demo(args: argparse.Namespace, display: Display) -> int:
    """`qlorag demo`."""
    from ....models.decoder.generate import peak_memory_bytes
    from ...hub.pull import pull
    from .demo_steps import MODEL, ask_documents, fine_tune

    began = time.perf_counter()
    out = Path(args.out)
    _clear(out)
    display.heading("1. Two real models")
    for name in (MODEL, ENCODER):
        display.say(f"{name}: {pull(name)}")
    pulled = time.perf_counter()
    tuned = fine_tune(BUNDLED / "rows", out, display)
    answers = ask_documents(BUNDLED / "documents", out, display)
    display.heading("Summary")
    display.table(["question", "how it was asked", "answer"], _answers(tuned, answers))
    seconds = time.perf_counter() - pulled
    facts = [
        ("weights in 4 bits", f"{tuned['bits_per_weight']:.3f} bits each, {size(tuned['packed_bytes'])} of them"),
        ("training", f"{tuned['training']['tokens_per_second']:.0f} tokens/s, {tuned['training']['seconds']:.0f} s"),
        ("validation loss", f"{tuned['first_valid_loss']:.2f} before, {tuned['training']['valid_loss']:.2f} after"),
        ("generating", f"{tuned['tokens_per_second']:.0f} tokens/s with adapter, "
                       f"{answers['tokens_per_second_dense']:.0f} without"),
        ("peak memory", f"{size(tuned['training']['peak_memory_bytes'])} in training, {size(peak_memory_bytes())} "
                        "with all that the demo loads later"),
        ("time", f"{seconds:.0f} s, and {pulled - began:.0f} s to get the models"),
        ("adapter, loss.png", str(out / "adapter")),
        ("fused model", str(out / "fused")),
        ("store", str(out / "store")),
    ]  # fmt: skip
    display.table(["measured in this run", ""], facts)
    display.result({**tuned, **answers, "peak_memory_bytes": peak_memory_bytes(), "seconds": seconds, "out": str(out)})
    return 0


def _clear(out: Path) -> None:
    """Makes `out` ready, removing what an earlier demo made there and nothing else.

    Raises UsageError: it holds folders of these names and no sign that a demo made them.
    """
    parts = [p for p in (out / "adapter", out / "fused", out / "store") if p.exists()]
    if parts and not (out / MARK).exists():
        raise UsageError(f"{parts[0]}: is there, and no demo made it: choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    (out / MARK).touch()
    for part in parts:
        shutil.rmtree(part)


def _answers(tuned: dict[str, Any], answers: dict[str, Any]) -> list[tuple[str, str, str]]:
    from .demo_steps import KEPT, RELATION, WHO

    return [
        (WHO, "4-bit base", _short(tuned["before"])),
        (WHO, "after QLoRA", _short(tuned["after"])),
        (WHO, "fused folder", _short(tuned["fused"])),
        (KEPT, "after QLoRA", _short(tuned["kept_after"])),
        (RELATION, "without documents", _short(answers["alone"])),
        (RELATION, "with documents", _short(answers["with_documents"])),
    ]


def _short(text: str, *, most: int = 120) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 3] + "..."
