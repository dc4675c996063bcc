"""Rotary position embedding, applied: see README.md."""

from .ops import rope

__all__ = ["rope"]
