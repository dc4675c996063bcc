"""A decoder written as an ordinary Hugging Face folder: what `load_model`, transformers and converters all read.

Nobody ever finds half a model (folders.py). Weights go into one safetensors file; sharding is left out, since the
format has no size limit.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from .config import read_config
from .decoder import Decoder
from .errors import WeightsError
from .folders import new_folder

# Beside weights and config.json, what makes a folder usable: copied as it is where it exists.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
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
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise WeightsError(f"{target}: already there and not empty: choose another folder or remove it")
    target.parent.mkdir(parents=True, exist_ok=True)
    tensors = _tensors(model, dtype)
    with new_folder(target) as building:
        try:
            save_file(tensors, building / "model.safetensors", metadata={"format": "pt"})
        except SafetensorError as fault:  # its own type, also for a full disk
            raise WeightsError(f"{target}: the weights cannot be written ({fault})") from None
        config = {**read_config(source), "dtype": str(dtype).removeprefix("torch.")}
        config.pop("torch_dtype", None)  # the old name of the same field
        config["tie_word_embeddings"] = model.lm_head.weight is model.model.embed_tokens.weight
        (building / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for name in COMPANIONS:
            if (Path(source) / name).is_file():
                shutil.copyfile(Path(source) / name, building / name)
        if target.exists():
            target.rmdir()  # it is empty, and a rename wants the place free
    return target


def _tensors(model: Decoder, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Parameters by name; a tied head is left out, since the format wants no tensor twice."""
    with torch.device("meta"):
        expected = {name for name, _ in Decoder(model.config).named_parameters()}
    got = dict(model.named_parameters())
    wrong = sorted(expected.symmetric_difference(got) - {"lm_head.weight"})
    if wrong:
        raise WeightsError(
            f"{wrong[0]}: not the dense weight of a plain decoder ({len(wrong)} such): merge and dequantize first"
        )
    return {name: p.detach().to(dtype).contiguous() for name, p in got.items()}
