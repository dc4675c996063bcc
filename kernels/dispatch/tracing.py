"""What torch does besides running what is called: whether it records, or differentiates forwards."""

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
    """Whether torch.compile, torch.jit.trace, make_fx or fake tensors look on.

    They see torch's operations and nothing of a call of C or Triton: what they recorded would leave the result as the
    memory it was allocated in. Then the operation must be one of torch's too, as the files torch_ops.py register them.
    """
    # Private, and the only way to ask: a dispatch mode is a tracer, or stands for one.
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
    )


def kept(make: Callable[P, T]) -> Callable[P, T]:
    """`make`, which gives tensors, its results kept; but not those made under a tracer, which may have no memory."""
    keep = lru_cache(maxsize=64)(make)

    @wraps(make)
    def get(*args: P.args, **kwargs: P.kwargs) -> T:
        return make(*args, **kwargs) if is_traced() else keep(*args, **kwargs)  # type: ignore[arg-type]

    return get


def has_tangent(x: Tensor) -> bool:
    """Whether forward-mode differentiation carries a derivative along with x, which C and Triton would drop."""
    # The level is private, and -1 outside of forward_ad.dual_level; to ask unpack_dual there would raise.
    if forward_ad._current_level < 0:
        return False
    return forward_ad.unpack_dual(x).tangent is not None  # type: ignore[no-untyped-call]
