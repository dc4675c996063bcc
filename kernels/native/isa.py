"""The instruction set (ISA) that a C kernel uses: the best of the processor, or the one in QLORAG_CPU_LEVEL."""

from __future__ import annotations

import os

ISAS = ("scalar", "avx2", "avx512", "vnni", "amx", "neon")  # the ISAs, by the numbers that the C files use
FAMILIES = (
    ("scalar", "avx2", "avx512", "vnni", "amx"),
    ("scalar", "neon"),
)  # for each kind of processor its ISAs, in rising order


class IsaError(ValueError):
    """QLORAG_CPU_LEVEL names an ISA that does not exist, or that this processor cannot run."""


def isas_up_to(best: int) -> tuple[str, ...]:
    """The ISAs of a processor whose best one is ISAS[best], in rising order."""
    name = ISAS[best]
    family = next(family for family in FAMILIES if name in family)
    return family[: family.index(name) + 1]


def choose_isa(best: int) -> int:
    """Return the index into ISAS of the ISA to use, where ISAS[best] is the best of the processor.

    Raises IsaError.
    """
    name = os.environ.get("QLORAG_CPU_LEVEL")
    if not name:
        return best
    if name not in ISAS:
        raise IsaError(f"QLORAG_CPU_LEVEL={name}: use one of {', '.join(ISAS)}, or unset it")
    runs = isas_up_to(best)
    if name not in runs:
        raise IsaError(
            f"QLORAG_CPU_LEVEL={name}, but this processor has {ISAS[best]}: use one of {', '.join(runs)}, or unset it"
        )
    return ISAS.index(name)
