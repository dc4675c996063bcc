"""`adapter_config.json` as PEFT 0.21 writes and reads it.

Read: r, lora_alpha, lora_dropout, use_rslora, rank_pattern, alpha_pattern and the selection of modules.
Every other feature of PEFT that changes what the tensors mean is refused by name; `NEUTRAL` lists the value
that switches each off. A key that is in no list is accepted when it is off (null, false, empty) or a plain
number or string, which only parametrises a feature. A flag that is on, or a nested setting, is refused: it
may switch on a feature.

Written: PEFT's whole set of keys, sorted, with `target_modules` such that PEFT finds exactly the same layers.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .config import LoRAConfig, check_alpha, check_dropout, check_rank, check_regex
from .errors import AdapterError
from .layer import LoRALinear
from .targets import selected

PEFT_VERSION = "0.21.2"  # whose keys are written; PEFT reads its own older and newer ones too

# Features that this package does not have: the value that is written, and the only one accepted when read.
NEUTRAL: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "bias": "none",
    "ensure_weight_tying": False,
    "fan_in_fan_out": False,
    "kasa_config": None,
    "layer_replication": None,
    "lora_bias": False,
    "megatron_config": None,
    "modules_to_save": None,
    "monteclora_config": None,
    "target_parameters": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "velora_config": None,
}
# Settings of the initial values of A and B, or of the features above: no effect on saved tensors.
IGNORED: dict[str, Any] = {
    "auto_mapping": None,
    "corda_config": None,
    "eva_config": None,
    "inference_mode": True,
    "loftq_config": {},
    "lora_ga_config": None,
    "megatron_core": "megatron.core",
    "peft_version": PEFT_VERSION,
    "qalora_group_size": 16,
    "revision": None,
    "runtime_config": None,
}
# The initializations that do not change the base's weights. The others (pissa, olora, corda, loftq, lora_ga, mica)
# move part of the base into the adapter or freeze part of it, so their files do not fit the original base.
PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class Selection:
    """The modules that a PEFT config selects; `paths` resolves them in a given model."""

    target_modules: str | tuple[str, ...]
    exclude_modules: str | tuple[str, ...]
    layers: tuple[int, ...] | None
    layers_pattern: tuple[str, ...]

    def paths(self, existing: Iterable[str]) -> list[str]:
        """Those of `existing` that the file selects, by PEFT's rule."""
        chosen = selected(existing, self.target_modules, self.exclude_modules)
        return chosen if self.layers is None else [path for path in chosen if self._block(path) in self.layers]

    def _block(self, path: str) -> int | None:
        patterns = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in self.layers_pattern] or [r".*?\.[^.]*\.(\d+)\."]
        found = next(filter(None, (re.match(p, path) for p in patterns)), None)
        return int(found.group(1)) if found else None


def read_config(text: str) -> tuple[LoRAConfig, Selection, str | None]:
    """The text of an adapter_config.json -> (config, selection, base_model_name_or_path).

    Raises AdapterError: not JSON, not a LoRA adapter, a field is missing or wrong, a feature not supported.
    """
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also an integer of thousands of digits
        raise AdapterError(
            f"not valid JSON ({error}): the file is damaged or cut off, save the adapter again"
        ) from error
    if not isinstance(raw, dict):
        raise AdapterError(f"holds a JSON {type(raw).__name__}, want an object with peft_type, r, lora_alpha, ...")
    if raw.get("peft_type") != "LORA":
        raise AdapterError(f"peft_type={raw.get('peft_type')!r}, want 'LORA': only LoRA adapters can be loaded")
    _refuse_unsupported(raw)
    field = _Fields(raw)
    layers = raw.get("layers_to_transform")
    selection = Selection(
        target_modules=field.patterns("target_modules"),
        exclude_modules=field.patterns("exclude_modules", optional=True),
        layers=None if layers in (None, []) else field.integers("layers_to_transform"),
        layers_pattern=field.names("layers_pattern"),
    )
    config = LoRAConfig(
        r=field.checked("r", check_rank),
        alpha=field.checked("lora_alpha", check_alpha),
        dropout=field.checked("lora_dropout", check_dropout, 0.0),
        targets=selection.target_modules,
        exclude=selection.exclude_modules,
        rslora=bool(field.boolean("use_rslora")),
        rank_pattern=field.mapping("rank_pattern"),
        alpha_pattern=field.mapping("alpha_pattern"),
    )
    for pattern in selection.layers_pattern:
        check_regex("layers_pattern", pattern)
    base = raw.get("base_model_name_or_path")
    return config, selection, base if isinstance(base, str) else None


def write_config(
    layers: Mapping[str, LoRALinear], existing: Sequence[str], *, base_name: str | None, task_type: str | None
) -> str:
    """The text of an adapter_config.json for `layers` {path: layer} of a model with module paths `existing`.

    It is derived from the layers themselves, so it cannot disagree with the tensors.
    Raises AdapterError: the layers differ in what PEFT keeps only once (dropout, rslora).
    """
    for name in ("dropout", "rslora"):
        if len(values := {getattr(layer, name) for layer in layers.values()}) > 1:
            raise AdapterError(f"layers differ in {name} ({sorted(values)}): the format has one value for all")
    first = next(iter(layers.values()))
    r, rank_pattern = _with_exceptions({path: layer.r for path, layer in layers.items()})
    alpha, alpha_pattern = _with_exceptions({path: _number(layer.alpha) for path, layer in layers.items()})
    config = NEUTRAL | IGNORED
    del config["runtime_config"]
    config |= {
        "base_model_name_or_path": base_name,
        "exclude_modules": None,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": alpha,
        "lora_dropout": first.dropout,
        "alpha_pattern": alpha_pattern,
        "peft_type": "LORA",
        "r": r,
        "rank_pattern": rank_pattern,
        "target_modules": _target_modules(list(layers), existing),
        "task_type": task_type,
        "use_rslora": first.rslora,
    }
    return json.dumps(config, indent=2, sort_keys=True) + "\n"


def _refuse_unsupported(raw: Mapping[str, Any]) -> None:
    for key, neutral in NEUTRAL.items():
        value = raw.get(key, neutral)
        if value not in (None, neutral) and value != []:
            raise AdapterError(
                f"{key}={_short(value)} is not supported, only {_short(neutral)}: "
                "load the adapter with peft and merge it there"
            )
    init = raw.get("init_lora_weights", True)
    if init not in PLAIN_INITS:
        raise AdapterError(
            f"init_lora_weights={_short(init)} is not supported: it changed the base's weights too; "
            "convert the adapter with peft's save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    known = {*NEUTRAL, *IGNORED, *_Fields.known}
    for key, value in raw.items():
        if key not in known and (value is True or (value and isinstance(value, (dict, list)))):
            raise AdapterError(
                f"{key}={_short(value)} is not known here: it may change what the tensors mean, so load the "
                "adapter with peft and merge it there"
            )


class _Fields:
    """Typed access to the config's fields; a failure names the field, what it is and what it should be."""

    known = frozenset(
        [
            "base_model_name_or_path",
            "init_lora_weights",
            "peft_type",
            "r",
            "lora_alpha",
            "lora_dropout",
            "use_rslora",
            "rank_pattern",
            "alpha_pattern",
            "target_modules",
            "exclude_modules",
            "layers_to_transform",
            "layers_pattern",
            "task_type",
        ]
    )

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.raw = raw

    def checked(self, key: str, check: Callable[[str, object], None], default: Any = None) -> Any:
        if key not in self.raw and default is None:
            raise AdapterError(f"{key} is missing: without it the update's size is unknown; save the adapter again")
        value = self.raw.get(key, default)
        check(key, value)
        return value

    def boolean(self, key: str) -> bool:
        value = self.raw.get(key) or False
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false")
        return value

    def mapping(self, key: str) -> dict[str, Any]:
        value = self.raw.get(key) or {}
        if not isinstance(value, dict):
            raise self._wrong(key, "an object {pattern: number}")
        return value

    def integers(self, key: str) -> tuple[int, ...]:
        value = self.raw[key] if isinstance(self.raw[key], list) else [self.raw[key]]
        if not all(isinstance(item, int) for item in value):
            raise self._wrong(key, "a block number or a list of them")
        return tuple(value)

    def names(self, key: str) -> tuple[str, ...]:
        value = self.raw.get(key) or []
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._wrong(key, "a string or a list of strings")
        return tuple(value)

    def patterns(self, key: str, *, optional: bool = False) -> str | tuple[str, ...]:
        value = self.raw.get(key)
        if not value and not optional:
            raise self._wrong(key, "names of modules, or one regular expression")
        return value if isinstance(value, str) and value else self.names(key)

    def _wrong(self, key: str, wanted: str) -> AdapterError:
        return AdapterError(f"{key}={_short(self.raw.get(key))}: want {wanted}")


def _with_exceptions(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The commonest value, and {pattern: value} for the layers that differ: last names if they are exact."""
    common = Counter(values.values()).most_common(1)[0][0]
    by_name: dict[str, set[Any]] = {}
    for path, value in values.items():
        by_name.setdefault(path.rpartition(".")[2], set()).add(value)
    patterns = {}
    for path, value in values.items():
        name = path.rpartition(".")[2]
        if value != common:
            patterns[re.escape(name if len(by_name[name]) == 1 else path)] = value
    return common, patterns


def _target_modules(paths: Sequence[str], existing: Sequence[str]) -> list[str]:
    """Last names ("q_proj") if they mean exactly `paths` among all the model's modules, else whole paths."""
    wanted = set(paths)
    for names in (sorted({path.rpartition(".")[2] for path in paths}), sorted(paths)):
        if set(selected(existing, names)) == wanted:
            return names
    extra = sorted(set(selected(existing, sorted(paths))) - wanted)
    raise AdapterError(
        f"target_modules cannot tell the adapted layers from {extra[0]}, whose path ends in one of theirs"
    )


def _number(value: float) -> int | float:
    return int(value) if value.is_integer() else value


def _short(value: object) -> str:
    text = json.dumps(value, default=repr)
    return text if len(text) <= 60 else text[:57] + "..."
