"""SwiGLU: by hand, against the definition and its autograd, in float64, and what it keeps for backward."""

from __future__ import annotations

import math

import pytest
import torch
from qlorag.kernels.swiglu import swiglu
from qlorag.kernels.swiglu.reference import swiglu as reference
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

pytestmark = pytest.mark.isa

SHAPES = [(5, 123), (), (1,), (2, 3, 64), (0, 7)]


def inputs(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    gate, up = (3 * torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(2))
    return gate.to(dtype).requires_grad_(), up.to(dtype).requires_grad_()


def results(function, gate: Tensor, up: Tensor, dh: Tensor) -> list[Tensor]:
    """h, dgate and dup in float64, of inputs taken over in their own dtype."""
    gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
    h = function(gate, up)
    return [h.detach().double(), *(g.double() for g in torch.autograd.grad(h, (gate, up), dh.to(h.dtype)))]


def test_by_hand() -> None:
    # g = log 3: sigmoid is 3/4, silu is 0.75 log 3, and its slope 0.75 (1 + 0.25 log 3).
    gate = torch.tensor([0.0, math.log(3)], requires_grad=True)
    up = torch.tensor([5.0, 2.0], requires_grad=True)
    h = swiglu(gate, up)
    assert h.tolist() == pytest.approx([0.0, 1.5 * math.log(3)])
    h.sum().backward()
    assert gate.grad is not None and up.grad is not None
    assert gate.grad.tolist() == pytest.approx([5 * 0.5, 2 * 0.75 * (1 + 0.25 * math.log(3))])
    assert up.grad.tolist() == pytest.approx([0.0, 0.75 * math.log(3)])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradcheck(shape: tuple[int, ...]) -> None:
    assert torch.autograd.gradcheck(swiglu, inputs(*shape))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_definition_and_its_autograd_in_float64(shape: tuple[int, ...]) -> None:
    gate, up = inputs(*shape)
    dh = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for got, want in zip(results(swiglu, gate, up, dh), results(reference, gate, up, dh), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_errs_no_more_than_twice_as_much_as_torch(dtype: torch.dtype) -> None:
    gate, up = inputs(5, 123, dtype=dtype)
    dh = torch.randn(5, 123, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact = results(reference, gate.double(), up.double(), dh)
    ours, torchs = (
        [(got - want).norm().item() for got, want in zip(results(f, gate, up, dh), exact, strict=True)]
        for f in (swiglu, reference)
    )
    assert all(a <= 2 * b for a, b in zip(ours, torchs, strict=True)), (ours, torchs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_forward_has_the_bits_of_the_definition(dtype: torch.dtype) -> None:
    gate, up = inputs(5, 123, dtype=dtype)
    want, before = reference(gate, up), (gate.detach().clone(), up.detach().clone())
    assert torch.equal(swiglu(gate, up), want)
    with torch.no_grad():
        assert torch.equal(swiglu(gate, up), want)
    assert torch.equal(gate, before[0]) and torch.equal(up, before[1])


def test_extreme_gates_stay_finite() -> None:
    gate = torch.tensor([-1e4, -88.0, 88.0, 1e4], requires_grad=True)
    up = torch.full((4,), 2.0, requires_grad=True)
    h = swiglu(gate, up)
    h.sum().backward()
    assert h.tolist() == pytest.approx([0, 0, 176, 2e4], abs=1e-30)
    assert gate.grad is not None and gate.grad.tolist() == pytest.approx([0, 0, 2, 2], abs=1e-30)


def test_only_the_gradients_asked_for() -> None:
    gate, up = inputs(5, 12)
    both = torch.autograd.grad(swiglu(gate, up).square().sum(), (gate, up))
    (dg,) = torch.autograd.grad(swiglu(gate, up.detach()).square().sum(), gate)
    (du,) = torch.autograd.grad(swiglu(gate.detach(), up).square().sum(), up)
    assert torch.equal(dg, both[0]) and torch.equal(du, both[1])


def test_halves_of_one_tensor() -> None:
    """As a fused gate-and-up projection gives them: rows with gaps between."""
    both = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: swiglu(*t.chunk(2, -1)), (both,))


def test_keeps_its_two_inputs_and_nothing_else() -> None:
    gate, up = inputs(8, 64, dtype=torch.bfloat16)
    kept: dict[str, list[int]] = {}
    for name, function in (("ours", swiglu), ("autograd", reference)):
        with saved_tensors_hooks(lambda t, name=name: kept.setdefault(name, []).append(t.data_ptr()) or t, lambda t: t):
            h = function(gate, up)
        assert h.data_ptr() not in kept[name]
    assert set(kept["ours"]) == {gate.data_ptr(), up.data_ptr()}
    assert len(set(kept["autograd"])) == 3  # silu(gate) too


@pytest.mark.parametrize(
    ("gate", "up", "message"),
    [
        (
            torch.zeros(2, 3),
            torch.zeros(3),
            r"gate is torch.float32 \[2, 3\] and up torch.float32 \[3\], wanted one dtype and shape",
        ),
        (
            torch.zeros(3),
            torch.zeros(3).half(),
            r"torch.float32 \[3\] and up torch.float16 \[3\], wanted one dtype and shape",
        ),
    ],
)
def test_what_does_not_fit(gate: Tensor, up: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        swiglu(gate, up)


def test_a_named_backend_runs_or_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, up = inputs(2, 3, dtype=torch.float32)
    assert torch.equal(swiglu(gate, up, backend="torch"), swiglu(gate, up))
    with pytest.raises(ValueError, match="backend='reference' does not exist: there are triton, torch"):
        swiglu(gate, up, backend="reference")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="backend='triton' cannot run: the tensors are on cpu, and it runs on a GPU"):
        swiglu(gate, up, backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match=r"backend='triton' cannot run: dtype=torch.float64, and it takes float32"):
        swiglu(gate.double(), up.double(), backend="triton")
