"""Frozen 4-bit weights under DistributedDataParallel: not sent again before every forward.

DDP broadcasts every buffer of a module from rank 0 before each forward, so that statistics like a batch norm's stay
equal. The packed parts of a QuantizedLinear are buffers that never change: over two processes on a CPU, six layers of
2048 x 2048 take 47 ms a step with that traffic and 24 ms without.

DDP leaves out the names in its `parameters_to_ignore`. They are put there by a hook before each forward, not earlier:
when a model is wrapped DDP sends its weights once, and the packed ones have to go with them. torch calls another
hook of this file whenever a module is put into a module, which is how it learns of a model being wrapped. That hook
is for the whole process, so it is registered with the first QuantizedLinear, not when this file is imported.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel


@lru_cache(maxsize=1)
def keep_out_of_ddp(is_packed: Callable[[nn.Module], bool]) -> None:
    """From now on DDP sends the buffers of the modules that `is_packed` holds for once, when it wraps a model."""

    def wrapped(owner: nn.Module, _: str, module: nn.Module | None) -> None:
        if isinstance(owner, DistributedDataParallel) and module is not None and any(map(is_packed, module.modules())):
            owner.register_forward_pre_hook(_Ignore(is_packed))

    register_module_module_registration_hook(wrapped)


class _Ignore:
    """Before a forward of DDP: name the packed buffers that the model has now (an adapter changes paths)."""

    def __init__(self, is_packed: Callable[[nn.Module], bool]) -> None:
        self.is_packed = is_packed

    def __call__(self, ddp: Any, _: Any) -> None:
        for path, module in ddp.module.named_modules():
            if self.is_packed(module):
                prefix = f"{path}." if path else ""
                ddp.parameters_to_ignore.update(f"{prefix}{name}" for name, _ in module.named_buffers(recurse=False))
        ddp._assign_modules_buffers()  # private: what it broadcasts, by parameters_to_ignore
