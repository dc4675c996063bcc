"""A decoder-only transformer, token by token: configuration, blocks, cache, sampling, generation."""

from __future__ import annotations

from .blocks import causal_attention
from .decoder import Decoder

__all__ = ["Decoder", "causal_attention"]
