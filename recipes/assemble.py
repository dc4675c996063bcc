"""The documented import path of `assemble`, which is defined in `hub.assemble`."""

from .hub.assemble import assemble

__all__ = ["assemble"]
