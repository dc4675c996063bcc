"""Checkpoints that transformers loads although their tensors are named otherwise: the same logits here."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from qlorag.models import ConfigError, WeightsError, load_model
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.oracle
Tensors = dict[str, torch.Tensor]
IDS = torch.arange(3, 20)[None]


def save(folder: Path, change: Callable[[Tensors], Tensors], *, tied: bool) -> torch.Tensor:
    """A random model's folder with its tensors changed. Returns the logits of transformers before that."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=tied)).eval()
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    save_file({name: t.contiguous() for name, t in change(load_file(file)).items()}, file, metadata={"format": "pt"})
    with torch.no_grad():
        logits: torch.Tensor = model(IDS).logits
    return logits


def logits_of(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = load_model(folder, dtype=torch.float32)(IDS)
    return logits


def test_names_of_the_base_class(tmp_path: Path) -> None:
    expected = save(tmp_path, lambda ts: {name.removeprefix("model."): t for name, t in ts.items()}, tied=True)
    assert torch.allclose(logits_of(tmp_path), expected, rtol=0, atol=1e-5)
    model = load_model(tmp_path)
    save(tmp_path / "usual", dict, tied=True)
    assert model.fingerprint == load_model(tmp_path / "usual").fingerprint  # an adapter fits both


def test_base_class_names_without_a_head_are_refused_where_one_is_needed(tmp_path: Path) -> None:
    bare = {"lm_head.weight"}
    save(tmp_path, lambda ts: {n.removeprefix("model."): t for n, t in ts.items() if n not in bare}, tied=False)
    with pytest.raises(WeightsError, match=r"missing lm_head\.weight"):
        load_model(tmp_path)


def test_a_tied_head_that_is_stored_alone(tmp_path: Path) -> None:
    moved = {"model.embed_tokens.weight": "lm_head.weight"}
    expected = save(tmp_path, lambda ts: {moved.get(name, name): t for name, t in ts.items()}, tied=True)
    assert torch.allclose(logits_of(tmp_path), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["mtp.layers.0.w", "model.mtp_layers.0.w", "model.layers.2.eh_proj.weight"])
def test_multi_token_prediction_is_left_out_and_named(name: str, tmp_path: Path) -> None:
    def with_mtp(tensors: Tensors) -> Tensors:
        extra = {name: torch.ones(3)}
        if name.startswith("model.layers"):
            extra["model.layers.2.mlp.up_proj.weight"] = torch.ones(3)
        return tensors | extra

    expected = save(tmp_path, with_mtp, tied=False)
    with pytest.warns(UserWarning, match=r"left out [12] tensors for multi-token prediction, such as"):
        got = logits_of(tmp_path)
    assert torch.allclose(got, expected, rtol=0, atol=1e-5)


def test_one_layer_more_without_its_marks_is_another_model(tmp_path: Path) -> None:
    save(tmp_path, lambda ts: ts | {"model.layers.2.mlp.up_proj.weight": torch.ones(3)}, tied=False)
    with pytest.raises(WeightsError, match=r"unexpected model\.layers\.2"):
        load_model(tmp_path)


def test_shards_that_hold_more_than_the_index_lists(tmp_path: Path) -> None:
    expected = save(tmp_path, dict, tied=False)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    save_file(tensors | {"leftover": torch.ones(2)}, tmp_path / "one.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "./one.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.warns(UserWarning, match=r"does not list leftover \(1 such\).*left out"):
        got = logits_of(tmp_path)
    assert torch.allclose(got, expected, rtol=0, atol=1e-5)


def test_an_mlx_folder_is_refused_by_name(tmp_path: Path) -> None:
    save(tmp_path, dict, tied=False)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization": {"group_size": 64, "bits": 4}}))
    with warnings.catch_warnings(), pytest.raises(ConfigError, match=r"quantized by MLX \(4 bits\)"):
        warnings.simplefilter("error")
        load_model(tmp_path)
