"""The loss fused with the output head, forward and backward: what it costs, and what it keeps.

    python bench/bench_cross_entropy.py [--tokens 256] [--dtype bfloat16] [--threads N] [--repeats 15] [--json FILE]

`--tokens` are the rows that have a label; the head is frozen, as in LoRA training. The reference makes all logits and
keeps their softmax. torch 2.13 has a fused form of its own. With its default settings it took over 20 times as long as
the reference at 256 rows; it stands here with the settings that were the fastest of those tried. See
harness/operation.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from harness.operation import VOCABULARY, WIDTH, Inputs, Operation, main
from qlorag.kernels.cross_entropy import linear_cross_entropy, reference
from torch import Tensor


def operation(new: Inputs) -> Operation:
    labels = torch.randint(VOCABULARY, (new.tokens,), generator=new.generator).to(new.device)
    head = new(VOCABULARY, WIDTH, trained=False, scale=WIDTH**-0.5)
    return Operation(
        ours=linear_cross_entropy,
        plain=reference.linear_cross_entropy,
        inputs=(new(new.tokens, WIDTH), head, labels),
        constants=2,
        flop=4.0 * new.tokens * WIDTH * VOCABULARY,  # z = h Wᵀ, dh = dz W
        others={"torch linear_cross_entropy, balanced": torch_fused} if hasattr(F, "linear_cross_entropy") else {},
    )


def torch_fused(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=128, acc_policy="balanced")
    return F.linear_cross_entropy(hidden, weight, labels, reduction="sum", options=options)


if __name__ == "__main__":
    main(operation, __doc__)
