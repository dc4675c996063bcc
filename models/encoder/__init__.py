"""Sentence encoders of the BERT kind: network, pooling, text to vector."""

from __future__ import annotations

from .encoder import Encoder, load_encoder

__all__ = ["Encoder", "load_encoder"]
