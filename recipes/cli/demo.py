"""`qlorag demo`: the whole story on real models, in a few minutes on a laptop.

A chat model of 135 million parameters is asked about somebody it cannot know, and invents an answer. It is held in
4 bits and fine-tuned on twelve rows; it then knows. The adapter is fused into a folder of its own. Last, the model
as it was before is asked with and without documents. Every number shown is measured while it runs.
"""

from __future__ import annotations

import argparse
import shutil
import time
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from ...lora import LoRAConfig
from ...models import generate, load_encoder
from ...models.decoder.generate import peak_memory_bytes
from ...quant import QuantizedLinear
from ...retrieval import read_documents
from ..data.examples import read_rows, tokenize_rows
from ..errors import UsageError
from ..hub.assemble import Assembled, assemble
from ..hub.fuse import fuse
from ..hub.pull import pull, resolve_model
from ..rag.answer import Answer, cite, prompt_messages
from ..training.memory import reuse_freed_memory
from ..training.run import TrainingRun
from ..training.trainer import TrainSettings
from .display import Display, size
from .rag import open_store, show_citations

MARK = ".made-by-qlorag-demo"
MODEL, ENCODER = "smollm2-135m-instruct", "minilm-l6"
WHO, KEPT = "Who is Patroclos Lemoniatis?", "What is the capital of France?"
RELATION = "Patroclos and Cyprus relation"
SETTINGS = TrainSettings(iters=60, batch_size=4, learning_rate=3e-4, seed=0)
LORA = LoRAConfig(r=8, alpha=16.0)


def register(verbs: Any) -> None:
    """Adds the verb's flags."""
    p = verbs.add_parser(
        "demo",
        help="fine-tune a real model, then ask documents, in a few minutes",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.set_defaults(run=demo)
    p.add_argument("--out", default="out/demo", help="folder for adapter, fused model and store; made anew")


def demo(args: argparse.Namespace, display: Display) -> int:
    """`qlorag demo`."""
    began = time.perf_counter()
    out = Path(args.out)
    _clear(out)
    display.heading("1. Two real models")
    for name in (MODEL, ENCODER):
        display.say(f"{name}: {pull(name)}")
    pulled = time.perf_counter()
    with as_file(files("qlorag.recipes") / "bundled") as bundled:
        tuned = _fine_tune(bundled / "rows", out, display)
        answers = _ask_documents(bundled / "documents", out, display)
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


def _fine_tune(rows: Path, out: Path, display: Display) -> dict[str, Any]:
    display.heading("2. The model in 4 bits, before any training")
    it = assemble(MODEL, quantize="nf4")
    layers = [m for m in it.model.modules() if isinstance(m, QuantizedLinear)]
    packed = sum(m.quantized.nbytes for m in layers)
    bits = 8 * packed / sum(m.in_features * m.out_features for m in layers)
    display.say(f"{len(layers)} projections in NF4 with double quantization: {bits:.3f} bits a weight, {size(packed)}")
    before, _ = _ask(it, WHO, display)
    kept_before, _ = _ask(it, KEPT, display)

    display.heading("3. QLoRA on twelve rows")
    train, valid = (
        tokenize_rows(read_rows(rows / f"{n}.jsonl")[0], it.tok, max_tokens=512)[0] for n in ("train", "valid")
    )
    reuse_freed_memory()
    run = TrainingRun(it, train, valid, lora=LORA, settings=SETTINGS, out=out / "adapter", name=MODEL)
    if run.go(display, report=10, evaluate=20, save=0, keep=1):
        raise KeyboardInterrupt
    it.model.eval()

    display.heading("4. The same questions, after")
    after, rate = _ask(it, WHO, display)
    kept_after, _ = _ask(it, KEPT, display)

    display.heading("5. Fused into a folder of its own")
    fuse(it, out / "fused")
    fused, _ = _ask(assemble(str(out / "fused")), WHO, display)
    return {
        "before": before, "kept_before": kept_before, "after": after, "kept_after": kept_after, "fused": fused,
        "bits_per_weight": bits, "packed_bytes": packed, "training": run.result,
        "first_valid_loss": run.first_valid_loss, "tokens_per_second": rate,
    }  # fmt: skip


def _ask_documents(documents: Path, out: Path, display: Display) -> dict[str, Any]:
    display.heading("6. Retrieval: the model as it came, and four documents")
    encoder = load_encoder(resolve_model(ENCODER))
    with open_store(out / "store", encoder, chunk_size=64, chunk_overlap=0) as store:
        store.add(read_documents([documents], relative_to=documents).documents)
        stats = store.stats()
        display.say(
            f"{stats.documents} documents, {stats.chunks} chunks of at most 64 tokens, {encoder.dim} dimensions"
        )
        hits = store.search(RELATION, k=1, score_threshold=0.2)  # so small a model reads one passage well, not three
    it = assemble(MODEL)
    alone, rate = _ask(it, RELATION, display)
    display.say(f"? {RELATION}  (with the passage found)")
    run = generate(it.model, it.tok, prompt_messages(RELATION, hits), max_tokens=80)
    for piece in run:
        display.piece(piece)
    answer: Answer = cite(RELATION, run.text, hits)
    display.piece("\n")
    show_citations(answer, display)
    return {"alone": alone, "with_documents": answer.cited_text(), "citations": answer.citations,
            "sources": [h.uri for h in hits], "tokens_per_second_dense": rate}  # fmt: skip


def _ask(it: Assembled, question: str, display: Display) -> tuple[str, float]:
    """Prints question and answer; returns the answer and how fast it came."""
    display.say(f"? {question}")
    run = generate(it.model, it.tok, question, max_tokens=48)
    display.piece("  ")
    for piece in run:
        display.piece(piece)
    display.piece("\n")
    return run.text, run.stats.generation_tps


def _answers(tuned: dict[str, Any], answers: dict[str, Any]) -> list[tuple[str, str, str]]:
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
