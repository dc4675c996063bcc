"""Rotary positions: by hand, against the definition and its autograd, in float64; the backward turns back."""

from __future__ import annotations

import math

import pytest
import torch
from qlorag.kernels.rope import rope
from qlorag.kernels.rope.reference import rope as reference
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

pytestmark = pytest.mark.isa

SHAPES = [(5, 124), (2, 3, 7, 10), (1, 2), (2, 3, 1, 4, 6), (3, 0, 8), (0, 3, 8)]


def tables(tokens: int, d: int, *, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """As models/decoder/rope.py makes them: the same angles in both halves."""
    angles = torch.arange(tokens, dtype=torch.float64)[:, None] * 10000 ** (-torch.arange(d // 2).double() * 2 / d)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def inputs(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.to(dtype).requires_grad_(), *tables(*shape[-2:], dtype=dtype)


def test_by_hand() -> None:
    # d = 4: dimensions (0, 2) turn by 90 degrees, (1, 3) by 0.
    cos = torch.tensor([[0.0, 1.0, 0.0, 1.0]])
    sin = torch.tensor([[1.0, 0.0, 1.0, 0.0]])
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0]], requires_grad=True)
    y = rope(x, cos, sin)
    assert y.tolist() == [[-3.0, 2.0, 1.0, 4.0]]
    y.backward(torch.tensor([[-3.0, 2.0, 1.0, 4.0]]))
    assert x.grad is not None and x.grad.tolist() == x.tolist()  # turned back


def test_scores_depend_on_the_distance_of_positions() -> None:
    q, k = torch.randn(2, 1, 8, dtype=torch.float64)
    cos, sin = tables(20, 8)
    turned_q, turned_k = rope(q.expand(20, 8), cos, sin), rope(k.expand(20, 8), cos, sin)
    scores = turned_q @ turned_k.T
    for distance in range(-5, 6):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm().expand(20))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradcheck(shape: tuple[int, ...]) -> None:
    x, cos, sin = inputs(*shape)
    assert torch.autograd.gradcheck(rope, (x, cos, sin))
    halves_differ = torch.randn(2, *shape[-2:], dtype=torch.float64)
    assert torch.autograd.gradcheck(rope, (x, *halves_differ))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_errs_no_more_than_twice_as_much_as_torch(dtype: torch.dtype) -> None:
    x, cos, sin = inputs(2, 3, 41, 64, dtype=dtype)
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(dtype)

    def results(function, *arguments: Tensor) -> tuple[Tensor, Tensor]:
        x = arguments[0].detach().requires_grad_()
        y = function(x, *arguments[1:])
        return y.detach().double(), torch.autograd.grad(y, x, dy.to(y.dtype))[0].double()

    exact = results(reference, x.double(), cos.double(), sin.double())
    ours, torchs = (
        [(got - want).norm().item() for got, want in zip(results(f, x, cos, sin), exact, strict=True)]
        for f in (rope, reference)
    )
    assert all(a <= 2 * b for a, b in zip(ours, torchs, strict=True)), (ours, torchs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_forward_has_the_bits_of_the_definition(dtype: torch.dtype) -> None:
    x, cos, sin = inputs(2, 5, 3, 64, dtype=dtype)
    for view in (x, x.transpose(1, 2)[..., :5, :].transpose(1, 2), x.detach()[:, :1].expand(2, 4, 3, 64)):
        want = reference(view, cos, sin)
        assert torch.equal(rope(view, cos, sin), want)
        with torch.no_grad():
            assert torch.equal(rope(view, cos, sin), want)


def test_wider_tables_widen_the_result() -> None:
    """As under autocast, where the projections give bfloat16 and the tables are float32."""
    x, cos, sin = inputs(2, 5, 3, 64, dtype=torch.bfloat16)
    tables = cos.float() + 1e-4, sin.float() - 1e-4  # not bfloat16 numbers
    y = rope(x, *tables)
    assert y.dtype == torch.float32 and torch.equal(y, reference(x, *tables))
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    got, want = (torch.autograd.grad(f(x, *tables), x, dy)[0] for f in (rope, reference))
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, rtol=0.01, atol=0.02)  # which is rounded twice, to 1 in 256 each


def test_backward_is_the_rotation_by_the_negative_angle() -> None:
    x, cos, sin = inputs(2, 4, 6, 8)
    dy = torch.randn(2, 6, 4, 8, dtype=torch.float64).transpose(1, 2)  # as attention's backward may lay it out
    (dx,) = torch.autograd.grad(rope(x, cos, sin), x, dy)
    torch.testing.assert_close(dx, reference(dy, cos, -sin))


def test_keeps_the_tables_only() -> None:
    x, cos, sin = inputs(2, 4, 6, 8)
    kept: list[int] = []
    with saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        rope(x, cos, sin)
    assert set(kept) == {cos.data_ptr(), sin.data_ptr()}


def test_equals_complex_multiplication() -> None:
    """The point (x1, x2) as a complex number, times exp(i angle)."""
    x, cos, sin = inputs(3, 7, 10)
    turned = torch.complex(x[..., :5], x[..., 5:]) * torch.polar(
        torch.ones(7, 5, dtype=torch.float64), torch.atan2(sin, cos)[:, :5]
    )
    torch.testing.assert_close(rope(x, cos, sin), torch.cat((turned.real, turned.imag), -1))
    assert math.isclose(sin[1, 0].item(), math.sin(1))


@pytest.mark.parametrize(
    ("x", "cos", "sin", "message"),
    [
        (torch.zeros(2, 4), torch.zeros(3, 4), torch.zeros(3, 4), r"x \[2, 4\], cos \[3, 4\] and sin \[3, 4\], wanted"),
        (torch.zeros(2, 4), torch.zeros(2, 4), torch.zeros(2, 2), r"cos \[2, 4\] and sin \[2, 2\], wanted \[..., T, d"),
        (torch.zeros(2, 5), torch.zeros(2, 5), torch.zeros(2, 5), r"x \[2, 5\].* with d even"),
        (torch.zeros(4), torch.zeros(4), torch.zeros(4), r"x \[4\], cos \[4\]"),
        (torch.zeros(2, 4), torch.zeros(2, 4), torch.zeros(2, 4).half(), "cos is torch.float32 and sin torch.float16"),
    ],
)
def test_what_does_not_fit(x: Tensor, cos: Tensor, sin: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rope(x, cos, sin)


def test_a_named_backend_runs_or_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    x, cos, sin = inputs(2, 3, 4, dtype=torch.float32)
    assert torch.equal(rope(x, cos, sin, backend="torch"), rope(x, cos, sin))
    with pytest.raises(ValueError, match="backend='c' does not exist: there are triton, torch"):
        rope(x, cos, sin, backend="c")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="backend='triton' cannot run: the tensors are on cpu, and it runs on a GPU"):
        rope(x, cos, sin, backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match=r"backend='triton' cannot run: dtype=torch.float64, and it takes float32"):
        rope(x.double(), cos.double(), sin.double(), backend="triton")
    with pytest.raises(ValueError, match=r"backend='triton' cannot run: cos is torch.float64, and it takes float32"):
        rope(x, cos.double(), sin.double(), backend="triton")
