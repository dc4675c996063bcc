"""The low-rank update's Triton kernel against the definition in float64, with at most twice torch's error."""

from __future__ import annotations

import pytest
import torch
from qlorag.kernels.lora import add_lora
from qlorag.kernels.lora.reference import add_lora as reference

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
S = 0.7
# Leading dimensions, N, K, R: tiles filled and not; ranks below, at and above a step, and between steps.
SHAPES = [((5,), 123, 77, 3), ((64,), 64, 32, 16), ((65,), 129, 40, 8), ((2, 9), 33, 20, 64), ((3,), 70, 90, 100)]


def inputs(lead, n, k, r, *, dtype=torch.float32, seed=0):
    """Base, x, A, B of products of size 1, and dy."""
    g = torch.Generator().manual_seed(seed)
    shapes = ((*lead, n), (*lead, k), (r, k), (n, r), (*lead, n))
    scales = (1, 1, k**-0.5, r**-0.5, 1)
    return [(s * torch.randn(shape, generator=g)).to(dtype) for s, shape in zip(scales, shapes, strict=True)]


def results(function, *arguments):
    """y, dbase, dx, dA, dB in float64."""
    *leaves, dy = (t.detach() for t in arguments)
    leaves = [t.requires_grad_() for t in leaves]
    y = function(*leaves)
    return [y.detach().double(), *(g.double() for g in torch.autograd.grad(y, leaves, dy.to(y.dtype)))]


def triton(*arguments):
    return add_lora(*arguments, scaling=S, backend="triton")


def definition(*arguments):
    return reference(*arguments, scaling=S)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_at_most_twice_the_error_of_torch(dtype):
    squares = torch.zeros(2, 5, dtype=torch.float64)
    for seed, shape in enumerate(SHAPES):
        arguments = inputs(*shape, dtype=dtype, seed=seed)
        exact = results(definition, *(t.double() for t in arguments))
        for who, function in enumerate((triton, definition)):
            parts = zip(results(function, *arguments), exact, strict=True)
            squares[who] += torch.stack([(got - want).square().mean() for got, want in parts])
    assert (squares[0] <= 4 * squares[1]).all(), (squares[0] / squares[1]).sqrt()  # of squares: 2 squared


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_whole_numbers_come_out_exactly(shape, dtype):
    """Each element in its place: sums of small whole numbers are exact in every dtype, whatever their order."""
    base, x, A, B, _ = inputs(*shape)
    base = base.mul(8).round().to(dtype)
    rank = torch.arange(A.shape[0])
    A = torch.zeros_like(A).index_put((rank, rank % A.shape[1]), torch.tensor(1.0)).to(dtype)  # picks out columns
    x, B = x.clamp(-1, 1).round().to(dtype), torch.zeros_like(B)
    column = torch.arange(B.shape[0])
    B[column, column % B.shape[1]] = 4.0
    got = add_lora(base, x, A, B, scaling=0.5, backend="triton")
    assert torch.equal(got, base + 2 * x[..., (column % len(rank)) % x.shape[-1]])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_float32_adapter_over_a_16_bit_base(dtype):
    base, x, A, B, dy = inputs((17,), 40, 24, 8, dtype=dtype)
    got, want = (results(f, base, x, A.float(), B.float(), dy) for f in (triton, lambda *a: add_lora(*a, scaling=S)))
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=0.01, atol=0.02)  # an ulp of bfloat16 is 1 in 128
    with torch.no_grad():
        y = triton(base, x, A.float(), B.float())
    assert y.dtype == dtype and torch.equal(y.double(), got[0])


def test_nan_reaches_its_own_results_only():
    base, x, A, B, _ = inputs((66,), 130, 24, 8)
    base[3, 100] = x[65, 2] = B[129, 7] = float("nan")
    expected = torch.zeros(66, 130, dtype=torch.bool)
    expected[3, 100] = expected[65] = expected[:, 129] = True
    assert torch.equal(triton(base, x, A, B).isnan(), expected)


def test_base_is_not_written_to():
    base, x, A, B, _ = inputs((5,), 123, 77, 3)
    before = base.clone()
    y = triton(base, x, A, B)
    assert torch.equal(base, before) and y.data_ptr() != base.data_ptr()


@pytest.mark.parametrize("lead", [(0,), (2, 0)])
def test_empty(lead):
    y, dbase, dx, dA, dB = results(triton, *inputs(lead, 4, 6, 2))
    assert y.shape == dbase.shape == (*lead, 4) and dx.shape == (*lead, 6) and (dA == 0).all() and (dB == 0).all()


def test_strides_do_not_matter():
    base, x, A, B, _ = inputs((6, 4), 10, 7, 3)
    views = [base.transpose(0, 1), x.transpose(0, 1), A.T.contiguous().T, B[:, :1].expand(10, 3)]
    torch.testing.assert_close(triton(*views), definition(*views))
    torch.testing.assert_close(triton(base[:1].expand(6, 4, 10), x, A, B), definition(base[:1], x, A, B))
