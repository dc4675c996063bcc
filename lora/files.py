"""Adapters on disk, in PEFT's format: a folder with two files.

    adapter_config.json          see `peft_config.py`
    adapter_model.safetensors    base_model.model.<path>.lora_A.weight [R, K], .lora_B.weight [N, R], float32

PEFT loads such a folder, and `load.py` loads PEFT's. The safetensors header, which PEFT does not read, holds
what PEFT has no field for: the fingerprint of the base that the adapter was trained against, how that base
was quantized, and a copy of the five fields that set ranks and scales.

Writing: each file under a temporary name, fsync, rename; the tensors first, the config last, so a folder
without a config is an interrupted save. When an older adapter is overwritten, a crash between the two
renames pairs new tensors with the old config; reading detects it by the copy of the fields.

Reading is strict. PEFT's own loader warns about missing keys and continues; here a missing, unexpected or
wrong tensor or field is an error that names file and key. PEFT adds the base's own weight of an adapted output head,
as base_model.model.<path>.base_layer.weight; it is read, and `load.py` compares it with the model's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from .attach import PREFIX, adapter_state, require_attached
from .config import LoRAConfig
from .errors import AdapterError
from .peft_config import Selection, read_config, write_config
from .targets import walk

CONFIG_NAME = "adapter_config.json"
TENSORS_NAME = "adapter_model.safetensors"
AGAIN = "the adapter is damaged or mixed from two saves; save it again"
_MLX_ADVICE = (
    "this is an adapter of mlx-lm (lora_a [K, R], lora_b [R, N]), which is not read: merge it there with "
    "mlx_lm.fuse and give the resulting model, or save it in PEFT's form"
)

_BASE, _QUANTIZE, _SCALES = "qlorag.base_fingerprint", "qlorag.base_quantize", "qlorag.scales"
_SCALE_FIELDS = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
_QUANTIZE_FIELDS = {"kind": str, "block_size": int, "double_quant": bool}
KINDS = ("lora_A", "lora_B")
BASE_WEIGHT = "base_layer"  # and .weight: the name that PEFT gives to the weight beside A and B
_MLX_NAME = "adapters.safetensors"


@dataclass(frozen=True)
class AdapterInfo:
    """What an adapter's files say.

    layers:           paths of the adapted layers, as the tensors name them.
    base_fingerprint: of the base it was trained against; None if the file does not say (PEFT's do not).
    quantize:         how that base was quantized; None if it was not, or if the file does not say.
    base_verified:    the fingerprint was there and equals the model's. Set by `load_adapter` only.
    """

    config: LoRAConfig
    layers: tuple[str, ...]
    base_name: str | None
    base_fingerprint: str | None
    quantize: dict[str, Any] | None
    base_verified: bool = False


def save_adapter(
    model: nn.Module,
    directory: str | Path,
    *,
    base_name: str | None = None,
    base_fingerprint: str | None = None,
    quantize: Mapping[str, Any] | None = None,
    task_type: str | None = "CAUSAL_LM",
) -> None:
    """Write the model's adapter to a folder, in float32, as PEFT would.

    base_name:        the base's folder or hub name; PEFT's base_model_name_or_path.
    base_fingerprint: checked when the adapter is loaded; None takes `model.fingerprint` if there is one.
    quantize:         how the base was quantized: {"kind": "nf4", "block_size": 64, "double_quant": True}.
    task_type:        for PEFT's Auto classes.
    Raises AdapterError: the model carries no adapter.
    """
    layers = require_attached(model)
    folder = Path(directory)
    existing = [path for path, _ in walk(model) if path]
    config = write_config(layers, existing, base_name=base_name, task_type=task_type)
    written = json.loads(config)
    metadata = {
        "format": "pt",
        _SCALES: json.dumps({key: written[key] for key in _SCALE_FIELDS}, sort_keys=True),
    }
    if fingerprint := base_fingerprint or getattr(model, "fingerprint", None):
        metadata[_BASE] = fingerprint
    if quantize:
        metadata[_QUANTIZE] = json.dumps(dict(quantize), sort_keys=True)
    tensors = {key: value.to("cpu", torch.float32).contiguous() for key, value in adapter_state(model).items()}
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / TENSORS_NAME, _in_order(to_safetensors(tensors, metadata)))
    _write(folder / CONFIG_NAME, config.encode())


def _in_order(file: bytes) -> bytes:
    """The same safetensors file with sorted metadata. The writer's order is random, and equal adapters should give
    equal files.
    """
    length = int.from_bytes(file[:8], "little")
    header = json.loads(file[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return file[:8] + text.ljust(length) + file[8 + length :]


def adapter_info(directory: str | Path) -> AdapterInfo:
    """What an adapter's files say, without a model: for `inspect`, and to load the base that the adapter needs.

    Raises AdapterError: a file is missing, damaged, or not an adapter that this package supports.
    """
    return read_adapter(Path(directory)).info


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter's files, read and checked as far as that is possible without a model."""

    config_path: Path
    tensors_path: Path
    selection: Selection
    tensors: dict[tuple[str, str], Tensor]  # (path, "lora_A" or "lora_B")
    base_weights: dict[str, Tensor]  # {path: what the file holds of the base's own weight}
    info: AdapterInfo


def read_adapter(folder: Path) -> AdapterFiles:
    config_path, tensors_path = folder / CONFIG_NAME, folder / TENSORS_NAME
    if not folder.is_dir():
        raise AdapterError(f"{folder}: no such folder: want one with {CONFIG_NAME} and {TENSORS_NAME}")
    if not tensors_path.is_file():
        if mlx := sorted(folder.glob(f"*{_MLX_NAME}")):  # whole, or a numbered checkpoint
            raise AdapterError(f"{mlx[-1]}: {_MLX_ADVICE}")
        hint = "; pickle files (.bin) are not opened, save it as safetensors" if any(folder.glob("*.bin")) else ""
        raise AdapterError(f"{tensors_path}: missing: the folder holds no adapter, or a save was interrupted{hint}")
    if not config_path.is_file():
        raise AdapterError(f"{config_path}: missing beside {TENSORS_NAME}: the save was interrupted; save it again")
    try:
        text = config_path.read_text(encoding="utf-8")
        config, selection, base_name = read_config(text)
    except (AdapterError, UnicodeDecodeError) as error:
        raise AdapterError(f"{config_path}: {error}") from error
    metadata, state = _read_tensors(tensors_path)
    _check_scales(config_path, json.loads(text), metadata)
    base_weights = _take_base_weights(state)
    tensors = {_parsed(key, tensors_path): value for key, value in state.items()}
    paths = dict.fromkeys(path for path, _ in tensors)
    for path in paths:
        for kind in KINDS:
            if (path, kind) not in tensors:
                raise AdapterError(f"{tensors_path}: {tensor_key(path, kind)} is missing: {AGAIN}")
    for (path, kind), tensor in tensors.items():
        _check_tensor(tensors_path, config, path, kind, tensor)
    for path in base_weights:
        if path not in paths:
            key = tensor_key(path, BASE_WEIGHT)
            raise AdapterError(f"{tensors_path}: unexpected tensor {key}: there is no lora_A for {path}; {AGAIN}")
    quantize = _json_object(tensors_path, _QUANTIZE, metadata)
    if quantize:
        _check_quantize(tensors_path, quantize)
    info = AdapterInfo(config, tuple(paths), base_name, metadata.get(_BASE), quantize)
    return AdapterFiles(config_path, tensors_path, selection, tensors, base_weights, info)


def _read_tensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path}: not a readable safetensors file ({error}): it is cut off or damaged") from error
    if not state:
        raise AdapterError(f"{path}: holds no tensor: {AGAIN}")
    return metadata, state


def _take_base_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take the weights of base layers out of `state`, by their path."""
    suffix = f".{BASE_WEIGHT}.weight"
    keys = [key for key in state if key.startswith(PREFIX) and key.endswith(suffix)]
    return {key.removeprefix(PREFIX).removesuffix(suffix): state.pop(key) for key in keys}


def _parsed(key: str, file: Path) -> tuple[str, str]:
    """`base_model.model.<path>.lora_A.weight` -> (path, "lora_A")."""
    path, _, kind = key.removesuffix(".weight").removeprefix(PREFIX).rpartition(".")
    if not path or kind not in KINDS or key != tensor_key(path, kind):
        if key.endswith((".lora_a", ".lora_b")):
            raise AdapterError(f"{file}: {key}: {_MLX_ADVICE}")
        raise AdapterError(
            f"{file}: unexpected tensor {key}: want {tensor_key('<path>', 'lora_A')} and .lora_B.weight only"
        )
    return path, kind


def tensor_key(path: str, kind: str) -> str:
    return f"{PREFIX}{path}.{kind}.weight"


def _check_tensor(file: Path, config: LoRAConfig, path: str, kind: str, tensor: Tensor) -> None:
    key, r = tensor_key(path, kind), config.rank_of(path)
    if tensor.ndim != 2 or not tensor.is_floating_point():
        raise AdapterError(
            f"{file}: {key} is {tensor.dtype} {list(tensor.shape)}, want a floating-point matrix: {AGAIN}"
        )
    rank = tensor.shape[0 if kind == "lora_A" else 1]
    if rank != r:
        raise AdapterError(f"{file}: {key} has rank {rank}, but {CONFIG_NAME} says r={r} for it: {AGAIN}")
    if not torch.isfinite(tensor).all():
        raise AdapterError(f"{file}: {key} holds NaN or infinity: the training diverged, use an earlier checkpoint")


def _check_scales(path: Path, config: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    for field, saved in (_json_object(path.parent / TENSORS_NAME, _SCALES, metadata) or {}).items():
        if (got := config.get(field)) != saved:
            raise AdapterError(f"{path}: {field}={got!r}, but {TENSORS_NAME} was saved with {saved!r}: {AGAIN}")


def _check_quantize(file: Path, quantize: Mapping[str, Any]) -> None:
    """Raise AdapterError unless it is what `save_adapter` documents: these options go to the base's loader."""
    known = ", ".join(_QUANTIZE_FIELDS)
    if "kind" not in quantize:
        raise AdapterError(f"{file}: metadata {_QUANTIZE} has no kind, want {known}: {AGAIN}")
    for key, value in quantize.items():
        if key not in _QUANTIZE_FIELDS:
            raise AdapterError(f"{file}: metadata {_QUANTIZE} has {key}={value!r:.60}, want only {known}: {AGAIN}")
        if type(value) is not (wanted := _QUANTIZE_FIELDS[key]):
            raise AdapterError(f"{file}: metadata {_QUANTIZE} has {key}={value!r:.60}, want {wanted.__name__}: {AGAIN}")


def _json_object(file: Path, field: str, metadata: Mapping[str, str]) -> dict[str, Any] | None:
    if field not in metadata:
        return None
    try:
        value = json.loads(metadata[field])
    except json.JSONDecodeError as error:
        raise AdapterError(f"{file}: metadata {field} is not valid JSON ({error}): {AGAIN}") from error
    if not isinstance(value, dict):
        raise AdapterError(f"{file}: metadata {field} is {value!r}, want an object: {AGAIN}")
    return value


def _write(path: Path, data: bytes) -> None:
    """Write `data` to `path` in full or not at all: temporary name, fsync, rename, fsync of the folder."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:  # ctrl-C too: no half-written file stays
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # Windows has no handle for a folder
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
