"""The fused loss: by hand, against the definition, its gradient in float64, and what it must not allocate."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from qlorag.kernels.cross_entropy import chunked, linear_cross_entropy
from qlorag.kernels.cross_entropy.reference import linear_cross_entropy as reference


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


@pytest.mark.parametrize("rows_per_chunk", [1, 3, 100])
@pytest.mark.parametrize("n", [0, 1, 7])
def test_equals_the_definition_and_gradcheck(n: int, rows_per_chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "CHUNK_BYTES", 4 * 11 * rows_per_chunk)
    torch.manual_seed(n)
    hidden = torch.randn(n, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 11, (n,))
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, labels), reference(hidden, weight, labels))
    assert torch.autograd.gradcheck(lambda h, w: 3 * linear_cross_entropy(h, w, labels), (hidden, weight))


def test_only_the_gradients_asked_for() -> None:
    hidden, weight, labels = torch.randn(4, 5), torch.randn(11, 5, requires_grad=True), torch.tensor([1, 2, 3, 10])
    linear_cross_entropy(hidden, weight, labels).backward()
    wanted = weight.grad
    weight.grad = None
    reference(hidden, weight, labels).backward()
    torch.testing.assert_close(wanted, weight.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errs_no_more_than_torch(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    hidden, weight, labels = torch.randn(64, 96), torch.randn(500, 96) * 0.2, torch.randint(0, 500, (64,))
    exact = reference(hidden.to(dtype).double(), weight.to(dtype).double(), labels)
    ours = linear_cross_entropy(hidden.to(dtype), weight.to(dtype), labels)
    theirs = torch.nn.functional.cross_entropy((hidden.to(dtype) @ weight.to(dtype).T).float(), labels, reduction="sum")
    assert ours.dtype == torch.float32
    assert abs(ours - exact) <= 2 * abs(theirs - exact) + 1e-3


def test_extreme_logits_stay_finite() -> None:
    hidden = torch.tensor([[1e4, -1e4]], requires_grad=True)
    loss = linear_cross_entropy(hidden, torch.eye(2), torch.tensor([1]))
    loss.backward()
    assert loss.item() == 2e4 and hidden.grad is not None and torch.isfinite(hidden.grad).all()


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
    ],
)
def test_what_does_not_fit(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(hidden, weight, labels)


def test_every_hand_written_backward_is_checked() -> None:
    """Each autograd.Function of the rooms is named in a test file that runs gradcheck."""
    import re

    root = Path(__file__).parents[2]
    functions = {
        name
        for room in ("kernels", "quant", "lora", "models")
        for path in (root / room).rglob("*.py")
        for name in re.findall(r"class (\w+)\((?:torch\.)?autograd\.Function\)", path.read_text())
    }
    assert {"LinearCrossEntropy", "LoRABranch"} <= functions
    covered = {  # Function -> the test that runs gradcheck on it, through its public face
        "LinearCrossEntropy": "tests/kernels/test_cross_entropy.py",
        "LoRABranch": "tests/lora/test_layer.py",
        "_QuantizedLinearFunction": "tests/quant/test_linear.py",
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
