"""C kernels, compiled on first use (build.py) and run with the best ISA of the processor (isa.py)."""

from __future__ import annotations

from .build import Library, NativeBuildError, load
from .isa import ISAS, IsaError, choose_isa, isas_up_to

__all__ = ["ISAS", "IsaError", "Library", "NativeBuildError", "choose_isa", "isas_up_to", "load"]
