"""Loss and gradients on a GPU, a few rows at a time: Triton computes a row's loss and overwrites its logits with dz.

    z   = h Wᵀ                               one chunk of rows, [c, V]
    L   = sum_i logsumexp(z_i) - z_i[label_i]
    dz  = softmax(z) - onehot(label)
    dh  = dz W                               [c, V] @ [V, D]
    dW  = dzᵀ h                              only if the head is trained

This is Liger-Kernel's fused linear cross-entropy (arXiv:2410.10989, section 3). Memory: a chunk of logits, at most
CHUNK_BYTES if they were float32, and dh [n, D]; with a trained head, dW in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK_BYTES = 16 * 2**20


def loss_and_gradients(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, wants_hidden: bool, wants_weight: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As vocabulary_slices.loss_and_gradients, for float32, float16 and bfloat16."""
    from .triton_kernels import loss_and_gradient

    loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
    dh = torch.empty_like(hidden) if wants_hidden else None
    dw = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
    rows = max(1, CHUNK_BYTES // (4 * weight.shape[0]))
    for begin in range(0, hidden.shape[0], rows):
        h, y = hidden[begin : begin + rows], labels[begin : begin + rows]  # [c, D], [c]
        z = h @ weight.T  # [c, V]
        loss += loss_and_gradient(z, y, gradient=wants_hidden or wants_weight).sum()  # z is now dz
        if dh is not None:
            dh[begin : begin + rows] = z @ weight
        if dw is not None:
            dw += z.float().T @ h.float()
    return loss, dh, None if dw is None else dw.to(weight.dtype)
