"""A decoder-only transformer, as Llama, Mistral, Qwen2 and Qwen3 share it.

    x = embed(ids)                                                                   # [B, T, D]
    per layer:  x = layer(x)                                                         # attention, then MLP: blocks.py
    logits = head(rms_norm(x))                                                       # [B, T, V]

Modules carry the names of the checkpoint (`model.layers.0.self_attn.q_proj`), so a tensor's name is its place, and an
adapter's too.

Two ways to run many sequences: a batch [B, T] of equal lengths, or *packed*: [1, T_total] with `lengths`, where each
sequence attends only to itself and starts at position 0. Training packs, so no padding is ever computed.

Left out: attention with a padding mask (packing replaces it), cross-attention, mixture of experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .blocks import DecoderLayer, RMSNorm
from .cache import KVCache
from .config import DecoderConfig
from .rope import Rope


class Transformer(nn.Module):
    """Embedding, layers and the last norm: everything under `model.` in a checkpoint."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        table = torch.empty(config.vocab_size, config.hidden_size)
        if not table.is_meta:  # torch's normal_ on meta imports its compiler: 885 modules, 144 MB, 1 s
            nn.init.normal_(table)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, _weight=table)
        self.layers = nn.ModuleList(DecoderLayer(config, index=i) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps)


class Decoder(nn.Module):
    """ids [B, T] -> logits [B, T, V].

    Attributes: `config`; `fingerprint`, the checkpoint's (empty for a model that was not loaded from one).
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.fingerprint = ""
        self.model = Transformer(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tied_head:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.rope = Rope(config.rope, head_dim=config.head_dim)

    def forward(self, ids: Tensor, *, lengths: Sequence[int] | None = None, cache: KVCache | None = None) -> Tensor:
        """ids: int64 [B, T].  lengths, cache: as in `hidden`.  Returns logits [B, T, V]."""
        logits: Tensor = self.lm_head(self.hidden(ids, lengths=lengths, cache=cache))
        return logits

    def hidden(self, ids: Tensor, *, lengths: Sequence[int] | None = None, cache: KVCache | None = None) -> Tensor:
        """What the head is applied to, [B, T, D].

        ids: int64 [B, T].
        lengths: the lengths of packed sequences, their sum being T; not together with a cache.
        cache: holds the positions before ids, and holds ids too afterwards.
        Raises ValueError: lengths do not add up, or both are given.
        """
        tokens = ids.shape[1]
        if lengths is not None:
            if cache is not None:
                raise ValueError("lengths and cache exclude each other: a cache continues one sequence")
            if sum(lengths) != tokens:
                raise ValueError(f"lengths add up to {sum(lengths)}, ids hold {tokens} tokens")
            positions = torch.cat([torch.arange(n, device=ids.device) for n in lengths])
        else:
            start = 0 if cache is None else cache.length
            positions = torch.arange(start, start + tokens, device=ids.device)
        x = self.model.embed_tokens(ids)
        cos_sin = self.rope.cos_sin(positions, x.dtype)
        for layer in self.model.layers:
            x = layer(x, cos_sin, lengths=lengths, cache=cache)
        if cache is not None:
            cache.advance(tokens)
        out: Tensor = self.model.norm(x)
        return out

    def new_cache(self, capacity: int = 256) -> KVCache:
        """An empty cache that holds `capacity` positions before it first grows."""
        return KVCache(self.config.num_layers, capacity=capacity)
