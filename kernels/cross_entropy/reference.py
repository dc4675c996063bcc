"""The definition: summed cross-entropy of the rows of `hidden` through the output head, all logits at once."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """sum_i  logsumexp_v(hidden_i . weight_v) - hidden_i . weight_{label_i}

    hidden: [n, D].  weight: [V, D].  labels: int64 [n].  Returns a scalar in hidden's dtype.
    """
    return F.cross_entropy(hidden @ weight.T, labels, reduction="sum")
