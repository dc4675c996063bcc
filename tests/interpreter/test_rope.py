"""The rotary kernel of Triton against the definition in float64, with at most twice torch's error."""

from __future__ import annotations

import pytest
import torch
from qlorag.kernels.rope import rope, triton_kernels
from qlorag.kernels.rope.reference import rope as reference

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# Tokens that do and do not fill a tile; halves of d that are and are not powers of two.
SHAPES = [(5, 124), (2, 3, 41, 64), (1, 2), (33, 64), (2, 4, 9, 128), (3, 5, 10), (1, 2, 130, 48), (2, 1, 3, 7, 6)]


def inputs(*shape, dtype=torch.float32, seed=0):
    """x, any tables (halves that differ, too), dy."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=g).to(dtype) for s in (shape, shape[-2:], shape[-2:], shape)]


def results(function, x, cos, sin, dy):
    """y and dx in float64."""
    x = x.detach().requires_grad_()
    y = function(x, cos, sin)
    return [y.detach().double(), torch.autograd.grad(y, x, dy.to(y.dtype))[0].double()]


def triton(x, cos, sin):
    return rope(x, cos, sin, backend="triton")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_at_most_twice_the_error_of_torch(dtype):
    squares = torch.zeros(2, 2, dtype=torch.float64)
    for seed, shape in enumerate(SHAPES):
        x, cos, sin, dy = inputs(*shape, dtype=dtype, seed=seed)
        exact = results(reference, x.double(), cos.double(), sin.double(), dy)
        for who, function in enumerate((triton, reference)):
            parts = zip(results(function, x, cos, sin, dy), exact, strict=True)
            squares[who] += torch.stack([(got - want).square().mean() for got, want in parts])
    assert (squares[0] <= 4 * squares[1]).all(), (squares[0] / squares[1]).sqrt()  # of squares: 2 squared


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quarter_turns_are_exact(shape, dtype):
    """Angles of 0, 90, 180 and 270 degrees move whole numbers and change signs: each element in its place."""
    x, *_, dy = (t.mul(8).round() for t in inputs(*shape, dtype=dtype))
    quarter = torch.randint(0, 4, (*shape[-2:-1], shape[-1] // 2), generator=torch.Generator().manual_seed(1))
    quarter = torch.cat((quarter, quarter), -1)
    cos, sin = (torch.tensor(t, dtype=dtype)[quarter] for t in ([1, 0, -1, 0], [0, 1, 0, -1]))
    got, want = (results(f, x, cos, sin, dy) for f in (triton, reference))
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    assert torch.equal(triton(triton(x, cos, sin), cos, -sin), x)


@pytest.mark.parametrize("processors", [1, 2, 1000])
def test_heads_are_divided_among_programs(processors, monkeypatch):
    monkeypatch.setattr(triton_kernels, "processors", lambda device: processors)
    x, cos, sin, _ = inputs(2, 5, 40, 64)
    torch.testing.assert_close(triton(x, cos, sin), reference(x, cos, sin))


def test_the_layout_of_x_is_kept():
    """Queries are [B, T, H, d] in memory, seen as [B, H, T, d]."""
    x, cos, sin, dy = inputs(2, 9, 41, 64)
    seen = x.transpose(1, 2).contiguous().transpose(1, 2)
    y = triton(seen, cos, sin)
    assert y.stride() == seen.stride() and torch.equal(y, triton(x, cos, sin))
    leaf = seen.detach().requires_grad_()
    (dx,) = torch.autograd.grad(triton(leaf, cos, sin), leaf, dy)
    assert torch.equal(dx.double(), results(triton, x, cos, sin, dy)[1])


def test_wider_tables_widen_the_result():
    x, cos, sin, dy = inputs(2, 9, 41, 64, dtype=torch.bfloat16)
    tables = cos.float() + 1e-4, sin.float() - 1e-4  # not bfloat16 numbers
    (y, dx), (want, want_dx) = (results(f, x, *tables, dy) for f in (triton, reference))
    assert triton(x, *tables).dtype == torch.float32
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dx, want_dx, rtol=0.01, atol=0.02)  # rounded to bfloat16


def test_views_with_holes_and_repetitions():
    x, cos, sin, _ = inputs(4, 6, 10, 16)
    wide = inputs(4, 6, 10, 32)[0]
    for view in (x[:, ::2], x[:, :1].expand(4, 6, 10, 16), wide[..., ::2], wide[..., 8:24], x.mT.contiguous().mT):
        torch.testing.assert_close(triton(view, cos, sin), reference(view, cos, sin))
    parts = torch.stack((cos, sin), -1)
    torch.testing.assert_close(triton(x, parts[..., 0], parts[..., 1]), reference(x, cos, sin))


def test_nan_stays_in_its_pair():
    x, cos, sin, dy = inputs(2, 33, 10)
    x[1, 32, 7] = float("nan")
    expected = torch.zeros(2, 33, 10, dtype=torch.bool)
    expected[1, 32, [2, 7]] = True
    y, dx = results(triton, x, cos, sin, dy)
    assert torch.equal(y.isnan(), expected) and not dx.isnan().any()


@pytest.mark.parametrize("shape", [(0, 3, 8), (3, 0, 8), (2, 0, 5, 8)])
def test_empty(shape):
    assert all(t.shape == shape for t in results(triton, *inputs(*shape)))
