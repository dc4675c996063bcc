"""Loss and gradients in torch, one slice of the vocabulary after another: whose logits, [c, V], never exist at once.

A row of h has one right word, its label y. Over the other words of a slice s of the vocabulary:

    z  = h W_sᵀ                              [c, S]
    a  = log sum exp z                       [c], how much they weigh
    m  = softmax(z) W_s                      [c, D], their mean

and what two slices found is what one slice of both would have found:

    a" = log(exp a + exp a')
    m" = exp(a - a") m + exp(a' - a") m'

At the end, with x = a - h·W_y over the whole vocabulary and q = 1 / (1 + exp(-x)), the probability of a wrong word:

    L  = log(1 + exp x)                      = logsumexp(all z) - z_y
    dh = q (m - W_y)                         = softmax(all z) W - W_y
    dW = pᵀ h,  p_y = -q,  other p = exp(z - L - z_y)

dh is attention with h as queries and W as keys and values, so it needs no second look at z (arXiv:2112.05682): two
products per slice, while its part of W is in the cache. The right word stands aside because a trained model is nearly
certain of it: softmax_y - 1 would be the difference of two numbers close to 1, and q is a number close to 0. dW wants
the final a, so a head that is trained is multiplied once more.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

ROWS = 1024  # of h that share one pass over W
FEW_ROWS = 128  # up to which z is made as (W hᵀ)ᵀ: 48 take 0.85 of the time that way, 160 as long
TILE = 2**22  # logits at a time: 8 MB in 16 bits, 16 in float32
CACHED = 2**18  # of them widened at a time by each thread: 1 MB in float32, which a large L2 cache holds


def loss_and_gradients(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, wants_hidden: bool, wants_weight: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Summed loss, dL/dhidden [n, D] and dL/dweight [V, D] of hidden [n, D], weight [V, D] and int64 labels [n].

    The loss is float32, or float64 where the inputs are; gradients have the dtype of what they belong to.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    dh = torch.empty_like(hidden) if wants_hidden else None
    losses, right_logits, q = torch.empty(3, len(hidden), dtype=wide, device=hidden.device)
    for rows in _parts(len(hidden)):
        h, y = hidden[rows], labels[rows]  # [c, D], [c]
        right = weight[y].to(wide)  # [c, D]
        right_logits[rows] = (h.to(wide) * right).sum(-1)
        a, m = _wrong_words(h, weight, y, wants_mean=wants_hidden)  # [c], [c, D]
        x = a - right_logits[rows]
        losses[rows] = torch.logaddexp(x, torch.zeros_like(x))
        q[rows] = x.sigmoid()
        if dh is not None:
            dh[rows] = m.sub_(right).mul_(q[rows, None])
    dw = _weight_gradient(hidden, weight, labels, losses + right_logits, q) if wants_weight else None
    return losses.sum(), dh, dw


def _wrong_words(h: Tensor, weight: Tensor, y: Tensor, *, wants_mean: bool) -> tuple[Tensor, Tensor]:
    """The module's a [c] and m [c, D] of the whole vocabulary; m is zeros if it is not wanted."""
    wide = torch.promote_types(h.dtype, torch.float32)
    a = torch.full((len(h), 1), -torch.inf, dtype=wide, device=h.device)
    m = torch.zeros(h.shape, dtype=wide, device=h.device)
    for first, w in _slices(weight, len(h)):
        z = _logits(h, w)  # [c, S]
        z[_labels_in(first, w, y)] = torch.finfo(z.dtype).min  # not -inf: a slice may hold nothing else
        largest, total = _exponentials(z, wide)  # [c, 1]
        here = largest.add_(total.log())
        both = torch.logaddexp(a, here)
        if wants_mean:
            mean = (z @ w).to(wide).div_(total)  # [c, D]
            m.lerp_(mean, (here - both).exp_())  # its share is exp(here - both), that of m the rest
        a = both
    return a[:, 0], m


def _logits(h: Tensor, w: Tensor) -> Tensor:
    """h wᵀ, [c, S]. A GEMM rearranges its right operand first; of few rows that is cheaper than of W."""
    return (w @ h.T).T.contiguous() if len(h) <= FEW_ROWS else h @ w.T


def _exponentials(z: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """Each row's maximum and sum of exp(z - maximum), [c, 1] in `wide`; z [c, S] becomes those exponentials.

    A few rows at a time: what is wide is then still in the cache when it is next read.
    """
    largest, total = torch.empty(2, len(z), 1, dtype=wide, device=z.device)
    at_once = max(1, CACHED * torch.get_num_threads() // z.shape[1])
    for first in range(0, len(z), at_once):
        rows = slice(first, first + at_once)
        part = z[rows]
        x = part.to(wide)  # part itself, if it is so wide
        largest[rows] = x.amax(-1, keepdim=True)
        total[rows] = x.sub_(largest[rows]).exp_().sum(-1, keepdim=True)
        part.copy_(x)
    return largest, total


def _weight_gradient(hidden: Tensor, weight: Tensor, labels: Tensor, lse: Tensor, q: Tensor) -> Tensor:
    """The module's dW [V, D]. lse, q: [n], the first over all words."""
    dw = torch.empty_like(weight)
    for first, w in _slices(weight, ROWS):
        total: Tensor | None = None  # [S, D]
        for rows in _parts(len(hidden)):
            h = hidden[rows]
            p = _logits(h, w).to(lse.dtype).sub_(lse[rows, None]).exp_()  # [c, S]
            i, word = _labels_in(first, w, labels[rows])
            p[i, word] = -q[rows][i]
            product = p.to(h.dtype).T @ h
            total = product if total is None else total.to(lse.dtype).add_(product)
        assert total is not None  # there is one block at least
        dw[first : first + len(w)] = total
    return dw


def _parts(n: int) -> list[slice]:
    """The rows 0 ... n-1 in blocks of about the same size: one of a few rows would cost as much as one of a hundred."""
    count = max(1, -(-n // ROWS))
    return [slice(n * i // count, n * (i + 1) // count) for i in range(count)]


def _slices(weight: Tensor, n: int) -> Iterator[tuple[int, Tensor]]:
    """The first word of each slice of the vocabulary, and its part of W [S, D]; S is a power of 2, but for the last."""
    width = 1 << ((TILE // max(1, min(ROWS, n))).bit_length() - 1)
    for first in range(0, len(weight), width):
        yield first, weight[first : first + width]


def _labels_in(first: int, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column of each label that is in the slice w, which begins with word `first`."""
    rows = ((y >= first) & (y < first + len(w))).nonzero()[:, 0]
    return rows, y[rows] - first
