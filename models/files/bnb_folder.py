"""A model folder in bitsandbytes' 4-bit form: which weights of a checkpoint are in it, and what a folder of ours says.

transformers writes such a folder with `save_pretrained`. Its config.json has a `quantization_config` (decoder/config.py
reads it), and each quantized weight is five or six tensors with JSON of its own (quant/bnb_files.py). Where the two
disagree the JSON is right: config.json says how the model was asked to be quantized, not how each tensor was. So a
layer that its maker left dense is loaded dense, and block sizes, of which config.json knows nothing, may differ.

The list of skipped modules, `llm_int8_skip_modules`, is honoured by that: a skipped layer is dense in the file.
A weight in 4 bits that the list names is refused, since transformers would make a dense layer for it.

Only projections inside the layers may be in 4 bits here. Embedding, norms and head stay dense, as transformers leaves
them unless it is told otherwise.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...quant import QuantizationError, QuantizedLinear, QuantizedTensor
from ...quant.bnb_files import BnbState, from_bnb, owner, read_state, state_key, to_bnb
from ..errors import ConfigError, WeightsError
from .weights import Checkpoint


@dataclass(frozen=True)
class PackedWeight:
    """A weight that a checkpoint holds in 4 bits: the names of its tensors, its own first, and what its JSON says."""

    parts: tuple[str, ...]
    state: BnbState


def packed_weights(checkpoint: Checkpoint) -> dict[str, PackedWeight]:
    """Every weight of the checkpoint that is in 4 bits, by its name. Reads their JSON and nothing else.

    Raises WeightsError: a weight lacks its codes or its JSON, or has JSON that is damaged.
    """
    parts: dict[str, list[str]] = {}
    for name in checkpoint.names():
        if (weight := owner(name)) is not None:
            parts.setdefault(weight, [weight]).append(name)
    found = {}
    for weight, names in parts.items():
        where = checkpoint.file(names[1])
        if weight not in checkpoint:
            raise WeightsError(f"{where}: holds {names[1]} but no {weight}: download or save it again")
        try:
            key = state_key(names, weight)
            found[weight] = PackedWeight(tuple(names), read_state(checkpoint.read(key), key))
        except QuantizationError as fault:
            raise WeightsError(f"{where}: {fault}") from None
    return found


def read_packed(checkpoint: Checkpoint, name: str, packed: PackedWeight, *, check_finite: bool) -> QuantizedTensor:
    """One weight in 4 bits, in memory of its own; nothing is computed.

    check_finite: refuse scales that are NaN or infinite.
    Raises WeightsError: a tensor of it is missing or damaged, or does not fit the others.
    """
    where = checkpoint.file(name)
    try:
        q = from_bnb({part: checkpoint.read(part) for part in packed.parts}, name)
    except QuantizationError as fault:
        raise WeightsError(f"{where}: {fault}") from None
    scales = q.absmax if q.nested_absmax is None else q.nested_absmax
    if check_finite and not torch.isfinite(scales).all():
        bad = int((~torch.isfinite(scales)).sum())
        raise WeightsError(
            f"{where}: {name} has {bad} NaN or infinite scales of {scales.numel()}: the checkpoint is damaged"
        )
    return q


def check_skipped(packed: Mapping[str, PackedWeight], raw: Mapping[str, Any], *, source: str) -> None:
    """Hold the list of skipped modules against the weights: names of modules, or of what they are in, or their ends.

    raw: config.json, which has a `quantization_config`.  source: its name, for messages.
    Raises ConfigError: it is not a list of names, or it names a weight that is in 4 bits.
    """
    key = "quantization_config.llm_int8_skip_modules"
    skipped = raw["quantization_config"].get("llm_int8_skip_modules")
    if skipped is None:
        return
    if not isinstance(skipped, list) or not all(isinstance(name, str) and name for name in skipped):
        raise ConfigError(f"{source}: {key}={skipped!r:.60}, wanted a list of module names, or null")
    for name in skipped:
        for weight in packed:
            module = weight.removesuffix(".weight")
            if module.startswith(f"{name}.") or module.endswith(name):  # as transformers decides
                raise ConfigError(
                    f"{source}: {key} names {name!r:.60}, but {weight} is stored in 4 bits: config.json and "
                    "weights are of two models, or the list was edited; correct it"
                )


def check_packed_names(packed: Mapping[str, PackedWeight], checkpoint: Checkpoint, *, dense: set[str]) -> None:
    """Raises WeightsError: no tensor is in 4 bits, or one is that has to be dense here."""
    if not packed:
        raise WeightsError(
            f"{checkpoint.folder}: config.json says 4-bit bitsandbytes, but no tensor is stored so: "
            "remove quantization_config from it, or give the folder it was saved with"
        )
    others = sorted(packed.keys() & dense)
    if others:
        raise WeightsError(
            f"{checkpoint.file(others[0])}: {others[0]} is stored in 4 bits, wanted only projections inside the layers "
            f"({len(others)} such): quantize the model again and skip it"
        )


def quantization_config(
    layers: Mapping[str, QuantizedLinear], *, dense: Collection[str], dtype: torch.dtype
) -> dict[str, Any]:
    """The `quantization_config` with which transformers makes a place for exactly `layers`.

    layers: by path, at least one.  dense: paths of linear layers that are not in 4 bits, the head aside.
    dtype: of dense weights, and what transformers computes in.
    """
    first = next(iter(layers.values())).quantized
    return {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": first.kind,
        "bnb_4bit_use_double_quant": first.double_quant,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        # None means the head; a list replaces that, so it must name the head too.
        "llm_int8_skip_modules": ["lm_head", *dense] if dense else None,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }


def packed_tensors(layers: Mapping[str, QuantizedLinear]) -> dict[str, torch.Tensor]:
    """The tensors of the weights of `layers`, by the names that transformers gives them."""
    tensors: dict[str, torch.Tensor] = {}
    for path, layer in layers.items():
        tensors |= to_bnb(layer.quantized, f"{path}.weight")
    return tensors
