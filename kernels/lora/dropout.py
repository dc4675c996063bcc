"""The dropout mask of the low-rank update's input, drawn from a seed, so that the backward can draw it again."""

from __future__ import annotations

import torch
from torch import Tensor


def draw_mask(x: Tensor, p: float, seed: int, s: float) -> tuple[Tensor | None, float]:
    """The mask (bool, x's shape; True is kept, None if all are) and s / (1 - p), which keeps E[x̃] = x.

    Each element is decided by 16 random bits, four elements to a 64-bit draw: a quarter of the time of
    `bernoulli_`, which would cost a CPU more than the layer itself. p is thereby rounded to a multiple of
    2^-16, and the scale uses the rounded value, so that E[x̃] = x holds exactly.
    """
    dropped = round(p * 65536)
    if dropped == 0:
        return None, s
    generator = torch.Generator(x.device).manual_seed(seed)
    bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64, device=x.device)
    bits.random_(-(2**63), None, generator=generator)
    uniform = bits.view(torch.int16)[: x.numel()]  # -32768 ... 32767
    return (uniform >= dropped - 32768).view(x.shape), s * 65536 / (65536 - dropped)


def masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """x with zeros where the mask is False."""
    return x if mask is None else x * mask
