"""What a model folder holds: its shape, its tensors by kind, the bits that each costs and the error they bring.

    bits per weight = 8 * (bytes of codes and scales) / weights
    error           = ‖W - W'‖ / ‖W‖, both over the whole tensor, W' decoded in float32

The error needs the original W, so it is shown where this program quantizes (`--quantize`), and is unknown for a folder
that came in 4 bits. Sizes are read off the files' headers and JSON, so a folder of any size is inspected at once.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ...models import (
    Checkpoint,
    DecoderConfig,
    TemplateError,
    decoder_config,
    load_model,
    load_tokenizer,
    read_config,
)
from ...models.decoder.config import FAMILIES
from ...models.files.bnb_folder import packed_weights
from ...quant import QuantizedLinear


@dataclass(frozen=True)
class TensorFacts:
    """One weight. stored: its dtype, or the 4-bit kind.  nbytes: codes and scales, without tables and JSON."""

    name: str
    stored: str
    parameters: int
    nbytes: int
    packed: bool = False
    error: float | None = None

    @property
    def bits(self) -> float:
        """Bits per weight."""
        return 8 * self.nbytes / self.parameters if self.parameters else 0.0

    @property
    def kind(self) -> str:
        """What such tensors have in common: q_proj, input_layernorm, ...; biases are a kind of their own."""
        path, _, leaf = self.name.rpartition(".")
        last = path.rpartition(".")[2] or leaf
        return last if leaf == "weight" else f"{last}.{leaf}"


@dataclass(frozen=True)
class KindFacts:
    """All tensors of one kind that are stored alike."""

    kind: str
    stored: str
    tensors: int
    parameters: int
    nbytes: int
    error: float | None

    @property
    def bits(self) -> float:
        """Bits per weight."""
        return 8 * self.nbytes / max(self.parameters, 1)


@dataclass(frozen=True)
class ModelFacts:
    """What a model folder holds.

    parameters, tensor_count, nbytes, dtypes: of the stored tensors; dtypes is {dtype or 4-bit kind: parameters}.
    config:  of a decoder; None for other models.
    tensors: each weight, as it is in memory if the model was quantized for the inspection.
    chat:    how its chat template writes a question and an answer; None without a template, or if it refuses them.
    stops:   the tokens that end an answer in a chat, as text.
    """

    folder: Path
    model_type: str | None
    config: DecoderConfig | None
    parameters: int
    tensor_count: int
    nbytes: int
    dtypes: dict[str, int]
    fingerprint: str
    tensors: list[TensorFacts]
    chat: str | None = None
    stops: tuple[str, ...] = ()

    @property
    def packed(self) -> list[TensorFacts]:
        """The weights in 4 bits."""
        return [f for f in self.tensors if f.packed]

    @property
    def kinds(self) -> list[KindFacts]:
        """The tensors by kind, in the order of the first of each."""
        groups: dict[tuple[str, str], list[TensorFacts]] = {}
        for f in self.tensors:
            groups.setdefault((f.kind, f.stored), []).append(f)
        return [
            KindFacts(kind, stored, len(group), sum(f.parameters for f in group), sum(f.nbytes for f in group),
                      mean_error(group))
            for (kind, stored), group in groups.items()
        ]  # fmt: skip


def inspect_model(folder: Path, *, quantize: str | None = None) -> ModelFacts:
    """The facts of a model folder.

    quantize: also load a decoder in 4 bits and measure the error.
    """
    raw, checkpoint = read_config(folder), Checkpoint(folder)
    stored = stored_facts(checkpoint)
    dtypes: Counter[str] = Counter()
    for f in stored:
        dtypes[f.stored] += f.parameters
    decoder = raw.get("model_type") in FAMILIES
    chat, stops = chat_facts(folder) if decoder else (None, ())
    return ModelFacts(
        folder=folder,
        model_type=raw.get("model_type"),
        config=decoder_config(raw, source=str(folder / "config.json")) if decoder else None,
        parameters=sum(f.parameters for f in stored),
        tensor_count=len(stored),
        nbytes=sum(checkpoint.nbytes(n) for n in checkpoint.names()),
        dtypes=dict(dtypes),
        fingerprint=checkpoint.fingerprint(),
        tensors=quantized_facts(folder, checkpoint, stored, quantize) if decoder and quantize else stored,
        chat=chat,
        stops=stops,
    )


def chat_facts(folder: Path) -> tuple[str | None, tuple[str, ...]]:
    """How the folder's chat template writes a question and an answer, and which tokens end the answer.

    Raises TokenizerError: the tokenizer's files are damaged. A folder without a tokenizer has neither.
    """
    if not (folder / "tokenizer.json").exists():
        return None, ()
    tok = load_tokenizer(folder)
    stops = tuple(tok.decode([i], skip_special=False) for i in sorted(tok.eos_ids | tok.turn_ends))
    example = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    try:
        return tok.chat_text(example, add_generation_prompt=False), stops
    except TemplateError:
        return None, stops


def stored_facts(checkpoint: Checkpoint) -> list[TensorFacts]:
    """Every weight of a checkpoint, dense or in bitsandbytes' 4 bits, in the order of the layers.

    Raises WeightsError: a 4-bit weight is damaged.
    """
    packed = packed_weights(checkpoint)
    parts = {part for weight in packed.values() for part in weight.parts[1:]}
    facts = []
    for name in sorted(set(checkpoint.names()) - parts, key=_layer_order):
        if name not in packed:
            entry = checkpoint.entry(name)
            facts.append(TensorFacts(name, entry.dtype, math.prod(entry.shape), entry.end - entry.begin))
            continue
        state = packed[name].state
        counted = (name, f"{name}.absmax", f"{name}.nested_absmax")
        offset = 4 if state.nested_offset is not None else 0  # in the JSON
        nbytes = sum(checkpoint.nbytes(part) for part in packed[name].parts if part in counted) + offset
        facts.append(TensorFacts(name, state.kind, math.prod(state.shape), nbytes, packed=True))
    return facts


def quantized_facts(folder: Path, checkpoint: Checkpoint, facts: list[TensorFacts], kind: str) -> list[TensorFacts]:
    """`facts` as they are in memory with `quantize=kind`, with the error of each weight that is quantized here.

    What loading leaves out (a second copy of a tied head) is left out.
    """
    model = load_model(folder, quantize=kind, dtype=torch.bfloat16)
    layers = {f"{n}.weight": m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    dense = {name: p.nbytes for name, p in model.named_parameters()}
    out = []
    for f in facts:
        if f.name in layers and not f.packed:
            layer = layers[f.name]
            w = checkpoint.read(f.name).float()
            error = float((layer.dequantize(torch.float32) - w).norm() / w.norm().clamp(min=1e-38))
            out.append(replace(f, stored=kind, nbytes=layer.quantized.nbytes, packed=True, error=error))
        elif f.packed:
            out.append(f)
        elif f.name in dense:
            out.append(replace(f, stored="BF16", nbytes=dense[f.name]))
    return out


def mean_error(facts: Iterable[TensorFacts]) -> float | None:
    """Root of the mean of squared relative errors, each tensor by its size; None if they are not known."""
    known = [(f.error, f.parameters) for f in facts if f.error is not None]
    total = sum(n for _, n in known)
    return math.sqrt(sum(e * e * n for e, n in known) / total) if total else None


def _layer_order(name: str) -> tuple[tuple[int, int | str], ...]:
    """A key that sorts layer 2 before layer 10."""
    return tuple((0, int(part)) if part.isdigit() else (1, part) for part in name.split("."))
