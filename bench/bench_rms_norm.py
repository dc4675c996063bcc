"""RMSNorm, forward and backward: what it costs, and what it keeps.

    python bench/bench_rms_norm.py [--tokens 256] [--dtype bfloat16] [--threads N] [--repeats 15] [--json FILE]

The weight is frozen, as in LoRA training. In 16 bits the reference leaves autograd a float32 copy of x; ours keeps x
as it came and one number per row. torch's own function is there for its speed. See harness/operation.py.
"""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from harness.operation import WIDTH, Inputs, Operation, main
from qlorag.kernels.rms_norm import reference, rms_norm

EPS = 1e-5


def operation(new: Inputs) -> Operation:
    return Operation(
        ours=partial(rms_norm, eps=EPS),
        plain=partial(reference.rms_norm, eps=EPS),
        inputs=(new(new.tokens, WIDTH), new(WIDTH, trained=False)),
        constants=1,
        others={"torch.nn.functional.rms_norm": lambda x, weight: F.rms_norm(x, (WIDTH,), weight, EPS)},
    )


if __name__ == "__main__":
    main(operation, __doc__)
