"""Speed and memory of generating text, beside transformers and the memory of the machine.

    python bench/bench_generate.py [--model DIR] [--prompt-tokens 256] [--tokens 64] [--rounds 3] [--threads N]
                                   [--bases nf4 dense] [--json FILE]

SmolLM2-135M in bfloat16, dense or with its projections in NF4 (double quantization), greedy, batch 1, always
exactly as many tokens: end tokens are switched off on both sides. Every candidate runs in a process of its own, once
per round, each round beginning with another one; of the generations in it the first is not counted.

    prefill  prompt tokens / time until the first token is handed out
    decode   tokens after the first / time between the first and the last

Both are taken where a caller sees them: ours between pieces of `generate`, transformers' in a streamer. Nothing is
reported unless both libraries choose the same first token; how many they agree on is printed. They may part later,
where two logits are closer than bfloat16 can tell; bitsandbytes' inference kernel also rounds its scales.

The limits: each decoded token reads every weight of the layers and of the head once, so decode <= read bandwidth /
those bytes (more is possible only where caches hold a part of them); prefill multiplies each weight of the layers
once per token, so prefill <= bfloat16 GEMM peak / 2P.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

from harness import child, hardware

GENERATIONS = 3  # in each process, the first of them a warm-up
DOCUMENTS = Path(__file__).parents[1] / "recipes" / "bundled" / "documents"
COMPETITORS: dict[str, dict[str, dict[str, str]]] = {  # base: name: environment
    "nf4": {
        "transformers + bitsandbytes": {},
        "transformers + bitsandbytes, tuned malloc": child.TUNED_MALLOC,
    },
    "dense": {"transformers": {}, "transformers, tuned malloc": child.TUNED_MALLOC},
}


# The jobs. Each runs in a process of its own and imports what it measures.


def prompt(folder: str, tokens: int) -> dict[str, Any]:
    """Token ids of running text: the demo's documents, over and over."""
    from qlorag.models import load_tokenizer

    text = "\n\n".join(path.read_text() for path in sorted(DOCUMENTS.iterdir()))
    ids = load_tokenizer(folder).encode(text)
    return {"ids": (ids * (1 + tokens // len(ids)))[:tokens]}


def generate_qlorag(folder: str, base: str, ids: list[int], tokens: int) -> dict[str, Any]:
    """As `qlorag generate` does it; and what a token must read and multiply at least."""
    import torch
    from qlorag.models import generate, load_model, load_tokenizer
    from torch import nn

    model = load_model(folder, quantize="nf4" if base == "nf4" else None, dtype=torch.bfloat16)
    tok = load_tokenizer(folder)
    tok.eos_ids = frozenset()
    timings = []
    for _ in range(GENERATIONS):
        began = time.perf_counter()
        run = generate(model, tok, ids, max_tokens=tokens)
        arrivals = [(time.perf_counter(), len(run.ids)) for _ in run]
        (first, early), (last, late) = arrivals[0], arrivals[-1]
        timings.append({"prefill": first - began, "per_token": (last - first) / (late - early)})
    layers = model.model.layers
    weights = [*layers.parameters(), *layers.buffers(), model.lm_head.weight]
    linears = [m for m in layers.modules() if isinstance(m, nn.Linear) or hasattr(m, "dequantize")]
    return {
        "timings": timings,
        "ids": run.ids,
        "bytes_per_token": sum(w.nbytes for w in weights),
        "layer_weights": sum(m.in_features * m.out_features for m in linears),
    }


def generate_transformers(folder: str, base: str, ids: list[int], tokens: int) -> dict[str, Any]:
    """`model.generate`, with its own cache and defaults."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    class Streamer:
        """Notes when tokens are handed out; the first call brings the prompt."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, _: Any) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    options = {"quantization_config": quantization} if base == "nf4" else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    x = torch.tensor([ids])
    timings = []
    for _ in range(GENERATIONS):
        streamer, began = Streamer(), time.perf_counter()
        out = model.generate(
            x,
            attention_mask=torch.ones_like(x),
            max_new_tokens=tokens,
            do_sample=False,
            streamer=streamer,
        )
        first, last = streamer.times[1], streamer.times[-1]
        timings.append({"prefill": first - began, "per_token": (last - first) / (len(streamer.times) - 2)})
    return {"timings": timings, "ids": out[0, len(ids) :].tolist()}


# The parent: runs them in turn, compares, prints.


def summarize(name: str, rounds: list[dict[str, Any]], *, prompt_tokens: int) -> dict[str, Any]:
    """One row of the table, the limits not yet in it."""
    timings = [timing for answer in rounds for timing in answer["timings"][1:]]
    prefill = [prompt_tokens / timing["prefill"] for timing in timings]
    decode = [1 / timing["per_token"] for timing in timings]
    return {
        "name": name,
        "prefill_tokens_per_s": statistics.median(prefill),
        "prefill_spread": [min(prefill), max(prefill)],
        "decode_tokens_per_s": statistics.median(decode),
        "decode_spread": [min(decode), max(decode)],
        "peak_rss_mib": statistics.median(answer["peak_rss_mib"] for answer in rounds),
        "ids": rounds[0]["ids"],
    }


def check(rows: list[dict[str, Any]], *, tokens: int) -> None:
    """Counts the tokens on which each row agrees with ours. Raises SystemExit: too few tokens, or another first one."""
    ours = rows[0]["ids"]
    for row in rows:
        if len(row["ids"]) != tokens:
            raise SystemExit(f"{row['name']}: {len(row['ids'])} tokens, wanted {tokens}; not reported")
        same = [a == b for a, b in zip(row["ids"], ours, strict=True)]
        row["same_tokens"] = same.index(False) if False in same else tokens
        if not row["same_tokens"]:
            raise SystemExit(f"{row['name']}: first token {row['ids'][0]}, ours {ours[0]}; not reported")


def show(base: str, rows: list[dict[str, Any]], limits: dict[str, float], *, tokens: int) -> None:
    columns = [f" {what:>8} {'[min .. max]':>16} {'of limit':>8} {'ours/it':>7}" for what in ("prefill", "decode")]
    print(f"\n{base:42}{''.join(columns)} {'peak RSS':>9} {'ours/it':>7} same")
    for row in rows:
        line = f"{row['name']:42}"
        for what in ("prefill", "decode"):
            key, (low, high) = f"{what}_tokens_per_s", row[f"{what}_spread"]
            ratio = f"{rows[0][key] / row[key]:.2f}x" if row is not rows[0] else ""
            line += f" {row[key]:8.1f} {f'[{low:.1f} .. {high:.1f}]':>16} {row[key] / limits[what]:8.1%} {ratio:>7}"
        ratio = f"{rows[0]['peak_rss_mib'] / row['peak_rss_mib']:.0%}" if row is not rows[0] else ""
        print(f"{line} {row['peak_rss_mib']:5.0f} MiB {ratio:>7} {row['same_tokens']}/{tokens}")
    print(f"{'limit':42} {limits['prefill']:8.1f} {'':33} {limits['decode']:8.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="decoder folder (default: the pulled smollm2-135m-instruct)")
    parser.add_argument("--prompt-tokens", type=int, default=256, help="(default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="generated (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=child.default_threads(), help="(default: %(default)s)")
    parser.add_argument("--bases", nargs="+", choices=[*COMPETITORS], default=[*COMPETITORS])
    parser.add_argument("--json", type=Path, help="write the results there")
    args = parser.parse_args()
    if args.tokens < 8:
        raise SystemExit(f"--tokens {args.tokens}: wanted at least 8, to time what follows the first")
    folder = args.model or child.pulled("smollm2-135m-instruct")
    machine = hardware.machine(args.threads)
    print(hardware.heading(machine))
    print(f"prompt {args.prompt_tokens} tokens, {args.tokens} generated; tokens per second")
    job = child.Job("prompt", {"folder": folder, "tokens": args.prompt_tokens})
    ids = child.run(__file__, job, threads=args.threads)["ids"]
    result: dict[str, Any] = {
        "machine": machine,
        "rounds": args.rounds,
        "prompt_tokens": args.prompt_tokens,
        "tokens": args.tokens,
        "bases": {},
    }
    for base in args.bases:
        told = {"folder": folder, "base": base, "ids": ids, "tokens": args.tokens}
        jobs = {"qlorag": child.Job("generate_qlorag", told)}
        for name, env in COMPETITORS[base].items():
            jobs[name] = child.Job("generate_transformers", told, env)
        answers = child.run_rounds(__file__, jobs, rounds=args.rounds, threads=args.threads)
        rows = [summarize(name, rounds, prompt_tokens=len(ids)) for name, rounds in answers.items()]
        check(rows, tokens=args.tokens)
        ours = answers["qlorag"][0]
        limits = {
            "prefill": machine["peaks"]["bfloat16_gflop_per_s"] * 1e9 / (2 * ours["layer_weights"]),
            "decode": machine["peaks"]["read_gb_per_s"] * 1e9 / ours["bytes_per_token"],
        }
        show(base, rows, limits, tokens=args.tokens)
        result["bases"][base] = {"limits": limits, "bytes_per_token": ours["bytes_per_token"], "candidates": rows}
    if args.json:
        child.write_json(args.json, result)


if __name__ == "__main__":
    child.serve(prompt, generate_qlorag, generate_transformers)
    main()
