"""Both ways against peft: our folders in its loader, its folders in ours, its training beside ours."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from qlorag.lora import LoRAConfig, LoRALinear, adapter_state, attach, load_adapter, merge, save_adapter
from safetensors.torch import load_file

pytestmark = pytest.mark.oracle

# Both sides compute float32 products of the same numbers; ours scales h and adds in place where peft
# scales the product, so sums differ in their last bits. The logits are of size 1.
TOLERANCE = {"rtol": 1e-5, "atol": 2e-6}

CASES = [
    (LoRAConfig(), {"target_modules": "all-linear"}),
    (
        LoRAConfig(r=4, alpha=8, targets=["q_proj", "v_proj"]),
        {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    ),
    (LoRAConfig(r=4, rslora=True), {"r": 4, "use_rslora": True, "target_modules": "all-linear"}),
    (
        LoRAConfig(targets=r".*\.(q|k)_proj", exclude=["layers.0.self_attn.k_proj"]),
        {"target_modules": r".*\.(q|k)_proj", "exclude_modules": ["layers.0.self_attn.k_proj"]},
    ),
    (
        LoRAConfig(rank_pattern={"down_proj": 2, r"layers\.1\.self_attn\.q_proj": 5}, alpha_pattern={"o_proj": 32.0}),
        {
            "target_modules": "all-linear",
            "rank_pattern": {"down_proj": 2, r"layers\.1\.self_attn\.q_proj": 5},
            "alpha_pattern": {"o_proj": 32},
        },
    ),
    (
        LoRAConfig(targets=["q_proj", "up_proj"], num_layers=1),
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    ),
]


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def train(model, ids, steps=3):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()


@pytest.mark.parametrize(("ours", "_theirs"), CASES)
def test_peft_loads_what_we_save(make_llama, ids, tmp_path, ours, _theirs):
    model = make_llama()
    chosen = attach(model, ours, seed=3)
    train(model, ids)
    save_adapter(model, tmp_path, base_fingerprint="abc", quantize={"kind": "nf4"})
    peft = PeftModel.from_pretrained(make_llama(), tmp_path)
    wrapped = {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.default")
        for name, _ in peft.named_modules()
        if name.endswith(".lora_A.default")
    }
    assert wrapped == set(chosen)
    assert not torch.allclose(logits(model, ids), logits(make_llama(), ids), atol=1e-3)  # the adapter does something
    torch.testing.assert_close(logits(model, ids), logits(peft, ids), **TOLERANCE)
    merged = peft.merge_and_unload()
    merge(model)
    torch.testing.assert_close(logits(model, ids), logits(merged, ids), **TOLERANCE)


@pytest.mark.parametrize(("_ours", "theirs"), CASES)
@pytest.mark.parametrize("adapter_name", ["default", "other"])
def test_we_load_what_peft_saves(make_llama, ids, tmp_path, _ours, theirs, adapter_name):
    arguments = {"r": 8, "lora_alpha": 16, "task_type": "CAUSAL_LM"} | theirs
    peft = get_peft_model(make_llama(), LoraConfig(**arguments), adapter_name=adapter_name)
    train(peft, ids)
    peft.eval()
    peft.save_pretrained(tmp_path)
    folder = tmp_path if adapter_name == "default" else tmp_path / adapter_name
    model = make_llama()
    info = load_adapter(model, folder)
    assert not info.base_verified and info.base_fingerprint is None
    assert not torch.allclose(logits(model, ids), logits(make_llama(), ids), atol=1e-3)
    torch.testing.assert_close(logits(model, ids), logits(peft, ids), **TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_we_load_an_adapted_head_with_the_base_weight_that_peft_adds(make_llama, ids, tmp_path, dtype):
    base = make_llama()
    base.lm_head.weight = torch.nn.Parameter(base.lm_head.weight.detach().clone())
    peft = get_peft_model(base, LoraConfig(r=2, target_modules=["lm_head", "q_proj"], task_type="CAUSAL_LM"))
    train(peft, ids)
    peft.eval().save_pretrained(tmp_path)
    assert "base_model.model.lm_head.base_layer.weight" in load_file(tmp_path / "adapter_model.safetensors")
    model = make_llama()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.to(dtype)  # the file's weight is float32
    assert "lm_head" in load_adapter(model, tmp_path).layers
    if dtype == torch.float32:
        torch.testing.assert_close(logits(model, ids), logits(peft, ids), **TOLERANCE)


@pytest.mark.parametrize(("ours", "theirs"), CASES)
def test_files_are_the_same(make_llama, tmp_path, ours, theirs):
    """Key for key: the config's fields and the tensors' names, shapes and dtypes."""
    arguments = {"r": 8, "lora_alpha": 16, "task_type": "CAUSAL_LM"} | theirs
    get_peft_model(make_llama(dtype=torch.bfloat16), LoraConfig(**arguments)).save_pretrained(tmp_path / "peft")
    model = make_llama(dtype=torch.bfloat16)
    attach(model, ours)
    save_adapter(model, tmp_path / "ours")
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("peft", "ours")]
    assert configs[0].keys() == configs[1].keys()
    # How modules and exceptions are spelled may differ; what they select is compared by the tests above.
    spelled = {
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "rank_pattern",
        "alpha_pattern",
        "base_model_name_or_path",
        "peft_version",
    }
    differing = {key for key in configs[0] if configs[0][key] != configs[1][key]}
    assert differing <= spelled
    theirs, ours = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("peft", "ours"))
    assert {k: (v.shape, v.dtype) for k, v in theirs.items()} == {k: (v.shape, v.dtype) for k, v in ours.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_follows_peft(make_llama, ids, tmp_path, dtype):
    """Same start, same optimizer, ten steps: the adapters stay together."""
    ours = make_llama(dtype=dtype)
    attach(ours, LoRAConfig(r=4, alpha=8), seed=1)
    save_adapter(ours, tmp_path)
    peft = PeftModel.from_pretrained(make_llama(dtype=dtype), tmp_path, is_trainable=True).eval()
    assert all(p.dtype == torch.float32 for name, p in peft.named_parameters() if "lora_" in name)
    for model in (ours, peft):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        for _ in range(10):
            optimizer.zero_grad()
            model(ids, labels=ids).loss.backward()
            optimizer.step()
    theirs = {name.replace(".default", ""): p.detach() for name, p in peft.named_parameters() if p.requires_grad}
    mine = adapter_state(ours)
    assert theirs.keys() == mine.keys()
    moved = sum(float(v.norm() ** 2) for k, v in mine.items() if "lora_B" in k) ** 0.5
    apart = sum(float((mine[k] - theirs[k]).norm() ** 2) for k in mine) ** 0.5
    assert moved > 0.05
    # float32: last bits. bf16: the base rounds to 8 bits (4e-3) both ways, which magnifies any difference.
    assert apart < (1e-5 if dtype == torch.float32 else 3e-2) * moved


def test_initial_distribution_is_pefts(make_llama):
    model = make_llama()
    attach(model, LoRAConfig(r=8))
    peft = get_peft_model(make_llama(), LoraConfig(r=8, target_modules="all-linear"))
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            theirs = peft.get_submodule(f"base_model.model.{name}").lora_A["default"].weight.detach()
            assert theirs.shape == module.lora_A.shape
            # uniform in ±1/sqrt(K): 256 or more draws reach within 5 % of the bound (chance to miss 2e-6)
            largest = module.lora_A.detach().abs().max()
            torch.testing.assert_close(largest, theirs.abs().max(), rtol=0.05, atol=0)


def test_many_layers(make_llama, ids, tmp_path):
    """PEFT shortens lists of 20 and more names; a block range must survive that."""
    model = make_llama(layers=4)
    chosen = attach(model, LoRAConfig(num_layers=3))
    assert len(chosen) == 21
    train(model, ids, 1)
    save_adapter(model, tmp_path)
    peft = PeftModel.from_pretrained(make_llama(layers=4), tmp_path)
    torch.testing.assert_close(logits(model, ids), logits(peft, ids), **TOLERANCE)
    peft.save_pretrained(tmp_path / "again")
    again = make_llama(layers=4)
    load_adapter(again, tmp_path / "again")
    assert torch.equal(logits(again, ids), logits(model, ids))
