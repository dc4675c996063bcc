"""SwiGLU with its gradient by hand:

    a  = silu(g) = g σ                       σ = 1 / (1 + exp(-g))
    h  = a u                                 [..., F]

    du = dh a
    dg = dh u σ (1 + g (1 - σ))              silu'(g), by the product rule: σ + g σ (1 - σ)

Saved for backward: g and u. Autograd would save a as well, and F is a model's widest dimension; here the backward
computes a again, one more pass over g. A trained layer behind this operation saves h, for its own weight's gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..dispatch import check_together, choose_backend


def swiglu(gate: Tensor, up: Tensor, *, backend: str | None = None) -> Tensor:
    """The product silu(gate) * up                                            (arXiv:2002.05202, equation 5)

    gate, up: [..., F], of one dtype: float32, float16, bfloat16, or (torch only) float64.
    backend:  "triton", "torch", or None for Triton on a GPU and torch elsewhere.
    Returns h [..., F] in their dtype.
    Raises ValueError: shapes or dtypes differ, or a named backend cannot run.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"gate is {gate.dtype} {list(gate.shape)} and up {up.dtype} {list(up.shape)}, wanted one dtype and shape"
        )
    check_together(gate=gate, up=up)
    on_gpu = choose_backend(gate, backend) == "triton"
    if not torch.is_grad_enabled():
        return _forward(gate, up, on_gpu)
    h: Tensor = SwiGLUFunction.apply(gate, up, on_gpu)  # type: ignore[no-untyped-call]
    return h


class SwiGLUFunction(torch.autograd.Function):
    """h = silu(g) u; see the module for the equations."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, on_gpu: bool) -> Tensor:
        """gate, up [..., F] -> h [..., F]."""
        ctx.save_for_backward(gate, up)
        ctx.on_gpu = on_gpu
        return _forward(gate, up, on_gpu)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
        """dh [..., F] -> (dg, du), each only if asked for."""
        gate, up = ctx.saved_tensors
        wants_gate, wants_up = ctx.needs_input_grad[:2]
        if ctx.on_gpu:
            from .triton_kernels import backward

            both = backward(dh, gate, up)
            return both[0] if wants_gate else None, both[1] if wants_up else None, None
        dg = du = None
        if wants_up:
            du = F.silu(gate).mul_(dh)
        if wants_gate:
            dg = torch.ops.aten.silu_backward(dh * up, gate)  # dh u σ (1 + g (1 - σ)), σ in float32, in one pass
        return dg, du, None


def _forward(gate: Tensor, up: Tensor, on_gpu: bool) -> Tensor:
    if on_gpu:
        from .triton_kernels import forward

        return forward(gate, up)
    return F.silu(gate).mul_(up)
