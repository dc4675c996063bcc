"""The parts of a decoder layer: RMSNorm, grouped-query attention, SwiGLU, and the layer that adds them up.

    x = x + o(attention(rope(q(n)), rope(k(n)), v(n)))   n = rms_norm(x)                 # [B, T, D]
    x = x + down(silu(gate(n)) * up(n))                  n = rms_norm(x)

Every projection is an ordinary module that takes [..., K] and returns [..., N]: 4-bit weights and LoRA replace it.
Attention runs on a batch of sequences of equal length, on *packed* sequences (`lengths`, each attends only to itself),
or on new tokens behind a cache. It has no padding mask: packing replaces it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.rms_norm import rms_norm
from ...kernels.rope import rope
from ...kernels.swiglu import swiglu
from .cache import KVCache
from .config import DecoderConfig

# torch's CPU backward of attention has a fixed cost in 16 bits: 46 tokens, 9 heads, forward and backward take 3.1 ms
# in bf16 and 0.75 in float32, 128 tokens 6.9 and 3.8; past some 200 tokens bf16 wins. Training rows are short.
SHORT = 160


class RMSNorm(nn.Module):
    """y = w * x / sqrt(mean(x^2) + eps), the mean in float32                (arXiv:1910.07467)"""

    def __init__(self, size: int, *, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., size]. Returns the same shape and dtype."""
        return rms_norm(x, self.weight, eps=self.eps)


class Attention(nn.Module):
    """Grouped-query attention: H query heads share KV key/value heads     (arXiv:2305.13245)"""

    def __init__(self, config: DecoderConfig, *, window: int | None) -> None:
        super().__init__()
        d, self.window = config.head_dim, window
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, d
        self.q_proj = nn.Linear(config.hidden_size, self.heads * d, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, self.kv_heads * d, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, self.kv_heads * d, bias=config.qkv_bias)
        self.o_proj = nn.Linear(self.heads * d, config.hidden_size, bias=config.o_bias)
        self.q_norm = RMSNorm(d, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(d, eps=config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(
        self,
        x: Tensor,
        cos_sin: tuple[Tensor, Tensor],
        *,
        lengths: Sequence[int] | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """x: [B, T, D]; cos_sin: two of [T, d]. Returns [B, T, D]."""
        batch, tokens, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(batch, tokens, self.heads, self.head_dim)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(batch, tokens, self.kv_heads, self.head_dim)).transpose(1, 2)
        v = self.v_proj(x).view(batch, tokens, self.kv_heads, self.head_dim).transpose(1, 2)
        q, k = rope(q, *cos_sin), rope(k, *cos_sin)  # [B, H or KV, T, d]
        if lengths is not None:
            parts = zip(*(torch.split(t, list(lengths), dim=2) for t in (q, k, v)), strict=True)
            y = torch.cat([causal_attention(*part, window=self.window) for part in parts], dim=2)
        else:
            if cache is not None:
                k, v = cache.append(layer, k, v)
            y = causal_attention(q, k, v, window=self.window)
        out: Tensor = self.o_proj(y.transpose(1, 2).reshape(batch, tokens, self.heads * self.head_dim))
        return out


def causal_attention(q: Tensor, k: Tensor, v: Tensor, *, window: int | None) -> Tensor:
    """softmax(q kᵀ / sqrt(d) + mask) v, where query t sees keys (t - window, t] counted from the end of the keys.

    q: [B, H, T, d]; k, v: [B, KV, S, d], S >= T: the queries are the last T positions.  Returns [B, H, T, d].
    """
    batch, heads, tokens, dim = q.shape
    kv_heads, seen = k.shape[1], k.shape[2]
    group = heads // kv_heads
    hides = window is not None and seen > window
    if tokens == 1 and not hides:
        # One query sees everything: the group's heads stand in for queries, so keys and values are not copied.
        y = F.scaled_dot_product_attention(q.reshape(batch, kv_heads, group, dim), k, v)
        return y.reshape(batch, heads, 1, dim)
    if group > 1:
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    if q.requires_grad and q.device.type == "cpu" and q.itemsize == 2 and tokens <= SHORT:
        return causal_attention(q.float(), k.float(), v.float(), window=window).to(q.dtype)
    if tokens == seen and not hides:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    at = torch.arange(seen - tokens, seen, device=q.device)[:, None]  # [T, 1]
    key = torch.arange(seen, device=q.device)[None, :]  # [1, S]
    visible = key <= at
    if window is not None:
        visible = visible & (key > at - window)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)): SwiGLU                                   (arXiv:2002.05202)"""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        d, f, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(d, f, bias=bias)
        self.up_proj = nn.Linear(d, f, bias=bias)
        self.down_proj = nn.Linear(f, d, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, T, D]. Returns [B, T, D]."""
        out: Tensor = self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
        return out


class DecoderLayer(nn.Module):
    """One pre-norm block: attention, then MLP, each added to its input."""

    def __init__(self, config: DecoderConfig, *, index: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, window=config.windows[index])
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.index = index

    def forward(
        self,
        x: Tensor,
        cos_sin: tuple[Tensor, Tensor],
        *,
        lengths: Sequence[int] | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """x: [B, T, D]. Returns [B, T, D]."""
        n = self.input_layernorm(x)
        x = x + self.self_attn(n, cos_sin, lengths=lengths, cache=cache, layer=self.index)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out
