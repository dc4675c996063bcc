"""The low-rank update, added to a layer's output in one pass: see README.md."""

from .ops import add_lora

__all__ = ["add_lora"]
