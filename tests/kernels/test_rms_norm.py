"""RMSNorm: by hand, against the definition and its autograd, in float64, and what it keeps for backward."""

from __future__ import annotations

import math

import pytest
import torch
from qlorag.kernels.rms_norm import rms_norm
from qlorag.kernels.rms_norm.reference import rms_norm as reference
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

pytestmark = pytest.mark.isa

EPS = 1e-5
SHAPES = [(5, 123), (123,), (2, 3, 64), (1, 1), (4, 1), (0, 7), (2, 0, 7), (2, 3, 0)]


def inputs(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=g, dtype=torch.float64)
    weight = 1 + 0.3 * torch.randn(shape[-1], generator=g, dtype=torch.float64)
    return x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()


def results(function, x: Tensor, weight: Tensor, dy: Tensor) -> list[Tensor]:
    """y, dx and dw in float64, of inputs taken over in their own dtype."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = function(x, weight, eps=EPS)
    return [y.detach().double(), *(g.double() for g in torch.autograd.grad(y, (x, weight), dy.to(y.dtype)))]


def test_by_hand() -> None:
    # The mean of 9 and 16 is 12.5, so r = 1 / sqrt(12.5) = 0.282843 and n = (0.848528, 1.131371).
    x = torch.tensor([3.0, 4.0], requires_grad=True)
    weight = torch.tensor([1.0, 2.0], requires_grad=True)
    y = rms_norm(x, weight, eps=0.0)
    assert y.tolist() == pytest.approx([3 / math.sqrt(12.5), 8 / math.sqrt(12.5)])
    y.sum().backward()
    # dn = (1, 2), mean(dn n) = 1.555635; dx = r (1 - 1.319..., 2 - 1.76) = r (-0.32, 0.24). dw = n.
    assert x.grad is not None and weight.grad is not None
    assert x.grad.tolist() == pytest.approx([-0.32 / math.sqrt(12.5), 0.24 / math.sqrt(12.5)], rel=1e-5)
    assert weight.grad.tolist() == pytest.approx([0.848528, 1.131371], rel=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradcheck(shape: tuple[int, ...]) -> None:
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, eps=EPS), inputs(*shape))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_definition_and_its_autograd_in_float64(shape: tuple[int, ...]) -> None:
    x, weight = inputs(*shape)
    dy = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for got, want in zip(results(rms_norm, x, weight, dy), results(reference, x, weight, dy), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_errs_no_more_than_twice_as_much_as_torch(dtype: torch.dtype) -> None:
    squares = torch.zeros(2, 3, dtype=torch.float64)
    for seed, shape in enumerate([(5, 123), (7, 576), (33, 64), (2, 3, 1000)]):
        x, weight = inputs(*shape, dtype=dtype, seed=seed)
        dy = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
        exact = results(reference, x.double(), weight.double(), dy)
        for who, function in enumerate((rms_norm, reference)):
            parts = zip(results(function, x, weight, dy), exact, strict=True)
            squares[who] += torch.stack([(got - want).square().mean() for got, want in parts])
    ours, torchs = squares
    assert (ours <= 4 * torchs).all(), (ours / torchs).sqrt()  # of squares: 2 squared


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_forward_has_the_bits_of_the_definition(dtype: torch.dtype) -> None:
    x, weight = inputs(5, 123, dtype=dtype)
    want = reference(x, weight, eps=EPS)
    assert torch.equal(rms_norm(x, weight, eps=EPS), want)
    with torch.no_grad():
        assert torch.equal(rms_norm(x, weight, eps=EPS), want)


def test_a_wider_weight_widens_the_result() -> None:
    x, weight = inputs(5, 123, dtype=torch.bfloat16)
    wide = weight.detach().float().requires_grad_()
    y = rms_norm(x, wide, eps=EPS)
    assert y.dtype == torch.float32 and torch.equal(y, reference(x, wide, eps=EPS))
    dx, dw = torch.autograd.grad(y.sum(), (x, wide))
    assert (dx.dtype, dw.dtype) == (torch.bfloat16, torch.float32)


def test_only_the_gradients_asked_for() -> None:
    x, weight = inputs(5, 12)
    both = torch.autograd.grad(rms_norm(x, weight, eps=EPS).square().sum(), (x, weight))
    (dx,) = torch.autograd.grad(rms_norm(x, weight.detach(), eps=EPS).square().sum(), x)
    (dw,) = torch.autograd.grad(rms_norm(x.detach(), weight, eps=EPS).square().sum(), weight)
    assert torch.equal(dx, both[0]) and torch.equal(dw, both[1])


def test_strides_do_not_matter() -> None:
    x, weight = inputs(6, 4, 3)
    for view in (x.transpose(0, 1), x[::2, 1:], x[:, :1].expand(6, 4, 3)):
        y = rms_norm(view, weight, eps=EPS)
        torch.testing.assert_close(y, reference(view, weight, eps=EPS))
        got = torch.autograd.grad(y.sum(), x)[0]  # whose dy is one number, expanded
        torch.testing.assert_close(got, torch.autograd.grad(reference(view, weight, eps=EPS).sum(), x)[0])


def test_keeps_x_and_one_number_per_row() -> None:
    x, weight = inputs(8, 64, dtype=torch.bfloat16)
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        rms_norm(x, weight.detach(), eps=EPS)
    assert sorted(t.nbytes for t in kept) == [8 * 4, 64 * 2, 8 * 64 * 2]  # r, the weight itself, x
    assert {t.data_ptr() for t in kept} >= {x.data_ptr(), weight.data_ptr()}


def test_large_and_small_rows_stay_finite() -> None:
    x = torch.tensor([[1e18, -1e18], [1e-30, 1e-30], [0.0, 0.0]], requires_grad=True)
    y = rms_norm(x, torch.ones(2), eps=EPS)
    y.sum().backward()
    assert y[0].tolist() == [1.0, -1.0] and y.isfinite().all() and x.grad is not None and x.grad.isfinite().all()


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(4), r"x \[2, 3\] and weight \[4\], wanted \[..., D\] and \[D\]"),
        (torch.zeros(2, 3), torch.zeros(2, 3), r"x \[2, 3\] and weight \[2, 3\], wanted"),
        (torch.zeros(()), torch.zeros(1), r"x \[\] and weight \[1\], wanted"),
    ],
)
def test_what_does_not_fit(x: Tensor, weight: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rms_norm(x, weight, eps=EPS)


def test_a_named_backend_runs_or_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = inputs(2, 3, dtype=torch.float32)
    assert torch.equal(rms_norm(x, weight, eps=EPS, backend="torch"), rms_norm(x, weight, eps=EPS))
    with pytest.raises(ValueError, match="backend='c' does not exist: there are triton, torch"):
        rms_norm(x, weight, eps=EPS, backend="c")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="backend='triton' cannot run: the tensors are on cpu, and it runs on a GPU"):
        rms_norm(x, weight, eps=EPS, backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # nothing is launched: the arguments are refused first
    with pytest.raises(ValueError, match=r"backend='triton' cannot run: dtype=torch.float64, and it takes float32"):
        rms_norm(x.double(), weight, eps=EPS, backend="triton")
    with pytest.raises(ValueError, match="cannot run: D=8193, and it takes rows of up to 8192"):
        rms_norm(torch.zeros(1, 8193), torch.zeros(8193), eps=EPS, backend="triton")
    with pytest.raises(ValueError, match=r"cannot run: weight is torch.float64, and it takes"):
        rms_norm(x, weight.double(), eps=EPS, backend="triton")
