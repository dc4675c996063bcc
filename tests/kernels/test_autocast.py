"""Under autocast every operation computes as it does without: in the dtype of what it is given, in both passes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from qlorag.kernels import nf4
from qlorag.kernels.cross_entropy import linear_cross_entropy
from qlorag.kernels.lora import add_lora
from qlorag.kernels.rms_norm import rms_norm
from qlorag.kernels.rope import rope
from qlorag.kernels.swiglu import swiglu
from torch import Tensor

pytestmark = pytest.mark.isa

NARROW = (torch.bfloat16, torch.float16)


def operations(dtype: torch.dtype) -> dict[str, tuple[Callable[..., Tensor], list[Tensor]]]:
    """Each with its arguments, some of which are of another dtype than `dtype`, as in a model."""
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    cos, sin, head, dy = numbers(5, 8), numbers(5, 8), numbers(100, 32), numbers(4, 24)
    w = nf4.quantize(numbers(24, 64), double_quant=False)
    labels = torch.randint(0, 100, (6,), generator=generator)
    wide = torch.float32
    return {
        "rms_norm": (lambda x, weight: rms_norm(x, weight, eps=1e-5), [numbers(3, 32), numbers(32, dtype=wide)]),
        "rope": (lambda x: rope(x, cos, sin), [numbers(2, 3, 5, 8)]),
        "swiglu": (swiglu, [numbers(4, 16), numbers(4, 16)]),
        "lora": (
            lambda *args: add_lora(*args, scaling=2.0),
            [numbers(4, 24), numbers(4, 64), numbers(8, 64, dtype=wide), numbers(24, 8, dtype=wide)],
        ),
        "cross_entropy": (lambda *args: linear_cross_entropy(*args, labels), [numbers(6, 32), numbers(100, 32)]),
        "cross_entropy, frozen": (lambda h: linear_cross_entropy(h, head, labels), [numbers(6, 32)]),
        "nf4": (lambda x: nf4.matmul(x.detach(), w) + nf4.matmul_backward(dy, w).sum() + 0 * x.sum(),
                [numbers(4, 64)]),
    }  # fmt: skip


def both_passes(
    operation: Callable[..., Tensor], arguments: list[Tensor], narrow: torch.dtype | None, backward_inside: bool = False
) -> list[Tensor]:
    """The result and all gradients, the forward under autocast to `narrow`."""
    leaves = [argument.clone().requires_grad_() for argument in arguments]
    with torch.autocast("cpu", narrow, enabled=narrow is not None):
        y = operation(*leaves)
    with torch.autocast("cpu", narrow, enabled=narrow is not None and backward_inside):
        return [y, *torch.autograd.grad(y, leaves, torch.ones_like(y))]


@pytest.mark.parametrize("backward_inside", [False, True], ids=["backward outside", "inside"])
@pytest.mark.parametrize("narrow", NARROW, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, *NARROW], ids=str)
@pytest.mark.parametrize("name", operations(torch.float32))
def test_the_same_bits(name: str, dtype: torch.dtype, narrow: torch.dtype, backward_inside: bool) -> None:
    operation, arguments = operations(dtype)[name]
    want = both_passes(operation, arguments, None)
    got = both_passes(operation, arguments, narrow, backward_inside)
    assert [t.dtype for t in got] == [t.dtype for t in want]
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("name", operations(torch.float32))
def test_the_same_bits_in_one_graph(name: str) -> None:
    operation, arguments = operations(torch.float16)[name]
    torch._dynamo.reset()
    compiled = torch.compile(operation, fullgraph=True, backend="aot_eager")
    want = both_passes(operation, arguments, None)
    got = both_passes(compiled, arguments, torch.bfloat16)
    assert [t.dtype for t in got] == [t.dtype for t in want]
    assert all(map(torch.equal, got, want))
