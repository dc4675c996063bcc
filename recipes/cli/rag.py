"""The verbs `index`, `search` and `ask`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...models import Encoder, generate, load_encoder
from ...retrieval import Hit, Store, read_documents
from ..errors import UsageError
from ..hub.assemble import assemble
from ..hub.pull import resolve_model
from ..rag.answer import NOT_FOUND, Answer, cite, fitting
from .display import Display, size
from .text import add_generation_flags, generation_options, stream

ENCODER = "minilm-l6"


def register(verbs: Any) -> None:
    """Adds the verbs' flags."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    p = verbs.add_parser("index", help="put documents into a store", formatter_class=formatter)
    p.set_defaults(run=index)
    p.add_argument("files", nargs="+", help="text and markdown files, or folders of them")
    _add_store_flags(p)
    p.add_argument("--append", action="store_true", help="add to a store that is there already")
    p.add_argument("--chunk-size", type=int, help="tokens in a chunk; default: what the encoder can read at once")
    p.add_argument("--chunk-overlap", type=int, help="tokens that neighbouring chunks share (default: 20)")

    p = verbs.add_parser("search", help="find passages in a store", formatter_class=formatter)
    p.set_defaults(run=search)
    p.add_argument("question")
    _add_store_flags(p)
    _add_search_flags(p)

    p = verbs.add_parser("ask", help="answer from a store, with sources", formatter_class=formatter)
    p.set_defaults(run=ask)
    p.add_argument("question")
    _add_store_flags(p)
    _add_search_flags(p)
    p.add_argument("--model", default="smollm2-135m-instruct", help="a model folder, or a name that `pull` knows")
    p.add_argument("--quantize", choices=["nf4", "fp4", "none"], help="hold the projections in 4 bits")
    p.add_argument("--dtype", default="auto", help="of arithmetic and dense weights")
    add_generation_flags(p)


def _add_store_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument("--store", required=True, help="folder of the store")
    p.add_argument("--encoder", default=ENCODER, help="an encoder's folder, or a name that `pull` knows")


def _add_search_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument("--k", type=int, default=3, help="most passages")
    p.add_argument("--score-threshold", type=float, default=0.2, help="smallest cosine that counts as found")


def open_store(
    folder: str | Path,
    encoder: Encoder,
    *,
    read_only: bool = False,
    chunk_size: int | None = None,
    chunk_overlap: int | None = None,
) -> Store:
    """The store in `folder`, its texts embedded and counted by `encoder`."""
    return Store.open(
        folder,
        embedder=encoder.encode,
        embedder_id=encoder.fingerprint,
        dim=encoder.dim,
        count_tokens=encoder.count_tokens,
        chunk_size=chunk_size,
        chunk_overlap=chunk_overlap,
        read_only=read_only,
    )


def index(args: argparse.Namespace, display: Display) -> int:
    """`qlorag index`."""
    there = (Path(args.store) / "store.sqlite3").exists()
    if there and not args.append:
        raise UsageError(f"{args.store}: already holds a store: add to it with --append, or name another folder")
    encoder = load_encoder(resolve_model(args.encoder))
    read = read_documents(args.files)
    chunk_size = args.chunk_size
    if chunk_size is None and not there:
        chunk_size = encoder.max_tokens - 2  # [CLS] and [SEP] take a place each
    if chunk_size is not None and chunk_size > encoder.max_tokens - 2:
        display.say(
            f"note: the encoder reads {encoder.max_tokens - 2} tokens of a chunk; of chunks of {chunk_size} the rest "
            "is not searched, though it is shown to the model",
            style="yellow",
        )
    for path, reason in read.failures:
        display.say(f"left out {path}: {reason}", style="yellow")
    if not read.documents:
        raise UsageError(f"{' '.join(args.files)}: no document could be read")
    with open_store(args.store, encoder, chunk_size=chunk_size, chunk_overlap=args.chunk_overlap) as store:
        with display.progress() as progress:
            task = progress.add_task("indexing", total=len(read.documents))
            report = store.add(read.documents, progress=lambda done, _: progress.update(task, completed=done))
        stats = store.stats()
    display.say(
        f"{args.store}: {report.added} documents added, {report.replaced} replaced, {report.unchanged} unchanged; "
        f"now {stats.documents} documents, {stats.chunks} chunks, {size(stats.bytes)}"
    )
    display.result({"store": args.store, **vars(report), "documents": stats.documents, "chunks": stats.chunks,
                    "left_out": dict(read.failures)})  # fmt: skip
    return 1 if read.failures else 0


def search(args: argparse.Namespace, display: Display) -> int:
    """`qlorag search`."""
    hits = _find(args, load_encoder(resolve_model(args.encoder)))
    if not hits:
        display.say(f"nothing with a score of at least {args.score_threshold}")
    show_sources(hits, display)
    display.result({"question": args.question, "hits": [as_json(h) for h in hits]})
    return 0


def ask(args: argparse.Namespace, display: Display) -> int:
    """`qlorag ask`."""
    options = generation_options(args)
    hits = _find(args, load_encoder(resolve_model(args.encoder)))
    if not hits:
        display.say(NOT_FOUND)
        display.result({"question": args.question, "answer": NOT_FOUND, "citations": [], "sources": []})
        return 0
    it = assemble(args.model, adapter_path=args.adapter_path, quantize=args.quantize, dtype=args.dtype)
    context = it.model.config.max_positions
    kept, messages = fitting(
        args.question,
        hits,
        system=args.system,
        count_tokens=lambda messages: len(it.tok.chat(messages)),
        # The answer needs room as well, but a large --max-tokens must not cost every passage.
        most=context - min(args.max_tokens, context // 4),
    )
    if len(kept) < len(hits):
        display.say(
            f"note: only the best {len(kept)} of {len(hits)} passages fit into the model's {context} tokens",
            style="yellow",
        )
    hits = kept
    run = generate(it.model, it.tok, messages, **options)
    stream(run, display)
    answer = cite(args.question, run.text, hits)
    show_citations(answer, display)
    display.result(
        {
            "question": args.question,
            "answer": answer.text,
            "citations": answer.citations,
            "cited_by": answer.cited_by,
            "sources": [as_json(h) for h in hits],
        }
    )
    return 0


def _find(args: argparse.Namespace, encoder: Encoder) -> list[Hit]:
    with open_store(args.store, encoder, read_only=True) as store:
        return store.search(args.question, k=args.k, score_threshold=args.score_threshold)


def show_citations(answer: Answer, display: Display) -> None:
    """The sources under an answer, those it rests on marked."""
    how = {
        "model": "cited by the model",
        "overlap": "found by comparing words, none cited rightly by the model",
        "none": "the answer's words stand in none of them",
    }[answer.cited_by]
    display.say()
    display.say(f"Sources ({how}):")
    show_sources(answer.sources, display, marked=answer.citations)


def show_sources(hits: Sequence[Hit], display: Display, *, marked: Sequence[int] = ()) -> None:
    """One paragraph a hit: number, score, file and characters, then the beginning of its text."""
    for n, hit in enumerate(hits, 1):
        star = "*" if n in marked else " "
        display.say(f"{star}[{n}] {hit.score:.3f}  {hit.uri}:{hit.start}-{hit.end}")
        text = " ".join(hit.text.split())
        display.say(f"      {text[:150]}{'...' if len(text) > 150 else ''}", style="dim")


def as_json(hit: Hit) -> dict[str, Any]:
    """A hit with everything that finds it again."""
    return {name: getattr(hit, name) for name in ("text", "score", "uri", "start", "end", "sha256", "metadata")}
