"""Loss and gradients in torch, one slice of the vocabulary at a time, so that all logits [c, V] never exist at once.

Each row of h has a label y. Over the other tokens of a slice s of the vocabulary:

    z  = h W_sᵀ                              [c, S], their logits
    a  = log sum exp z                       [c], their logsumexp
    m  = softmax(z) W_s                      [c, D], the mean of their rows of W

Two slices combine into what one slice of both would give:

    a" = log(exp a + exp a')
    m" = exp(a - a") m + exp(a' - a") m'

After the last slice, with x = a - h·W_y and q = 1 / (1 + exp(-x)), the probability of all tokens but the label:

    L  = log(1 + exp x)                      = logsumexp(all z) - z_y
    dh = q (m - W_y)                         = softmax(all z) W - W_y
    dW = pᵀ h,  p_y = -q,  other p = exp(z - L - z_y)

dh is attention with h as queries and W as keys and values, so z is not needed a second time (arXiv:2112.05682): two
products per slice, while its part of W is in the cache. The label is left out of the sums because a trained model gives
it a probability near 1: softmax_y - 1 would be a difference of two numbers close to 1, where q is a number close to 0.
dW needs the final a, so a head that is trained costs one more product.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

ROWS = 1024  # of h that share one pass over W
FEW_ROWS = 128  # up to this many, z is computed as (W hᵀ)ᵀ: 0.85 of the time for 48 rows, as long for 160
TILE = 2**22  # logits at a time: 8 MB in 16 bits, 16 in float32
CACHED = 2**18  # logits that each thread converts to float32 at a time: 1 MB, which a large L2 cache holds


def loss_and_gradients(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, wants_hidden: bool, wants_weight: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Summed loss, dL/dhidden [n, D] and dL/dweight [V, D] of hidden [n, D], weight [V, D] and int64 labels [n].

    The loss is float32, or float64 if the inputs are; each gradient has the dtype of its tensor.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    dh = torch.empty_like(hidden) if wants_hidden else None
    losses, label_logits, q = torch.empty(3, len(hidden), dtype=wide, device=hidden.device)
    for rows in _parts(len(hidden)):
        h, y = hidden[rows], labels[rows]  # [c, D], [c]
        label_rows = weight[y].to(wide)  # [c, D]
        label_logits[rows] = (h.to(wide) * label_rows).sum(-1)
        a, m = _other_tokens(h, weight, y, wants_mean=wants_hidden)  # [c], [c, D]
        x = a - label_logits[rows]
        losses[rows] = torch.logaddexp(x, torch.zeros_like(x))
        q[rows] = x.sigmoid()
        if dh is not None:
            dh[rows] = m.sub_(label_rows).mul_(q[rows, None])
    dw = _weight_gradient(hidden, weight, labels, losses + label_logits, q) if wants_weight else None
    return losses.sum(), dh, dw


def _other_tokens(h: Tensor, weight: Tensor, y: Tensor, *, wants_mean: bool) -> tuple[Tensor, Tensor]:
    """The module's a [c] and m [c, D] over the whole vocabulary; m is zeros if it is not wanted."""
    wide = torch.promote_types(h.dtype, torch.float32)
    a = torch.full((len(h), 1), -torch.inf, dtype=wide, device=h.device)
    m = torch.zeros(h.shape, dtype=wide, device=h.device)
    for first, w in _slices(weight, len(h)):
        z = _logits(h, w)  # [c, S]
        z[_labels_in(first, w, y)] = torch.finfo(z.dtype).min  # not -inf: a slice may consist of the label
        largest, total = _exponentials(z, wide)  # [c, 1]
        here = largest.add_(total.log())
        both = torch.logaddexp(a, here)
        if wants_mean:
            mean = (z @ w).to(wide).div_(total)  # [c, D]
            m.lerp_(mean, (here - both).exp_())  # exp(here - both) is the weight of this slice
        a = both
    return a[:, 0], m


def _logits(h: Tensor, w: Tensor) -> Tensor:
    """h wᵀ, [c, S]. A GEMM rearranges its right operand first, which is cheaper for a few rows of h than for W."""
    return (w @ h.T).T.contiguous() if len(h) <= FEW_ROWS else h @ w.T


def _exponentials(z: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """Each row's maximum and sum of exp(z - maximum), [c, 1] in `wide`; z [c, S] becomes those exponentials.

    It takes a few rows at a time, so that their float32 values are still in the cache when they are read again.
    """
    largest, total = torch.empty(2, len(z), 1, dtype=wide, device=z.device)
    at_once = max(1, CACHED * torch.get_num_threads() // z.shape[1])
    for first in range(0, len(z), at_once):
        rows = slice(first, first + at_once)
        part = z[rows]
        x = part.to(wide)  # part itself if it has that dtype
        largest[rows] = x.amax(-1, keepdim=True)
        total[rows] = x.sub_(largest[rows]).exp_().sum(-1, keepdim=True)
        part.copy_(x)
    return largest, total


def _weight_gradient(hidden: Tensor, weight: Tensor, labels: Tensor, lse: Tensor, q: Tensor) -> Tensor:
    """The module's dW [V, D]. lse: [n], logsumexp over the whole vocabulary.  q: [n]."""
    dw = torch.empty_like(weight)
    for first, w in _slices(weight, ROWS):
        total: Tensor | None = None  # [S, D]
        for rows in _parts(len(hidden)):
            h = hidden[rows]
            p = _logits(h, w).to(lse.dtype).sub_(lse[rows, None]).exp_()  # [c, S]
            i, column = _labels_in(first, w, labels[rows])
            p[i, column] = -q[rows][i]
            product = p.to(h.dtype).T @ h
            total = product if total is None else total.to(lse.dtype).add_(product)
        assert total is not None  # there is one block at least
        dw[first : first + len(w)] = total
    return dw


def _parts(n: int) -> list[slice]:
    """The rows 0 ... n-1 in blocks of about the same size, since a block of a few rows costs as much as one of 100."""
    count = max(1, -(-n // ROWS))
    return [slice(n * i // count, n * (i + 1) // count) for i in range(count)]


def _slices(weight: Tensor, n: int) -> Iterator[tuple[int, Tensor]]:
    """First token of each slice of the vocabulary and its part of W [S, D]; S is a power of 2 except in the last."""
    width = 1 << ((TILE // max(1, min(ROWS, n))).bit_length() - 1)
    for first in range(0, len(weight), width):
        yield first, weight[first : first + width]


def _labels_in(first: int, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column of each label that is in the slice w, which begins with token `first`."""
    rows = ((y >= first) & (y < first + len(w))).nonzero()[:, 0]
    return rows, y[rows] - first
