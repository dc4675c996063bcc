"""Whether torch is recording what is called, rather than only running it."""

from __future__ import annotations

import torch


def is_traced() -> bool:
    """Whether torch.compile, torch.jit.trace, make_fx or fake tensors look on.

    They see torch's operations and nothing of a call of C or Triton: what they recorded would leave the result as the
    memory it was allocated in. Then the operation must be one of torch's too, as torch_ops.py registers them.
    """
    # Private, and the only way to ask: a dispatch mode is a tracer, or stands for one.
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
    )
