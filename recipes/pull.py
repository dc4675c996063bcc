"""The documented import path of `pull`, which is defined in `hub.pull`."""

from .hub.pull import pull

__all__ = ["pull"]
