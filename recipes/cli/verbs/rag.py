"""The verbs `index`, `search` and `ask`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import UsageError
from ..display import Display, size
from ..flags import (
    add_generation_flags,
    add_model_flags,
    add_search_flags,
    add_store_flags,
    add_verb,
    generation_options,
)
from ..printable import one_line
from .text import stream

if TYPE_CHECKING:
    from ....models import Encoder
    from ....retrieval import Hit, ReadReport, Store
    from ...rag import Answer


def register(verbs: Any) -> None:
    """Adds the verbs' flags."""
    p = add_verb(verbs, "index", run_index)
    p.add_argument("files", nargs="+", help="text and markdown files, or folders of them")
    add_store_flags(p)
    p.add_argument("--append", action="store_true", help="add to a store that is there already")
    p.add_argument("--chunk-size", type=int, help="tokens in a chunk; default: what the encoder can read at once")
    p.add_argument("--chunk-overlap", type=int, help="tokens that neighbouring chunks share (default: 20)")

    p = add_verb(verbs, "search", run_search)
    p.add_argument("question")
    add_store_flags(p)
    add_search_flags(p)

    p = add_verb(verbs, "ask", run_ask)
    p.add_argument("question")
    add_store_flags(p)
    add_search_flags(p)
    add_model_flags(p, model="smollm2-135m-instruct")
    add_generation_flags(p)


def open_encoder(args: argparse.Namespace) -> Encoder:
    """The encoder that --encoder names."""
    from ....models import load_encoder
    from ...hub.pull import resolve_model

    return load_encoder(resolve_model(args.encoder))


def open_store(
    folder: str | Path,
    encoder: Encoder,
    *,
    read_only: bool = False,
    chunk_size: int | None = None,
    chunk_overlap: int | None = None,
) -> Store:
    """The store in `folder`, its texts embedded and counted by `encoder`."""
    from ....retrieval import Store

    return Store.open(
        folder,
        embedder=encoder.encode,
        embedder_id=encoder.fingerprint,
        dim=encoder.dim,
        chunk_size=chunk_size,
        chunk_overlap=chunk_overlap,
        read_only=read_only,
    )


def run_index(args: argparse.Namespace, display: Display) -> int:
    """`qlorag index`."""
    from ....retrieval import read_documents

    if Path(args.store).exists() and not Path(args.store).is_dir():
        raise UsageError(f"{args.store}: a file, wanted a folder for the store: name another")
    there = (Path(args.store) / "store.sqlite3").exists()
    if there and not args.append:
        raise UsageError(f"{args.store}: already holds a store: add to it with --append, or name another folder")
    encoder = open_encoder(args)
    read = read_documents(args.files)
    _say_what_was_left_out(read, display)
    if not read.documents:
        raise UsageError(f"{' '.join(args.files)}: no document could be read")
    with open_store(args.store, encoder, chunk_size=args.chunk_size, chunk_overlap=args.chunk_overlap) as store:
        with display.counting("indexing") as progress:
            progress(0, len(read.documents))
            report = store.add(read.documents, progress=progress)
        stats = store.stats()
    display.say(
        f"{args.store}: {report.added} documents added, {report.replaced} replaced, {report.unchanged} unchanged; "
        f"now {stats.documents} documents, {stats.chunks} chunks, {size(stats.bytes)}"
    )
    display.result({"store": args.store, **vars(report), "documents": stats.documents, "chunks": stats.chunks,
                    "left_out": dict(read.failures), "skipped": dict(read.skipped)})  # fmt: skip
    return 1 if read.failures else 0


def _say_what_was_left_out(read: ReadReport, display: Display) -> None:
    """Every file that failed; of those that are passed over by their names how many of each kind, with an example."""
    for path, reason in read.failures:
        display.say(f"left out {one_line(path)}: {one_line(reason.removeprefix(f'{path}: '))}", style="yellow")
    kinds: dict[str, list[str]] = {}
    for path, reason in read.skipped:
        kinds.setdefault(f"{Path(path).suffix or 'no suffix'}: {reason}", []).append(path)
    for kind, paths in sorted(kinds.items()):
        display.say(f"passed over {len(paths)} ({one_line(kind)}), such as {one_line(paths[0])}", style="yellow")


def run_search(args: argparse.Namespace, display: Display) -> int:
    """`qlorag search`."""
    hits = _find(args)
    if not hits:
        display.say(f"nothing with a score of at least {args.score_threshold}")
    show_sources(hits, display)
    display.result({"question": args.question, "hits": [as_json(h) for h in hits]})
    return 0


def run_ask(args: argparse.Namespace, display: Display) -> int:
    """`qlorag ask`."""
    from ...hub.assemble import assemble
    from ...rag import NOT_FOUND, answer_from

    options = generation_options(args)
    hits = _find(args)
    if not hits:  # then no model is loaded
        display.say(NOT_FOUND)
        display.result({"question": args.question, "answer": NOT_FOUND, "citations": [], "sources": []})
        return 0
    loaded = assemble(args.model, adapter_path=args.adapter_path, quantize=args.quantize, dtype=args.dtype)
    run = answer_from(hits, loaded.model, loaded.tok, args.question, system=args.system, **options)
    if len(run.sources) < len(hits):
        display.say(
            f"note: only the best {len(run.sources)} of {len(hits)} passages fit into the model's {run.context} tokens",
            style="yellow",
        )
    stream(run, display)
    show_citations(run.answer, display)
    display.result(
        {
            "question": args.question,
            "answer": run.answer.text,
            "citations": run.answer.citations,
            "cited_by": run.answer.cited_by,
            "sources": [as_json(h) for h in run.sources],
        }
    )
    return 0


def _find(args: argparse.Namespace) -> list[Hit]:
    if args.k < 1:
        raise UsageError(f"--k {args.k}: wanted at least 1")
    with open_store(args.store, open_encoder(args), read_only=True) as store:
        return store.search(args.question, k=args.k, score_threshold=args.score_threshold)


def show_citations(answer: Answer, display: Display) -> None:
    """The sources under an answer, those it rests on marked."""
    how = {
        "model": "cited by the model",
        "overlap": "found by comparing words, none cited rightly by the model",
        "none": "none holds the names, numbers and words of a sentence of the answer"
        if answer.shares_words
        else "the answer's words are in none of them",
    }[answer.cited_by]
    display.say()
    display.say(f"Sources ({how}):")
    show_sources(answer.sources, display, marked=answer.citations)


def show_sources(hits: Sequence[Hit], display: Display, *, marked: Sequence[int] = ()) -> None:
    """One paragraph a hit: number, score, file and characters, then the beginning of its text."""
    for n, hit in enumerate(hits, 1):
        star = "*" if n in marked else " "
        display.say(f"{star}[{n}] {hit.score:.3f}  {one_line(hit.uri)}:{hit.start}-{hit.end}")
        text = " ".join(hit.text.split())
        display.say(f"      {text[:150]}{'...' if len(text) > 150 else ''}", style="dim")


def as_json(hit: Hit) -> dict[str, Any]:
    """A hit with everything that finds it again."""
    return {name: getattr(hit, name) for name in ("text", "score", "uri", "start", "end", "sha256", "metadata")}
