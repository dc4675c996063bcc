"""config.json of a decoder: each key is read, or changes nothing, or is refused; and RoPE in its two spellings."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from qlorag.models import ConfigError, decoder_config, load_model, save_model
from qlorag.models.decoder.config_keys import IRRELEVANT, ONLY, READ

SIZES: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}

NEW = {**YARN, "rope_theta": 1e6}


def raw(**changes: Any) -> dict[str, Any]:
    return {"model_type": "llama", **SIZES, **changes}


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["LlamaConfig", "MistralConfig", "MinistralConfig", "Qwen2Config", "Qwen3Config"])
def test_every_key_of_a_familys_class_is_accounted_for(name: str) -> None:
    import transformers

    keys = set(getattr(transformers, name)().to_dict())
    assert keys - READ - IRRELEVANT - ONLY.keys() - {"attention_dropout"} == set()


def test_no_key_is_in_two_lists() -> None:
    assert READ & IRRELEVANT == READ & ONLY.keys() == IRRELEVANT & ONLY.keys() == set()


@pytest.mark.parametrize("key", sorted(READ - {"partial_rotary_factor", "original_max_position_embeddings"}))
def test_a_key_that_is_read_is_checked_or_changes_the_configuration(key: str) -> None:
    """A value of the wrong type under each key: a key that is only listed, and not read, would pass."""
    base = raw(use_sliding_window=True, sliding_window=8)
    for family in ("llama", "mistral", "qwen3"):
        try:
            decoder_config({**base, "model_type": family, key: {"no": "such"}})
        except ConfigError as error:
            assert key in str(error) or (key.startswith("quantization") and "quantized" in str(error))
            return
    pytest.fail(f"{key} is not read")


@pytest.mark.parametrize("key", sorted(ONLY))
def test_a_key_that_would_change_the_numbers_is_refused(key: str) -> None:
    only = ONLY[key][0]
    decoder_config(raw(**{key: only}))
    decoder_config(raw(**{key: None}))
    with pytest.raises(ConfigError, match=rf"{key}=2\.5 is not implemented"):
        decoder_config(raw(**{key: 2.5}))


def test_a_key_that_nothing_knows_is_named_in_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"config\.json: not read: router_gain, zebra: if the model needs it"):
        decoder_config(raw(zebra=1, router_gain=0.5, nothing=None, off=False))
    with pytest.warns(UserWarning, match=r"attention_dropout=0\.1 is not applied in training"):
        decoder_config(raw(attention_dropout=0.1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoder_config(raw(architectures=["LlamaForCausalLM"], attention_dropout=0.0, use_cache=True))


@pytest.mark.oracle
@pytest.mark.parametrize("kinds", [["full_attention"] * 2, ["sliding_attention", "full_attention"]])
def test_mistral_with_layer_types_is_what_transformers_makes_of_it(kinds: list[str], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4)).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "layer_types": kinds}))
    assert decoder_config(json.loads(path.read_text())).windows == tuple(
        4 if "sliding" in kind else None for kind in kinds
    )
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        # In float64, but for transformers' angles, which are float32; a wrong window moves the logits by 0.3.
        assert torch.allclose(load_model(tmp_path, dtype=torch.float64)(ids), theirs(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_scaling": YARN},
            "factor is None and 4.0",
        ),
        (
            {"rope_parameters": {**YARN, "rope_theta": 1e6}, "rope_scaling": {**YARN, "factor": 2.0}},
            "factor is 4.0 and 2.0",
        ),
        ({"rope_parameters": {**YARN, "rope_theta": 1e6}, "rope_theta": 1e4, "rope_scaling": YARN}, "rope_theta is"),
    ],
)
def test_two_spellings_of_rope_that_differ_are_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=f"rope_parameters and rope_scaling contradict each other .*{named}"):
        decoder_config(raw(**changes))


def test_two_spellings_of_rope_that_agree_are_one() -> None:
    once = decoder_config(raw(rope_parameters=NEW)).rope
    old = {"factor": 4.0, "type": "yarn", "original_max_position_embeddings": 32}
    assert (
        decoder_config(raw(rope_parameters={**YARN, "rope_theta": 1e6}, rope_theta=1e6, rope_scaling=old)).rope == once
    )
    assert decoder_config(raw(rope_theta=1e6, rope_scaling=old)).rope == once
    with pytest.warns(UserWarning, match="rope_theta=50000 is not read"):
        decoder_config(raw(rope_parameters={"rope_type": "default", "rope_theta": 1e4}, rope_theta=5e4))


@pytest.mark.oracle
@pytest.mark.parametrize("scaling", [None, {**YARN, "original_max_position_embeddings": 32}])
@pytest.mark.parametrize("spelling", ["new", "old"])
def test_a_written_folder_spells_rope_twice_and_transformers_reads_the_same(
    scaling: dict[str, Any] | None, spelling: str, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    rope = {"rope_theta": 5e5, **(scaling or {"rope_type": "default"})}
    LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=rope)).save_pretrained(tmp_path / "a")
    path = tmp_path / "a" / "config.json"
    if spelling == "old":
        config = json.loads(path.read_text())
        del config["rope_parameters"]
        path.write_text(json.dumps({**config, "rope_theta": 5e5, "rope_scaling": scaling}))
    ours = load_model(tmp_path / "a", dtype=torch.float32)
    save_model(ours, tmp_path / "b", source=tmp_path / "a", dtype=torch.float32)
    written = json.loads((tmp_path / "b" / "config.json").read_text())
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 5e5
    assert written["rope_scaling"] == scaling
    ids = torch.arange(3, 90)[None]
    expected = ours(ids)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "b", dtype=torch.float32)(ids), expected)
        assert torch.allclose(theirs(ids).logits, expected, rtol=0, atol=1e-5)


def test_an_unknown_number_of_rope_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"rope_scaling\.mrope_section is not implemented for rope type default"):
        decoder_config(raw(rope_theta=1e4, rope_scaling={"rope_type": "default", "mrope_section": [16, 24, 24]}))
