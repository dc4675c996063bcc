"""Which instruction set a kernel uses: the best the processor has, or the one QLORAG_CPU_LEVEL names."""

from __future__ import annotations

import os

LEVELS = ("scalar", "avx2", "avx512")  # the numbers that the C files use


class LevelError(ValueError):
    """QLORAG_CPU_LEVEL names a level that does not exist, or that this processor cannot run."""


def choose_level(best: int) -> int:
    """Return the index into LEVELS to run, where `best` is the highest that the processor has.

    Raises LevelError.
    """
    name = os.environ.get("QLORAG_CPU_LEVEL")
    if not name:
        return best
    if name not in LEVELS:
        raise LevelError(f"QLORAG_CPU_LEVEL={name}: use one of {', '.join(LEVELS)}, or unset it")
    level = LEVELS.index(name)
    if level > best:
        raise LevelError(f"QLORAG_CPU_LEVEL={name}, but this processor has {LEVELS[best]}: lower it, or unset it")
    return level
