"""What can go wrong when model files are read. Each message is one line that names the file and the field."""

from __future__ import annotations


class ModelError(ValueError):
    """Base of every error that this package raises on purpose."""


class ConfigError(ModelError):
    """A model's configuration is missing, malformed, or describes something that is not implemented."""


class WeightsError(ModelError):
    """A weight file is damaged, incomplete, or does not fit the configuration beside it."""


class TokenizerError(ModelError):
    """A tokenizer's files are missing, malformed, or of a kind that is not implemented."""


class TemplateError(ModelError):
    """A chat template is missing, malformed, or refused the messages it was given."""
