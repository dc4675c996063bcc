"""Time and peak memory of loading a model, beside the bound this project sets itself, and beside transformers.

    python bench/bench_load.py [--model DIR] [--rounds 3] [--threads N] [--json FILE]

Weights stream: a tensor is read, quantized, put into its place and forgotten before the next one is read. So the peak
of loading may rise above that of the imports by no more than

    bound = bytes of the loaded model + bytes of its largest tensor as stored + 150 MB

where the 150 MB are for everything else: temporaries of quantizing, the kernel's library, the allocator's slack. The
peak is VmHWM of a process that does nothing but import and load. The last line and the exit status say whether
`load_model(quantize="nf4")` kept it.

Time is from the call to the loaded model, files in the page cache, as they are after the first round.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from harness import child, hardware

SLACK = 150_000_000  # bytes


# The jobs. Each runs in a process of its own and imports what it measures.


def load_qlorag(folder: str, quantize: str | None) -> dict[str, Any]:
    import torch
    from qlorag.models import Checkpoint, load_model

    before, began = child.peak_rss_bytes(), time.perf_counter()
    model = load_model(folder, quantize=quantize, dtype=torch.bfloat16)
    answer = {"seconds": time.perf_counter() - began, "rise": child.peak_rss_bytes() - before, "before": before}
    checkpoint = Checkpoint(folder)  # read again, after the measurement
    largest = max(checkpoint.read(name).nbytes for name in checkpoint.names())
    return answer | {"model": _held(model), "largest_tensor": largest}


def load_transformers(folder: str, quantize: str | None) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    options = {"quantization_config": quantization} if quantize else {}
    before, began = child.peak_rss_bytes(), time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options)
    answer = {"seconds": time.perf_counter() - began, "rise": child.peak_rss_bytes() - before, "before": before}
    return answer | {"model": _held(model)}


def _held(model: Any) -> int:
    """Bytes of parameters and buffers; a tied tensor counts once."""
    tensors = {t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]}
    return sum(tensors.values())


# The parent.

JOBS = {
    "qlorag, nf4": ("load_qlorag", "nf4"),
    "qlorag, dense": ("load_qlorag", None),
    "transformers + bitsandbytes, nf4": ("load_transformers", "nf4"),
    "transformers, dense": ("load_transformers", None),
}


def summarize(name: str, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """One row, in bytes and seconds; of the rises the largest, because a bound is kept always or not at all."""
    seconds = [answer["seconds"] for answer in rounds]
    row = {
        "name": name,
        "seconds": statistics.median(seconds),
        "spread": [min(seconds), max(seconds)],
        "before": max(answer["before"] for answer in rounds),
        "rise": max(answer["rise"] for answer in rounds),
        "model": rounds[0]["model"],
    }
    if "largest_tensor" in rounds[0]:
        row["bound"] = row["model"] + rounds[0]["largest_tensor"] + SLACK
        row["kept"] = row["rise"] <= row["bound"]
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="decoder folder (default: the pulled smollm2-135m-instruct)")
    parser.add_argument("--rounds", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=child.default_threads(), help="(default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=[*JOBS], default=[*JOBS], help="some of the rows")
    parser.add_argument("--json", type=Path, help="write the results there")
    args = parser.parse_args()
    folder = args.model or child.pulled("smollm2-135m-instruct")
    jobs = {name: child.Job(JOBS[name][0], {"folder": folder, "quantize": JOBS[name][1]}) for name in args.only}
    answers = child.run_rounds(__file__, jobs, rounds=args.rounds, threads=args.threads)
    rows = [summarize(name, found) for name, found in answers.items()]
    machine = hardware.describe()
    print(f"{machine['cpu']}, {args.threads} threads, torch {machine['versions']['torch']}; {args.rounds} rounds")
    print(f"{'MB':34} {'imports':>8} {'rise':>8} {'bound':>8} {'model':>8} {'seconds':>8}  [min .. max]")
    for row in rows:
        bound = f"{row['bound'] / 1e6:8.0f}" if "bound" in row else " " * 8
        low, high = row["spread"]
        print(f"{row['name']:34} {row['before'] / 1e6:8.0f} {row['rise'] / 1e6:8.0f} {bound} {row['model'] / 1e6:8.0f} "
              f"{row['seconds']:8.2f}  [{low:.2f} .. {high:.2f}]")  # fmt: skip
    if args.json:
        child.write_json(args.json, {"rounds": args.rounds, "threads": args.threads, "rows": rows})
    broken = [row["name"] for row in rows if row.get("kept") is False]
    print(f"bound exceeded by {', '.join(broken)}" if broken else "every load stayed within its bound")
    return 1 if broken else 0


if __name__ == "__main__":
    child.serve(load_qlorag, load_transformers)
    sys.exit(main())
