"""The definition: silu of one projection, times the other."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """The product silu(gate) * up, where silu(g) = g / (1 + exp(-g))         (arXiv:2002.05202, equation 5)

    gate, up: [..., F], alike.  Returns [..., F] in their dtype; for 16 bits, silu and the product are rounded each.
    """
    return F.silu(gate) * up
