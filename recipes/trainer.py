"""The documented import path of `Trainer`, which is defined in `training.trainer`."""

from .training.trainer import Trainer, TrainSettings

__all__ = ["TrainSettings", "Trainer"]
