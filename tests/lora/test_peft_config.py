"""adapter_config.json as free-form input: whatever stands in it, the answer is a config or an AdapterError."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qlorag.lora import AdapterError, LoRAConfig
from qlorag.lora.peft_config import NEUTRAL, read_config

GOOD = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
READ = "init_lora_weights lora_dropout use_rslora rank_pattern alpha_pattern exclude_modules layers_to_transform"
KEYS = st.sampled_from([*GOOD, *NEUTRAL, *READ.split(), "layers_pattern", "base_model_name_or_path", "something_new"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(KEYS, VALUES, max_size=4))
def test_any_values(changes):
    try:
        config, selection, _ = read_config(json.dumps(GOOD | changes))
    except AdapterError as error:
        assert "\n" not in str(error)
    else:
        assert isinstance(config, LoRAConfig)
        assert isinstance(selection.paths(["model.layers.0.q_proj"]), list)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=40))
def test_any_text(text):
    with pytest.raises(AdapterError):
        read_config(text)


@pytest.mark.parametrize("text", ["1" * 5000, '{"peft_type": "LORA", "r": ' + "1" * 5000 + "}", "{" * 10_000])
def test_beyond_the_parsers_limits(text):
    with pytest.raises(AdapterError):
        read_config(text)


@pytest.mark.parametrize("pattern", ["a{99999999999}", "(" * 2000 + ")" * 2000, "(?P<n>a)(?P<n>b)"])
def test_patterns_beyond_res_limits(pattern):
    for key, value in (("target_modules", pattern), ("rank_pattern", {pattern: 4})):
        try:
            read_config(json.dumps(GOOD | {key: value}))
        except AdapterError as error:
            assert "not a regular expression" in str(error)


@pytest.mark.parametrize(
    ("layers", "pattern", "expected"),
    [
        (None, None, ["model.layers.0.q_proj", "model.layers.1.q_proj", "enc.block.1.q_proj"]),
        (1, None, ["model.layers.1.q_proj", "enc.block.1.q_proj"]),
        ([0], None, ["model.layers.0.q_proj"]),
        ([0, 1], "block", ["enc.block.1.q_proj"]),
        ([1], ["layers", "block"], ["model.layers.1.q_proj", "enc.block.1.q_proj"]),
    ],
)
def test_layers_to_transform(layers, pattern, expected):
    paths = [
        "model.layers.0.q_proj",
        "model.layers.1.q_proj",
        "enc.block.1.q_proj",
        "q_proj_x",
        "model.layers.1.v_proj",
    ]
    text = json.dumps(GOOD | {"layers_to_transform": layers, "layers_pattern": pattern})
    _, selection, _ = read_config(text)
    assert selection.paths(paths) == expected
