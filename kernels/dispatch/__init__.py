"""Choose the backend of an operation that has a Triton kernel and a torch implementation: one rule for all operations.

`backend=None` takes Triton for tensors on a GPU and torch for all others. A backend that is named runs, or ValueError
says why it cannot. Both compute what the operation's reference.py defines, so the choice affects speed and memory only.

Triton is imported by the first call that needs it. With TRITON_INTERPRET=1 set before that, its kernels run on CPU
tensors, in numpy: slow, but it tests them where there is no GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .tracing import cached_unless_traced, has_tangent, is_traced, is_transformed

__all__ = [
    "BACKENDS",
    "FLOATS",
    "BackendStatus",
    "available_backends",
    "cached_unless_traced",
    "check_together",
    "choose_backend",
    "has_tangent",
    "is_traced",
    "is_transformed",
    "launching_on",
    "processors",
    "why_no_triton",
    "why_not_triton",
    "without_autocast",
]

BACKENDS = ("triton", "torch")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class BackendStatus(NamedTuple):
    """One line of `qlorag inspect --backends`."""

    operation: str
    backend: str
    available: bool
    detail: str  # how it runs, or why it cannot


def available_backends(operation: str) -> list[BackendStatus]:
    """The backends of `operation` in the order in which backend=None tries them, and why one cannot run here."""
    no_gpu = None if torch.cuda.is_available() else "no GPU: torch.cuda.is_available() is False"
    why = no_gpu or why_no_triton()
    return [
        BackendStatus(operation, "triton", why is None, why or "on tensors of the GPU"),
        BackendStatus(operation, "torch", True, "plain torch, any device"),
    ]


def choose_backend(x: Tensor, backend: str | None, *, obstacle: Callable[[], str | None] = lambda: None) -> str:
    """The backend that computes on `x`: `backend` itself if it can run, else the fastest that can.

    obstacle: says why Triton cannot run this call, apart from device and dtype; called only where it decides.
    Raises ValueError: a named backend does not exist, or cannot run.
    """
    if backend is None:
        fits = x.is_cuda and why_not_triton(x.device, x.dtype) is None and obstacle() is None
        return "triton" if fits else "torch"
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} does not exist: there are {', '.join(BACKENDS)}")
    if backend == "triton" and (why := why_not_triton(x.device, x.dtype) or obstacle()) is not None:
        raise ValueError(f"backend={backend!r} cannot run: {why}")
    return backend


def check_together(*, labels: Tensor | None = None, **tensors: Tensor) -> None:
    """Raise ValueError unless all of these tensors are on one device and, apart from `labels`, floating point.

    A kernel would read another device's memory, and the formulas are meaningless for integers.
    """
    for name, t in tensors.items():
        if t.dtype not in (*FLOATS, torch.float64):
            raise ValueError(f"{name} is {t.dtype}: wanted float32, float16, bfloat16 or float64")
    (first, x), *others = tensors.items()
    for name, t in others if labels is None else [*others, ("labels", labels)]:
        if t.device != x.device:
            raise ValueError(f"{name} is on {t.device}, {first} on {x.device}: move them together")


def why_not_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why Triton cannot compute on such tensors, or None."""
    if device.type != "cuda" and not (device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return f"the tensors are on {device}, and it runs on a GPU (on the CPU only with TRITON_INTERPRET=1, as a test)"
    if dtype not in FLOATS:
        return f"dtype={dtype}, and it takes float32, float16 or bfloat16"
    return why_no_triton()


@lru_cache(maxsize=1)
def why_no_triton() -> str | None:
    """Why Triton cannot be imported here, or None."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton does not import: {error}"
    return None


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Switch autocast off: operations compute in the dtype of their inputs, in both passes."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def launching_on(x: Tensor) -> AbstractContextManager[Any]:
    """Make the device of `x` the current one, on which Triton launches."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


@lru_cache(maxsize=16)
def processors(device: torch.device) -> int:
    """About how many programs `device` runs at once."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 8
