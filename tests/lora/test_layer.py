"""The layer and its hand-written gradient."""

from __future__ import annotations

import math

import pytest
import torch
from qlorag.kernels.lora import add_lora, ops
from qlorag.kernels.lora.dropout import draw_mask
from qlorag.lora import AdapterError, LoRALinear
from qlorag.lora.layer import SHORT_INPUT
from torch import nn

pytestmark = pytest.mark.isa

DTYPE = torch.float64


def update(y0, x, A, B, s, p=0.0, seed=0, dtype=DTYPE):
    """The layer's update, with its hand-written gradient."""
    return add_lora(y0, x, A, B, scaling=s, dropout=p, seed=seed, dtype=dtype)


def plain(y0, x, A, B, s, p=0.0, seed=0):
    """The same equation in ordinary torch operations, for autograd to differentiate."""
    mask, s = draw_mask(x, p, seed, s)
    x = x if mask is None else torch.where(mask, x, 0)
    return y0 + s * (x @ A.T) @ B.T


def inputs(*lead: int, k: int = 5, n: int = 7, r: int = 3, dtype=DTYPE):
    g = torch.Generator().manual_seed(0)
    shapes = ((*lead, n), (*lead, k), (r, k), (n, r))
    return [torch.randn(shape, generator=g, dtype=dtype).requires_grad_() for shape in shapes]


def test_by_hand():
    # W = I, A = [1 2], B = [3 4]ᵀ, alpha = 2, R = 1, so s = 2.  x = [1, 1]:  x Aᵀ = 3,  s 3 Bᵀ = [18, 24]
    base = nn.Linear(2, 2, bias=False)
    base.weight.data.copy_(torch.eye(2))
    layer = LoRALinear(base, r=1, alpha=2.0)
    layer.lora_A.data.copy_(torch.tensor([[1.0, 2.0]]))
    layer.lora_B.data.copy_(torch.tensor([[3.0], [4.0]]))
    x = torch.tensor([[1.0, 1.0]], requires_grad=True)
    y = layer(x)
    assert y.tolist() == [[19.0, 25.0]]
    y.sum().backward()
    # dy = [1 1]:  dy B = 7;  dx = dy W + s 7 A = [1 1] + 14 [1 2];  dA = s 7 x;  dB = s dyᵀ (x Aᵀ) = 2 * 3
    assert x.grad is not None and x.grad.tolist() == [[15.0, 29.0]]
    assert layer.lora_A.grad.tolist() == [[14.0, 14.0]]
    assert layer.lora_B.grad.tolist() == [[6.0], [6.0]]
    assert layer.delta().tolist() == [[6.0, 12.0], [8.0, 16.0]]


@pytest.mark.parametrize("lead", [(), (4,), (1, 1), (2, 3), (2, 1, 3)])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_gradcheck(lead, p):
    assert torch.autograd.gradcheck(lambda *args: update(*args, 0.7, p, 11), inputs(*lead))


@pytest.mark.parametrize("needed", range(1, 16))
def test_each_gradient_alone(needed):
    """Any subset of the four gradients: those asked for are right, the others are absent."""
    ours, theirs = inputs(4), inputs(4)
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        a.requires_grad_(bool(needed >> i & 1))
        b.requires_grad_(bool(needed >> i & 1))
    dy = torch.randn(4, 7, dtype=DTYPE)
    update(*ours, 0.7).backward(dy)
    plain(*theirs, 0.7).backward(dy)
    for a, b in zip(ours, theirs, strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_equals_autograd_of_the_formula(p):
    ours, theirs = inputs(3, 6), inputs(3, 6)
    dy = torch.randn(3, 6, 7, dtype=DTYPE)
    y, y_plain = update(*ours, 1.5, p, 42), plain(*theirs, 1.5, p, 42)
    torch.testing.assert_close(y, y_plain)
    y.backward(dy)
    y_plain.backward(dy)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_second_derivatives_are_refused():
    tensors = inputs(4)
    y = update(*tensors, 1.0)
    (dx,) = torch.autograd.grad(y, tensors[1], torch.ones_like(y).requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_saved_tensors_are_not_written():
    tensors = inputs(4)
    versions = [t._version for t in tensors]
    copies = [t.detach().clone() for t in tensors]
    y = update(*tensors, 0.7, 0.3, 5)
    y.sum().backward(retain_graph=True)
    first = [t.grad.clone() for t in tensors]
    y.sum().backward()
    for t, version, copy, grad in zip(tensors, versions, copies, first, strict=True):
        assert t._version == version
        assert torch.equal(t, copy)
        torch.testing.assert_close(t.grad, 2 * grad)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (1, 5), (5,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_empty_and_single(shape, dtype):
    layer = LoRALinear(nn.Linear(5, 7).to(dtype), r=3, alpha=6.0)
    x = torch.randn(shape).to(dtype).requires_grad_()
    y = layer(x)
    assert y.shape == (*shape[:-1], 7)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert layer.lora_B.grad.shape == (7, 3)


def test_non_contiguous():
    y0, x, A, B = inputs(6, 4)
    strided = [t.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for t in (y0, x)]
    assert not strided[1].is_contiguous()
    dy = torch.randn(4, 6, 7, dtype=DTYPE).transpose(0, 1)
    expected = update(y0, x, A, B, 0.7)
    actual = update(*strided, A, B, 0.7)
    torch.testing.assert_close(actual, expected)
    expected.backward(dy)
    actual.backward(dy)
    torch.testing.assert_close(strided[1].grad, x.grad)
    torch.testing.assert_close(strided[0].grad, dy)


def test_a_new_adapter_changes_nothing():
    base = nn.Linear(24, 8)
    layer = LoRALinear(base, r=4, alpha=8.0, generator=torch.Generator().manual_seed(3))
    x = torch.randn(5, 24)
    assert torch.equal(layer(x), base(x))
    bound = 1 / math.sqrt(24)
    assert layer.lora_A.abs().max() <= bound
    assert layer.lora_A.abs().max() > 0.8 * bound  # 96 uniform draws: all below 0.8 with probability 5e-10
    again = LoRALinear(base, r=4, alpha=8.0, generator=torch.Generator().manual_seed(3))
    assert torch.equal(layer.lora_A, again.lora_A)


def test_scaling():
    assert LoRALinear(nn.Linear(4, 4), r=4, alpha=8).scaling == 2.0
    assert LoRALinear(nn.Linear(4, 4), r=4, alpha=8, rslora=True).scaling == 4.0


# Dtypes


@pytest.mark.parametrize("rows", [SHORT_INPUT - 1, SHORT_INPUT, 300])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("compute", [None, torch.float32, torch.bfloat16])
def test_half_precision_error(rows, dtype, compute):
    """The error against float64 is at most twice that of the formula in plain torch at the same precision."""
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(64, 96, bias=False).to(dtype), r=8, alpha=16.0, compute_dtype=compute)
    layer.lora_B.data.normal_(std=0.2)
    x = torch.randn(1, rows, 64).to(dtype).requires_grad_()
    dy = torch.randn(1, rows, 96).to(dtype)
    y = layer(x)
    y.backward(dy)
    assert y.dtype == dtype and x.grad.dtype == dtype
    assert layer.lora_A.grad.dtype == layer.lora_B.grad.dtype == torch.float32

    def formula(wide):
        W, A, B, xs = (t.detach().to(wide).requires_grad_() for t in (layer.base.weight, layer.lora_A, layer.lora_B, x))
        out = xs @ W.T + layer.scaling * (xs @ A.T) @ B.T
        out.backward(dy.to(wide))
        return [t.double() for t in (out.detach(), xs.grad, A.grad, B.grad)]

    exact = formula(torch.float64)
    narrow = formula(dtype if compute is None else torch.bfloat16 if torch.bfloat16 in (dtype, compute) else dtype)
    ours = [t.double() for t in (y.detach(), x.grad, layer.lora_A.grad, layer.lora_B.grad)]
    for name, mine, torchs, truth in zip(("y", "dx", "dA", "dB"), ours, narrow, exact, strict=True):
        error, reference = (mine - truth).norm(), (torchs - truth).norm()
        assert error <= 2 * reference, f"{name}: {error:.3g} > 2 x {reference:.3g}"


def test_a_wider_base_output_keeps_its_precision():
    """A float32 base output beside a bf16 branch must not be rounded to bf16 on the way."""
    y0, x, A, B = (t.detach().float() for t in inputs(4))
    y = update(y0, x.bfloat16(), A, torch.zeros_like(B), 1.0, dtype=torch.bfloat16)
    assert y.dtype == torch.float32
    assert torch.equal(y, y0)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_a_half_precision_sum_is_taken_in_float32_and_rounded_once(half):
    """y = 256 + 1.003 lies past the middle of 256 and 258, bf16's neighbours, so it rounds up. Were B or the sum
    rounded to bf16 on the way, 1.003 would be 1 and the tie 257 would go to 256. In float16 the same at 2048."""
    at = 256.0 if half == torch.bfloat16 else 2048.0
    base = nn.Linear(1, 1, bias=False).to(half)
    base.weight.data.fill_(at)
    layer = LoRALinear(base, r=1, alpha=1.0)
    layer.lora_A.data.fill_(1.0)
    layer.lora_B.data.fill_(1.0 + 0.4 * torch.finfo(half).eps)  # `half` alone would round this to 1
    y = layer(torch.ones(1, 1, dtype=half))
    assert y.dtype == half and y.item() == at + 2


def test_a_float32_base_keeps_its_bits_beside_a_half_precision_branch():
    base = nn.Linear(1, 1, bias=False)
    base.weight.data.fill_(257.003)
    layer = LoRALinear(base, r=1, alpha=1.0, compute_dtype=torch.bfloat16)
    layer.lora_A.data.fill_(1.0)
    layer.lora_B.data.fill_(2.0)
    x = torch.ones(1, 1)
    assert layer(x).item() == (base(x) + 2).item()  # bf16 would give 258


@pytest.mark.parametrize("rows", [SHORT_INPUT - 1, SHORT_INPUT])
@pytest.mark.parametrize("compute", [None, torch.float32])
def test_the_dtype_of_the_products_under_autocast(rows, compute):
    """Short inputs and an explicit compute_dtype in float32, others in autocast's dtype, as without autocast."""
    layer = LoRALinear(nn.Linear(16, 8, bias=False).bfloat16(), r=4, alpha=4.0, compute_dtype=compute)
    layer.lora_B.data.normal_()
    x = torch.randn(rows, 16).bfloat16()
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x.float()), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_on_a_gpu_triton_adds_the_update(dtype, p, monkeypatch):
    """The fused sum, where it runs by itself, against torch's: the same products, and one rounding of y."""
    layer = LoRALinear(nn.Linear(96, 160, bias=False).to("cuda", dtype), r=8, alpha=16.0, dropout=p)
    layer.lora_B.data.normal_()
    x = torch.randn(40, 96, device="cuda").to(dtype)
    launched, results = [], []
    launch = triton_kernels().add_product
    monkeypatch.setattr(triton_kernels(), "add_product", lambda *args: launched.append(1) or launch(*args))
    for compiling in (False, True):  # where torch records, it computes
        monkeypatch.setattr(ops, "is_traced", lambda compiling=compiling: compiling)
        torch.manual_seed(3)
        leaf = x.clone().requires_grad_()
        layer.zero_grad()
        y = layer(leaf)
        y.sum().backward()
        results.append([y, leaf.grad, layer.lora_A.grad.clone(), layer.lora_B.grad.clone()])
    assert launched == [1]
    for fused, plain in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-2)


def triton_kernels():
    from qlorag.kernels.lora import triton_kernels

    return triton_kernels


def test_gradients_accumulate_in_float32():
    """512 gradients of 1 onto 4096: in bf16, where the ulp at 4096 is 32, the sum would stay where it is."""
    base = nn.Linear(1, 1, bias=False).bfloat16().requires_grad_(False)
    layer = LoRALinear(base, r=1, alpha=1.0)
    layer.lora_A.data.fill_(1.0)
    layer.lora_B.grad = torch.full((1, 1), 4096.0)
    for _ in range(512):
        layer(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
    assert layer.lora_B.grad.item() == 4096 + 512


# Dropout


def test_dropout_hits_only_the_branch_and_only_in_training():
    layer = LoRALinear(nn.Linear(64, 8), r=4, alpha=8.0, dropout=0.5)
    x = torch.randn(6, 64)
    assert torch.equal(layer(x), layer.base(x))  # B is 0: the base's input was not dropped
    layer.lora_B.data.normal_()
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    torch.testing.assert_close(layer(x), layer.base(x) + x @ layer.delta().T)


def test_every_layer_and_every_call_draws_its_own_mask():
    """A base of zeros with A = B = I returns the dropped input itself: 0 where it was dropped, else x / (1 - p)."""
    layers = []
    for _ in range(2):
        base = nn.Linear(64, 64, bias=False)
        layer = LoRALinear(base, r=64, alpha=64.0, dropout=0.5)
        for weight, value in ((base.weight, torch.zeros(64, 64)), (layer.lora_A, torch.eye(64)),
                              (layer.lora_B, torch.eye(64))):  # fmt: skip
            weight.data.copy_(value)
        layers.append(layer)
    x = torch.ones(4, 64)

    def masks():
        torch.manual_seed(5)
        return [layer(x) for layer in (layers[0], layers[1], layers[0])]

    first = masks()
    assert all(set(y.unique().tolist()) == {0.0, 2.0} for y in first)
    assert not any(torch.equal(first[i], first[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    assert all(torch.equal(a, b) for a, b in zip(first, masks(), strict=True))


def test_dropout_is_reproducible_and_survives_checkpointing():
    layer = LoRALinear(nn.Linear(64, 8), r=4, alpha=8.0, dropout=0.5)
    layer.lora_B.data.normal_()
    x = torch.randn(6, 64, requires_grad=True)

    def gradients(call):
        torch.manual_seed(7)
        layer.zero_grad()
        x.grad = None
        y = call(x)
        torch.rand(3)  # whatever else draws between forward and backward
        y.sum().backward()
        return y.detach(), x.grad, layer.lora_A.grad.clone(), layer.lora_B.grad.clone()

    plainly = gradients(layer)
    recomputed = gradients(lambda x: torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False))
    for a, b in zip(plainly, recomputed, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_rate_and_scale(p):
    x = torch.ones(401, 333)  # an odd count: the last draw is used in part
    mask, s = draw_mask(x, p, 3, 2.0)
    kept = mask.double().mean().item()
    # five standard deviations of a binomial share over 133,533 elements
    assert abs(kept - (1 - p)) < 5 * math.sqrt(p * (1 - p) / x.numel())
    assert s == pytest.approx(2 / (1 - p), rel=2e-4)  # p is rounded to 2^-16, which moves 1 - p by 1.5e-4 at 0.9
    again, _ = draw_mask(x, p, 3, 2.0)
    other, _ = draw_mask(x, p, 4, 2.0)
    assert torch.equal(mask, again)
    assert not torch.equal(mask, other)


# Bad input


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"r": 0}, "r=0"),
        ({"r": True}, "r=True"),
        ({"r": 2.0}, "r=2.0"),
        ({"alpha": 0}, "alpha=0"),
        ({"alpha": math.nan}, "alpha=nan"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"dropout": -0.1}, "dropout=-0.1"),
    ],
)
def test_bad_arguments(arguments, named):
    with pytest.raises(AdapterError, match=named):
        LoRALinear(nn.Linear(4, 4), **({"r": 2, "alpha": 4.0} | arguments))


def test_not_a_linear_layer():
    with pytest.raises(AdapterError, match="Embedding cannot carry LoRA"):
        LoRALinear(nn.Embedding(4, 4), r=2, alpha=4.0)
    with pytest.raises(AdapterError, match="LoRALinear cannot"):
        LoRALinear(LoRALinear(nn.Linear(4, 4), r=2, alpha=4.0), r=2, alpha=4.0)
