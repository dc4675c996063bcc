"""Which implementations of each operation of kernels/ can run on this machine, and why the others cannot."""

from __future__ import annotations

from ...kernels import dispatch, nf4

OPERATIONS = ("cross_entropy", "lora", "rms_norm", "rope", "swiglu")  # of kernels/, beside nf4, whose backends differ


def available_backends() -> list[dispatch.BackendStatus]:
    """Every backend of every operation."""
    backends = list(nf4.available_backends())
    for name in OPERATIONS:
        backends += dispatch.available_backends(name)
    return backends
