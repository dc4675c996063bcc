"""The low-rank update: by hand, against the definition and its autograd, in float64."""

from __future__ import annotations

import pytest
import torch
from qlorag.kernels.lora import add_lora
from qlorag.kernels.lora.reference import add_lora as reference
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

pytestmark = pytest.mark.isa

S = 0.7
# Leading dimensions, N, K, R.
SHAPES = [((5,), 123, 77, 3), ((), 4, 6, 2), ((2, 3), 8, 5, 1), ((1,), 1, 1, 1), ((0,), 4, 6, 2), ((2, 0), 4, 6, 2)]


def inputs(
    lead: tuple[int, ...], n: int, k: int, r: int, *, dtype: torch.dtype = torch.float64, seed: int = 0
) -> list[Tensor]:
    """Base, x, A, B of products of size 1."""
    g = torch.Generator().manual_seed(seed)
    shapes = ((*lead, n), (*lead, k), (r, k), (n, r))
    scales = (1, 1, k**-0.5, r**-0.5)
    made = [s * torch.randn(shape, generator=g, dtype=torch.float64) for s, shape in zip(scales, shapes, strict=True)]
    return [t.to(dtype).requires_grad_() for t in made]


def results(function, arguments: list[Tensor], dy: Tensor) -> list[Tensor]:
    """y, dbase, dx, dA, dB in float64, of inputs taken over in their own dtype."""
    leaves = [t.detach().requires_grad_() for t in arguments]
    y = function(*leaves)
    return [y.detach().double(), *(g.double() for g in torch.autograd.grad(y, leaves, dy.to(y.dtype)))]


def ours(*arguments: Tensor) -> Tensor:
    return add_lora(*arguments, scaling=S)


def definition(*arguments: Tensor) -> Tensor:
    return reference(*arguments, scaling=S)


def test_by_hand() -> None:
    base = torch.tensor([[10.0, 20.0]], requires_grad=True)
    x = torch.tensor([[1.0, 2.0, 3.0]], requires_grad=True)
    A = torch.tensor([[1.0, 0.0, 1.0]], requires_grad=True)  # z = 4
    B = torch.tensor([[1.0], [-2.0]], requires_grad=True)
    y = add_lora(base, x, A, B, scaling=0.5)
    assert y.tolist() == [[12.0, 16.0]]
    y.backward(torch.tensor([[1.0, 1.0]]))  # g = 0.5 (1 - 2) = -0.5
    assert base.grad is not None and base.grad.tolist() == [[1.0, 1.0]]
    assert x.grad is not None and x.grad.tolist() == [[-0.5, 0.0, -0.5]]
    assert A.grad is not None and A.grad.tolist() == [[-0.5, -1.0, -1.5]]
    assert B.grad is not None and B.grad.tolist() == [[2.0], [2.0]]


@pytest.mark.parametrize(("lead", "n", "k", "r"), SHAPES, ids=str)
def test_gradcheck(lead: tuple[int, ...], n: int, k: int, r: int) -> None:
    assert torch.autograd.gradcheck(ours, inputs(lead, min(n, 9), min(k, 7), r))


@pytest.mark.parametrize(("lead", "n", "k", "r"), SHAPES, ids=str)
def test_equals_the_definition_and_its_autograd_in_float64(lead: tuple[int, ...], n: int, k: int, r: int) -> None:
    arguments = inputs(lead, n, k, r)
    dy = torch.randn(*lead, n, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for got, want in zip(results(ours, arguments, dy), results(definition, arguments, dy), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_errs_no_more_than_twice_as_much_as_torch(dtype: torch.dtype) -> None:
    squares = torch.zeros(2, 5, dtype=torch.float64)
    for seed, (lead, n, k, r) in enumerate([((5,), 123, 77, 3), ((40,), 96, 64, 8), ((2, 9), 33, 200, 16)]):
        arguments = inputs(lead, n, k, r, dtype=dtype, seed=seed)
        dy = torch.randn(*lead, n, generator=torch.Generator().manual_seed(seed)).to(dtype)
        exact = results(definition, [t.double() for t in arguments], dy)
        for who, function in enumerate((ours, definition)):
            parts = zip(results(function, arguments, dy), exact, strict=True)
            squares[who] += torch.stack([(got - want).square().mean() for got, want in parts])
    # dbase is dy itself, without any error, in both.
    assert (squares[0] <= 4 * squares[1]).all(), (squares[0] / squares[1]).sqrt()  # of squares: 2 squared
    assert squares[0, 1] == squares[1, 1] == 0


def test_a_float32_adapter_over_a_16_bit_base() -> None:
    base, x, A, B = inputs((5,), 12, 8, 4, dtype=torch.bfloat16)
    A, B = A.detach().float().requires_grad_(), B.detach().float().requires_grad_()
    y = ours(base, x, A, B)
    assert y.dtype == torch.bfloat16
    gradients = torch.autograd.grad(y.sum(), (base, x, A, B))
    assert [g.dtype for g in gradients] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]


def test_only_the_gradients_asked_for() -> None:
    arguments = inputs((5,), 12, 8, 4)
    all_of_them = torch.autograd.grad(ours(*arguments).square().sum(), arguments)
    for i, want in enumerate(all_of_them):
        alone = [t if i == j else t.detach() for j, t in enumerate(arguments)]
        (got,) = torch.autograd.grad(ours(*alone).square().sum(), alone[i])
        assert torch.equal(got, want), i


def test_writes_to_none_of_its_arguments_and_keeps_no_output() -> None:
    base, x, A, B = inputs((6,), 12, 8, 2)
    before = [t.detach().clone() for t in (base, x, A, B)]
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = ours(base, x, A, B)
    assert sorted(list(t.shape) for t in kept) == sorted([[6, 8], [6, 2], [2, 8], [12, 2]])
    y.sum().backward()
    assert all(torch.equal(t, was) for t, was in zip((base, x, A, B), before, strict=True))


def test_strides_do_not_matter() -> None:
    base, x, A, B = inputs((6, 4), 10, 7, 3)
    views = [base.transpose(0, 1), x.transpose(0, 1), A.T.contiguous().T, B[:, :1].expand(10, 3)]
    torch.testing.assert_close(ours(*views), definition(*views))
    torch.testing.assert_close(ours(base[:1].expand(6, 4, 10), x, A, B), definition(base[:1], x, A, B))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 4), (2, 5), (3, 5), (4, 2)), r"base \[2, 4\], x \[2, 5\], lora_A \[3, 5\], lora_B \[4, 2\], wanted"),
        (((2, 4), (2, 5), (3, 6), (4, 3)), r"lora_A \[3, 6\].*wanted \[..., N\], \[..., K\], \[R, K\], \[N, R\]"),
        (((2, 4), (3, 5), (3, 5), (4, 3)), r"base \[2, 4\], x \[3, 5\]"),
        (((2, 4), (2, 5), (3, 5), (5, 3)), r"lora_B \[5, 3\]"),
        (((2, 4), (2, 5), (5,), (4, 3)), r"lora_A \[5\]"),
        (((), (), (3, 5), (4, 3)), r"base \[\], x \[\]"),
    ],
)
def test_what_does_not_fit(shapes: tuple[tuple[int, ...], ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ours(*(torch.zeros(shape) for shape in shapes))


@pytest.mark.parametrize("base_dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_base_and_the_products_may_have_two_dtypes(base_dtype: torch.dtype) -> None:
    base, x, A, B = inputs((5,), 12, 8, 4, dtype=torch.float32)
    wide = base.to(base_dtype)
    y = add_lora(wide, x, A, B, scaling=S)
    assert y.dtype == base_dtype
    exact = definition(*(t.double() for t in (wide, x, A, B)))
    torch.testing.assert_close(y.double(), exact, rtol=torch.finfo(base_dtype).eps, atol=1e-6)
    narrow = add_lora(base, x, A, B, scaling=S, dtype=torch.bfloat16)  # products of numbers of 8 bits
    assert narrow.dtype == torch.float32 and not torch.equal(narrow, y.float())
    torch.testing.assert_close(narrow.double(), definition(*(t.double() for t in (base, x, A, B))), rtol=0, atol=0.05)


def test_dropout_is_that_of_its_seed() -> None:
    """Of a base of zeros and A = B = I what comes back is the input that is left, divided by 1 - p."""
    eye, x = torch.eye(64), torch.ones(3, 64)
    y, again, other = (
        add_lora(torch.zeros(3, 64), x, eye, eye, scaling=1.0, dropout=0.5, seed=seed) for seed in (1, 1, 2)
    )
    assert set(y.unique().tolist()) == {0.0, 2.0} and torch.equal(y, again) and not torch.equal(y, other)
    unnamed, zero = (
        add_lora(torch.zeros(3, 64), x, eye, eye, scaling=1.0, dropout=0.5, **s) for s in ({}, {"seed": 0})
    )
    assert torch.equal(unnamed, zero)


@pytest.mark.parametrize("dropout", [-0.1, 1.0, float("nan"), "0.1"])
def test_dropout_out_of_range_is_refused(dropout: float) -> None:
    with pytest.raises(ValueError, match=r"dropout=.*, wanted a number from 0 to less than 1"):
        add_lora(*inputs((2,), 4, 5, 3), scaling=S, dropout=dropout)


@pytest.mark.parametrize("scaling", [float("nan"), float("inf"), "2"])
def test_a_scaling_that_is_no_number_is_refused(scaling: float) -> None:
    with pytest.raises(ValueError, match=rf"^scaling={scaling!r}, wanted a finite number$"):
        add_lora(*inputs((2,), 4, 5, 3), scaling=scaling)


@pytest.mark.parametrize(("place", "name"), list(enumerate(("base", "x", "lora_A", "lora_B"))))
def test_each_tensor_has_to_hold_real_numbers(place: int, name: str) -> None:
    arguments = inputs((2,), 4, 5, 3)
    arguments[place] = arguments[place].detach().long()
    with pytest.raises(ValueError, match=f"^{name} is torch.int64: wanted"):
        ours(*arguments)


def test_a_dtype_that_holds_no_products_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dtype=torch.int64, wanted float32, float16, bfloat16 or float64"):
        add_lora(*inputs((2,), 4, 5, 3), scaling=S, dtype=torch.int64)


def test_a_named_backend_runs_or_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = inputs((2,), 4, 5, 3, dtype=torch.float32)
    assert torch.equal(add_lora(*arguments, scaling=S, backend="torch"), ours(*arguments))
    with pytest.raises(ValueError, match="backend='c' does not exist: there are triton, torch"):
        add_lora(*arguments, scaling=S, backend="c")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="backend='triton' cannot run: the tensors are on cpu, and it runs on a GPU"):
        add_lora(*arguments, scaling=S, backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match=r"backend='triton' cannot run: dtype=torch.float64, and it takes float32"):
        add_lora(*(t.double() for t in arguments), scaling=S, backend="triton")
    with pytest.raises(ValueError, match=r"backend='triton' cannot run: dtype=torch.float64, and it takes float32"):
        add_lora(*arguments, scaling=S, dtype=torch.float64, backend="triton")


def test_under_autocast_with_the_backward_outside():
    g = torch.Generator().manual_seed(3)
    base, x, a, b = (torch.randn(s, generator=g, requires_grad=True) for s in ((5, 7), (5, 6), (2, 6), (7, 2)))
    with torch.autocast("cpu", torch.bfloat16):
        y = add_lora(base, x, a, b, scaling=2.0)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == torch.float32
    torch.testing.assert_close(y, base + 2.0 * (x @ a.T) @ b.T)
