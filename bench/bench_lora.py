"""The low-rank update, forward and backward: what an adapter adds to one projection.

    python bench/bench_lora.py [--tokens 256] [--dtype bfloat16] [--threads N] [--repeats 15] [--json FILE]

Rank 8 on the widest projection, 576 to 1536; the layer's own product is not in the figures. Both forms keep x and z.
On a processor the same products run in both; what is fused is for a GPU. See harness/operation.py.
"""

from __future__ import annotations

from functools import partial

from harness.operation import HIDDEN, WIDTH, Inputs, Operation, main
from qlorag.kernels.lora import add_lora, reference

RANK = 8


def operation(new: Inputs) -> Operation:
    base, x = new(new.tokens, HIDDEN), new(new.tokens, WIDTH)
    return Operation(
        ours=partial(add_lora, scaling=2.0),
        plain=partial(reference.add_lora, scaling=2.0),
        inputs=(base, x, new(RANK, WIDTH, scale=WIDTH**-0.5), new(HIDDEN, RANK)),
        constants=2,
        flop=6.0 * new.tokens * RANK * (WIDTH + HIDDEN),  # z and y forward; g, dx, dA and dB backward
    )


if __name__ == "__main__":
    main(operation, __doc__)
