"""RMSNorm's Triton kernels against the definition in float64, with at most twice torch's error."""

from __future__ import annotations

import pytest
import torch
from qlorag.kernels.rms_norm import rms_norm, triton_kernels
from qlorag.kernels.rms_norm.reference import rms_norm as reference

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
EPS = 1e-5
# Rows shorter and longer than a tile, that do and do not fill it; many and few of them.
SHAPES = [(5, 123), (1, 1), (33, 64), (3, 576), (2, 3, 1000), (2, 4096), (1, 5000)]


def inputs(*shape, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    weight = 1 + 0.3 * torch.randn(shape[-1], generator=g)
    return torch.randn(shape, generator=g).to(dtype), weight.to(dtype), torch.randn(shape, generator=g).to(dtype)


def results(function, x, weight, dy):
    """y, dx and dw in float64."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = function(x, weight)
    return [y.detach().double(), *(g.double() for g in torch.autograd.grad(y, (x, weight), dy.to(y.dtype)))]


def triton(x, weight):
    return rms_norm(x, weight, eps=EPS, backend="triton")


def definition(x, weight):
    return reference(x, weight, eps=EPS)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_at_most_twice_the_error_of_torch(dtype):
    squares = torch.zeros(2, 3, dtype=torch.float64)
    for seed, shape in enumerate(SHAPES):
        x, weight, dy = inputs(*shape, dtype=dtype, seed=seed)
        exact = results(definition, x.double(), weight.double(), dy)
        for who, function in enumerate((triton, definition)):
            parts = zip(results(function, x, weight, dy), exact, strict=True)
            squares[who] += torch.stack([(got - want).square().mean() for got, want in parts])
    assert (squares[0] <= 4 * squares[1]).all(), (squares[0] / squares[1]).sqrt()  # of squares: 2 squared


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # eps = 0, where a program has no row
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_powers_of_two_come_out_exactly(dtype):
    """x = ±4, so the mean of squares is 16 and nothing is rounded; the backward is zero where dn is along n."""
    x = (torch.randint(0, 2, (7, 40), generator=torch.Generator().manual_seed(0)) * 8 - 4).to(dtype)
    weight = 2.0 ** (torch.arange(40) % 5).to(dtype)
    y = rms_norm(x, weight, eps=0.0, backend="triton")
    assert torch.equal(y, weight * x / 4)
    with torch.no_grad():
        assert torch.equal(rms_norm(x, weight, eps=0.0, backend="triton"), y)
    x.requires_grad_()
    ones = torch.ones(40, dtype=dtype, requires_grad=True)
    dx, dw = torch.autograd.grad(rms_norm(x, ones, eps=0.0, backend="triton"), (x, ones), x / 4)
    assert (dx == 0).all() and (dw == 7).all()


@pytest.mark.parametrize("rows", [1, 31, 32, 33, 257])
def test_the_weight_s_gradient_is_added_up_over_many_programs(rows, monkeypatch):
    monkeypatch.setattr(triton_kernels, "processors", lambda device: 1)  # 4 programs
    x, weight, dy = inputs(rows, 300)
    got, again, want = (results(f, x, weight, dy) for f in (triton, triton, definition))
    for one, other, right in zip(got, again, want, strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, right, rtol=1e-4, atol=1e-5)


def test_only_the_gradients_asked_for():
    x, weight, dy = inputs(5, 123)
    _, dx, dw = results(triton, x, weight, dy)
    assert torch.equal(torch.autograd.grad(triton(x.requires_grad_(), weight), x, dy)[0].double(), dx)
    x = x.detach()
    assert torch.equal(torch.autograd.grad(triton(x, weight.requires_grad_()), weight, dy)[0].double(), dw)


def test_nothing_is_written_outside_and_nan_stays_in_its_row():
    x, weight, dy = inputs(6, 123)
    x[2, 100] = float("nan")
    y, dx, dw = results(triton, x, weight, dy)
    expected = torch.zeros(6, 123, dtype=torch.bool)
    expected[2] = True
    assert torch.equal(y.isnan(), expected) and torch.equal(dx.isnan(), expected) and dw.isnan().all()


def test_a_wider_weight_widens_the_result():
    x, weight, _ = inputs(5, 123, dtype=torch.bfloat16)
    y = triton(x, weight.float())
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, definition(x, weight.float()), rtol=0.01, atol=0.01)  # x r to bfloat16: 1 in 256


@pytest.mark.parametrize("shape", [(0, 7), (2, 0, 7), (2, 3, 0)])
def test_empty(shape):
    x, weight, dy = inputs(*shape)
    y, dx, dw = results(triton, x, weight, dy)
    assert y.shape == dx.shape == shape and (dw == 0).all() and dw.shape == shape[-1:]


def test_strides_do_not_matter():
    x, weight, _ = inputs(6, 4, 7)
    x.requires_grad_()
    for view in (x.transpose(0, 1), x[::2, 1:], x[:, :1].expand(6, 4, 7)):
        y = triton(view, weight)
        torch.testing.assert_close(y, definition(view, weight))
        got = torch.autograd.grad(y.sum(), x)[0]
        torch.testing.assert_close(got, torch.autograd.grad(definition(view, weight).sum(), x)[0], rtol=1e-4, atol=1e-5)
