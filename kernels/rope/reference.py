"""The definition: dimensions i and i + d/2 of a vector are a point in a plane, rotated by its position's angle."""

from __future__ import annotations

import torch
from torch import Tensor


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotation x * cos + cat(-x2, x1) * sin of x = cat(x1, x2)           (arXiv:2104.09864, section 3.4.2)

    x: [..., T, d].  cos, sin: [T, d].  Returns [..., T, d] in the wider dtype of them.
    """
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin
