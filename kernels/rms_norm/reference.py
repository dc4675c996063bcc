"""The definition: each row divided by the root of its mean square, then scaled by the weight, column by column.

Llama's order of rounding: the normalized row is rounded to the dtype of x, and its product with the weight once more.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """Each row as weight * round(x / sqrt(mean(x^2) + eps)), the mean in float32   (arXiv:1910.07467, equation 4)

    x: [..., D].  weight: [D].  Returns [..., D] in the wider dtype of the two; float64 stays float64 throughout.
    """
    wide = x.float() if x.dtype != torch.float64 else x
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)
