"""The definition: silu of one projection, times the other."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """The product silu(gate) * up, where silu(g) = g / (1 + exp(-g))         (arXiv:2002.05202, equation 5)

    gate, up: [..., F], of one dtype.  Returns [..., F] in it; in 16 bits, silu and the product are each rounded.
    """
    return F.silu(gate) * up
