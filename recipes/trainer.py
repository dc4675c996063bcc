"""The documented import path of `Trainer` and `TrainSettings`, which are defined in `training`."""

from .training.settings import TrainSettings
from .training.trainer import Trainer

__all__ = ["TrainSettings", "Trainer"]
