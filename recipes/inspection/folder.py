"""What a folder holds: a model, an adapter, a training run, a store, or training data; as plain data.

recipes/cli/verbs/inspection.py shows these facts.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from ...lora import AdapterInfo, adapter_info
from ...models import SafetensorsFile, Tokenizer, load_tokenizer
from ...retrieval import Stats, Store
from ..data.examples import read_rows, tokenize_rows
from ..errors import UsageError
from ..hub.pull import resolve_model
from ..training.checkpoint import FOLDER, checkpoints
from ..training.metrics import read_metrics
from .model import ModelFacts, inspect_model


@dataclass(frozen=True)
class AdapterFacts:
    """An adapter: what its files say, and how many parameters it has."""

    folder: Path
    info: AdapterInfo
    parameters: int


@dataclass(frozen=True)
class RunFacts:
    """A run that was interrupted or is under way: its adapter is not written yet.

    checkpoint, step: the newest checkpoint and its step, if there is one.
    losses: {event: (step, loss)}, the last of each.
    """

    folder: Path
    checkpoint: Path | None
    step: int | None
    losses: dict[str, tuple[int, float]]


@dataclass(frozen=True)
class StoreFacts:
    """A store, as it describes itself."""

    folder: Path
    stats: Stats


@dataclass(frozen=True)
class DataFileFacts:
    """One file of rows.  shapes: {shape: rows}.  tokens, labels: with a model's tokenizer, else None."""

    rows: int
    invalid: int
    shapes: dict[str, int]
    tokens: int | None = None
    labels: int | None = None


@dataclass(frozen=True)
class DataFacts:
    """Training data: one file, or the .jsonl files of a folder, by name."""

    path: Path
    files: dict[str, DataFileFacts]


Facts = ModelFacts | AdapterFacts | RunFacts | StoreFacts | DataFacts


def inspect_folder(name: str, *, quantize: str | None = None, model: str | None = None) -> Facts:
    """What `name` is: a folder, a .jsonl file, or the name of a model that `pull` knows.

    quantize: also load a model in 4 bits and measure it.  model: whose tokenizer counts the tokens of data.
    Raises UsageError: it is none of them, or not what `quantize` or `model` is for; and the errors of their readers.
    """
    facts = _facts(name, quantize=quantize, model=model)
    if quantize and not (isinstance(facts, ModelFacts) and facts.config is not None):
        kind = f"a model of type {facts.model_type}" if isinstance(facts, ModelFacts) else "no model"
        raise UsageError(f"--quantize {quantize}: {name} is {kind}, and only a decoder is put in 4 bits: leave it out")
    if model and not isinstance(facts, DataFacts):
        raise UsageError(f"--model {model}: {name} holds no rows whose tokens could be counted: leave it out")
    return facts


def _facts(name: str, *, quantize: str | None, model: str | None) -> Facts:
    path = Path(name)
    if path.suffix == ".jsonl" and path.is_file():
        return _data(path, model)
    if (path / "adapter_config.json").exists():
        return _adapter(path)
    if (path / "store.sqlite3").exists():
        return _store(path)
    if not (path / "config.json").exists():  # a model's folder may hold anything else besides
        if (path / "metrics.jsonl").exists() or (path / FOLDER).is_dir():
            return _run(path)
        if path.is_dir() and any(path.glob("*.jsonl")):
            return _data(path, model)
    folder = resolve_model(name)
    if (folder / "config.json").exists():
        return inspect_model(folder, quantize=quantize)
    raise UsageError(f"{name}: holds no config.json, adapter_config.json, store.sqlite3 or .jsonl file")


def _adapter(path: Path) -> AdapterFacts:
    info = adapter_info(path)
    tensors = SafetensorsFile(path / "adapter_model.safetensors").entries.values()
    return AdapterFacts(path, info, sum(math.prod(e.shape) for e in tensors))


def _run(path: Path) -> RunFacts:
    saved, metrics = checkpoints(path), path / "metrics.jsonl"
    losses = {e["event"]: (e["step"], e["loss"]) for e in (read_metrics(metrics) if metrics.exists() else [])}
    if not saved:
        return RunFacts(path, None, None, losses)
    return RunFacts(path, saved[-1], int(saved[-1].name.rpartition("-")[2]), losses)


def _store(path: Path) -> StoreFacts:
    with Store.open(path, read_only=True) as store:
        return StoreFacts(path, store.stats())


def _data(path: Path, model: str | None) -> DataFacts:
    files = [path] if path.is_file() else sorted(path.glob("*.jsonl"))
    tok = load_tokenizer(resolve_model(model)) if model else None
    return DataFacts(path, {file.name: _data_file(file, tok) for file in files})


def _data_file(file: Path, tok: Tokenizer | None) -> DataFileFacts:
    rows, skipped = read_rows(file, skip_invalid=True)
    shapes = dict(Counter(str(r.kind) for r in rows))
    if tok is None:
        return DataFileFacts(len(rows), len(skipped), shapes)
    _, report = tokenize_rows(rows, tok, max_tokens=10**9)
    return DataFileFacts(len(rows), len(skipped), shapes, report.tokens, report.labels)
