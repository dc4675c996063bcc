"""An adapter written into its base: one ordinary model folder that needs neither afterwards.

From a 4-bit base, the update is added to the *decoded* weights, W' = decode(W) + s B A, because those are the weights
it was trained against. Adding it to the original weights instead would undo only half of what training corrected for
(PEFT issue 2105), and quantizing W' again would round most of a small update away (PEFT issue 2321).
"""

from __future__ import annotations

from pathlib import Path

import torch

from ...lora import MergeReport, merge, to_dense
from ...models import save_model
from ...quant import QuantizedLinear
from .assemble import LoadedModel
from .end_tokens import write_end_ids


def fuse(loaded: LoadedModel, save_path: str | Path, *, dtype: torch.dtype = torch.bfloat16) -> MergeReport:
    """Merges the attached adapter and saves the model as a Hugging Face folder.

    loaded: a model with an adapter attached; afterwards its layers are dense and merged.
    Returns what merging changed, layer by layer.
    Raises WeightsError: the place is taken.  AdapterError: no adapter is attached.
    """
    report = merge(loaded.model, dtype=dtype)
    for path, layer in list(loaded.model.named_modules()):  # 4-bit layers that carried no adapter
        if isinstance(layer, QuantizedLinear):
            loaded.model.set_submodule(path, to_dense(layer, dtype))
    folder = save_model(loaded.model, save_path, source=loaded.folder, dtype=dtype)
    write_end_ids(folder, loaded.tok.eos_ids)  # what ends a turn was learned with the adapter
    return report
