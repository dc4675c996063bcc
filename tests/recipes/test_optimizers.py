"""AdamW by hand, what of it a resumed run takes over, and clipping. Against torch.optim: test_trainer.py."""

from __future__ import annotations

import math

import pytest
import torch
from qlorag.recipes.training.optimizers import AdamW, clip_gradients
from torch import nn


def parameter(*values: float, grad: list[float] | None = None) -> nn.Parameter:
    p = nn.Parameter(torch.tensor(values, dtype=torch.float64))
    p.grad = None if grad is None else torch.tensor(grad, dtype=torch.float64)
    return p


def test_two_steps_by_hand() -> None:
    """b1 = 0.5, b2 = 0.75, eps = 1, lr = 0.1, decay = 2, p = 3.

    g = 2: m = 1, v = 1; m̂ = 1 / 0.5 = 2, v̂ = 1 / 0.25 = 4; p = 3 (1 - 0.2) - 0.1 · 2 / (2 + 1) = 2.4 - 0.2/3
    g = 0: m = 0.5, v = 0.75; m̂ = 0.5 / 0.75 = 2/3, v̂ = 0.75 / 0.4375 = 12/7
    """
    p = parameter(3.0, grad=[2.0])
    optimizer = AdamW({"p": p}, weight_decay=2.0, betas=(0.5, 0.75), eps=1.0)
    optimizer.step(0.1)
    assert optimizer.steps == 1
    assert (optimizer.m["p"].item(), optimizer.v["p"].item()) == (1.0, 1.0)
    first = 2.4 - 0.2 / 3
    assert p.item() == pytest.approx(first, rel=1e-12)
    p.grad = torch.zeros(1, dtype=torch.float64)
    optimizer.step(0.1)
    assert (optimizer.m["p"].item(), optimizer.v["p"].item()) == (0.5, 0.75)
    assert p.item() == pytest.approx(first * 0.8 - 0.1 * (2 / 3) / (math.sqrt(12 / 7) + 1), rel=1e-12)


def test_usual_settings_are_the_papers() -> None:
    optimizer = AdamW({})
    assert (optimizer.weight_decay, optimizer.betas, optimizer.eps, optimizer.steps) == (0.0, (0.9, 0.999), 1e-8, 0)


def test_a_parameter_without_gradient_stays_and_the_others_move() -> None:
    still, moved = parameter(1.0), parameter(1.0, grad=[1.0])
    optimizer = AdamW({"a": still, "b": moved}, weight_decay=0.5)
    optimizer.step(0.1)
    assert still.item() == 1.0 and moved.item() == pytest.approx(1 - 0.05 - 0.1)
    optimizer.zero_grad()
    assert still.grad is None and moved.grad is None


def stepped() -> AdamW:
    optimizer = AdamW({"a": parameter(1.0, 2.0, grad=[1.0, -3.0]), "b": parameter(4.0, grad=[2.0])})
    optimizer.step(0.1)
    return optimizer


def test_state_goes_and_comes_back_by_name() -> None:
    one, other = stepped(), AdamW({"a": parameter(1.0, 2.0), "b": parameter(4.0)})
    state = one.state_dict()
    assert sorted(state) == ["m.a", "m.b", "v.a", "v.b"]
    assert state["m.a"].tolist() == pytest.approx([0.1, -0.3]) and state["v.b"].tolist() == pytest.approx([0.004])
    other.load_state_dict(state, steps=7)
    assert other.steps == 7
    assert all(torch.equal(t, state[name]) for name, t in other.state_dict().items())
    other.m["a"].zero_()
    assert state["m.a"].tolist() != [0, 0]  # it was copied


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"m.a": None}, "m.a is missing, unexpected or of another shape (1 such)"),
        ({"m.a": None, "v.b": None}, "m.a is missing, unexpected or of another shape (2 such)"),
        ({"m.c": torch.zeros(1)}, "m.c is missing, unexpected or of another shape (1 such)"),
        ({"v.a": torch.zeros(1)}, "v.a is missing, unexpected or of another shape (1 such)"),
    ],
)
def test_a_state_of_other_parameters_is_refused(change: dict[str, torch.Tensor | None], message: str) -> None:
    optimizer = stepped()
    before = {name: t.clone() for name, t in optimizer.state_dict().items()}
    state = {name: t + 1 for name, t in optimizer.state_dict().items()} | change
    with pytest.raises(ValueError) as error:
        optimizer.load_state_dict({name: t for name, t in state.items() if t is not None}, steps=9)
    assert str(error.value) == message
    assert optimizer.steps == 1 and all(torch.equal(before[name], t) for name, t in optimizer.state_dict().items())


@pytest.mark.parametrize(
    ("limit", "wanted"),
    [(2.5, [1.5, 2.0]), (0.0, [3.0, 4.0]), (5.0, [3.0, 4.0]), (9.0, [3.0, 4.0]), (0.5, [0.3, 0.4])],
)
def test_the_joint_norm_is_clipped(limit: float, wanted: list[float]) -> None:
    """(3, 4) over two parameters has the norm 5."""
    parameters = {"a": parameter(0.0, grad=[3.0]), "b": parameter(0.0, grad=[4.0]), "c": parameter(0.0)}
    assert clip_gradients(parameters, limit) == 5.0
    assert [parameters[n].grad.item() for n in "ab"] == pytest.approx(wanted, rel=1e-15)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_norm_that_is_not_finite_is_returned_and_scales_nothing(bad: float) -> None:
    parameters = {"a": parameter(0.0, 0.0, grad=[3.0, bad])}
    assert not math.isfinite(clip_gradients(parameters, 1.0))
    assert parameters["a"].grad[0].item() == 3.0


def test_squares_beyond_float32_are_summed_in_float64() -> None:
    p = nn.Parameter(torch.zeros(2))
    p.grad = torch.tensor([3e30, 4e30])
    assert clip_gradients({"p": p}, 1.0) == pytest.approx(5e30)
    assert p.grad.tolist() == pytest.approx([0.6, 0.8])
