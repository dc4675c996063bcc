"""A model in the form that other programs read: a folder in bitsandbytes' 4 bits.

Nothing is lost beyond what quantizing loses: what is written is what `--quantize` holds in memory, byte for
byte, and transformers with bitsandbytes decodes the same numbers from it. An adapter is not part of it. Written into a
4-bit weight, most of a small update would be rounded away (fuse.py), so a 4-bit base and its adapter are two folders.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ...models import load_model, save_quantized
from ...quant import QuantizedLinear
from .pull import resolve_model


@dataclass(frozen=True)
class ExportReport:
    """What was written. bits_per_weight: of the 4-bit weights, with their scales."""

    folder: Path
    layers: int
    quantized_parameters: int
    bits_per_weight: float
    nbytes: int


def export_bnb(
    name: str,
    save_path: str | Path,
    *,
    quantize: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    dtype: torch.dtype = torch.bfloat16,
) -> ExportReport:
    """Writes a model with its projections in 4 bits, as transformers and bitsandbytes load it.

    name: a model folder or a name that `pull` knows. One that is in 4 bits already keeps its bytes.
    save_path: the new folder; must not exist, or be empty.  dtype: of everything that stays dense.
    Raises ModelError, QuantizationError, RecipeError.
    """
    source = resolve_model(name)
    model = load_model(source, quantize=quantize, block_size=block_size, double_quant=double_quant, dtype=dtype)
    folder = save_quantized(model, save_path, source=source, dtype=dtype)
    weights = [m.quantized for m in model.modules() if isinstance(m, QuantizedLinear)]
    parameters = sum(q.numel for q in weights)
    return ExportReport(
        folder=folder,
        layers=len(weights),
        quantized_parameters=parameters,
        bits_per_weight=8 * sum(q.nbytes for q in weights) / parameters,
        nbytes=sum(p.stat().st_size for p in folder.iterdir()),
    )
