"""A model ready to run from the names a user types: folder or known name, 4 bits or not, with or without an adapter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ...lora import adapter_info, load_adapter
from ...models import Decoder, Tokenizer, load_model, load_tokenizer
from ...quant import QuantizedLinear
from ..errors import UsageError
from .end_tokens import read_end_ids
from .pull import resolve_model

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class LoadedModel:
    """A decoder, its tokenizer, the folder both came from, and how its base is quantized (None: it is not)."""

    model: Decoder
    tok: Tokenizer
    folder: Path
    quantize: str | None


def assemble(
    name: str, *, adapter_path: str | None = None, quantize: str | None = None, dtype: str = "auto"
) -> LoadedModel:
    """Loads a decoder and its tokenizer, and attaches the adapter if one is given.

    name:     a model folder or a name that `pull` knows.
    quantize: "nf4", "fp4", "none" (as the folder stores it), or None for: as the adapter's base was in training.
    dtype:    "auto", or a key of DTYPES.
    Raises ModelError, AdapterError, RecipeError.
    """
    folder = resolve_model(name)
    info = adapter_info(adapter_path) if adapter_path else None
    options: dict[str, object] = {}
    if quantize is None and info is not None and info.quantize:
        quantize = info.quantize["kind"]
        options = {k: v for k, v in info.quantize.items() if k != "kind"}
    kind = None if quantize in (None, "none") else quantize
    model = load_model(folder, quantize=kind, dtype=pick_dtype(dtype), **options)  # type: ignore[arg-type]
    held = sorted({m.kind for m in model.modules() if isinstance(m, QuantizedLinear)})  # asked for, or stored so
    tok = load_tokenizer(folder)
    tok.check_vocab(model.config.vocab_size)
    if adapter_path:
        load_adapter(model, adapter_path, base_fingerprint=model.fingerprint)
        tok = tok.stopping_at(read_end_ids(Path(adapter_path)))
    model.eval()
    return LoadedModel(model, tok, folder, "+".join(held) or None)


def pick_dtype(name: str) -> torch.dtype:
    """The dtype of that name; "auto" is bfloat16 where the processor multiplies it natively, else float32.

    On a CPU without bf16 instructions a bf16 product runs several times slower than a float32 one.
    """
    if name == "auto":
        return torch.bfloat16 if _has_fast_bfloat16() else torch.float32
    if name not in DTYPES:
        raise UsageError(f"--dtype {name}: wanted auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def _has_fast_bfloat16() -> bool:
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported())
    cpu = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(cpu.get("avx512_bf16") or cpu.get("amx_bf16") or cpu.get("bf16") or cpu.get("arm_bf16"))
