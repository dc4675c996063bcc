"""What a training step minimises: one file per objective, all with the interface of `objective.py`."""

from __future__ import annotations

from .objective import Objective, PackedBatch
from .sft import SFT

__all__ = ["SFT", "Objective", "PackedBatch"]
