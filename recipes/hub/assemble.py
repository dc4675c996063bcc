"""A model ready to run from the names a user types: folder or known name, 4 bits or not, with or without an adapter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ...lora import AdapterError, AdapterInfo, adapter_info, load_adapter
from ...lora.files import TENSORS_NAME
from ...models import Decoder, Tokenizer, load_model, load_tokenizer
from ...models.files.load import QUANTIZE_KINDS
from ...quant import QuantizedLinear
from ..errors import UsageError
from .end_tokens import read_end_ids
from .pull import resolve_model

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class LoadedModel:
    """A decoder, its tokenizer, the folder both came from, and how its base is quantized (None: it is not).

    doubt: why the adapter may belong to another base, in words; "" if it does not, or if there is none.
    """

    model: Decoder
    tok: Tokenizer
    folder: Path
    quantize: str | None
    doubt: str = ""


def assemble(
    name: str | None, *, adapter_path: str | None = None, quantize: str | None = None, dtype: str = "auto"
) -> LoadedModel:
    """Loads a decoder and its tokenizer, and attaches the adapter if one is given.

    name:     a model folder or a name that `pull` knows; None for the base that the adapter names.
    quantize: "nf4", "fp4", "none" (as the folder stores it), or None for: as the adapter's base was in training.
    dtype:    "auto", or a key of DTYPES.
    Raises ModelError, AdapterError, RecipeError.
    """
    if adapter_path and not (Path(adapter_path) / TENSORS_NAME).exists():
        saved = sorted(Path(adapter_path).glob("checkpoints/step-[0-9]*"))
        if saved:
            raise UsageError(f"{adapter_path}: a run that is not finished: name its newest checkpoint, {saved[-1]}")
    info = adapter_info(adapter_path) if adapter_path else None
    name = name or (info.base_name if info is not None else None)
    if name is None:
        missing = "--model is missing" if info is None else f"{adapter_path}: it names no base model"
        raise UsageError(f"{missing}: give --model, a model folder or a name that `qlorag pull` knows")
    folder = resolve_model(name)
    doubt = ""
    options: dict[str, object] = {}
    if quantize is None and info is not None and info.quantize:
        quantize, options = _recorded(info.quantize, str(adapter_path))
    kind = None if quantize in (None, "none") else quantize
    model = load_model(folder, quantize=kind, dtype=pick_dtype(dtype), **options)  # type: ignore[arg-type]
    held = sorted({m.kind for m in model.modules() if isinstance(m, QuantizedLinear)})  # asked for, or stored so
    tok = load_tokenizer(folder)
    tok.check_vocab(model.config.vocab_size)
    if adapter_path:
        loaded = load_adapter(model, adapter_path, base_fingerprint=model.fingerprint)
        doubt = _doubt(loaded, name, folder)
        tok = tok.stopping_at(read_end_ids(Path(adapter_path)))
    model.eval()
    return LoadedModel(model, tok, folder, "+".join(held) or None, doubt)


def _recorded(quantize: dict[str, object], adapter_path: str) -> tuple[str, dict[str, object]]:
    """How the adapter's file says that its base was quantized: the kind, and the options of `load_model`.

    `adapter_info` has checked the options and their types. Raises AdapterError: a kind that is not known.
    """
    if quantize["kind"] not in QUANTIZE_KINDS:
        raise AdapterError(
            f"{adapter_path}: it records a base quantized with kind={quantize['kind']!r:.60}, wanted "
            f"{' or '.join(QUANTIZE_KINDS)}: say --quantize yourself"
        )
    return str(quantize["kind"]), {k: v for k, v in quantize.items() if k != "kind"}


def _doubt(adapter: AdapterInfo, name: str, folder: Path) -> str:
    """Why the adapter may belong to another base: nothing proves that it is this one, and it names another."""
    if adapter.base_verified or not adapter.base_name:
        return ""
    named = Path(adapter.base_name.rstrip("/")).name.casefold()
    if named in (Path(name).name.casefold(), folder.name.casefold()):
        return ""
    return (
        f"the adapter says that it was trained on {adapter.base_name!r}, which nothing here verifies, and the model is "
        f"{name!r}: if they are different weights, the answers are worthless"
    )


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
