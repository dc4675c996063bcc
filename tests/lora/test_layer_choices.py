"""What the layer chooses by itself: dtypes, devices, first values, the stream of its dropout masks, its text."""

from __future__ import annotations

import math

import pytest
import torch
from qlorag.lora import LoRALinear
from qlorag.lora.layer import SHORT_INPUT, feature_counts, is_linear, is_quantized
from torch import nn


def one_number(base: float, B: float, dtype: torch.dtype, **options: object) -> LoRALinear:
    """y = (base + B) x for the first of two inputs, A = [1 0]."""
    linear = nn.Linear(2, 1, bias=False).to(dtype)
    linear.weight.data.copy_(torch.tensor([[base, 0.0]]))
    layer = LoRALinear(linear, r=1, alpha=1.0, **options)
    layer.lora_A.data.copy_(torch.tensor([[1.0, 0.0]]))
    layer.lora_B.data.fill_(B)
    return layer


def test_short_half_precision_inputs_are_computed_in_float32():
    """256 + 1.003 is past the middle of bf16's 256 and 258. With B rounded to bf16 it is the tie 257, which goes to
    256. So the sum tells in which dtype the branch ran: float32 below SHORT_INPUT rows, the input's from there on."""
    layer = one_number(256.0, 1.003, torch.bfloat16)
    for rows, wanted in ((1, 258.0), (SHORT_INPUT - 1, 258.0), (SHORT_INPUT, 256.0)):
        x = torch.tensor([[1.0, 0.0]], dtype=torch.bfloat16).expand(rows, 2)
        assert set(layer(x).flatten().tolist()) == {wanted}, rows
    layer.compute_dtype = torch.float32
    assert set(layer(x).flatten().tolist()) == {258.0}


def test_the_compute_dtype_is_the_branchs():
    """x Aᵀ with x = 1 + 2^-10, which is 1 in bf16."""
    x = torch.tensor([[1 + 2**-10, 0.0]])
    assert one_number(0.0, 1.0, torch.float32)(x).item() == 1 + 2**-10
    assert one_number(0.0, 1.0, torch.float32, compute_dtype=torch.bfloat16)(x).item() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_both_matrices_have_the_dtype_asked_for(dtype: torch.dtype):
    layer = LoRALinear(nn.Linear(4, 3), r=2, alpha=2.0, dtype=dtype)
    assert layer.lora_A.dtype == layer.lora_B.dtype == dtype
    assert layer.delta().dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


class Bare(nn.Module):
    """A linear layer by duck type, without parameters or buffers."""

    in_features, out_features = 4, 3


def test_both_matrices_live_where_the_base_does():
    on_meta = nn.Linear(4, 3, device="meta")
    buffered = Bare()
    buffered.register_buffer("codes", torch.empty(1, device="meta"))
    for base, device, wanted in (
        (nn.Linear(4, 3), None, "cpu"),
        (on_meta, None, "meta"),
        (buffered, None, "meta"),
        (on_meta, torch.device("cpu"), "cpu"),
        (Bare(), None, "cpu"),
    ):
        layer = LoRALinear(base, r=2, alpha=2.0, device=device)
        assert layer.lora_A.device.type == layer.lora_B.device.type == wanted


def test_a_layer_without_memory_has_outputs_without_memory():
    """As a model is planned on the device "meta", for which autocast has no settings."""
    layer = LoRALinear(nn.Linear(4, 3, device="meta"), r=2, alpha=2.0)
    y = layer(torch.empty(5, 4, device="meta"))
    assert (y.device.type, y.shape, y.dtype) == ("meta", (5, 3), torch.float32)


def test_first_values_are_uniform_around_zero():
    """In ±1/sqrt(K), variance 1/(3K). 2,000 draws: five standard deviations of mean and variance as bounds."""
    A = LoRALinear(nn.Linear(100, 3), r=20, alpha=2.0, generator=torch.Generator().manual_seed(0)).lora_A.detach()
    assert A.abs().max() <= 0.1
    assert abs(A.mean()) < 5 * math.sqrt(0.01 / 3 / 2000)
    assert abs(A.var() - 0.01 / 3) < 5 * math.sqrt(4 / 45 * 1e-4 / 2000)  # the variance of u² is 4/45 for u in ±1


def test_without_dropout_no_random_number_is_drawn():
    layer = LoRALinear(nn.Linear(4, 3), r=2, alpha=2.0, dropout=0.5)
    x = torch.ones(2, 4)
    for layer.dropout, training, drawn in ((0.5, True, True), (0.5, False, False), (0.0, True, False)):
        layer.train(training)
        before = torch.get_rng_state()
        layer(x)
        assert torch.equal(before, torch.get_rng_state()) != drawn


def shows_its_mask(size: int, p: float) -> LoRALinear:
    """Over a base of zeros A = B = I return the dropped input itself: 0 where it was dropped, else x / (1 - p)."""
    layer = LoRALinear(nn.Linear(size, size, bias=False), r=size, alpha=float(size), dropout=p)
    for weight, value in (
        (layer.base.weight, torch.zeros(size, size)),
        (layer.lora_A, torch.eye(size)),
        (layer.lora_B, torch.eye(size)),
    ):
        weight.data.copy_(value)
    return layer


def test_hundreds_of_masks_are_all_different():
    layer = shows_its_mask(64, 0.5)
    torch.manual_seed(0)
    masks = {tuple((layer(torch.ones(1, 64))[0] != 0).tolist()) for _ in range(300)}
    assert len(masks) == 300


@pytest.mark.parametrize("p", [2**-16, 0.1, 0.5, 0.9])
def test_masks_by_their_definition(p: float):
    """Numbers u in 0 ... 65535, four to a draw of 64 bits; dropped where u < round(65536 p). A run that is resumed
    under a later version draws them again, so they may not change."""
    rows, size = 6349, 63  # 399,987 elements, 6 of which are expected to lie on the border; the last draw serves 3
    layer = shows_its_mask(size, p)
    torch.manual_seed(7)
    y = layer(torch.ones(rows, size))
    torch.manual_seed(7)  # the layer draws one number from torch's generator, the mask's seed
    seed = int(torch.randint(2**63 - 1, ()))
    draws = torch.empty(rows * size // 4 + 1, dtype=torch.int64)
    draws.random_(-(2**63), None, generator=torch.Generator().manual_seed(seed))
    u = draws.numpy().view("<i2").astype(int)[: rows * size].reshape(rows, size) + 32768
    dropped = round(65536 * p)
    assert (u == dropped).any() and (u == dropped - 1).any()
    wanted = torch.tensor(u >= dropped) * (65536 / (65536 - dropped))
    assert torch.equal(y, wanted.float())


def test_a_rate_that_rounds_to_nothing_drops_nothing():
    assert torch.equal(shows_its_mask(64, 2**-18)(torch.ones(6000, 64)), torch.ones(6000, 64))


def test_which_layers_can_carry_an_adapter():
    linear, bare = nn.Linear(4, 3), Bare()
    assert is_linear(linear) and is_linear(bare) and feature_counts(bare) == (4, 3)
    assert not is_linear(nn.Embedding(4, 3)) and not is_linear(LoRALinear(linear, r=1, alpha=1.0))
    for half in ("in_features", "out_features"):
        other = Bare()
        setattr(other, half, None)
        assert not is_linear(other)


def test_which_layers_count_as_quantized():
    class Quantized(Bare):
        def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(3, 4, dtype=dtype)

    class Named(Bare):
        dequantize = "not a method"

    class NotLinear(nn.Module):
        dequantize = Quantized.dequantize

    assert is_quantized(Quantized())
    assert not any(is_quantized(m) for m in (Named(), Bare(), NotLinear(), nn.Linear(4, 3)))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "r=2, alpha=3"),
        ({"dropout": 0.25}, "r=2, alpha=3, dropout=0.25"),
        ({"rslora": True}, "r=2, alpha=3, rslora"),
        ({"dropout": 0.25, "rslora": True}, "r=2, alpha=3, dropout=0.25, rslora"),
    ],
)
def test_its_text_names_what_is_not_the_default(options: dict[str, object], text: str):
    assert LoRALinear(nn.Linear(4, 3), r=2, alpha=3.0, **options).extra_repr() == text


def test_a_layer_made_in_inference_mode_is_trained():
    with torch.inference_mode():
        layer = LoRALinear(nn.Linear(4, 3), r=2, alpha=4)
    x = torch.randn(5, 4, requires_grad=True)
    with torch.inference_mode(False):
        layer.base = nn.Linear(4, 3)
    layer(x).sum().backward()
    assert layer.lora_B.grad is not None and not layer.lora_A.is_inference()
