"""Memory for a decoded weight that is used at once and then forgotten.

A fresh tensor of more than 32 MiB is mapped by the CPU's allocator, faulted in page by page and unmapped again, about
0.45 ms per MiB on an Intel Xeon (Sapphire Rapids), ten times the cost of decoding into it. So products decode into
memory that they share. There is one scratch per thread, so that two threads never decode into the same memory, and it
is used only between a decode and the product that follows, where autograd does not record: no graph can hold it. On a
GPU torch's caching allocator already reuses memory, in the order of the stream.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from ..dispatch import is_traced


class _Scratch(threading.local):
    """One growing buffer per thread and dtype."""

    def __init__(self) -> None:
        self.buffers: dict[torch.dtype, Tensor] = {}


_scratch = _Scratch()


def take(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Uninitialised memory of the CPU of `shape`, valid until this thread's next `take` of this dtype."""
    if is_traced():  # what is made now may have no memory later
        return torch.empty(shape, dtype=dtype, device="cpu")
    numel = torch.Size(shape).numel()
    buffer = _scratch.buffers.get(dtype)
    if buffer is None or buffer.numel() < numel:
        _scratch.buffers.pop(dtype, None)  # free the small one before the large one is made
        with torch.inference_mode(False):  # an inference tensor could not be written to later
            buffer = _scratch.buffers[dtype] = torch.empty(numel, dtype=dtype, device="cpu")
    return buffer[:numel].view(shape)
