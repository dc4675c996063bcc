"""The one exception family of `kernels` and `quant`: an argument or a file that is not what it must be."""

from __future__ import annotations


class QuantizationError(ValueError):
    """The message is one line: what was got, what was wanted, and what to do about it."""
