"""Folding an adapter into its base."""

from __future__ import annotations

import pytest
import torch
from qlorag.lora import AdapterError, LoRAConfig, LoRALinear, attach, merge, to_dense
from torch import nn

pytestmark = pytest.mark.isa

CONFIG = LoRAConfig(r=4, alpha=8)


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def test_by_hand():
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].weight.data.copy_(torch.eye(2))
    base = model[0]
    attach(model, LoRAConfig(r=1, alpha=2))
    model[0].lora_A.data.copy_(torch.tensor([[1.0, 2.0]]))
    model[0].lora_B.data.copy_(torch.tensor([[3.0], [4.0]]))
    report = merge(model)
    assert type(model[0]) is nn.Linear and model[0] is not base
    assert model[0].weight.tolist() == [[7.0, 12.0], [8.0, 17.0]]
    assert base.weight.tolist() == [[1.0, 0.0], [0.0, 1.0]]  # not written to
    (layer,) = report.layers
    assert (layer.path, layer.max_abs_delta, layer.rounding) == ("0", 16.0, 0.0)
    assert layer.relative == pytest.approx((6**2 + 12**2 + 8**2 + 16**2) ** 0.5 / 2**0.5)
    assert "merged 1 layers: largest change 16 in 0" in str(report)


def test_merged_equals_unmerged(llama, ids, fill_b):
    chosen = attach(llama, CONFIG)
    fill_b(llama)
    expected = logits(llama, ids)
    report = merge(llama)
    assert [layer.path for layer in report.layers] == chosen
    assert not any(isinstance(module, LoRALinear) for module in llama.modules())
    assert not any(p.requires_grad for name, p in llama.named_parameters() if "proj" in name)
    # float32 sums of 32 to 48 terms in another order: a few 1e-7 of the logits' size of about 1
    torch.testing.assert_close(logits(llama, ids), expected, rtol=1e-5, atol=1e-5)


def test_bf16_is_rounded_once_and_the_loss_is_reported(make_llama, fill_b):
    model = make_llama(dtype=torch.bfloat16)
    attach(model, CONFIG)
    fill_b(model)
    layer = model.model.layers[0].mlp.up_proj
    exact = layer.base.weight.float() + layer.delta()
    delta = layer.delta()
    report = merge(model)
    merged = model.model.layers[0].mlp.up_proj.weight
    assert torch.equal(merged, exact.bfloat16())
    (row,) = [row for row in report.layers if row.path == "model.layers.0.mlp.up_proj"]
    assert row.rounding == pytest.approx(float((merged.float() - exact).norm() / delta.norm()), rel=1e-6)
    assert 0 < row.rounding < 0.05


def test_an_update_below_the_ulp_is_reported_as_lost():
    model = nn.Sequential(nn.Linear(4, 4, bias=False).bfloat16())
    model[0].weight.data.fill_(1.0)
    attach(model, LoRAConfig(r=1, alpha=1))
    model[0].lora_A.data.fill_(1.0)
    model[0].lora_B.data.fill_(1e-3)  # half a bf16 ulp at 1.0 is 2e-3
    report = merge(model)
    assert report.layers[0].rounding == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantized_base_is_decoded(make_llama, quantized_class, ids, fill_b, dtype):
    model = make_llama()
    for block in model.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(block.mlp, name, quantized_class(getattr(block.mlp, name)))
    attach(model, LoRAConfig(r=4, alpha=8, targets=["up_proj", "down_proj"]))
    fill_b(model)
    expected = logits(model, ids)
    with pytest.raises(AdapterError, match=r"up_proj: its base is quantized, so merge needs dtype="):
        merge(model)
    assert isinstance(model.model.layers[0].mlp.up_proj, LoRALinear)
    layer = model.model.layers[0].mlp.up_proj
    exact = layer.base.dequantize(torch.float32) + layer.delta()
    merge(model, dtype=dtype)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, exact.to(dtype))
    assert isinstance(model.model.layers[0].mlp.gate_proj, quantized_class)  # no adapter: left alone
    if dtype == torch.float32:
        torch.testing.assert_close(logits(model, ids), expected, rtol=1e-5, atol=1e-5)


def test_to_dense_keeps_the_bias(quantized_class):
    quantized = quantized_class(nn.Linear(6, 3))
    dense = to_dense(quantized, torch.float32)
    x = torch.randn(2, 6)
    assert torch.equal(dense(x), quantized(x))


def test_the_result_is_an_ordinary_model(llama, ids, fill_b, tmp_path):
    """transformers saves and loads the merged model as it does any other."""
    attach(llama, CONFIG)
    fill_b(llama)
    merge(llama)
    llama.save_pretrained(tmp_path)
    again = type(llama).from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert torch.equal(logits(again, ids), logits(llama, ids))


def test_refusals_leave_the_model_as_it_was(llama, ids, fill_b):
    with pytest.raises(AdapterError, match="no LoRA layer"):
        merge(llama)
    attach(llama, CONFIG)
    fill_b(llama)
    last = llama.model.layers[1].mlp.down_proj
    last.lora_B.data[0, 0] = float("nan")
    with pytest.raises(AdapterError, match=r"model\.layers\.1\.mlp\.down_proj: lora_A or lora_B is not finite"):
        merge(llama)
    assert isinstance(llama.model.layers[0].self_attn.q_proj, LoRALinear)


def test_a_tied_weight_is_refused(llama):
    attach(llama, LoRAConfig(targets=["lm_head"]))
    with pytest.raises(AdapterError, match=r"lm_head: its weight is also model\.embed_tokens\.weight"):
        merge(llama)


def test_overflow_is_refused(fill_b):
    model = nn.Sequential(nn.Linear(4, 4).half())
    attach(model, LoRAConfig(r=1, alpha=1e8))
    fill_b(model)
    with pytest.raises(AdapterError, match=r"0: W \+ s B A is not finite in torch\.float16"):
        merge(model)
