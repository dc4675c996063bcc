"""Choosing layers, attaching, detaching, counting."""

from __future__ import annotations

import pytest
import torch
from qlorag.lora import (
    AdapterError,
    LoRAConfig,
    LoRALinear,
    adapter_state,
    attach,
    count_parameters,
    describe_parameters,
    detach,
    trainable_parameters,
)
from torch import nn

PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def paths(names, blocks=(0, 1)):
    return [f"model.layers.{i}.{name}" for i in blocks for name in names]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LoRAConfig(), paths(PROJECTIONS + MLP)),
        (LoRAConfig(num_layers=1), paths(PROJECTIONS + MLP, (1,))),
        (LoRAConfig(num_layers=2), paths(PROJECTIONS + MLP)),
        (LoRAConfig(targets=["q_proj", "v_proj"]), paths((PROJECTIONS[0], PROJECTIONS[2]))),
        (LoRAConfig(targets=("self_attn.q_proj",), num_layers=1), paths(PROJECTIONS[:1], (1,))),
        (LoRAConfig(targets=["model.layers.1.mlp.up_proj"]), ["model.layers.1.mlp.up_proj"]),
        (LoRAConfig(targets=r".*layers\.0\.mlp\.(up|down)_proj"), paths(MLP[1:], (0,))),
        (LoRAConfig(exclude=["mlp.down_proj", "o_proj"]), paths(PROJECTIONS[:3] + MLP[:2])),
        (LoRAConfig(exclude=r".*self_attn.*"), paths(MLP)),
        (LoRAConfig(targets=["lm_head"]), ["lm_head"]),  # the head only when it is asked for by name
    ],
)
def test_selection(llama, config, expected):
    assert attach(llama, config) == expected
    adapted = [path for path, module in llama.named_modules() if isinstance(module, LoRALinear)]
    assert adapted == expected


def test_everything_else_is_frozen(llama, ids):
    before = {name: p.clone() for name, p in llama.named_parameters()}
    modules = dict(llama.named_modules())
    chosen = attach(llama, LoRAConfig(r=4))
    names = [name for name, _ in trainable_parameters(llama)]
    assert names == [f"{path}.lora_{x}" for path in chosen for x in "AB"]
    optimizer = torch.optim.SGD([p for _, p in trainable_parameters(llama)], lr=1.0)
    for _ in range(2):
        llama(ids, labels=ids).loss.backward()
        optimizer.step()
    assert sorted(detach(llama)) == sorted(chosen)
    assert dict(llama.named_modules()).keys() == modules.keys()
    assert all(dict(llama.named_modules())[path] is module for path, module in modules.items())
    for name, p in llama.named_parameters():
        assert torch.equal(p, before[name]) and p.grad is None and not p.requires_grad, name


def test_seed_decides_and_leaves_the_global_generator_alone(make_llama):
    def state(seed):
        model = make_llama()
        torch.manual_seed(5)
        attach(model, LoRAConfig(), seed=seed)
        return adapter_state(model), torch.rand(1)

    (first, draw), (same, draw_again), (other, _) = state(1), state(1), state(2)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert all(torch.equal(first[k], same[k]) for k in first)
    assert not torch.equal(first[key], other[key])
    assert torch.equal(draw, draw_again) and torch.equal(draw, torch.manual_seed(5) and torch.rand(1))


def test_patterns(llama):
    config = LoRAConfig(
        r=8,
        alpha=16,
        rank_pattern={"down_proj": 2, r"layers\.1\.self_attn\.q_proj": 4, ".*q_proj": 6},
        alpha_pattern={"o_proj": 32},
    )
    attach(llama, config)

    def at(path):
        layer = llama.get_submodule(f"model.layers.{path}")
        return layer.r, layer.scaling

    assert at("0.mlp.down_proj") == (2, 8.0)
    assert at("1.self_attn.q_proj") == (4, 4.0)  # the first pattern that matches wins
    assert at("0.self_attn.q_proj") == (6, 16 / 6)
    assert at("0.self_attn.o_proj") == (8, 4.0)
    assert at("0.mlp.up_proj") == (8, 2.0)


def test_compute_and_parameter_dtype(make_llama):
    model = make_llama(dtype=torch.bfloat16)
    attach(model, LoRAConfig(), compute_dtype=torch.bfloat16)
    layer = model.model.layers[0].mlp.up_proj
    assert layer.lora_A.dtype == torch.float32 and layer.compute_dtype == torch.bfloat16
    detach(model)
    attach(model, LoRAConfig(), dtype=torch.bfloat16)
    assert model.model.layers[0].mlp.up_proj.lora_B.dtype == torch.bfloat16


def test_training_mode_follows_the_layer(llama):
    attach(llama, LoRAConfig(dropout=0.5))
    assert not llama.model.layers[0].mlp.up_proj.training


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (
            LoRAConfig(targets=["q_prj"]),
            ["'q_prj'", "q_proj (2)", "down_proj (2)", "model.layers.0.self_attn.q_proj"],
        ),
        (LoRAConfig(targets=["q_proj", "nope"]), ["'nope'", "q_proj (2)"]),
        (LoRAConfig(targets="q_proj"), ["'q_proj'", "['q_proj']", "regular expression for the whole path"]),
        (LoRAConfig(targets=["embed_tokens"]), ["'embed_tokens'", "no linear layer"]),
        (LoRAConfig(targets=["q_proj"], exclude=["self_attn.q_proj"]), ["exclude=['self_attn.q_proj']"]),
        (LoRAConfig(targets=["model.layers.0.mlp.up_proj"], num_layers=1), ["in the last 1 blocks"]),
        (LoRAConfig(num_layers=3), ["num_layers=3", "2 blocks"]),
    ],
)
def test_no_match_lists_what_exists(llama, config, named):
    before = dict(llama.named_modules())
    with pytest.raises(AdapterError) as error:
        attach(llama, config)
    for text in named:
        assert text in str(error.value)
    assert "\n" not in str(error.value)
    assert dict(llama.named_modules()) == before
    assert all(p.requires_grad for p in llama.parameters())


def test_num_layers_without_blocks():
    with pytest.raises(AdapterError, match=r"layers\.<i>"):
        attach(nn.Sequential(nn.Linear(2, 2)), LoRAConfig(num_layers=1))


def test_no_linear_layer():
    with pytest.raises(AdapterError, match="no linear layer"):
        attach(nn.Sequential(nn.ReLU()), LoRAConfig())


def test_double_attach_and_empty_detach(llama):
    with pytest.raises(AdapterError, match="no LoRA layer"):
        detach(llama)
    attach(llama, LoRAConfig(targets=["q_proj"]))
    with pytest.raises(AdapterError, match="already carries LoRA on 2 layers"):
        attach(llama, LoRAConfig(targets=["v_proj"]))


def test_a_shared_layer_is_refused():
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "c": nn.Linear(2, 2)})
    model["b"] = model["a"]
    with pytest.raises(AdapterError, match="a, b are one and the same layer"):
        attach(model, LoRAConfig())
    assert attach(model, LoRAConfig(targets=["c"])) == ["c"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"r": 0}, "r=0"),
        ({"alpha": float("inf")}, "alpha=inf"),
        ({"dropout": 1}, "dropout=1"),
        ({"targets": ()}, "targets is empty"),
        ({"num_layers": 0}, "num_layers=0"),
        ({"targets": "("}, r"targets='\('"),
        ({"exclude": "["}, r"exclude='\['"),
        ({"rank_pattern": {"q": -1}}, r"rank_pattern\['q'\]=-1"),
        ({"rank_pattern": {"(": 1}}, "rank_pattern='"),
        ({"alpha_pattern": {"q": "8"}}, r"alpha_pattern\['q'\]='8'"),
    ],
)
def test_bad_config(arguments, named):
    with pytest.raises(AdapterError, match=named):
        LoRAConfig(**arguments)


def test_counting(make_llama, quantized_class):
    model = make_llama()
    total = sum(p.numel() for p in model.parameters())
    assert count_parameters(model) == (total, total)
    attach(model, LoRAConfig(r=2, targets=["q_proj"]))
    adapter = 2 * (32 + 32) * 2
    assert count_parameters(model) == (adapter, total + adapter)
    detach(model)
    for block in model.model.layers:
        block.mlp.up_proj = quantized_class(block.mlp.up_proj)
    attach(model, LoRAConfig(r=2, targets=["q_proj", "up_proj"]))
    adapter += 2 * (32 + 48) * 2
    assert count_parameters(model) == (adapter, total + adapter)  # weights, not the bytes they are packed in
    text = describe_parameters(model)
    assert text.startswith("trainable 0.000576 M of 0.0") and f"({100 * adapter / (total + adapter):.3g} %)" in text
