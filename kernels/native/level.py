"""The instruction set (ISA) that a C kernel uses: the best of the processor, or the one in QLORAG_CPU_LEVEL."""

from __future__ import annotations

import os

LEVELS = ("scalar", "avx2", "avx512", "vnni", "amx", "neon")  # the ISAs, by the numbers that the C files use
FAMILIES = (
    ("scalar", "avx2", "avx512", "vnni", "amx"),
    ("scalar", "neon"),
)  # for each kind of processor its ISAs, in rising order


class LevelError(ValueError):
    """QLORAG_CPU_LEVEL names an ISA that does not exist, or that this processor cannot run."""


def levels_up_to(best: int) -> tuple[str, ...]:
    """The ISAs of a processor whose best one is LEVELS[best], in rising order."""
    name = LEVELS[best]
    family = next(family for family in FAMILIES if name in family)
    return family[: family.index(name) + 1]


def choose_level(best: int) -> int:
    """Return the index into LEVELS of the ISA to use, where LEVELS[best] is the best of the processor.

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
