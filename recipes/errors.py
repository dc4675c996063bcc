"""What can go wrong in a recipe. Each message is one line that says what was found and what to do."""

from __future__ import annotations


class RecipeError(ValueError):
    """Base of every error that this package raises on purpose."""


class PullError(RecipeError):
    """A model could not be fetched, checked or put in its place."""


class DataError(RecipeError):
    """A training or evaluation file holds a row that cannot be used."""


class TrainingError(RecipeError):
    """A training run cannot start, resume or go on."""


class UsageError(RecipeError):
    """A command was asked for something it does not offer."""
