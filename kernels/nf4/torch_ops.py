"""The operations as torch sees them: for torch.compile, which cannot look into ctypes or a launch of Triton.

Registered under the name of the package (`torch.ops.qlorag.nf4_matmul` here, another where this folder was copied),
with what they give for tensors without data, and with a gradient. Eager code does not come this way: a call through
torch's dispatcher costs 50 µs, and the first one imports 150 MB of torch's compiler.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .checks import QuantizationError, check_absmax, check_block_size, check_kind, check_weight
from .eager import dequantize_eager, matmul_backward_eager, matmul_eager, quantize_absmax_eager, quantize_eager
from .tensor import NESTED_BLOCK_SIZE, QuantizedTensor

NAMESPACE = __name__.split(".")[0]
_WEIGHT = "Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_offset"


def _weight(parts: Sequence[Tensor | None], shape: Sequence[int], kind: str, block_size: int) -> QuantizedTensor:
    """What the schema has as tensors and numbers, as one value. Its dtype, of which no operation makes use, is any."""
    known = check_kind(kind)
    return QuantizedTensor.from_parts(parts, shape=tuple(shape), kind=known, block_size=block_size, dtype=torch.float32)


def _quantize(w: Tensor, kind: str, block_size: int) -> tuple[Tensor, Tensor]:
    q = quantize_eager(w, kind=kind, block_size=block_size, double_quant=False)
    return q.packed, q.absmax


def _quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    codes, nested = quantize_absmax_eager(absmax)
    return codes, *nested


def _dequantize(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    shape: Sequence[int],
    kind: str,
    block_size: int,
    dtype: torch.dtype,
) -> Tensor:
    q = _weight((packed, absmax, nested_absmax, nested_offset), shape, kind, block_size)
    return dequantize_eager(q, dtype=dtype)


def _matmul(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    out_features: int,
    kind: str,
    block_size: int,
) -> Tensor:
    shape = (out_features, x.shape[-1])
    return matmul_eager(x.detach(), _weight((packed, absmax, nested_absmax, nested_offset), shape, kind, block_size))


def _matmul_backward(
    dy: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    in_features: int,
    kind: str,
    block_size: int,
) -> Tensor:
    q = _weight((packed, absmax, nested_absmax, nested_offset), (dy.shape[-1], in_features), kind, block_size)
    return matmul_backward_eager(dy.detach().contiguous(), q)


nf4_quantize = torch.library.custom_op(
    f"{NAMESPACE}::nf4_quantize",
    _quantize,
    mutates_args=(),
    schema="(Tensor w, str kind, int block_size) -> (Tensor, Tensor)",
)
nf4_quantize_absmax = torch.library.custom_op(
    f"{NAMESPACE}::nf4_quantize_absmax",
    _quantize_absmax,
    mutates_args=(),
    schema="(Tensor absmax) -> (Tensor, Tensor, Tensor)",
)
nf4_dequantize = torch.library.custom_op(
    f"{NAMESPACE}::nf4_dequantize",
    _dequantize,
    mutates_args=(),
    schema=f"({_WEIGHT}, SymInt[] shape, str kind, int block_size, ScalarType dtype) -> Tensor",
)
nf4_matmul = torch.library.custom_op(
    f"{NAMESPACE}::nf4_matmul",
    _matmul,
    mutates_args=(),
    schema=f"(Tensor x, {_WEIGHT}, SymInt out_features, str kind, int block_size) -> Tensor",
)
nf4_matmul_backward = torch.library.custom_op(
    f"{NAMESPACE}::nf4_matmul_backward",
    _matmul_backward,
    mutates_args=(),
    schema=f"(Tensor dy, {_WEIGHT}, SymInt in_features, str kind, int block_size) -> Tensor",
)


@nf4_quantize.register_fake
def _(w, kind, block_size):  # type: ignore[no-untyped-def]
    check_block_size(block_size)
    check_weight(w)
    packed = w.new_empty((w.numel() + 1) // 2, dtype=torch.uint8)
    return packed, w.new_empty(-(-w.numel() // block_size), dtype=torch.float32)


@nf4_quantize_absmax.register_fake
def _(absmax):  # type: ignore[no-untyped-def]
    check_absmax(absmax)
    codes = absmax.new_empty(absmax.numel(), dtype=torch.uint8)
    return codes, absmax.new_empty(-(-absmax.numel() // NESTED_BLOCK_SIZE)), absmax.new_empty(())


@nf4_dequantize.register_fake
def _(packed, absmax, nested_absmax, nested_offset, shape, kind, block_size, dtype):  # type: ignore[no-untyped-def]
    return packed.new_empty(shape, dtype=dtype)


@nf4_matmul.register_fake
def _(x, packed, absmax, nested_absmax, nested_offset, out_features, kind, block_size):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], out_features)


@nf4_matmul_backward.register_fake
def _(dy, packed, absmax, nested_absmax, nested_offset, in_features, kind, block_size):  # type: ignore[no-untyped-def]
    return dy.new_empty(*dy.shape[:-1], in_features)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, absmax, nested_absmax, nested_offset, _, *ctx.options = inputs
    ctx.in_features = x.shape[-1]
    ctx.save_for_backward(packed, absmax, nested_absmax, nested_offset)


def _gradient(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    # dx = dy W;  W is frozen
    dx = nf4_matmul_backward(dy, *ctx.saved_tensors, ctx.in_features, *ctx.options)
    return dx, None, None, None, None, None, None, None


nf4_matmul.register_autograd(_gradient, setup_context=_save)


def _vmap(op: Any) -> Any:
    """Both products take any leading dimensions, so the mapped one becomes the first of them."""

    def rule(info: Any, in_dims: tuple[int | None, ...], x: Tensor, *rest: Any) -> tuple[Tensor, int]:
        mapped = [dim for dim in in_dims[1:] if dim is not None]
        if mapped or in_dims[0] is None:
            raise QuantizationError(f"{op._name}: vmap over a packed weight: map over x only")
        return op(x.movedim(in_dims[0], 0), *rest), 0

    return rule


nf4_matmul.register_vmap(_vmap(nf4_matmul))
nf4_matmul_backward.register_vmap(_vmap(nf4_matmul_backward))


class TransformedMatmul(torch.autograd.Function):
    """y = x Wᵀ under torch.func.grad, jacrev and the like, which refuse the gradient of a registered operation."""

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        y: Tensor = nf4_matmul(*inputs)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        # dx = dy W
        dx = TransformedMatmulBackward.apply(dy, *ctx.saved_tensors, ctx.in_features, *ctx.options)  # type: ignore[no-untyped-call]
        return dx, None, None, None, None, None, None, None

    setup_context = staticmethod(_save)
    vmap = staticmethod(_vmap(nf4_matmul))


class TransformedMatmulBackward(torch.autograd.Function):
    """dx = dy W, with a gradient of its own: a transform differentiates as if for a second derivative, always."""

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        dx: Tensor = nf4_matmul_backward(*inputs)
        return dx

    @staticmethod
    def backward(ctx: Any, ddx: Tensor) -> tuple[Tensor | None, ...]:
        # the gradient for dy is ddx Wᵀ
        ddy = TransformedMatmul.apply(ddx, *ctx.saved_tensors, ctx.in_features, *ctx.options)  # type: ignore[no-untyped-call]
        return ddy, None, None, None, None, None, None, None

    setup_context = staticmethod(_save)
    vmap = staticmethod(_vmap(nf4_matmul_backward))
