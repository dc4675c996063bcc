"""SwiGLU's Triton kernels against the definition in float64, with at most twice torch's error."""

from __future__ import annotations

import pytest
import torch
from qlorag.kernels.swiglu import swiglu
from qlorag.kernels.swiglu.reference import swiglu as reference

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [(5, 123), (1,), (), (2048,), (2, 3, 1000), (3, 2047)]  # whole tiles, and ragged ones


def inputs(*shape, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [(3 * torch.randn(shape, generator=g)).to(dtype) for _ in range(3)]


def results(function, gate, up, dh):
    """h, dgate and dup in float64."""
    gate, up = gate.clone().requires_grad_(), up.clone().requires_grad_()
    h = function(gate, up)
    return [h.detach().double(), *(g.double() for g in torch.autograd.grad(h, (gate, up), dh.to(h.dtype)))]


def triton(gate, up):
    return swiglu(gate, up, backend="triton")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_at_most_twice_the_error_of_torch(dtype):
    squares = torch.zeros(2, 3, dtype=torch.float64)
    for seed, shape in enumerate(SHAPES):
        gate, up, dh = inputs(*shape, dtype=dtype, seed=seed)
        exact = results(reference, gate.double(), up.double(), dh)
        for who, function in enumerate((triton, reference)):
            parts = zip(results(function, gate, up, dh), exact, strict=True)
            squares[who] += torch.stack([(got - want).square().sum() for got, want in parts])
    assert (squares[0] <= 4 * squares[1]).all(), (squares[0] / squares[1]).sqrt()  # of squares: 2 squared


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # exp(1e4) in numpy
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_extreme_gates_stay_finite(dtype):
    gate = torch.tensor([-1e4, -88.0, 0.0, 88.0, 1e4], dtype=dtype)
    two = torch.full((5,), 2.0, dtype=dtype)
    h, dgate, dup = results(triton, gate, two, torch.ones(5, dtype=dtype))
    wide = gate.double()
    torch.testing.assert_close(h, wide.clamp(min=0) * 2, rtol=0, atol=1e-30)
    torch.testing.assert_close(dgate, torch.tensor([0, 0, 1, 2, 2]).double(), rtol=0, atol=1e-30)
    torch.testing.assert_close(dup, wide.clamp(min=0), rtol=0, atol=1e-30)


def test_each_element_in_its_place_and_nan_stays_there():
    gate, up, dh = inputs(3, 2047)
    gate[1, 5] = up[2, 2046] = float("nan")
    expected = torch.zeros(3, 2047, dtype=torch.bool)
    expected[1, 5] = True
    h, dgate, dup = results(triton, gate, up, dh)
    assert torch.equal(dup.isnan(), expected)  # which does not look at up
    expected[2, 2046] = True
    assert torch.equal(h.isnan(), expected) and torch.equal(dgate.isnan(), expected)


def test_forward_alone_gives_the_same():
    gate, up, _ = inputs(5, 123, dtype=torch.bfloat16)
    with torch.no_grad():
        alone = triton(gate, up)
    assert torch.equal(alone, triton(gate.requires_grad_(), up))


def test_only_the_gradients_asked_for():
    gate, up, dh = inputs(5, 123)
    _, dgate, dup = results(triton, gate, up, dh)
    assert torch.equal(torch.autograd.grad(triton(gate.requires_grad_(), up), gate, dh)[0].double(), dgate)
    gate = gate.detach()
    assert torch.equal(torch.autograd.grad(triton(gate, up.requires_grad_()), up, dh)[0].double(), dup)


@pytest.mark.parametrize("shape", [(0,), (2, 0, 7)])
def test_empty(shape):
    assert all(t.shape == shape for t in results(triton, *inputs(*shape)))


def test_halves_of_one_tensor():
    both = torch.randn(7, 10, generator=torch.Generator().manual_seed(0), requires_grad=True)
    h = triton(*both.chunk(2, -1))
    torch.testing.assert_close(h, reference(*both.chunk(2, -1)))
    got, want = (torch.autograd.grad(f(*both.chunk(2, -1)).sum(), both)[0] for f in (triton, reference))
    torch.testing.assert_close(got, want)
