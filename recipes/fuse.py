"""An adapter written into its base: one ordinary model folder that needs neither afterwards.

From a 4-bit base, the update is added to the *decoded* weights, W' = decode(W) + s B A, because those are the weights
it was trained against. Adding it to the original weights instead would undo only half of what training corrected for
(PEFT issue 2105), and quantizing W' again would round most of a small update away (PEFT issue 2321).
"""

from __future__ import annotations

from pathlib import Path

import torch

from ..lora import merge
from ..models import save_model
from .assemble import Assembled


def fuse(it: Assembled, save_path: str | Path, *, dtype: torch.dtype = torch.bfloat16) -> dict[str, object]:
    """Merges the attached adapter and saves the model as a Hugging Face folder.

    it: a model with an adapter attached; afterwards its layers are dense and merged.
    Returns what was done: layers, the largest change of a weight, and the relative size of the update.
    Raises WeightsError: the place is taken.  AdapterError: no adapter is attached.
    """
    report = merge(it.model, dtype=dtype)
    save_model(it.model, save_path, source=it.folder, dtype=dtype)
    return report.summary()


