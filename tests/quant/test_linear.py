"""QuantizedLinear: its product, its gradient, what it keeps in memory, and that its weight never changes."""

from __future__ import annotations

import copy
import gc
import hashlib
import pickle
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from qlorag.kernels import nf4
from qlorag.kernels.nf4 import eager, fused_rows, scratch
from qlorag.quant import QuantizationError, QuantizedLinear, dequantize, quantize, quantize_linears
from qlorag.quant import linear as linear_module
from torch import nn
from torch.autograd import forward_ad

pytestmark = pytest.mark.isa

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def layer(k=48, n=20, *, bias=True, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return QuantizedLinear.from_linear(nn.Linear(k, n, bias=bias), **options)


def digest(module: nn.Module) -> str:
    parts = [t.detach().numpy().tobytes() for t in module.state_dict().values()]
    return hashlib.sha256(b"".join(parts)).hexdigest()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("leading", [(), (1,), (7,), (2, 0), (2, 3, 4)])
def test_forward_and_backward_are_those_of_the_decoded_weight(leading, bias, dtype):
    quantized = layer(bias=bias)
    w = quantized.dequantize(dtype)
    b = None if quantized.bias is None else quantized.bias.to(dtype)
    x = torch.randn(*leading, 48, generator=generator()).to(dtype).requires_grad_()
    twin = x.detach().clone().requires_grad_()
    dy = torch.randn(*leading, 20, generator=generator(1)).to(dtype)
    y, expected = quantized(x), F.linear(twin, w, b)
    assert y.dtype == dtype and torch.equal(y, expected)  # the same kernel on the same bits
    with torch.no_grad():
        assert torch.equal(quantized(x), expected)
    y.backward(dy)
    expected.backward(dy)
    # dy W is the same sum as torch's own, which may run it in another order: a few units in the last place.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(x.grad, twin.grad, rtol=4 * eps, atol=4 * eps)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_gradcheck(kind, double_quant):
    quantized = layer(9, 5, kind=kind, double_quant=double_quant)
    assert quantized.bias is not None
    quantized.bias = nn.Parameter(quantized.bias.double())

    def forward(x, bias):
        quantized.bias.data.copy_(bias.data)
        return linear_module._QuantizedLinearFunction.apply(x, bias, quantized.quantized)

    x = torch.randn(2, 3, 9, dtype=torch.float64, generator=generator(), requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, generator=generator(), requires_grad=True)
    assert torch.autograd.gradcheck(forward, (x, bias))
    assert torch.autograd.gradcheck(quantized, (x,))  # and through the module


def test_autograd_keeps_the_packed_weight_and_nothing_else():
    quantized = layer(64, 64)
    kept: list[torch.Tensor] = []

    def pack(t):
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        x = torch.randn(5, 64, generator=generator(), requires_grad=True)
        quantized(x)
    own = {b.data_ptr() for b in quantized.buffers()}
    assert {t.data_ptr() for t in kept} == own


def test_the_scratch_is_shared_by_layers_and_never_escapes():
    first, second = layer(64, 48), layer(48, 64)
    x = torch.randn(30, 64, generator=generator(), requires_grad=True)  # more rows than the fused product takes
    y = second(first(x))
    buffer = scratch._scratch.buffers[torch.float32]
    storage = buffer.untyped_storage().data_ptr()
    assert y.untyped_storage().data_ptr() != storage
    assert first.dequantize().untyped_storage().data_ptr() != storage
    y.sum().backward()
    expected = torch.ones(30, 64) @ second.dequantize() @ first.dequantize()
    torch.testing.assert_close(x.grad, expected)
    buffer.fill_(float("nan"))  # no result looks at it again, and the next call writes all it reads
    assert not y.isnan().any() and not x.grad.isnan().any() and not second(first(x)).isnan().any()
    assert scratch._scratch.buffers[torch.float32] is buffer


def test_a_scratch_made_in_inference_mode_serves_training(monkeypatch):
    monkeypatch.setattr(scratch, "_scratch", scratch._Scratch())
    quantized = layer()
    x = torch.randn(2, 48, dtype=torch.float64, generator=generator())  # float64: the reference writes with torch
    with torch.inference_mode():
        expected = quantized(x)
    y = quantized(x.requires_grad_())
    y.sum().backward()
    assert torch.equal(y, expected) and x.grad is not None


def test_threads_do_not_share_a_scratch():
    layers = [layer(200, 100), layer(200, 100, kind="fp4")]
    x = torch.randn(4, 200, generator=generator())
    expected = [F.linear(x, one.dequantize(), one.bias) for one in layers]
    wrong: list[int] = []

    def work(i):
        for _ in range(50):
            if not torch.equal(layers[i](x), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i % 2,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.compiler
def test_without_a_gradient_few_rows_are_multiplied_by_the_packed_weight(monkeypatch):
    quantized = layer(128, 20)
    decoded: list[int] = []
    decode = eager._decode
    monkeypatch.setattr(eager, "_decode", lambda *args: decoded.append(1) or decode(*args))
    for dtype in FLOATS:
        for leading in ((), (1,), (1, 3), (0,)):
            x = torch.randn(*leading, 128, generator=generator()).to(dtype)
            y = quantized(x)
            assert y.dtype == dtype and y.shape == (*leading, 20)
            expected = quantized.bias.double() + x.double() @ quantized.dequantize(torch.float64).T
            # 128 products of about 0.1, rounded once and, with the bias, once more.
            torch.testing.assert_close(y.double(), expected, rtol=0, atol=2 * torch.finfo(dtype).eps)
    assert decoded == []
    quantized(torch.zeros(fused_rows(torch.float32, torch.device("cpu")) + 1, 128))
    quantized(torch.zeros(1, 128, dtype=torch.float64))
    with torch.no_grad():
        quantized(torch.zeros(1, 128, requires_grad=True))
    assert decoded == [1, 1]
    quantized.bias.requires_grad_(True)
    y = quantized(torch.zeros(1, 128))  # with a gradient too; its backward decodes
    assert y.requires_grad and decoded == [1, 1]
    wide_block = layer(48, 20)  # 48 is no multiple of 64
    assert torch.equal(wide_block(torch.ones(48)), F.linear(torch.ones(48), wide_block.dequantize(), wide_block.bias))


def test_a_replaced_or_moved_weight_is_the_one_that_is_multiplied():
    quantized, other = layer(128, 20), layer(128, 20, kind="nf4", bias=False)
    x = torch.randn(2, 128, generator=generator())
    before = quantized(x)
    quantized.packed.bitwise_not_()  # in place
    flipped = quantized(x)
    assert not torch.equal(flipped, before)
    quantized.packed = ~quantized.packed  # another tensor
    assert torch.equal(quantized(x), before)
    quantized.share_memory()  # the same tensors, elsewhere
    assert torch.equal(quantized(x), before)
    for twin in (copy.deepcopy(quantized), copy.copy(quantized), pickle.loads(pickle.dumps(quantized))):
        assert torch.equal(twin(x), before)
    quantized.load_state_dict({**other.state_dict(), "bias": torch.zeros(20)}, assign=True)
    assert torch.equal(quantized(x), other(x))
    quantized.packed = quantized.packed[:-1]
    with pytest.raises(QuantizationError, match="packed has 1279 elements"):
        quantized(x)


def test_threads_may_share_a_layer():
    quantized = layer(576, 64, bias=False)
    inputs = [torch.randn(1 + i % 3, 576, generator=generator(i)) for i in range(4)]
    expected = [quantized(x) for x in inputs]
    wrong: list[int] = []

    def work(i):
        for _ in range(200):
            if not torch.equal(quantized(inputs[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_autocast_computes_in_its_dtype():
    quantized = layer()
    x = torch.randn(2, 48, generator=generator(), requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = quantized(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32


def test_casts_move_the_bias_and_leave_the_weight_alone():
    quantized = layer()
    parts = {name: part.clone() for name, part in quantized.named_buffers()}
    for cast in (quantized.half, quantized.double, quantized.bfloat16, lambda: quantized.to(torch.float32)):
        cast()
        for name, part in quantized.named_buffers():
            assert part.dtype == parts[name].dtype and torch.equal(part, parts[name]), name
    assert {p.device.type for p in copy.deepcopy(quantized).to("meta").state_dict().values()} == {"meta"}


def test_state_dict_round_trip():
    one, other = layer(), layer(kind="nf4")
    with torch.no_grad():
        other.packed.zero_()
        other.absmax.zero_()
    assert sorted(one.state_dict()) == ["_extra_state", "absmax", "bias", "nested_absmax", "nested_offset", "packed"]
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.dequantize(), other.dequantize())
    plain = layer(double_quant=False)
    assert sorted(plain.state_dict()) == ["_extra_state", "absmax", "bias", "packed"]
    with pytest.raises(RuntimeError, match=r"absmax is torch.uint8, wanted torch.float32"):
        plain.load_state_dict(one.state_dict())


@pytest.mark.parametrize("strict", [True, False])
def test_a_state_of_another_dtype_is_refused_and_nothing_is_lost(strict):
    """Copied, float scales would become the whole number 0."""
    double, plain = layer(), layer(double_quant=False)
    before = digest(double)
    with pytest.raises(RuntimeError, match=r"absmax is torch.float32, wanted torch.uint8: it comes from a layer that"):
        double.load_state_dict(plain.state_dict(), strict=strict)
    assert digest(double) == before


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("made", "message"),
    [
        ({"kind": "fp4"}, "kind='fp4', wanted 'nf4'"),
        ({"block_size": 128}, "block_size=128, wanted 64"),
        ({"double_quant": False}, "double_quant=False, wanted True"),
        ({"shape": (128, 64)}, r"shape=\[128, 64\], wanted \[64, 128\]"),
    ],
)
def test_the_state_of_another_kind_of_layer_is_refused_by_name(made, message, strict):
    def make(shape=(64, 128), **options):
        w = torch.randn(*shape, generator=generator(1))
        return nn.Sequential(QuantizedLinear(quantize(w, **{"kind": "nf4", **options})))

    wanted = make()
    before = digest(wanted[0])
    with pytest.raises(RuntimeError, match=rf"0\.packed comes from a layer with {message}"):
        wanted.load_state_dict(make(**made).state_dict(), strict=strict)
    assert digest(wanted[0]) == before
    wanted.load_state_dict(make().state_dict(), strict=strict)


def test_a_state_without_a_record_loads_and_a_damaged_one_is_refused():
    one, other = nn.Sequential(layer()), nn.Sequential(layer())
    with torch.no_grad():
        other[0].packed.zero_()
    old = {name: part for name, part in one.state_dict().items() if "_extra_state" not in name}
    assert str(other.load_state_dict(old)) == "<All keys matched successfully>"
    assert torch.equal(one[0].dequantize(), other[0].dequantize())
    for record in (b"{", b"[]", b"\xff"):
        with pytest.raises(RuntimeError, match=r"0._extra_state is not the JSON of a quantized layer"):
            other.load_state_dict(old | {"0._extra_state": torch.tensor(list(record), dtype=torch.uint8)})


@pytest.mark.parametrize("how", ["made", "from tensors", "moved", "assigned"])
def test_a_layer_made_in_inference_mode_can_be_trained_through(how):
    dense = nn.Linear(64, 32)
    with torch.inference_mode():
        made = layer(64) if how == "moved" else QuantizedLinear.from_linear(nn.Linear(64, 32))
        if how == "from tensors":
            made = QuantizedLinear(quantize(dense.weight), dense.bias.clone())
        if how == "moved":
            made = made.to("meta").to_empty(device="cpu")
        if how == "assigned":
            made.load_state_dict({name: part.clone() for name, part in made.state_dict().items()}, assign=True)
    x = torch.randn(3, 64, requires_grad=True)
    made(x).sum().backward()
    assert x.grad.shape == x.shape
    assert not any(t.is_inference() for t in (*made.buffers(), *made.parameters()))


@pytest.mark.parametrize("bias", [True, False])
def test_transforms(bias):
    made = QuantizedLinear.from_linear(nn.Linear(64, 32, bias=bias))
    w, x = made.dequantize(torch.float32), torch.randn(3, 5, 64, generator=generator(1))
    torch.testing.assert_close(torch.func.vmap(made, in_dims=1, out_dims=1)(x), made(x))
    expected = 2 * made(x) @ w
    torch.testing.assert_close(torch.func.grad(lambda z: made(z).square().sum())(x), expected)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(lambda z: made(z).square().sum()))(x), expected)
    torch.testing.assert_close(torch.func.jacrev(made)(x[0, 0]), w)
    torch.testing.assert_close(torch.func.vmap(torch.func.jacrev(made))(x[0]), w.expand(5, -1, -1))
    twice = torch.func.jacrev(torch.func.grad(lambda z: made(z).square().sum()))
    torch.testing.assert_close(twice(x[0, 0]), 2 * w.T @ w)
    double = QuantizedLinear.from_linear(nn.Linear(32, 8), block_size=32)
    args = (torch.randn(2, 32, dtype=torch.float64, requires_grad=True), *double._parts(), 8, "nf4", 32)
    assert torch.autograd.gradcheck(nf4.TransformedMatmul.apply, args)
    assert torch.autograd.gradgradcheck(nf4.TransformedMatmul.apply, args)


def test_scales_that_were_cast_are_refused():
    """FSDP's MixedPrecision(buffer_dtype=...) assigns to `.data`, which no layer sees."""
    for double_quant, name in ((True, "nested_absmax"), (False, "absmax")):
        made = QuantizedLinear.from_linear(nn.Linear(64, 32), double_quant=double_quant)
        made(torch.zeros(1, 64))
        part = getattr(made, name)
        part.data = part.to(torch.bfloat16)
        for rows in (1, 1000):
            with pytest.raises(
                QuantizationError, match=f"^{name} was cast to torch.bfloat16.* buffer_dtype out of FSDP"
            ):
                made(torch.zeros(rows, 64))


def test_frozen_means_frozen():
    model = nn.Sequential(layer(32, 32), nn.LayerNorm(32), layer(32, 32, double_quant=False))
    before = [digest(model[0]), digest(model[2])]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(3):
        model(torch.randn(4, 32, generator=generator(step))).square().mean().backward()
        optimizer.step()
    assert [digest(model[0]), digest(model[2])] == before
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"1.weight", "1.bias"}


def test_a_weight_written_to_between_the_passes_is_noticed():
    quantized = layer()
    y = quantized(torch.randn(2, 48, generator=generator(), requires_grad=True))
    quantized.packed.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_layer_holds_4_127_bits_per_weight():
    quantized = layer(1024, 512, bias=False)
    held = sum(t.nbytes for t in (*quantized.buffers(), *quantized.parameters()))
    assert 8 * held / (1024 * 512) == pytest.approx(4.127, abs=6e-4)
    assert "bits_per_weight=4.127" in repr(quantized)


def test_from_quantized_shares_the_tensors():
    q = quantize(torch.randn(6, 64, generator=generator()))
    quantized = QuantizedLinear.from_quantized(q, torch.ones(6))
    assert quantized.packed is q.packed and (quantized.in_features, quantized.out_features) == (64, 6)
    assert torch.equal(quantized.dequantize(), dequantize(q))
    assert torch.equal(dequantize(quantized.quantized), dequantize(q))


def test_meta():
    """Shapes and dtypes, as of any layer; quantizing wants values."""
    empty = layer().to("meta")
    assert empty(torch.zeros(2, 48, device="meta")).shape == (2, empty.out_features)
    for linear in (nn.Linear(48, 20, device="meta"), nn.Linear(48, 20, device="meta", dtype=torch.bfloat16)):
        with pytest.raises(QuantizationError, match="w is on meta, where tensors have no values: load it first"):
            QuantizedLinear.from_linear(linear)


@pytest.mark.parametrize("k", [48, 64])  # decoded, fused
def test_a_forward_derivative_is_refused(k):
    x = torch.ones(2, k)
    with forward_ad.dual_level():
        with pytest.raises(QuantizationError, match=r"^x .* tangent"):
            layer(k)(forward_ad.make_dual(x, x))
        assert layer(k)(x).shape[0] == 2


def test_bad_input():
    for x, message in (
        (torch.zeros(2, 47), r"x is \[2, 47\]: wanted \[..., 48\]"),
        (torch.zeros(()), r"x is \[\]: wanted \[..., 48\]"),
        (torch.zeros(2, 48, device="meta"), "x is on meta, the weight on cpu: move them together"),
        (torch.zeros(0, 48, dtype=torch.int64), "x is torch.int64: wanted float32"),
    ):
        with pytest.raises(QuantizationError, match=message):
            layer()(x)
    assert layer()(torch.zeros(0, 48, dtype=torch.float64)).dtype == torch.float64
    changed = layer(64)
    changed(torch.zeros(1, 64))
    changed.block_size = 48
    with pytest.raises(QuantizationError, match="block_size=48"):  # though the product had been prepared
        changed(torch.zeros(1, 64))
    q = quantize(torch.ones(2, 3, 4))
    with pytest.raises(QuantizationError, match=r"shape \[N, K\], got \[2, 3, 4\]"):
        QuantizedLinear(q)
    with pytest.raises(QuantizationError, match=r"bias has shape \[3\]: wanted \[2\]"):
        QuantizedLinear(quantize(torch.ones(2, 3)), torch.ones(3))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(8, 16), nn.Linear(16, 8, bias=False), nn.LayerNorm(8)

    def forward(self, x):
        return self.norm(self.down(self.up(x)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.lm_head = nn.Linear(8, 11, bias=False)


ALL = ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]


def test_quantize_linears_replaces_all_but_the_head():
    model = Model().eval()
    dense = [weakref.ref(model.get_submodule(name)) for name in ALL]
    expected = quantize(model.blocks[0].up.weight.detach(), block_size=32)
    assert quantize_linears(model, block_size=32) == ALL
    assert all(isinstance(model.get_submodule(name), QuantizedLinear) for name in ALL)
    assert type(model.lm_head) is nn.Linear and not model.blocks[0].up.training
    assert torch.equal(model.blocks[0].up.dequantize(), dequantize(expected))
    gc.collect()
    assert [ref() for ref in dense] == [None] * 4  # the dense layers are gone


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        ((), ALL),
        ("down", ["blocks.0.up", "blocks.1.up"]),
        (["down"], ["blocks.0.up", "blocks.1.up"]),
        (("lm_head", "down"), ["blocks.0.up", "blocks.1.up"]),
        (("lm_head", "blocks.0.*"), ["blocks.1.up", "blocks.1.down"]),
        (("lm_head", "0.up"), ["blocks.0.down", "blocks.1.up", "blocks.1.down"]),
    ],
)
def test_skip_takes_paths_their_last_parts_and_globs(skip, left):
    assert quantize_linears(Model(), skip=skip) == left
    assert quantize_linears(Model(), skip=skip, default_skip=()) == [*left, *([] if "lm_head" in skip else ["lm_head"])]


@pytest.mark.parametrize(
    "owner", [nn.TransformerEncoderLayer(64, 4, 128), nn.Sequential(Model(), nn.TransformerEncoderLayer(64, 4, 128))]
)
def test_a_layer_whose_owner_reads_its_weight_is_refused(owner):
    """nn.TransformerEncoderLayer in eval mode; its attention has a subclass of nn.Linear, which stays anyway."""
    with pytest.raises(QuantizationError, match=r"linear1: .* is an nn.TransformerEncoderLayer, .* add linear1 and"):
        quantize_linears(owner)
    assert not any(isinstance(m, QuantizedLinear) for m in owner.modules())
    if isinstance(owner, nn.Sequential):
        assert quantize_linears(owner, skip=("linear1", "linear2")) == [f"0.{name}" for name in ALL]


def test_a_layer_in_two_places_stays_one_layer():
    model = nn.ModuleDict({"a": Block(), "b": Block()})
    model["b"].up = model["a"].up
    assert quantize_linears(model) == ["a.up", "a.down", "b.up", "b.down"]
    assert model["a"].up is model["b"].up and isinstance(model["a"].up, QuantizedLinear)


def test_quantize_linears_refuses():
    with pytest.raises(QuantizationError, match=r"skip='blocks.7.\*' fits no linear layer: there are blocks.0.up"):
        quantize_linears(Model(), skip=("blocks.7.*",))
    with pytest.raises(QuantizationError, match="no linear layer to quantize: there are none"):
        quantize_linears(nn.Sequential(nn.LayerNorm(3)))
    with pytest.raises(QuantizationError, match=r"no linear layer to quantize: there are blocks\.0\.up"):
        quantize_linears(Model(), skip=("*",))
    tied = Model()
    tied.lm_head.weight = tied.embed.weight
    with pytest.raises(QuantizationError, match="lm_head shares its weight with embed: add it to skip"):
        quantize_linears(tied, default_skip=())
    assert type(tied.blocks[0].up) is nn.Linear  # refused before anything was replaced
    assert quantize_linears(tied) == ALL
    broken = Model()
    broken.blocks[1].up.weight.data[3, 4] = float("nan")
    with pytest.raises(QuantizationError, match=r"blocks.1.up.weight: w\[3, 4\] is nan"):
        quantize_linears(broken)
