"""The fused loss: by hand, against the definition, its gradient in float64, and what it must not allocate."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from qlorag.kernels.cross_entropy import linear_cross_entropy, torch_ops, vocabulary_slices
from qlorag.kernels.cross_entropy.reference import linear_cross_entropy as reference
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.isa


def inputs(n: int, width: int, vocabulary: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [n, D] and weight [V, D], which want gradients, and labels [n]; logits have the variance 1."""
    g = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(rows, width, generator=g, dtype=torch.float64) for rows in (n, vocabulary))
    labels = torch.randint(vocabulary, (n,), generator=g)
    return hidden.to(dtype).requires_grad_(), (weight * width**-0.5).to(dtype).requires_grad_(), labels


def results(function: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> list[Tensor]:
    """The loss, dhidden and dweight, in float64."""
    hidden, weight = (t.detach().requires_grad_() for t in (hidden, weight))
    loss = function(hidden, weight, labels)
    return [t.detach().double() for t in (loss, *torch.autograd.grad(loss, (hidden, weight)))]


def few_at_a_time(patch: pytest.MonkeyPatch, rows: int, columns: int, *, cached: int = 1, few: int = 2) -> None:
    """Blocks of so many rows, slices of so many words, so many logits widened at a time; how many rows are few."""
    patch.setattr(vocabulary_slices, "ROWS", rows)
    patch.setattr(vocabulary_slices, "TILE", rows * columns)
    patch.setattr(vocabulary_slices, "CACHED", cached)
    patch.setattr(vocabulary_slices, "FEW_ROWS", few)


def test_by_hand() -> None:
    hidden = torch.tensor([[1.0, 0.0], [0.0, 2.0]], requires_grad=True)
    head = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    loss = linear_cross_entropy(hidden, head, torch.tensor([0, 1]))
    loss.backward()
    e = math.e
    assert loss.item() == pytest.approx(math.log(e + 2) - 1 + math.log(e**2 + 2) - 2, rel=1e-6)
    # softmax(1, 0, 0) = (e, 1, 1) / (e + 2), minus the label's one, through the head's first two rows
    assert hidden.grad is not None
    assert hidden.grad[0].tolist() == pytest.approx([e / (e + 2) - 1, 1 / (e + 2)], rel=1e-6)


@pytest.mark.parametrize("vocabulary", [1, 2, 11])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 4), (2, 8), (100, 100)])
@pytest.mark.parametrize("n", [0, 1, 7])
def test_equals_the_definition_and_gradcheck(
    n: int, rows: int, columns: int, vocabulary: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    few_at_a_time(monkeypatch, rows, columns)
    hidden, weight, labels = inputs(n, 5, vocabulary, torch.float64, seed=n)
    for got, want in zip(
        results(linear_cross_entropy, hidden, weight, labels), results(reference, hidden, weight, labels), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda h, w: 3 * linear_cross_entropy(h, w, labels), (hidden, weight))


def test_only_the_gradients_asked_for() -> None:
    hidden, weight, labels = torch.randn(4, 5), torch.randn(11, 5, requires_grad=True), torch.tensor([1, 2, 3, 10])
    linear_cross_entropy(hidden, weight, labels).backward()
    wanted = weight.grad
    weight.grad = None
    reference(hidden, weight, labels).backward()
    torch.testing.assert_close(wanted, weight.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "columns", "few"), [(1000, 1000, 1000), (16, 64, 2)])
def test_errs_no_more_than_twice_as_much_as_torch(
    rows: int, columns: int, few: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    few_at_a_time(monkeypatch, rows, columns, cached=1000, few=few)
    hidden, weight, labels = inputs(64, 96, 500, dtype)

    def torchs(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy((h @ w.T).float(), y, reduction="sum")  # widened, which the definition is not

    exact = results(reference, hidden.double(), weight.double(), labels)
    for got, other, want in zip(
        results(linear_cross_entropy, hidden, weight, labels),
        results(torchs, hidden, weight, labels),
        exact,
        strict=True,
    ):
        assert (got - want).norm() <= 2 * (other - want).norm() + 1e-7 * want.norm()
    assert linear_cross_entropy(hidden, weight, labels).dtype == torch.float32


def test_a_word_that_is_nearly_certain_keeps_its_small_gradient() -> None:
    """softmax - 1 in float32 has an error of 6e-8; here the gradient itself is some 1e-6 of a row of the head."""
    weight = torch.eye(8)[:5]
    hidden, labels = 15 * torch.eye(8)[:2], torch.tensor([0, 1])
    exact = results(reference, hidden.double(), weight.double(), labels)
    wrong = 4 / (math.exp(15) + 4)
    assert exact[1][0, 0].item() == pytest.approx(-wrong)
    for got, want in zip(results(linear_cross_entropy, hidden, weight, labels), exact, strict=True):
        torch.testing.assert_close(got, want, rtol=5e-6, atol=0.0)


def test_float16_of_logits_near_its_end() -> None:
    hidden = torch.tensor([[200.0, -200.0]], dtype=torch.float16).requires_grad_()
    weight = torch.tensor([[300.0, 0.0], [0.0, 300.0], [299.0, 0.0]], dtype=torch.float16)  # 60000, -60000, 59800
    for label, loss in ((0, 0.0), (1, 120000.0), (2, 200.0)):
        got = linear_cross_entropy(hidden, weight, torch.tensor([label]))
        assert got.item() == pytest.approx(loss, abs=16)  # what a logit of that size is rounded by
        (dh,) = torch.autograd.grad(got, hidden)
        assert dh.isfinite().all()


def test_extreme_logits_stay_finite() -> None:
    hidden = torch.tensor([[1e4, -1e4]], requires_grad=True)
    loss = linear_cross_entropy(hidden, torch.eye(2), torch.tensor([1]))
    loss.backward()
    assert loss.item() == 2e4 and hidden.grad is not None and torch.isfinite(hidden.grad).all()


class Largest(TorchDispatchMode):
    """Elements of the largest memory that an operation made, views and results in place left out.

    Under a mode the loss is one operation; with its backend named, those it consists of.
    """

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known, self.elements = {t.untyped_storage().data_ptr() for t in known}, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in self.known:
                self.elements = max(self.elements, t.untyped_storage().nbytes() // t.element_size())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_of_all_rows_and_words_never_exist(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    few_at_a_time(monkeypatch, 32, 64, cached=256)
    hidden, weight, labels = inputs(100, 8, 1000, dtype)
    frozen = weight.detach()
    with Largest(hidden, frozen) as seen:
        linear_cross_entropy(hidden, frozen, labels, backend="torch").backward()
    assert seen.elements == 25 * 64  # 100 rows in blocks of at most 32, alike
    with Largest(hidden, weight) as seen:
        linear_cross_entropy(hidden, weight, labels, backend="torch").backward()
    assert seen.elements == weight.numel()
    with Largest(hidden, weight) as seen:
        reference(hidden, weight, labels)
    assert seen.elements == 100 * 1000, "what a definition that makes them all looks like"


def test_a_gradient_is_all_that_is_kept() -> None:
    hidden, weight, labels = inputs(6, 5, 11, torch.float32)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        loss = linear_cross_entropy(hidden, weight.detach(), labels)
    assert [tuple(t.shape) for t in saved] == [(6, 5)]
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(hidden, weight, labels), loss)


def test_no_second_derivative() -> None:
    hidden, weight, labels = inputs(3, 5, 11, torch.float64)
    (dh,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels).square(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dh.sum().backward()


@pytest.mark.parametrize(
    ("hidden", "weight", "labels", "message"),
    [
        (
            torch.zeros(2, 3),
            torch.zeros(5, 4),
            torch.zeros(2, dtype=torch.int64),
            r"hidden \[2, 3\] and weight \[5, 4\]",
        ),
        (
            torch.zeros(2, 3),
            torch.zeros(5, 3),
            torch.zeros(3, dtype=torch.int64),
            r"labels torch.int64 \[3\], wanted int64, one for each of 2",
        ),
        (torch.zeros(2, 3), torch.zeros(5, 3), torch.tensor([0, 5]), "labels go from 0 to 5, wanted 0 to 4: leave out"),
        (torch.zeros(2, 3), torch.zeros(5, 3), torch.tensor([0, -100]), "labels go from -100 to 0"),
        (torch.zeros(2, 3), torch.zeros(5, 3).half(), torch.tensor([0, 1]), "torch.float32 and weight torch.float16"),
    ],
)
def test_what_does_not_fit(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(hidden, weight, labels)


def test_every_hand_written_backward_is_checked() -> None:
    """Each autograd.Function of the packages is named in a test file that runs gradcheck."""
    import re

    root = Path(__file__).parents[2]
    functions = {
        name
        for package in ("kernels", "quant", "lora", "models")
        for path in (root / package).rglob("*.py")
        for name in re.findall(r"class (\w+)\((?:torch\.)?autograd\.Function\)", path.read_text())
    }
    assert {"LinearCrossEntropy", "AddLoRAFunction"} <= functions
    covered = {  # Function -> the test that runs gradcheck on it, through its public face
        "LinearCrossEntropy": "tests/kernels/test_cross_entropy.py",
        "_QuantizedLinearFunction": "tests/quant/test_linear.py",
        "TransformedMatmul": "tests/quant/test_linear.py",
        "TransformedMatmulBackward": "tests/quant/test_linear.py",
        "RMSNormFunction": "tests/kernels/test_rms_norm.py",
        "RopeFunction": "tests/kernels/test_rope.py",
        "SwiGLUFunction": "tests/kernels/test_swiglu.py",
        "AddLoRAFunction": "tests/kernels/test_lora_kernel.py",
    }
    assert functions == set(covered), "a Function without a gradcheck: write one and name it here"
    for path in covered.values():
        assert "gradcheck(" in (root / path).read_text()


def test_a_backend_that_cannot_run_is_named():
    h, w, labels = torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="backend='triton' cannot run: the tensors are on cpu"):
        linear_cross_entropy(h, w, labels, backend="triton")
    with pytest.raises(ValueError, match="backend='c' does not exist"):
        linear_cross_entropy(h, w, labels, backend="c")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wants", [(True, True), (True, False), (False, True), (False, False)])
def test_it_compiles_into_one_graph(wants, dtype):
    random = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=random).to(dtype) for n in (5, 300))
    labels = torch.randint(0, 300, (5,), generator=random)

    def run(loss):
        inputs = [t.clone().requires_grad_(w) for t, w in zip((hidden, weight), wants, strict=True)]
        value = loss(*inputs, labels) * 2
        if any(wants):
            value.backward()
        return [value, *(t.grad for t in inputs if t.grad is not None)]

    compiled = run(torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager"))
    assert len(compiled) == 1 + sum(wants) and all(map(torch.equal, compiled, run(linear_cross_entropy)))
    with pytest.raises(ValueError, match="labels go from 0 to 300"):
        torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")(
            hidden, weight, torch.tensor([0, 1, 2, 3, 300])
        )


@pytest.mark.parametrize("compiled", [False, True])
def test_a_loss_scale_beyond_float16(compiled):
    """GradScaler begins with 65536, which is infinity in float16; the gradients that it scales are small."""
    hidden, weight, labels = inputs(4, 64, 500, torch.float16)
    leaves = [(t * 1e-2).detach().requires_grad_() for t in (hidden, weight)]
    compute = torch.compile(linear_cross_entropy, backend="aot_eager") if compiled else linear_cross_entropy
    (dh,) = torch.autograd.grad(compute(*leaves, labels) * 65536.0, leaves[:1])
    wide = [t.detach().float().requires_grad_() for t in leaves]
    (want,) = torch.autograd.grad(reference(*wide, labels) * 65536.0, wide[:1])
    assert dh.dtype == torch.float16 and 50 < want.abs().max() < 65504
    torch.testing.assert_close(dh.float(), want, rtol=0.01, atol=0.1)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_records_it(mode):
    hidden, weight, labels = inputs(5, 16, 30, torch.float32)
    arguments = (hidden.detach(), weight.detach(), labels)
    traced = make_fx(lambda h, w, y: linear_cross_entropy(h, w, y), tracing_mode=mode)(*arguments)
    other = (arguments[0].flip(0), arguments[1], labels.flip(0))
    assert torch.equal(traced(*other), linear_cross_entropy(*other))


def test_opcheck():
    hidden, weight = torch.randn(5, 16, requires_grad=True), torch.randn(30, 16, requires_grad=True)
    torch.library.opcheck(torch_ops.loss_and_gradients, (hidden, weight, torch.arange(5), True, True))
