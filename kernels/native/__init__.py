"""C kernels, compiled on first use (build.py) and run with the best ISA of the processor (level.py)."""

from __future__ import annotations

from .build import Library, NativeBuildError, load
from .level import LEVELS, LevelError, choose_level, levels_up_to

__all__ = ["LEVELS", "LevelError", "Library", "NativeBuildError", "choose_level", "levels_up_to", "load"]
