"""Loss and gradient of a row of logits on a GPU; the gradient overwrites the logits.

    L  = logsumexp(z) - z[label]
    dz = softmax(z) - onehot(label)

One program per row, two passes over it: the first keeps a running maximum and a sum that is rescaled whenever the
maximum grows (arXiv:1805.02867), the second overwrites. Sums are float32 for every dtype of z; dz is rounded once, to
the dtype of z. The row is read twice and written once; a row that fits into the cache is read from memory once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import launching_on

BLOCK = 4096


@triton.jit
def loss_and_gradient_kernel(
    z,  # [c, V], overwritten with its gradient if GRADIENT
    labels,  # int64 [c]
    losses,  # float32 [c]
    columns,  # V
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    start = z + row * columns
    label = tl.load(labels + row)
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, columns, BLOCK):
        v = first + tl.arange(0, BLOCK)
        x = tl.load(start + v, mask=v < columns, other=float("-inf")).to(tl.float32)
        # Each lane has its own maximum. Before its first element both are -inf, and the guards make that exp(0) * 0.
        grown = tl.maximum(largest, x)
        shift = tl.where(grown == float("-inf"), 0.0, grown)
        total = total * tl.exp(tl.where(largest == float("-inf"), 0.0, largest - shift)) + tl.exp(x - shift)
        largest = grown
    overall = tl.max(largest, axis=0)
    lse = overall + tl.log(tl.sum(total * tl.exp(largest - overall), axis=0))
    tl.store(losses + row, lse - tl.load(start + label).to(tl.float32))
    if GRADIENT:
        tl.debug_barrier()  # all threads read the label's logit before any overwrites it
        for first in range(0, columns, BLOCK):
            v = first + tl.arange(0, BLOCK)
            x = tl.load(start + v, mask=v < columns, other=0).to(tl.float32)
            dz = tl.exp(x - lse) - tl.where(v == label, 1.0, 0.0)
            tl.store(start + v, dz.to(z.dtype.element_ty), mask=v < columns)


def loss_and_gradient(z: Tensor, labels: Tensor, *, gradient: bool) -> Tensor:
    """Losses float32 [c] of the logits z [c, V]; with `gradient`, z then holds dL/dz."""
    losses = torch.empty(z.shape[0], dtype=torch.float32, device=z.device)
    with launching_on(z):
        loss_and_gradient_kernel[(z.shape[0],)](z, labels, losses, z.shape[1], GRADIENT=gradient, BLOCK=BLOCK)
    return losses
