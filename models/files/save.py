"""A decoder written as an ordinary Hugging Face folder: what `load_model`, transformers and converters all read.

Two forms of the same folder: dense, or with the projections in bitsandbytes' 4 bits (bnb_folder.py). Half a model
is never seen (folders.py). Weights go into one safetensors file; sharding is left out, since the format has no size
limit.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from ...quant import QuantizedLinear
from ..decoder.decoder import Decoder
from ..errors import WeightsError
from .bnb_folder import packed_tensors, quantization_config
from .config_json import read_config
from .folders import check_free, new_folder

# Beside weights and config.json, what makes a folder usable: copied as it is where it exists.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)


def save_model(
    model: Decoder,
    folder: str | os.PathLike[str],
    *,
    source: str | os.PathLike[str],
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """Writes the model's weights in `dtype` with the configuration and tokenizer of the folder it came from.

    folder: where; must not exist, or be empty.  source: the folder the model was loaded from.
    Raises WeightsError: the place is taken, or a layer of the model has no dense weight.
    """
    target = check_free(folder)
    return _write(target, model, _dense_tensors(model, dtype), source=source, dtype=dtype, quantization=None)


def save_quantized(
    model: Decoder,
    folder: str | os.PathLike[str],
    *,
    source: str | os.PathLike[str],
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """As `save_model`, for a model with projections in 4 bits: transformers loads the result with bitsandbytes.

    dtype: of embedding, norms, biases, head, and of projections that are dense. The 4-bit ones are written as they are.
    Raises WeightsError: the place is taken; no layer is in 4 bits, or one is that has to be dense.
    """
    target = check_free(folder)
    layers = {path: m for path, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    if not layers:
        raise WeightsError(f"{target}: no layer of the model is in 4 bits: load it with quantize, or use save_model")
    outside = [path for path in layers if not path.startswith("model.layers.")]
    if outside:
        raise WeightsError(f"{target}: {outside[0]} is in 4 bits, wanted only projections inside the layers: skip it")
    tensors = _dense_tensors(model, dtype, packed=layers) | packed_tensors(layers)
    dense = [path for path, m in model.model.named_modules(prefix="model") if isinstance(m, nn.Linear)]
    quantization = quantization_config(layers, dense=dense, dtype=dtype)
    return _write(target, model, tensors, source=source, dtype=dtype, quantization=quantization)


def _write(
    target: Path,
    model: Decoder,
    tensors: dict[str, torch.Tensor],
    *,
    source: str | os.PathLike[str],
    dtype: torch.dtype,
    quantization: dict[str, Any] | None,
) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(target) as building:
        try:
            save_file(tensors, building / "model.safetensors", metadata={"format": "pt"})
        except SafetensorError as fault:  # its own type, also for a full disk
            raise WeightsError(f"{target}: the weights cannot be written ({fault})") from None
        config = {**read_config(source), "dtype": str(dtype).removeprefix("torch.")}
        config.pop("torch_dtype", None)  # the old name of the same field
        config.pop("quantization_config", None)  # the source's
        config["tie_word_embeddings"] = model.lm_head.weight is model.model.embed_tokens.weight
        spell_rope_twice(config)
        if quantization is not None:
            config["quantization_config"] = quantization  # last, so that saving again gives the same bytes
        (building / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for name in COMPANIONS:
            for path in sorted(Path(source).glob(name)):
                (building / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(path, building / path.relative_to(source))
        if target.exists():
            target.rmdir()  # it is empty, and a rename wants the place free
    return target


def spell_rope_twice(config: dict[str, Any]) -> None:
    """Adds to a configuration the other of RoPE's two spellings, so that every program reads the same.

    transformers 5 writes `rope_parameters` alone, from which mlx-lm 0.32.2 reads no theta for llama, mistral and qwen2
    (it takes 10,000 without a word); older programs know only `rope_theta` and `rope_scaling`.
    """
    new = config.get("rope_parameters")
    if new:
        scaling = {key: value for key, value in new.items() if key != "rope_theta"}
        config["rope_theta"] = new.get("rope_theta", config.get("rope_theta", 10000.0))
    else:
        scaling = dict(config.get("rope_scaling") or {})
        config["rope_theta"] = scaling.pop("rope_theta", config.get("rope_theta", 10000.0))
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        config["rope_parameters"] = {**scaling, "rope_type": kind, "rope_theta": config["rope_theta"]}
    scaled = scaling.get("rope_type", scaling.get("type", "default")) != "default"
    config["rope_scaling"] = scaling if scaled else None


def _dense_tensors(model: Decoder, dtype: torch.dtype, *, packed: Collection[str] = ()) -> dict[str, torch.Tensor]:
    """Parameters by name; a tied head is left out, since the format wants no tensor twice.

    packed: paths of layers whose weight is no parameter.
    """
    with torch.device("meta"):
        expected = {name for name, _ in Decoder(model.config).named_parameters()}
    expected -= {f"{path}.weight" for path in packed}
    got = dict(model.named_parameters())
    wrong = sorted(expected.symmetric_difference(got) - {"lm_head.weight"})
    if wrong:
        raise WeightsError(
            f"{wrong[0]}: not the dense weight of a plain decoder ({len(wrong)} such): "
            + ("detach or merge the adapter first" if packed else "merge and dequantize first")
        )
    return {name: p.detach().to(dtype).contiguous() for name, p in got.items()}
