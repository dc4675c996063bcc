"""Whether torch traces the current call, transforms it (torch.func), or differentiates it in forward mode."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

P = ParamSpec("P")
T = TypeVar("T")


def is_traced() -> bool:
    """Whether the current call is traced: by torch.compile, torch.jit.trace, make_fx or fake tensors.

    A tracer records torch operations and sees nothing of a call to C or Triton: it would record a result that is
    allocated and never written. So a traced call has to use a registered torch operation, see the files torch_ops.py.
    """
    # These are private functions, and torch has no public ones: an active dispatch mode is a tracer or acts for one.
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
    )


def is_transformed() -> bool:
    """Whether a transform of torch.func (vmap, grad, jacrev, ...) wraps the tensors of the current call.

    They then have no memory for C or Triton to work on, and an autograd.Function that saves what is not its argument
    is refused: the call has to use a registered torch operation.
    """
    return torch._C._are_functorch_transforms_active()  # private, and torch has no public one


def cached_unless_traced(make: Callable[P, T]) -> Callable[P, T]:
    """`make` with its results, tensors, cached; those made while tracing are not, since they may have no memory."""
    keep = lru_cache(maxsize=64)(make)

    @wraps(make)
    def get(*args: P.args, **kwargs: P.kwargs) -> T:
        return make(*args, **kwargs) if is_traced() else keep(*args, **kwargs)  # type: ignore[arg-type]

    return get


def has_tangent(x: Tensor) -> bool:
    """Whether x has a tangent (forward-mode differentiation), which C and Triton would drop."""
    # _current_level is private; it is -1 outside of forward_ad.dual_level, where unpack_dual would raise.
    if forward_ad._current_level < 0:
        return False
    return forward_ad.unpack_dual(x).tangent is not None  # type: ignore[no-untyped-call]
