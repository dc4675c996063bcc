"""The keys and values of tokens already seen, so that each new token costs one pass and not a whole prefix.

One pair of buffers per layer, [B, KV heads, capacity, head_dim]. A buffer doubles when it is full, so appending n
tokens one by one copies O(n) in total. Nothing is evicted: with a sliding window the mask hides what is too old.
"""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Grows as tokens are appended; `length` is how many positions every layer holds.

    layers: number of decoder layers.  capacity: positions allocated at the first append.
    """

    def __init__(self, layers: int, *, capacity: int = 256) -> None:
        self.length = 0
        self._capacity = capacity
        self._keys: list[Tensor | None] = [None] * layers
        self._values: list[Tensor | None] = [None] * layers

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k, v: [B, KV, T, d] for positions length ... length + T. Returns all keys and values, [B, KV, length + T, d].

        `length` itself moves only in `advance`, once every layer has appended.
        """
        end = self.length + k.shape[2]
        keys = self._grown(self._keys[layer], k, end)
        values = self._grown(self._values[layer], v, end)
        keys[:, :, self.length : end] = k
        values[:, :, self.length : end] = v
        self._keys[layer], self._values[layer] = keys, values
        return keys[:, :, :end], values[:, :, :end]

    def advance(self, tokens: int) -> None:
        """Marks `tokens` more positions as held by every layer."""
        self.length += tokens

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(t.nbytes for t in (*self._keys, *self._values) if t is not None)

    def _grown(self, buffer: Tensor | None, new: Tensor, end: int) -> Tensor:
        if buffer is not None and buffer.shape[2] >= end:
            return buffer
        capacity = max(self._capacity, end, 0 if buffer is None else 2 * buffer.shape[2])
        batch, heads, _, dim = new.shape
        grown = torch.empty(batch, heads, capacity, dim, dtype=new.dtype, device=new.device)
        if buffer is not None:
            grown[:, :, : self.length] = buffer[:, :, : self.length]
        return grown
