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
from typing import Any

import torch

from ...models import Checkpoint, decoder_config, load_model, read_config
from ...models.decoder.config import FAMILIES
from ...models.files.bnb_folder import packed_weights
from ...quant import QuantizedLinear
from ..cli.display import Display, count, size


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
        return 8 * self.nbytes / self.parameters if self.parameters else 0.0

    @property
    def kind(self) -> str:
        """What such tensors have in common: q_proj, input_layernorm, ...; biases are told from weights."""
        path, _, leaf = self.name.rpartition(".")
        last = path.rpartition(".")[2] or leaf
        return last if leaf == "weight" else f"{last}.{leaf}"


def inspect_model(folder: Path, display: Display, *, quantize: str | None, tensors: bool) -> dict[str, Any]:
    """Describes a model folder.

    quantize: also load it in 4 bits and measure the error.  tensors: list every tensor, not only kinds.
    """
    raw, checkpoint = read_config(folder), Checkpoint(folder)
    facts = stored_facts(checkpoint)
    parameters = sum(f.parameters for f in facts)
    dtypes: Counter[str] = Counter()
    for f in facts:
        dtypes[f.stored] += f.parameters
    result: dict[str, Any] = {
        "kind": "model",
        "model_type": raw.get("model_type"),
        "parameters": parameters,
        "bytes": sum(checkpoint.nbytes(n) for n in checkpoint.names()),
        "dtypes": dict(dtypes),
        "fingerprint": checkpoint.fingerprint(),
    }
    shares = ", ".join(f"{d} ({100 * n / max(parameters, 1):.1f} %)" for d, n in dtypes.most_common())
    rows = [
        ("type", str(raw.get("model_type"))),
        ("parameters", f"{count(parameters)} in {len(facts)} tensors"),
        ("stored as", shares),
        ("weights", size(result["bytes"])),
        ("fingerprint", result["fingerprint"][:16]),
    ]
    decoder = raw.get("model_type") in FAMILIES
    if decoder:
        rows[1:1] = _shape(raw, folder)
        if quantize:
            facts = quantized_facts(folder, checkpoint, facts, quantize)
    packed = [f for f in facts if f.packed]
    if packed:
        totals = _totals(packed, facts)
        result |= totals
        rows += [
            (f"as {', '.join(sorted({f.stored for f in packed}))}",
             f"{count(totals['quantized_parameters'])} parameters in 4 bits, "
             f"{totals['bits_per_weight']:.3f} bits each with all their state"),
            ("in memory", f"{size(totals['quantized_bytes'])} packed and {size(totals['dense_bytes'])} dense"),
        ]  # fmt: skip
        if totals["error"] is not None:
            rows.append(("error", f"{100 * totals['error']:.2f} % RMS of the weights in 4 bits"))
    display.table(["", str(folder)], rows)
    if packed or tensors:
        result["kinds"] = _show_kinds(facts, display)
    if tensors:
        result["tensors"] = _show_tensors(facts, display)
    return result


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


def _shape(raw: dict[str, Any], folder: Path) -> list[tuple[str, str]]:
    c = decoder_config(raw, source=str(folder / "config.json"))
    return [
        ("shape", f"{c.num_layers} layers, width {c.hidden_size}, {c.num_heads} heads over {c.num_kv_heads} KV heads"),
        ("vocabulary", f"{c.vocab_size}, head {'tied to the embedding' if c.tied_head else 'of its own'}"),
        ("context", f"{c.max_positions} tokens, RoPE {c.rope.kind} with theta {c.rope.theta:g}"),
    ]


def _totals(packed: list[TensorFacts], facts: list[TensorFacts]) -> dict[str, Any]:
    parameters, nbytes = sum(f.parameters for f in packed), sum(f.nbytes for f in packed)
    return {
        "quantized_parameters": parameters,
        "quantized_bytes": nbytes,
        "bits_per_weight": 8 * nbytes / parameters,
        "dense_bytes": sum(f.nbytes for f in facts if not f.packed),
        "error": _mean_error(packed),
    }


def _mean_error(facts: Iterable[TensorFacts]) -> float | None:
    """Root of the mean of squared relative errors, each tensor by its size; None if they are not known."""
    known = [(f.error, f.parameters) for f in facts if f.error is not None]
    total = sum(n for _, n in known)
    return math.sqrt(sum(e * e * n for e, n in known) / total) if total else None


def _show_kinds(facts: list[TensorFacts], display: Display) -> list[dict[str, Any]]:
    groups: dict[tuple[str, str], list[TensorFacts]] = {}
    for f in facts:
        groups.setdefault((f.kind, f.stored), []).append(f)
    kinds: list[dict[str, Any]] = [
        {
            "kind": kind,
            "stored": stored,
            "tensors": len(group),
            "parameters": (parameters := sum(f.parameters for f in group)),
            "bytes": (nbytes := sum(f.nbytes for f in group)),
            "bits_per_weight": 8 * nbytes / max(parameters, 1),
            "error": _mean_error(group),
        }
        for (kind, stored), group in groups.items()
    ]
    rows = [
        (k["kind"], k["stored"], k["tensors"], count(k["parameters"]), size(k["bytes"]),
         f"{k['bits_per_weight']:.3f}", _percent(k["error"]))
        for k in kinds
    ]  # fmt: skip
    display.table(["kind", "stored as", "tensors", "parameters", "bytes", "bits per weight", "error"], rows)
    return kinds


def _show_tensors(facts: list[TensorFacts], display: Display) -> list[dict[str, Any]]:
    rows = [(f.name, f.stored, count(f.parameters), f"{f.bits:.3f}", _percent(f.error)) for f in facts]
    display.table(["tensor", "stored as", "parameters", "bits per weight", "error"], rows)
    return [
        {"name": f.name, "stored": f.stored, "parameters": f.parameters, "bits_per_weight": f.bits, "error": f.error}
        for f in facts
    ]


def _percent(error: float | None) -> str:
    return "-" if error is None else f"{100 * error:.2f} %"


def _layer_order(name: str) -> tuple[tuple[int, int | str], ...]:
    """A key that sorts layer 2 before layer 10."""
    return tuple((0, int(part)) if part.isdigit() else (1, part) for part in name.split("."))
