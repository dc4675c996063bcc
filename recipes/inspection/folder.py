"""What a folder holds, in words: a model, an adapter, a training run, a store, or training data."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

from ...kernels import dispatch, nf4
from ...lora import adapter_info
from ...models import SafetensorsFile, load_tokenizer
from ...retrieval import Store
from ..cli.display import Display, count
from ..data.examples import read_rows, tokenize_rows
from ..errors import UsageError
from ..hub.pull import resolve_model
from ..training.checkpoint import FOLDER, checkpoints
from ..training.metrics import read_metrics
from .model import inspect_model

OPERATIONS = ("cross_entropy", "lora", "rms_norm", "rope", "swiglu")  # of kernels/, beside nf4, whose backends differ


def inspect_folder(
    name: str, display: Display, *, quantize: str | None, model: str | None, tensors: bool = False
) -> dict[str, Any]:
    """Describes what `name` is. Raises UsageError: it is none of them; and the errors of their readers."""
    path = Path(name)
    if path.suffix == ".jsonl" and path.is_file():
        return _data(path, display, model)
    if (path / "adapter_config.json").exists():
        return _adapter(path, display)
    if (path / "store.sqlite3").exists():
        return _store(path, display)
    if not (path / "config.json").exists():  # a model's folder may hold anything else besides
        if (path / "metrics.jsonl").exists() or (path / FOLDER).is_dir():
            return _run(path, display)
        if path.is_dir() and any(path.glob("*.jsonl")):
            return _data(path, display, model)
    folder = resolve_model(name)
    if (folder / "config.json").exists():
        return inspect_model(folder, display, quantize=quantize, tensors=tensors)
    raise UsageError(f"{name}: holds no config.json, adapter_config.json, store.sqlite3 or .jsonl file")


def inspect_backends(display: Display) -> list[dict[str, Any]]:
    """Which implementations of each operation of kernels/ can run here, and why the others cannot."""
    backends = nf4.available_backends()
    for name in OPERATIONS:
        backends += dispatch.available_backends(name)
    rows = [(b.operation, b.backend, "yes" if b.available else "no", b.detail) for b in backends]
    title = "backend=None takes an operation's first that runs on the tensors' device."
    display.table(["operation", "backend", "runs here", "detail"], rows, title=title)
    return [b._asdict() for b in backends]


def _adapter(path: Path, display: Display) -> dict[str, Any]:
    info = adapter_info(path)
    tensors = SafetensorsFile(path / "adapter_model.safetensors").entries.values()
    parameters = sum(math.prod(e.shape) for e in tensors)
    quantized = "not recorded" if info.quantize is None else ", ".join(f"{k}={v}" for k, v in info.quantize.items())
    display.table(
        ["", str(path)],
        [
            ("adapter", f"LoRA r={info.config.r} alpha={info.config.alpha:g} dropout={info.config.dropout:g}"),
            ("layers", f"{len(info.layers)}: {', '.join(sorted({n.rpartition('.')[2] for n in info.layers}))}"),
            ("parameters", count(parameters)),
            ("base", f"{info.base_name or 'not named'}, fingerprint {(info.base_fingerprint or 'not recorded')[:16]}"),
            ("base quantized", quantized if info.base_fingerprint else "not recorded"),
        ],
    )
    return {
        "kind": "adapter",
        "r": info.config.r,
        "alpha": info.config.alpha,
        "layers": len(info.layers),
        "parameters": parameters,
        "base": info.base_name,
        "base_fingerprint": info.base_fingerprint,
        "quantize": info.quantize,
    }


def _run(path: Path, display: Display) -> dict[str, Any]:
    """A run that was interrupted or is under way: its adapter is not written yet."""
    saved, metrics = checkpoints(path), path / "metrics.jsonl"
    step = int(saved[-1].name.rpartition("-")[2]) if saved else None
    losses: dict[str, tuple[int, float]] = {}  # the last of each event
    for event in read_metrics(metrics) if metrics.exists() else []:
        losses[event["event"]] = (event["step"], event["loss"])
    go_on = f"the train command again, with --adapter-path {path} and " + ("--resume" if saved else "--overwrite")
    rows = [
        ("training run", "not finished: there is no adapter_config.json"),
        ("newest checkpoint", "none" if step is None else f"step {step}"),
        *((f"last {event} loss", f"{loss:.4f} at step {at}") for event, (at, loss) in losses.items()),
        ("to go on" if saved else "to start anew", go_on),
    ]
    display.table(["", str(path)], rows)
    return {
        "kind": "run",
        "checkpoint": None if step is None else str(saved[-1]),
        "step": step,
        "losses": {event: {"step": at, "loss": loss} for event, (at, loss) in losses.items()},
    }


def _store(path: Path, display: Display) -> dict[str, Any]:
    with Store.open(path, read_only=True) as store:
        stats = vars(store.stats())
    display.table(["", str(path)], [(k.replace("_", " "), v) for k, v in stats.items()])
    return {"kind": "store", **stats}


def _data(path: Path, display: Display, model: str | None) -> dict[str, Any]:
    files = [path] if path.is_file() else sorted(path.glob("*.jsonl"))
    tok = load_tokenizer(resolve_model(model)) if model else None
    rows, result = [], {}
    for file in files:
        read, skipped = read_rows(file, skip_invalid=True)
        shapes = Counter(r.kind for r in read)
        entry: dict[str, Any] = {"rows": len(read), "invalid": len(skipped), "shapes": dict(shapes)}
        tokens = "-"
        if tok is not None:
            examples, _ = tokenize_rows(read, tok, max_tokens=10**9)
            entry["tokens"] = sum(len(e.ids) for e in examples)
            entry["trained_tokens"] = sum(sum(e.mask) for e in examples)
            tokens = f"{entry['tokens']}, {entry['trained_tokens']} trained"
        rows.append((file.name, len(read), len(skipped), ", ".join(f"{n} {k}" for k, n in shapes.items()), tokens))
        result[file.name] = entry
    display.table(["file", "rows", "invalid", "shapes", "tokens"], rows, title=str(path))
    return {"kind": "data", "files": result}
