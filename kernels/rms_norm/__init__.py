"""Root-mean-square normalization that keeps x and one number per row: see README.md."""

from .ops import rms_norm

__all__ = ["rms_norm"]
