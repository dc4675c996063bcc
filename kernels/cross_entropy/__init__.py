"""Cross-entropy fused with the output head: see README.md."""

from .ops import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
