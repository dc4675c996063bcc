"""Putting a saved adapter into a model.

All checks are made, and all layers built, before the first layer is replaced, so a refused adapter leaves
the model unchanged. The tensors must be exactly those that `target_modules` selects in this model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from .attach import place, refuse_attached
from .errors import AdapterError, some
from .files import AGAIN, BASE_WEIGHT, KINDS, AdapterFiles, AdapterInfo, read_adapter, tensor_key
from .layer import LoRALinear
from .targets import linear_layers, refuse_shared, what_exists


def load_adapter(
    model: nn.Module,
    directory: str | Path,
    *,
    base_fingerprint: str | None = None,
    trainable: bool = False,
    dtype: torch.dtype = torch.float32,
    compute_dtype: torch.dtype | None = None,
) -> AdapterInfo:
    """Attach the adapter in a folder to the model, and freeze everything (all but A and B with `trainable`).

    base_fingerprint: of the model; None takes `model.fingerprint` if there is one. It must equal the file's.
                      If either is unknown, the adapter is loaded and the result's `base_verified` is False.
    dtype, compute_dtype: as in `LoRALinear`.
    Raises AdapterError: the file and what to do, for anything that does not fit. The model is then unchanged.
    """
    refuse_attached(model)
    files = read_adapter(Path(directory))
    actual = base_fingerprint or getattr(model, "fingerprint", None)
    wanted = files.info.base_fingerprint
    if actual and wanted and actual != wanted:
        raise AdapterError(
            f"{files.tensors_path}: trained on the base with fingerprint {wanted}, but this model's is "
            f"{actual}: load the base it was trained on (it says {files.info.base_name!r})"
        )
    layers = linear_layers(model)
    _check_paths(layers, files)
    refuse_shared(layers, files.info.layers)
    _check_base_weights(layers, files)
    adapted = {path: _layer(layers[path], path, files, dtype, compute_dtype) for path in files.info.layers}
    place(model, adapted, trainable=trainable)
    return replace(files.info, base_verified=bool(actual and wanted))


def _check_paths(layers: Mapping[str, nn.Module], files: AdapterFiles) -> None:
    """Raise AdapterError unless the tensors' layers are exactly those that the config selects in this model."""
    named, file = files.info.layers, files.tensors_path
    if unknown := [path for path in named if path not in layers]:
        raise AdapterError(
            f"{file}: has tensors for {some(unknown)}, but this model has no such linear layer: "
            f"is it the right base? {what_exists(layers)}"
        )
    expected = files.selection.paths(layers)
    if missing := [tensor_key(path, "lora_A") for path in expected if path not in named]:
        raise AdapterError(f"{file}: missing {some(missing)}, which target_modules asks for: {AGAIN}")
    if extra := [tensor_key(path, "lora_A") for path in named if path not in expected]:
        raise AdapterError(f"{file}: unexpected {some(extra)}, which target_modules does not mean: {AGAIN}")


def _check_base_weights(layers: Mapping[str, nn.Module], files: AdapterFiles) -> None:
    """Raise AdapterError unless the file's copies of the base's weights are the model's, in the narrower dtype."""
    for path, saved in files.base_weights.items():
        key, held = tensor_key(path, BASE_WEIGHT), getattr(layers[path], "weight", None)
        if not isinstance(held, Tensor) or not saved.is_floating_point():
            raise AdapterError(
                f"{files.tensors_path}: {key} cannot be compared with {path} of this model, which is a "
                f"{type(layers[path]).__name__}: load the base without quantizing that layer, or save the adapter with "
                "save_embedding_layers=False"
            )
        if saved.shape != held.shape or not _same(saved, held.detach().cpu()):
            raise AdapterError(
                f"{files.tensors_path}: {key} {list(saved.shape)} is not {path}.weight {list(held.shape)} of this "
                "model: it was trained or resized too, so load the adapter with peft and merge it there, or load the "
                "base it was trained on"
            )


def _same(saved: Tensor, held: Tensor) -> bool:
    """Whether one is the other, as stored or rounded to its dtype."""
    return torch.equal(saved.to(held.dtype), held) or torch.equal(held.to(saved.dtype), saved)


def _layer(
    base: nn.Module, path: str, files: AdapterFiles, dtype: torch.dtype, compute_dtype: torch.dtype | None
) -> LoRALinear:
    """`base` with the file's A and B beside it, not yet in the model."""
    config = files.info.config
    layer = LoRALinear(
        base,
        r=config.rank_of(path),
        alpha=config.alpha_of(path),
        dropout=config.dropout,
        rslora=config.rslora,
        dtype=dtype,
        compute_dtype=compute_dtype,
        generator=torch.Generator(),  # A is overwritten; torch's global generator must not move for it
    )
    for kind in KINDS:
        parameter, value = layer.get_parameter(kind), files.tensors[path, kind]
        if parameter.shape != value.shape:
            raise AdapterError(
                f"{files.tensors_path}: {tensor_key(path, kind)} is {list(value.shape)}, this model wants "
                f"{list(parameter.shape)}: load the base that the adapter was trained on"
            )
        parameter.data.copy_(value)
    return layer
