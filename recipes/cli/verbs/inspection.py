"""The verb `inspect`: shows the facts that recipes/inspection finds, as tables or as JSON."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ...errors import UsageError
from ..display import Display, count, size
from ..flags import add_verb

if TYPE_CHECKING:
    from ...inspection.folder import AdapterFacts, DataFacts, Facts, RunFacts, StoreFacts
    from ...inspection.model import ModelFacts


def register(verbs: Any) -> None:
    """Adds the verb's flags."""
    p = add_verb(verbs, "inspect", run_inspect)
    p.add_argument("path", nargs="?", help="folder of a model, an adapter, a store or data; or a known model's name")
    p.add_argument("--quantize", choices=["nf4", "fp4"], help="also load a model in 4 bits and measure it")
    p.add_argument("--tensors", action="store_true", help="list every tensor with its bits and, if known, its error")
    p.add_argument("--model", help="count a data folder's tokens with this model's tokenizer")
    p.add_argument("--backends", action="store_true", help="show which kernels this machine can run")


def run_inspect(args: argparse.Namespace, display: Display) -> int:
    """`qlorag inspect`."""
    from ...inspection.folder import inspect_folder
    from ...inspection.model import ModelFacts

    if not args.path and not args.backends:
        raise UsageError("inspect: give a folder, or --backends")
    result: dict[str, Any] = {}
    if args.backends:
        result["backends"] = _show_backends(display)
    if args.path:
        facts = inspect_folder(args.path, quantize=args.quantize, model=args.model)
        if args.tensors and not isinstance(facts, ModelFacts):
            raise UsageError(f"--tensors: {args.path} is no model: leave it out")
    elif args.quantize or args.model or args.tensors:
        raise UsageError("--quantize, --model and --tensors are about a folder: give one")
    if args.path:
        result |= _show(facts, display, tensors=args.tensors)
    display.result(result)
    return 0


def _show_backends(display: Display) -> list[dict[str, Any]]:
    from ...inspection.backends import available_backends

    backends = available_backends()
    rows = [(b.operation, b.backend, "yes" if b.available else "no", b.detail) for b in backends]
    title = "backend=None takes an operation's first that runs on the tensors' device."
    display.table(["operation", "backend", "runs here", "detail"], rows, title=title)
    return [b._asdict() for b in backends]


def _show(facts: Facts, display: Display, *, tensors: bool) -> dict[str, Any]:
    """Prints the facts; returns them as JSON."""
    from ...inspection.folder import AdapterFacts, DataFacts, RunFacts, StoreFacts

    if isinstance(facts, AdapterFacts):
        return _show_adapter(facts, display)
    if isinstance(facts, RunFacts):
        return _show_run(facts, display)
    if isinstance(facts, StoreFacts):
        return _show_store(facts, display)
    if isinstance(facts, DataFacts):
        return _show_data(facts, display)
    return _show_model(facts, display, tensors=tensors)


def _show_model(facts: ModelFacts, display: Display, *, tensors: bool) -> dict[str, Any]:
    shares = sorted(facts.dtypes.items(), key=lambda item: -item[1])
    stored = ", ".join(f"{d} ({100 * n / max(facts.parameters, 1):.1f} %)" for d, n in shares)
    rows = [("type", str(facts.model_type))]
    if (c := facts.config) is not None:
        heads = f"{c.num_heads} heads over {c.num_kv_heads} KV heads"
        rows += [
            ("shape", f"{c.num_layers} layers, width {c.hidden_size}, {heads}"),
            ("vocabulary", f"{c.vocab_size}, head {'tied to the embedding' if c.tied_head else 'of its own'}"),
            ("context", f"{c.max_positions} tokens, RoPE {c.rope.kind} with theta {c.rope.theta:g}"),
        ]
    rows += [
        ("parameters", f"{count(facts.parameters)} in {facts.tensor_count} tensors"),
        ("stored as", stored),
        ("weights", size(facts.nbytes)),
        ("fingerprint", facts.fingerprint[:16]),
    ]
    if facts.chat is not None:
        rows.append(("a chat", repr(facts.chat)))
    if facts.stops:
        rows.append(("answers end at", " ".join(facts.stops)))
    result: dict[str, Any] = {
        "kind": "model",
        "chat": facts.chat,
        "answers_end_at": list(facts.stops),
        "model_type": facts.model_type,
        "parameters": facts.parameters,
        "bytes": facts.nbytes,
        "dtypes": facts.dtypes,
        "fingerprint": facts.fingerprint,
    }
    if facts.packed:
        totals = _totals(facts)
        result |= totals
        rows += _total_rows(facts, totals)
    display.table(["", str(facts.folder)], rows)
    if facts.packed or tensors:
        result["kinds"] = _show_kinds(facts, display)
    if tensors:
        result["tensors"] = _show_tensors(facts, display)
    return result


def _totals(facts: ModelFacts) -> dict[str, Any]:
    """Of the weights in 4 bits."""
    from ...inspection.model import mean_error

    packed = facts.packed
    parameters, nbytes = sum(f.parameters for f in packed), sum(f.nbytes for f in packed)
    return {
        "quantized_parameters": parameters,
        "quantized_bytes": nbytes,
        "bits_per_weight": 8 * nbytes / parameters,
        "dense_bytes": sum(f.nbytes for f in facts.tensors if not f.packed),
        "error": mean_error(packed),
    }


def _total_rows(facts: ModelFacts, totals: dict[str, Any]) -> list[tuple[str, str]]:
    kinds = ", ".join(sorted({f.stored for f in facts.packed}))
    rows = [
        (f"as {kinds}", f"{count(totals['quantized_parameters'])} parameters in 4 bits, "
                        f"{totals['bits_per_weight']:.3f} bits each with all their state"),
        ("in memory", f"{size(totals['quantized_bytes'])} packed and {size(totals['dense_bytes'])} dense"),
    ]  # fmt: skip
    if totals["error"] is not None:
        rows.append(("error", f"{100 * totals['error']:.2f} % RMS of the weights in 4 bits"))
    return rows


def _show_kinds(facts: ModelFacts, display: Display) -> list[dict[str, Any]]:
    kinds = facts.kinds
    rows = [
        (k.kind, k.stored, k.tensors, count(k.parameters), size(k.nbytes), f"{k.bits:.3f}", _percent(k.error))
        for k in kinds
    ]
    display.table(["kind", "stored as", "tensors", "parameters", "bytes", "bits per weight", "error"], rows)
    return [
        {"kind": k.kind, "stored": k.stored, "tensors": k.tensors, "parameters": k.parameters, "bytes": k.nbytes,
         "bits_per_weight": k.bits, "error": k.error}
        for k in kinds
    ]  # fmt: skip


def _show_tensors(facts: ModelFacts, display: Display) -> list[dict[str, Any]]:
    rows = [(f.name, f.stored, count(f.parameters), f"{f.bits:.3f}", _percent(f.error)) for f in facts.tensors]
    display.table(["tensor", "stored as", "parameters", "bits per weight", "error"], rows)
    return [
        {"name": f.name, "stored": f.stored, "parameters": f.parameters, "bits_per_weight": f.bits, "error": f.error}
        for f in facts.tensors
    ]


def _percent(error: float | None) -> str:
    return "-" if error is None else f"{100 * error:.2f} %"


def _show_adapter(facts: AdapterFacts, display: Display) -> dict[str, Any]:
    info = facts.info
    quantized = "not recorded" if info.quantize is None else ", ".join(f"{k}={v}" for k, v in info.quantize.items())
    display.table(
        ["", str(facts.folder)],
        [
            ("adapter", f"LoRA r={info.config.r} alpha={info.config.alpha:g} dropout={info.config.dropout:g}"),
            ("layers", f"{len(info.layers)}: {', '.join(sorted({n.rpartition('.')[2] for n in info.layers}))}"),
            ("parameters", count(facts.parameters)),
            ("base", f"{info.base_name or 'not named'}, fingerprint {(info.base_fingerprint or 'not recorded')[:16]}"),
            ("base quantized", quantized if info.base_fingerprint else "not recorded"),
        ],
    )
    return {
        "kind": "adapter",
        "r": info.config.r,
        "alpha": info.config.alpha,
        "layers": len(info.layers),
        "parameters": facts.parameters,
        "base": info.base_name,
        "base_fingerprint": info.base_fingerprint,
        "quantize": info.quantize,
    }


def _show_run(facts: RunFacts, display: Display) -> dict[str, Any]:
    resumable = facts.checkpoint is not None
    again = (
        f"the train command again, with --adapter-path {facts.folder} and --{'resume' if resumable else 'overwrite'}"
    )
    rows = [
        ("training run", "not finished: there is no adapter_config.json"),
        ("newest checkpoint", "none" if facts.step is None else f"step {facts.step}"),
        *((f"last {event} loss", f"{loss:.4f} at step {at}") for event, (at, loss) in facts.losses.items()),
        ("to go on" if resumable else "to start anew", again),
    ]
    display.table(["", str(facts.folder)], rows)
    return {
        "kind": "run",
        "checkpoint": None if facts.checkpoint is None else str(facts.checkpoint),
        "step": facts.step,
        "losses": {event: {"step": at, "loss": loss} for event, (at, loss) in facts.losses.items()},
    }


def _show_store(facts: StoreFacts, display: Display) -> dict[str, Any]:
    stats = vars(facts.stats)
    display.table(["", str(facts.folder)], [(k.replace("_", " "), v) for k, v in stats.items()])
    return {"kind": "store", **stats}


def _show_data(facts: DataFacts, display: Display) -> dict[str, Any]:
    rows, result = [], {}
    for name, file in facts.files.items():
        entry: dict[str, Any] = {"rows": file.rows, "invalid": file.invalid, "shapes": file.shapes}
        tokens = "-"
        if file.tokens is not None:
            entry |= {"tokens": file.tokens, "trained_tokens": file.labels}
            tokens = f"{file.tokens}, {file.labels} labelled"
        rows.append((name, file.rows, file.invalid, ", ".join(f"{n} {k}" for k, n in file.shapes.items()), tokens))
        result[name] = entry
    display.table(["file", "rows", "invalid", "shapes", "tokens"], rows, title=str(facts.path))
    return {"kind": "data", "files": result}
