"""A decoder-only transformer, token by token: configuration, blocks, cache, sampling, generation."""

from __future__ import annotations

from .decoder import Decoder, causal_attention

__all__ = ["Decoder", "causal_attention"]
