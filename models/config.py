"""The documented import path of `decoder_config`, which is defined in `decoder.config`."""

from .decoder.config import decoder_config

__all__ = ["decoder_config"]
