"""Rotary positions, forward and backward: what turning the queries costs.

    python bench/bench_rope.py [--tokens 256] [--dtype bfloat16] [--threads N] [--repeats 15] [--json FILE]

Neither form keeps anything of x. The reference's autograd fills two tensors with zeros to put the halves of dx into;
ours turns dy back. See harness/operation.py.
"""

from __future__ import annotations

import math

import torch
from harness.operation import HEAD, HEADS, Inputs, Operation, main
from qlorag.kernels.rope import reference, rope


def operation(new: Inputs) -> Operation:
    angles = 2 * math.pi * torch.rand(new.tokens, HEAD // 2, generator=new.generator).repeat(1, 2)
    cos, sin = (table.to(new.device, new.dtype) for table in (angles.cos(), angles.sin()))
    return Operation(ours=rope, plain=reference.rope, inputs=(new(1, HEADS, new.tokens, HEAD), cos, sin), constants=2)


if __name__ == "__main__":
    main(operation, __doc__)
