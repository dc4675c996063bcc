"""The operations under torch's own inspection, and a layer under torch.compile."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from qlorag.kernels import nf4
from qlorag.kernels.nf4 import torch_ops
from qlorag.lora import LoRAConfig, attach
from qlorag.quant import QuantizedLinear, quantize_linears
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

pytestmark = [pytest.mark.isa, pytest.mark.slow]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def packed_weight(n, k, *, double_quant):
    return nf4.quantize(torch.randn(n, k, generator=generator()), double_quant=double_quant)


@pytest.mark.parametrize("double_quant", [True, False])
def test_opcheck(double_quant):
    """Schema, fake tensors, autograd registration and AOT dispatch, as torch checks them."""
    weight = packed_weight(48, 64, double_quant=double_quant).parts
    x = torch.randn(3, 64, generator=generator(), requires_grad=True)
    dy = torch.randn(3, 48, generator=generator())
    torch.library.opcheck(torch_ops.nf4_quantize, (x.detach(), "nf4", 64))
    torch.library.opcheck(torch_ops.nf4_quantize_absmax, (torch.rand(300, generator=generator()),))
    torch.library.opcheck(torch_ops.nf4_dequantize, (*weight, [48, 64], "nf4", 64, torch.bfloat16))
    torch.library.opcheck(torch_ops.nf4_matmul, (x, *weight, 48, "nf4", 64))
    torch.library.opcheck(torch_ops.nf4_matmul_backward, (dy, *weight, 64, "nf4", 64))


@pytest.mark.parametrize("double_quant", [True, False])
def test_quantizing_compiles_into_one_graph(double_quant):
    def run(w):
        return nf4.dequantize(nf4.quantize(w, double_quant=double_quant))

    w = torch.randn(30, 77, generator=generator())
    assert torch.equal(torch.compile(run, fullgraph=True, backend="aot_eager")(w), run(w))


def run_all(x, dy, w):
    return nf4.dequantize(w), nf4.matmul(x, w), nf4.matmul_backward(dy, w)


def test_the_operations_compile_into_one_graph():
    w = packed_weight(48, 64, double_quant=True)
    x, dy = torch.randn(3, 64, generator=generator()), torch.randn(3, 48, generator=generator())
    compiled = torch.compile(run_all, fullgraph=True, backend="aot_eager")(x, dy, w)
    assert all(map(torch.equal, compiled, run_all(x, dy, w)))


@pytest.mark.parametrize("rows", [2, 500])
def test_tracers_record_the_operation(rows):
    """And not the memory that C wrote its result into."""
    layer = QuantizedLinear.from_linear(nn.Linear(64, 48)).requires_grad_(False)
    w = packed_weight(48, 64, double_quant=True)
    one, other = torch.randn(2, rows, 64, generator=generator())
    dy = torch.randn(rows, 48, generator=generator())
    for f in (layer, lambda x: torch.cat([y.flatten() for y in run_all(x, dy, w)])):
        for traced in (torch.jit.trace(f, one, check_trace=False), make_fx(f)(one)):
            assert torch.equal(traced(other), f(other))


@pytest.mark.compiler
def test_fake_tensors():
    """They have no memory: either the operation is one of torch's, or it refuses."""
    layer, w = QuantizedLinear.from_linear(nn.Linear(64, 48)), packed_weight(48, 64, double_quant=True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x, dy = torch.randn(3, 64), torch.randn(3, 48)
        assert [tuple(y.shape) for y in (*run_all(x, dy, w), layer(x))] == [(48, 64), (3, 48), (3, 64), (3, 48)]
        q, plain = (nf4.quantize(torch.randn(30, 77), double_quant=double_quant) for double_quant in (True, False))
        assert [t.numel() for t in (*q.parts, *plain.parts[:2])] == [1155, 37, 1, 1, 1155, 37]
        for call in (
            lambda: nf4.quantize(torch.randn(64), backend="c"),
            lambda: nf4.dequantize(w, out=torch.empty(48, 64)),
            lambda: nf4.matmul(x, w, backend="c"),
        ):
            with pytest.raises(nf4.QuantizationError, match=r"has no memory \(a fake or traced one\?\)"):
                call()


@pytest.mark.parametrize("backend", ["c", "reference", None])
def test_nothing_made_under_fake_tensors_is_kept(backend):
    """In a process whose first call is one of these: what is kept from it serves the real ones that follow."""
    code = f"""
import contextlib, torch
from torch._subclasses.fake_tensor import FakeTensorMode
from qlorag.kernels import nf4
from qlorag.quant.dynamic8bit import dequantize8, quantize8

def run(w, backend):
    weight = nf4.quantize(w, backend=backend)
    out = nf4.dequantize(weight, out=torch.empty(48, 64), backend=backend)
    y = nf4.matmul(torch.ones(100, 64), weight, backend=backend)
    return out, y, dequantize8(*quantize8(w, signed=True), signed=True)

for allow in (False, True):
    with FakeTensorMode(allow_non_fake_inputs=allow), contextlib.suppress(Exception):
        run(torch.randn(48, 64), {backend!r})
w = torch.randn(48, 64)
for a, b in zip(run(w, None), run(w, "reference")):
    assert type(a) is torch.Tensor and torch.allclose(a, b, atol=1e-4), (a, b)
print("done")
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "done\n"), run.stderr[-2000:]


def test_a_traced_product_refuses_what_an_eager_one_refuses():
    w = packed_weight(48, 64, double_quant=False)
    product = torch.compile(nf4.matmul, backend="aot_eager")
    backward = torch.compile(nf4.matmul_backward, backend="aot_eager")
    for call, message in (
        (
            lambda: product(torch.ones(2, 64, requires_grad=True), w),
            "x requires a gradient, and this product has none",
        ),
        (lambda: product(torch.ones(2, 64, dtype=torch.bfloat16), w, bias=torch.ones(48)), "bias is torch.float32"),
        (lambda: product(torch.ones(2, 63), w), r"x has shape \[2, 63\]"),
        (lambda: backward(torch.ones(2, 47), w), r"dy has shape \[2, 47\]"),
    ):
        with pytest.raises(nf4.QuantizationError, match=message):
            call()


@pytest.mark.parametrize("rows", [2, 500])
def test_autocast_leaves_the_dtype_of_a_product_to_x(rows):
    """A layer follows autocast; the operation does as it is told, however many rows there are."""
    w = packed_weight(48, 64, double_quant=True)
    x, dy = torch.randn(rows, 64, generator=generator()), torch.randn(rows, 48, generator=generator())
    expected = run_all(x, dy, w)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, run_all(x, dy, w), expected))


@pytest.mark.parametrize("autocast", [False, True])
def test_an_adapted_quantized_layer_compiles_into_one_graph(autocast):
    """Forward and backward, against eager; `fullgraph` makes every graph break an error."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, 64))
    quantize_linears(model)
    attach(model, LoRAConfig(r=4, targets=["0", "2"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    assert any(isinstance(m, QuantizedLinear) for m in model.modules())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for form in (model, compiled):
        x = torch.randn(30, 64, generator=generator(), requires_grad=True)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = form(x)
        y.float().square().sum().backward()
        results.append([y, x.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1]) == 6
    for eager, graph in zip(*results, strict=True):
        # The same operations on the same numbers, but for the order in which gradients meet.
        tolerance = 0.02 if autocast else 1e-5
        torch.testing.assert_close(graph, eager, rtol=tolerance, atol=tolerance * eager.abs().max().item())


def test_a_compiled_layer_serves_without_a_gradient_too():
    layer = QuantizedLinear.from_linear(nn.Linear(64, 48))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 64, generator=generator())
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x))


def test_eager_code_does_not_load_the_compiler():
    import subprocess
    import sys

    script = """
import sys, torch
from qlorag.quant import QuantizedLinear
layer = QuantizedLinear.from_linear(torch.nn.Linear(64, 48))
layer(torch.zeros(2, 64)), layer(torch.zeros(40, 64, requires_grad=True)).sum().backward()
print(sorted(m for m in sys.modules if m.startswith(("torch._dynamo", "torch._inductor", "triton")))[:3])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_the_default_device_is_not_asked():
    """`with torch.device(...)` around code that uses layers on the CPU: what C writes to has to be memory."""
    layer = QuantizedLinear.from_linear(nn.Linear(64, 48))
    x, w = torch.randn(40, 64, generator=generator()), torch.randn(8, 64, generator=generator())
    want = layer(x)
    with torch.device("meta"):
        got, decoded = layer(x), nf4.dequantize(nf4.quantize(w))
    assert torch.equal(got, want) and decoded.device.type == "cpu"
