"""The loss kernel of Triton: its losses and gradients against float64, with at most twice torch's error."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from qlorag.kernels.cross_entropy import linear_cross_entropy
from qlorag.kernels.cross_entropy.triton_kernels import BLOCK, loss_and_gradient

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def logits(rows, columns, dtype=torch.float32, scale=3.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    z = (scale * torch.randn(rows, columns, generator=g)).to(dtype)
    return z, torch.randint(columns, (rows,), generator=g)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("columns", [1, 7, BLOCK, BLOCK + 1, 2 * BLOCK + 333])
def test_loss_and_gradient_of_logits(columns, dtype):
    z, labels = logits(5, columns, dtype)
    labels[0], labels[1] = 0, columns - 1
    exact = z.double().requires_grad_()
    want = F.cross_entropy(exact, labels, reduction="none")
    want.sum().backward()
    memory = torch.full((5 * columns + 64,), 7.0, dtype=dtype)
    memory[: 5 * columns] = z.view(-1)
    mine = memory[: 5 * columns].view(5, columns)
    alone = loss_and_gradient(z.clone(), labels, gradient=False)
    losses = loss_and_gradient(mine, labels, gradient=True)
    assert torch.equal(alone, losses)
    torch.testing.assert_close(
        losses.double(), want.detach(), rtol=1e-5, atol=1e-5
    )  # float32 sums of some thousand terms
    # One rounding to the dtype of z, of numbers up to 1.
    torch.testing.assert_close(mine.double(), exact.grad, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    assert (memory[5 * columns :] == 7).all()


def test_large_and_infinite_logits_do_not_overflow():
    z, labels = logits(3, 100, scale=1e4)
    z[0, :50] = float("-inf")  # what a mask leaves
    labels[0] = 60
    want = F.cross_entropy(z.double(), labels, reduction="none")
    losses = loss_and_gradient(z, labels, gradient=True)
    torch.testing.assert_close(losses.double(), want, rtol=1e-5, atol=1e-2)
    assert torch.isfinite(z).all() and (z[0, :50] == 0).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_fused_loss_has_at_most_twice_the_error_of_torch(dtype):
    g = torch.Generator().manual_seed(1)
    hidden, head = torch.randn(9, 24, generator=g).to(dtype), (torch.randn(500, 24, generator=g) / 5).to(dtype)
    labels = torch.randint(500, (9,), generator=g)

    def torchs(h, w, y):
        return F.cross_entropy((h @ w.T).float(), y, reduction="sum")

    results = {}
    for name, function, kind in (
        ("triton", partial(linear_cross_entropy, backend="triton"), dtype),
        ("torch", torchs, dtype),
        ("exact", linear_cross_entropy, torch.float64),
    ):
        h, w = (t.to(kind).clone().requires_grad_() for t in (hidden, head))
        loss = function(h, w, labels)
        loss.backward()
        results[name] = [t.detach().double() for t in (loss, h.grad, w.grad)]
    for got, other, want in zip(results["triton"], results["torch"], results["exact"], strict=True):
        assert (got - want).norm() <= 2 * (other - want).norm() + 1e-6 * want.norm()


def test_labels_of_any_stride():
    g = torch.Generator().manual_seed(2)
    hidden, head = torch.randn(9, 24, generator=g), torch.randn(50, 24, generator=g)
    labels = torch.randint(50, (9, 2), generator=g)[:, 1]
    loss = linear_cross_entropy(hidden, head, labels, backend="triton")
    torch.testing.assert_close(loss, linear_cross_entropy(hidden, head, labels.clone(), backend="torch"))
