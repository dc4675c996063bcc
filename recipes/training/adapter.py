"""A loaded model made ready for a run: with a new adapter, or with a checkpoint's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...lora import LoRAConfig, attach, load_adapter, save_adapter
from ...models import Decoder
from ..errors import TrainingError
from ..hub.assemble import LoadedModel
from ..hub.end_tokens import read_end_ids, write_end_ids
from .checkpoint import read_state
from .objectives import Objective
from .settings import TrainSettings


@dataclass(frozen=True)
class PreparedModel:
    """A model with a trainable adapter, and what is written beside it.

    name:     the base's, as the user gave it.  quantize: the base's 4-bit kind, None for a dense base.
    layers:   paths of the adapted layers.
    record:   the settings that a checkpoint keeps, see `run_record`.
    end_ids:  the tokens that end what is learned, and those that ended a generation before.
    resumed_from: the checkpoint whose adapter this is, None for a new one; `step` is its step, else 0.
    """

    model: Decoder
    name: str
    quantize: str | None
    layers: list[str]
    record: dict[str, Any]
    end_ids: tuple[int, ...] = ()
    resumed_from: Path | None = None
    step: int = 0

    def save_adapter(self, folder: Path) -> None:
        """Writes the adapter as PEFT reads it, with the base it was trained against."""
        save_adapter(
            self.model,
            folder,
            base_name=self.name,
            base_fingerprint=self.model.fingerprint,
            quantize=None if self.quantize is None else {"kind": self.quantize},
        )
        write_end_ids(folder, self.end_ids)


def run_record(
    base: LoadedModel, examples: Sequence[Any], *, lora: LoRAConfig, settings: TrainSettings, objective: Objective
) -> dict[str, Any]:
    """Everything that decides a run's numbers, as JSON types: a resumed run must have the same."""
    record = {
        **vars(settings),
        **objective.settings(),
        "lora": {k: v for k, v in vars(lora).items() if v not in ({}, ())},
        "quantize": base.quantize,
        "base": base.model.fingerprint,
        "dtype": str(base.model.model.embed_tokens.weight.dtype),
        "data": _digest(examples, objective),
    }
    as_read_back: dict[str, Any] = json.loads(json.dumps(record))  # tuples become lists
    return as_read_back


def prepare(
    base: LoadedModel,
    lora: LoRAConfig,
    record: dict[str, Any],
    *,
    name: str,
    seed: int = 0,
    end_ids: Iterable[int] = (),
    resume_from: Path | None = None,
    start_from: Path | None = None,
) -> PreparedModel:
    """Attaches a new adapter to the model, or the one in a checkpoint, or a finished one to train further.

    seed: of the new adapter's initial weights.
    end_ids: the tokens that end what is learned (`TokenizeReport.ends`); generation with the adapter stops at them.
    start_from: an adapter's folder: its weights are where a new run begins, with a fresh optimizer. Its rank, scale and
             layers are its own.
    Raises TrainingError: the checkpoint was made with other settings, or a target cannot be trained.
    Raises AdapterError: the adapter fits no layer, or the checkpoint's is damaged.
    """
    ends = tuple(sorted({*base.tok.eos_ids, *end_ids}))
    if resume_from is not None:
        step = read_state(resume_from, settings=record)
        info = load_adapter(base.model, resume_from, base_fingerprint=base.model.fingerprint, trainable=True)
        return PreparedModel(base.model, name, base.quantize, list(info.layers), record, ends, resume_from, step)
    if start_from is not None:
        info = load_adapter(base.model, start_from, base_fingerprint=base.model.fingerprint, trainable=True)
        layers = list(info.layers)
        ends = tuple(sorted({*ends, *read_end_ids(start_from)}))
    else:
        layers = attach(base.model, lora, seed=seed)
    if "lm_head" in layers:
        raise TrainingError("targets: the output head cannot be adapted, the loss is fused with it: leave it out")
    return PreparedModel(base.model, name, base.quantize, layers, record, ends)


def _digest(examples: Sequence[Any], objective: Objective) -> str:
    """SHA-256 of what is trained on, in order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps(objective.describe(example)).encode())
    return digest.hexdigest()
