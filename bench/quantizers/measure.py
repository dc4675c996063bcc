"""What four bits cost: the error of NF4, FP4 and an affine int4 on real weights, and what is left of the embeddings.

    python bench/quantizers/measure.py [--model DIR] [--out DIR]     measures; --out writes the three files there
    python bench/quantizers/measure.py --from FILE --out DIR         writes page and picture from a quantizers.json

The committed files are those of `--out bench/quantizers`.

The weights are those of the linear layers of all-MiniLM-L6-v2, 10.6 million numbers, which its authors published in
float32. (SmolLM2 cannot serve: its file holds 4-bit numbers already.) Each quantizer stores them and reads them back:

    nf4, fp4       nearest of 16 values * absmax of the block; absmax float32
    + dq           the same with double quantization, absmax in 8 bits
    int4 affine    round((w - low) / scale) in 0 ... 15, scale = (high - low) / 15; both float16, or both float32

    bits           8 * bytes of all that is stored / weights: counted from the tensors, not from a formula
    rms error      √(Σ (w' - w)² / Σ w²) over all weights
    worst block    the largest √(Σ (w' - w)² / Σ w²) of a single block, which has as many weights as its quantizer's
    cosine         between the embedding of a text by the model with w' and by the model with w, both computed in
                   float32; mean and least over 100 texts. Word embeddings, norms and biases stay as they are.

The results do not depend on how busy the machine is, only (in late digits) on its instructions.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import torch
from qlorag.models import load_encoder
from qlorag.quant import dequantize, quantize
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # bench/, from which its files import each other

from harness import child  # noqa: E402
from quantizers.page import columns, draw, page  # noqa: E402

BLOCK_SIZES = (32, 64, 128, 256)
TEXTS = 100
BUNDLED = HERE.parents[1] / "recipes" / "bundled"


class Stored(NamedTuple):
    """A weight as a quantizer gives it back, and what it kept to do so."""

    weight: Tensor  # float32, of the shape it had
    bytes: int


Quantizer = Callable[[Tensor, int], Stored]  # (weight, block size)


def ours(kind: str, *, double_quant: bool) -> Quantizer:
    """NF4 or FP4 as this project stores them."""

    def run(w: Tensor, block_size: int) -> Stored:
        q = quantize(w, kind=kind, block_size=block_size, double_quant=double_quant)
        return Stored(dequantize(q, dtype=torch.float32), q.nbytes)

    return run


def affine(dtype: torch.dtype) -> Quantizer:
    """Sixteen even steps from the least to the largest weight of a block; `dtype` is that of scale and low.

    The codes are chosen for the rounded scale and low: what is read back is what was optimized.
    """

    def run(w: Tensor, block_size: int) -> Stored:
        blocks = w.reshape(-1, block_size)
        least, most = blocks.aminmax(dim=1, keepdim=True)
        low, scale = least.to(dtype), ((most - least) / 15).to(dtype)
        step = scale.float().clamp(min=torch.finfo(torch.float32).tiny)  # a block of equal weights: code 0, its low
        codes = ((blocks - low.float()) / step).round().clamp(0, 15)
        decoded = (codes * scale.float() + low.float()).view_as(w)
        return Stored(decoded, -(-w.numel() // 2) + low.nbytes + scale.nbytes)  # two codes to a byte

    return run


QUANTIZERS: dict[str, Quantizer] = {
    "nf4": ours("nf4", double_quant=False),
    "nf4 + dq": ours("nf4", double_quant=True),
    "fp4": ours("fp4", double_quant=False),
    "fp4 + dq": ours("fp4", double_quant=True),
    "int4 affine, float16": affine(torch.float16),
    "int4 affine, float32": affine(torch.float32),
}


class Sums:
    """Adds up the errors of several weights, in float64."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.error = self.weight = self.worst = 0.0
        self.bytes = self.count = 0

    def add(self, w: Tensor, stored: Stored) -> None:
        """One weight more. Its numel is a multiple of the block size."""
        exact, back = (t.double().reshape(-1, self.block_size) for t in (w, stored.weight))
        error, weight = (back - exact).square().sum(dim=1), exact.square().sum(dim=1)  # [blocks]
        # Zeros that come back as zeros have no error, though 0 / 0 is none; any other error of theirs is infinite.
        self.worst = max(self.worst, torch.where(error > 0, error / weight, 0.0).max().sqrt().item())
        self.error += error.sum().item()
        self.weight += weight.sum().item()
        self.bytes += stored.bytes
        self.count += w.numel()

    def result(self) -> dict[str, float]:
        return {
            "bits": 8 * self.bytes / self.count,
            "rms_error": (self.error / self.weight) ** 0.5,
            "worst_block": self.worst,
        }


def linears(model: nn.Module) -> Iterator[nn.Linear]:
    return (module for module in model.modules() if isinstance(module, nn.Linear))


def weight_errors(weights: Sequence[Tensor], name: str, block_size: int) -> tuple[dict[str, float], list[Tensor]]:
    """Bits and errors of a quantizer over some weights, and what it made of them."""
    sums, decoded = Sums(block_size), []
    for w in weights:
        stored = QUANTIZERS[name](w, block_size)
        sums.add(w, stored)
        decoded.append(stored.weight)
    return sums.result(), decoded


def cosines(a: Tensor, b: Tensor) -> dict[str, float]:
    """Of the rows of a and b, in float64: mean and least."""
    each = torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=1)
    return {"cosine_mean": each.mean().item(), "cosine_min": each.min().item()}


def texts() -> list[str]:
    """100 texts of 3 to 120 words: the demo's questions, answers and documents, and paragraphs of Python's manual."""
    rows = [json.loads(line) for path in sorted(BUNDLED.glob("rows/*.jsonl")) for line in path.read_text().splitlines()]
    found = [f"{row['prompt']} {row['completion']}" for row in rows]
    found += [paragraph for path in sorted(BUNDLED.glob("documents/*")) for paragraph in _paragraphs(path.read_text())]
    manual = [paragraph for name in sorted(topics) for paragraph in _paragraphs(topics[name])]
    prose = sorted({p for p in manual if 15 <= len(p.split()) <= 120 and p[0].isupper() and p.endswith(".")})
    found = list(dict.fromkeys(found))  # a question of the training rows is asked again in the test rows
    return found + random.Random(0).sample(prose, TEXTS - len(found))


def _paragraphs(text: str) -> list[str]:
    return [" ".join(part.split()) for part in text.split("\n\n") if len(part.split()) >= 3]


def measure(folder: Path, names: Sequence[str], block_sizes: Sequence[int]) -> dict[str, Any]:
    """All that page and picture show, and what it was measured on."""
    encoder, sample = load_encoder(folder, dtype=torch.float32), texts()
    layers = list(linears(encoder))
    weights = [layer.weight.detach().clone() for layer in layers]
    wanted = torch.from_numpy(encoder.encode(sample))
    rows = []
    for name in names:
        for block_size in block_sizes:
            errors, decoded = weight_errors(weights, name, block_size)
            with torch.no_grad():
                for layer, w in zip(layers, decoded, strict=True):
                    layer.weight.copy_(w)
            got = torch.from_numpy(encoder.encode(sample))
            rows.append({"name": name, "block_size": block_size, **errors, **cosines(wanted, got)})
            print(f"{name}, block size {block_size}", file=sys.stderr)
    return {
        "model": "all-MiniLM-L6-v2",
        "fingerprint": encoder.fingerprint,
        "matrices": len(weights),
        "weights": sum(w.numel() for w in weights),
        "texts": {
            "count": len(sample),
            "words": sorted(len(text.split()) for text in sample)[:: len(sample) - 1],
            "sha256": hashlib.sha256("\n".join(sample).encode()).hexdigest(),
        },
        "versions": {"python": platform.python_version(), "torch": torch.__version__.split("+")[0]},
        "rows": rows,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="an encoder's folder; default: minilm-l6, pulled")
    parser.add_argument("--from", dest="measured", type=Path, help="results measured before, instead of measuring")
    parser.add_argument("--out", type=Path, help="folder for quantizers.json, QUANTIZERS.md and quantizers.svg")
    args = parser.parse_args()
    if args.measured:
        result = json.loads(args.measured.read_text())
    else:
        result = measure(args.model or child.pulled("minilm-l6"), list(QUANTIZERS), BLOCK_SIZES)
    print(columns(result["rows"]))
    if args.out:
        child.write_json(args.out / "quantizers.json", result)
        (args.out / "QUANTIZERS.md").write_text(page(result))
        draw(result, args.out / "quantizers.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
