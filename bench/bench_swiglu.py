"""SwiGLU, forward and backward: what it costs, and what it keeps.

    python bench/bench_swiglu.py [--tokens 256] [--dtype bfloat16] [--threads N] [--repeats 15] [--json FILE]

Autograd keeps gate, up and silu(gate); ours the first two, and computes the third again. See harness/operation.py.
"""

from __future__ import annotations

from harness.operation import HIDDEN, Inputs, Operation, main
from qlorag.kernels.swiglu import reference, swiglu


def operation(new: Inputs) -> Operation:
    gate, up = new(new.tokens, HIDDEN), new(new.tokens, HIDDEN)
    return Operation(ours=swiglu, plain=reference.swiglu, inputs=(gate, up), constants=0)


if __name__ == "__main__":
    main(operation, __doc__)
