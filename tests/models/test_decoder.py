"""The decoder against transformers: tiny random models of every family and RoPE, and the real SmolLM2."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from qlorag.models import load_model
from qlorag.models.decoder import causal_attention
from qlorag.models.errors import ConfigError, WeightsError

pytestmark = pytest.mark.isa

TINY: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("Llama", {"head_dim": 10}),
    "llama-mha": ("Llama", {"num_key_value_heads": 6}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-window": ("Mistral", {"sliding_window": 7}),
    "qwen2": ("Qwen2", {"use_sliding_window": False}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3-bias": ("Qwen3", {"head_dim": 8, "attention_bias": True}),
}
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "yarn-mscale": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "mscale": 1.0,
        "mscale_all_dim": 0.8,
        "truncate": False,
    },
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 2.2, 2.5, 3.0],
        "original_max_position_embeddings": 32,
    },
}


def make(folder: Path, family: str, **changes: Any) -> Any:
    """Saves a random transformers model into folder and returns it, every parameter (norms and biases too) random."""
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{family}Config")(**{**TINY, **changes})
    torch.manual_seed(7)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    model.save_pretrained(folder)
    return model


def tokens(n: int, *, batch: int = 1) -> torch.Tensor:
    return torch.randint(0, TINY["vocab_size"], (batch, n), generator=torch.Generator().manual_seed(n))


@pytest.mark.oracle
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    family, changes = FAMILIES[name]
    theirs = make(tmp_path, family, **changes)
    ours = load_model(tmp_path, dtype=torch.float32)
    ids = tokens(23, batch=2)
    # Both compute in float32 in a different order of additions: some 1e-6 on logits of size 1.
    torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-5, rtol=0)


@pytest.mark.oracle
@pytest.mark.parametrize("length", [12, 50])
@pytest.mark.parametrize("name", ROPES)
@torch.no_grad()
def test_rope_scalings_equal_transformers(name: str, length: int, tmp_path: Path) -> None:
    theirs = make(tmp_path, "Llama", rope_parameters={"rope_theta": 10000.0, **ROPES[name]})
    ours = load_model(tmp_path, dtype=torch.float32)
    ids = tokens(length)
    torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-5, rtol=0)


@pytest.mark.oracle
@torch.no_grad()
def test_dynamic_rope_past_the_trained_length(tmp_path: Path) -> None:
    theirs = make(tmp_path, "Llama", rope_parameters={"rope_theta": 10000.0, **ROPES["dynamic"]})
    ids = tokens(90)  # trained for 64
    torch.testing.assert_close(load_model(tmp_path, dtype=torch.float32)(ids), theirs(ids).logits, atol=1e-5, rtol=0)


@pytest.mark.oracle
@torch.no_grad()
def test_old_spelling_of_rope_means_the_same(tmp_path: Path) -> None:
    theirs = make(tmp_path, "Llama", rope_parameters={"rope_theta": 5000.0, **ROPES["llama3"]})
    path = tmp_path / "config.json"
    raw = json.loads(path.read_text())
    new = raw.pop("rope_parameters")
    raw["rope_theta"] = new.pop("rope_theta")
    raw["rope_scaling"] = {"type": new.pop("rope_type"), **new}
    path.write_text(json.dumps(raw))
    ids = tokens(30)
    torch.testing.assert_close(load_model(tmp_path, dtype=torch.float32)(ids), theirs(ids).logits, atol=1e-5, rtol=0)


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["llama", "mistral-window", "qwen2-window", "qwen3"])
@torch.no_grad()
def test_cache_changes_nothing(name: str, tmp_path: Path) -> None:
    family, changes = FAMILIES[name]
    make(tmp_path, family, **changes)
    model = load_model(tmp_path, dtype=torch.float64)
    ids = tokens(19)
    whole = model(ids)
    for cuts in ([1] * 19, [5, 1, 1, 7, 5], [18, 1]):
        cache, parts = model.new_cache(capacity=2), []  # so small that it grows on the way
        for part in ids.split(cuts, dim=1):
            parts.append(model(part, cache=cache))
        # Sums of some 100 terms of size 1 in another order: 1e-14 at most. A wrong position or mask shows at 1e-2.
        torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-12, rtol=0)
        assert cache.length == 19


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["llama", "qwen2-window"])
@torch.no_grad()
def test_packed_sequences_do_not_see_each_other(name: str, tmp_path: Path) -> None:
    family, changes = FAMILIES[name]
    make(tmp_path, family, **changes)
    model = load_model(tmp_path, dtype=torch.float32)
    parts = [tokens(n) for n in (3, 1, 11, 6)]
    packed = model(torch.cat(parts, 1), lengths=[3, 1, 11, 6])
    torch.testing.assert_close(packed, torch.cat([model(p) for p in parts], 1), atol=2e-6, rtol=0)
    with pytest.raises(ValueError, match="add up to 20, ids hold 21"):
        model(torch.cat(parts, 1), lengths=[3, 11, 6])


def test_attention_by_hand() -> None:
    # Two keys; the second query sees both with equal scores, the first only its own.
    q = torch.zeros(1, 1, 2, 4)
    k = torch.randn(1, 1, 2, 4)
    v = torch.tensor([[[[1.0, 0, 0, 0], [3.0, 0, 0, 0]]]])
    assert causal_attention(q, k, v, window=None)[0, 0, :, 0].tolist() == [1.0, 2.0]
    assert causal_attention(q, k, v, window=1)[0, 0, :, 0].tolist() == [1.0, 3.0]


@pytest.mark.oracle
@torch.no_grad()
def test_a_tied_config_with_two_different_matrices_keeps_both(tmp_path: Path) -> None:
    make(tmp_path, "Llama", tie_word_embeddings=False)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))
    with pytest.warns(UserWarning, match="keeping both"):
        model = load_model(tmp_path, dtype=torch.float32)
    assert model.lm_head.weight is not model.model.embed_tokens.weight


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type='gpt2' is not supported, only llama, mistral, qwen2, qwen3"),
        ({"hidden_act": "relu"}, "hidden_act='relu' is not implemented"),
        (
            {"num_attention_heads": 12},
            "self_attn.k_proj.weight has shape [16, 48], config.json makes it [8, 48]",
        ),
        (
            {"num_key_value_heads": 3},
            "self_attn.k_proj.weight has shape [16, 48], config.json makes it [24, 48]",
        ),
        ({"num_key_value_heads": 4}, "num_attention_heads=6 is not a multiple of num_key_value_heads=4"),
        ({"vocab_size": 99}, "embed_tokens.weight has shape [101, 48], config.json makes it [99, 48]"),
        ({"num_hidden_layers": 4}, "missing model.layers.3."),
        ({"num_hidden_layers": 2}, "unexpected model.layers.2."),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "48"}, "hidden_size='48', wanted a whole number"),
        ({"rope_parameters": {"rope_type": "spiral"}}, "rope type 'spiral' is not implemented"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope type yarn without factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"attention_bias": True}, "missing model.layers.0.self_attn.k_proj.bias"),
        ({"quantization_config": {"quant_method": "gptq"}}, "already quantized (gptq)"),
    ],
    ids=lambda v: re.sub(r"\W+", "-", str(v))[:40],
)
def test_a_config_that_does_not_fit_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    make(tmp_path, "Llama")
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "head_dim": None, **change}))
    with pytest.raises((ConfigError, WeightsError)) as fault:
        load_model(tmp_path)
    assert message in str(fault.value)
    assert str(tmp_path) in str(fault.value)
    assert "\n" not in str(fault.value)


def test_config_that_is_missing_or_not_json(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"config\.json: not found"):
        load_model(tmp_path)
    for text in ('{"model_type": "lla', "[1]", ""):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ConfigError, match=r"config\.json"):
            load_model(tmp_path)


@pytest.mark.oracle
def test_check_finite_names_the_tensor(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    make(tmp_path, "Llama")
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"layers\.1\.mlp\.up_proj\.weight holds 1 NaN or infinite"):
        load_model(tmp_path, check_finite=True)


TEXT = " ".join(
    f"On day {i} the ship had sailed {i * 37} miles, and nobody aboard had seen a gull; the cook said so."
    for i in range(20)
)


@pytest.mark.model
@pytest.mark.oracle
@torch.no_grad()
def test_smollm2_logits(smollm2_dir: Path) -> None:
    from qlorag.models import load_tokenizer

    transformers = pytest.importorskip("transformers")
    ids = torch.tensor([load_tokenizer(smollm2_dir).encode(TEXT)[:256]])
    assert ids.shape == (1, 256)
    ours = load_model(smollm2_dir, dtype=torch.float32)
    logits = ours(ids)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32)
    torch.testing.assert_close(logits, theirs(ids).logits, atol=1e-4, rtol=0)


@pytest.mark.model
@torch.no_grad()
def test_smollm2_token_by_token(smollm2_dir: Path) -> None:
    """In float64, where only a wrong position or mask could show: float32 alone differs by 1e-4 on logits of 30."""
    from qlorag.models import load_tokenizer

    ids = torch.tensor([load_tokenizer(smollm2_dir).encode(TEXT)[:56]])
    model = load_model(smollm2_dir, dtype=torch.float64)
    cache = model.new_cache()
    stepwise = torch.cat([model(part, cache=cache) for part in ids.split([50] + [1] * 6, dim=1)], 1)
    torch.testing.assert_close(stepwise, model(ids), atol=1e-9, rtol=0)
