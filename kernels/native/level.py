"""Which instruction set a kernel uses: the best the processor has, or the one QLORAG_CPU_LEVEL names."""

from __future__ import annotations

import os

LEVELS = ("scalar", "avx2", "avx512", "vnni", "amx", "neon")  # the numbers that the C files use
FAMILIES = (
    ("scalar", "avx2", "avx512", "vnni", "amx"),
    ("scalar", "neon"),
)  # each kind of processor, its levels in rising order


class LevelError(ValueError):
    """QLORAG_CPU_LEVEL names a level that does not exist, or that this processor cannot run."""


def levels_up_to(best: int) -> tuple[str, ...]:
    """What a processor runs whose highest level is LEVELS[best], in rising order."""
    name = LEVELS[best]
    family = next(family for family in FAMILIES if name in family)
    return family[: family.index(name) + 1]


def choose_level(best: int) -> int:
    """Return the index into LEVELS to run, where LEVELS[best] is the highest that the processor has.

    Raises LevelError.
    """
    name = os.environ.get("QLORAG_CPU_LEVEL")
    if not name:
        return best
    if name not in LEVELS:
        raise LevelError(f"QLORAG_CPU_LEVEL={name}: use one of {', '.join(LEVELS)}, or unset it")
    runs = levels_up_to(best)
    if name not in runs:
        raise LevelError(
            f"QLORAG_CPU_LEVEL={name}, but this processor has {LEVELS[best]}: use one of {', '.join(runs)}, or unset it"
        )
    return LEVELS.index(name)
