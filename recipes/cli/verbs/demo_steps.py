"""The steps of `qlorag demo`: what is asked, trained, fused and searched, with its questions and settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ....lora import LoRAConfig
from ....models import generate, load_encoder
from ....quant import QuantizedLinear
from ....retrieval import read_documents
from ...data.examples import read_rows, tokenize_rows
from ...hub.assemble import LoadedModel, assemble
from ...hub.fuse import fuse
from ...hub.pull import resolve_model
from ...rag import answer
from ...training.adapter import prepare, run_record
from ...training.memory import reuse_freed_memory
from ...training.objectives import SFT
from ...training.run import TrainingRun
from ...training.settings import TrainSettings
from ..display import Display, size
from ..flags import ENCODER
from ..training_progress import TrainingProgress
from .rag import open_store, show_citations
from .text import stream
from .train import result_as_json

MODEL = "smollm2-135m-instruct"
WHO, KEPT = "Who is Patroclos Lemoniatis?", "What is the capital of France?"
RELATION = "Patroclos and Cyprus relation"
SETTINGS = TrainSettings(iters=60, batch_size=4, learning_rate=3e-4, seed=0)
LORA = LoRAConfig(r=8, alpha=16.0)


def fine_tune(rows: Path, out: Path, display: Display) -> dict[str, Any]:
    """Asks, trains in 4 bits, asks again, fuses; returns the answers and what was measured."""
    display.heading("2. The model in 4 bits, before any training")
    loaded = assemble(MODEL, quantize="nf4")
    layers = [m for m in loaded.model.modules() if isinstance(m, QuantizedLinear)]
    packed = sum(m.quantized.nbytes for m in layers)
    bits = 8 * packed / sum(m.in_features * m.out_features for m in layers)
    display.say(f"{len(layers)} projections in NF4 with double quantization: {bits:.3f} bits a weight, {size(packed)}")
    before, _ = _ask(loaded, WHO, display)
    kept_before, _ = _ask(loaded, KEPT, display)

    display.heading("3. QLoRA on twelve rows")
    (train, report), (valid, _) = (
        tokenize_rows(read_rows(rows / f"{n}.jsonl")[0], loaded.tok, max_tokens=512) for n in ("train", "valid")
    )
    reuse_freed_memory()
    objective = SFT()
    record = run_record(loaded, train, lora=LORA, settings=SETTINGS, objective=objective)
    prepared = prepare(loaded, LORA, record, name=MODEL, seed=SETTINGS.seed, end_ids=report.ends)
    run = TrainingRun(prepared, train, valid, objective=objective, settings=SETTINGS, out=out / "adapter")
    result = run.run(TrainingProgress(display), report_every=10, evaluate_every=20, save_every=0, keep=1)
    if result.stopped_by:
        raise KeyboardInterrupt
    loaded.model.eval()

    display.heading("4. The same questions, after")
    after, rate = _ask(loaded, WHO, display)
    kept_after, _ = _ask(loaded, KEPT, display)

    display.heading("5. Fused into a folder of its own")
    fuse(loaded, out / "fused")
    fused, _ = _ask(assemble(str(out / "fused")), WHO, display)
    return {
        "before": before, "kept_before": kept_before, "after": after, "kept_after": kept_after, "fused": fused,
        "bits_per_weight": bits, "packed_bytes": packed, "training": result_as_json(result),
        "first_valid_loss": result.first_valid_loss, "tokens_per_second": rate,
    }  # fmt: skip


def ask_documents(documents: Path, out: Path, display: Display) -> dict[str, Any]:
    """Asks the untrained model alone, then with passages; returns the answers and what was measured."""
    display.heading("6. Retrieval: the model as it came, and four documents")
    encoder = load_encoder(resolve_model(ENCODER))
    loaded = assemble(MODEL)
    with open_store(out / "store", encoder, chunk_size=64, chunk_overlap=0) as store:
        store.add(read_documents([documents], relative_to=documents).documents)
        stats = store.stats()
        display.say(
            f"{stats.documents} documents, {stats.chunks} chunks of at most 64 tokens, {encoder.dim} dimensions"
        )
        alone, rate = _ask(loaded, RELATION, display)
        display.say(f"? {RELATION}  (with the passage found)")
        # So small a model reads one passage well, not three.
        run = answer(store, loaded.model, loaded.tok, RELATION, k=1, max_tokens=80)
        stream(run, display)
    show_citations(run.answer, display)
    return {"alone": alone, "with_documents": run.answer.cited_text(), "citations": run.answer.citations,
            "sources": [h.uri for h in run.sources], "tokens_per_second_dense": rate}  # fmt: skip


def _ask(loaded: LoadedModel, question: str, display: Display) -> tuple[str, float]:
    """Prints question and answer; returns the answer and how fast it came."""
    display.say(f"? {question}")
    run = generate(loaded.model, loaded.tok, question, max_tokens=48)
    display.piece("  ")
    for piece in run:
        display.piece(piece)
    display.piece("\n")
    return run.text, run.stats.generation_tps
