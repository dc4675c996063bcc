"""SwiGLU that keeps its two inputs and nothing else: see README.md."""

from .ops import swiglu

__all__ = ["swiglu"]
