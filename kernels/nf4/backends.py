"""Which backend runs an operation: one rule for all of this folder.

Every backend of an operation gives the same bits where it decodes, and sums within the same error where it
accumulates, so the choice is only about speed. `backend=None` takes Triton for tensors on a GPU, the C kernel for
tensors on the CPU when it could be compiled, and the reference for everything else; a backend that is named must run,
or QuantizationError says why it cannot.
"""

from __future__ import annotations

import torch

from ..dispatch import BackendStatus, why_no_triton, why_not_triton
from ..native import NativeBuildError
from . import cpu
from .checks import FLOATS, QuantizationError

BACKENDS = ("triton", "c", "reference")


def choose_backend(
    device: torch.device, dtype: torch.dtype, backend: str | None, *, obstacles: dict[str, str | None] | None = None
) -> str:
    """The backend to use: `backend` itself if it can run, else the fastest that can.

    obstacles: why a backend cannot, or should not, run this call, apart from device, dtype and compiler.
    """
    reasons = {"triton": why_not_triton, "c": why_not_c}

    def why_not(name: str) -> str | None:
        return (obstacles or {}).get(name) or reasons[name](device, dtype)

    if backend is None:
        fastest = "triton" if device.type == "cuda" else "c"
        return fastest if why_not(fastest) is None else "reference"
    if backend not in BACKENDS:
        raise QuantizationError(f"backend={backend!r} does not exist: there are {', '.join(BACKENDS)}")
    if backend in reasons and (why := why_not(backend)) is not None:
        raise QuantizationError(f"backend={backend!r} cannot run: {why}")
    return backend


def why_not_c(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return f"the tensors are on {device}, and it runs on the CPU"
    if dtype not in FLOATS:
        return f"dtype={dtype}, and it takes float32, float16 or bfloat16"
    try:
        cpu.library()
    except NativeBuildError as error:
        return str(error)
    return None


def available_backends() -> list[BackendStatus]:
    """What can run here, and how, or why not."""
    why = why_not_c(torch.device("cpu"), torch.float32)
    detail = why or ""
    if why is None:
        try:
            detail = cpu.describe()
        except QuantizationError as error:  # QLORAG_CPU_LEVEL is wrong
            why = detail = str(error)
    no_backward = why or (None if cpu.has_matrix_unit() else "without AMX W is decoded, then multiplied")
    no_gpu = None if torch.cuda.is_available() else "no GPU: torch.cuda.is_available() is False"
    no_triton = no_gpu or why_no_triton()
    in_c = dict.fromkeys(("nf4.quantize", "nf4.dequantize", "nf4.matmul"), (why is None, detail))
    in_c["nf4.matmul_backward"] = (no_backward is None, no_backward or f"{detail}, bfloat16")
    return [
        status
        for operation, c in in_c.items()
        for status in (
            BackendStatus(operation, "triton", no_triton is None, no_triton or "on tensors of the GPU"),
            BackendStatus(operation, "c", *c),
            BackendStatus(operation, "reference", True, "plain torch, any device"),
        )
    ]
