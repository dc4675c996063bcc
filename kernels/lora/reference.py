"""The definition: a layer's output plus a scaled product of rank R."""

from __future__ import annotations

from torch import Tensor


def add_lora(base: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, *, scaling: float) -> Tensor:
    """The sum base + scaling * (x Aᵀ) Bᵀ                                      (arXiv:2106.09685, equation 3)

    base: [..., N].  x: [..., K].  lora_A: [R, K].  lora_B: [N, R].  Returns [..., N]. All in one dtype.
    """
    return base + scaling * (x @ lora_A.T) @ lora_B.T
