"""Why targets are missed, and what would reach them: sentences for TARGETS.md.

They are about the machine of the committed results; the experiments behind them are in kernels/nf4/NOTES.md.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Reason:
    """`pattern` fits the names of the targets that it is about."""

    what: str
    pattern: str
    why: str

    def fits(self, work: str) -> bool:
        return re.search(self.pattern, work) is not None


REASONS = (
    Reason(
        "Decoding, elements per second",
        "^dequantize .* one thread$",
        "One core writes no faster to memory: 12 Gelem/s of bfloat16, and 6 of float32, are 24 GB/s. A copy of as many "
        "bytes, which `bench_nf4.py` prints beside it, is slower still, and fewer instructions changed nothing. A "
        "processor with more bandwidth for one core would get there; on this one nothing would.",
    ),
    Reason(
        "Decoding, beside the public function as installed",
        "public function, as installed",
        "The same limit on one side, the price of page faults on the other.",
    ),
    Reason(
        "One row, beside bitsandbytes' rearranged weight",
        "repacked for inference",
        "It multiplies as many bytes in much the same way. Even a product that did nothing but read them would not be "
        "ten times as fast.",
    ),
    Reason(
        "One row, malloc as installed",
        "matmul_4bit, malloc as installed",
        "Page faults of bitsandbytes make this ratio two to three times that of the tuned process, and not four times. "
        "What this side waits for is the same in both.",
    ),
    Reason(
        "One row",
        "matmul_4bit, malloc",
        "19 vector instructions for 128 codes, 8 of them look-ups: on this processor a look-up of 16-bit entries is "
        "two instructions. Where it is one, 15 are left.",
    ),
    Reason(
        "Four rows beside one",
        "^M=4,",
        "One row became faster than four did: they share the look-ups, and not the seven instructions of each.",
    ),
    Reason(
        "Many rows",
        "^M=(128|512)",
        "What the decoding of a block and the multiplication of the one before do not overlap.",
    ),
)
