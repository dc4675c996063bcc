"""Speed and memory of LoRA training, beside peft + bitsandbytes and the machine's own matrix product.

    python bench/bench_train.py [--model DIR] [--steps 20] [--rounds 3] [--threads N] [--bases nf4 dense] [--json FILE]

SmolLM2-135M on the demo's rows, batch 1; base in NF4 with double quantization, or dense; bfloat16 arithmetic; LoRA
of rank 8, alpha 16 on all linear layers, in float32; AdamW at 2e-4 with warm-up and cosine, gradient clipped to 1.
Every candidate runs in a process of its own, once per round, each round beginning with another one. All train on
the same token sequences, in the same order, from the same initial adapter: ours is saved in PEFT's format, and peft
loads it.

Nothing is reported unless all agree before and in the first step: the mean loss over all rows to LOSS_TOLERANCE, which
is a statement about the quantized weights and the forward pass; the norm of the first gradient to NORM_TOLERANCE,
about the backward pass. Later losses drift apart with bfloat16's rounding, which moves the loss of a single row by 1 to
4 %; they are printed beside each other.

tok/s is per optimizer step after the warm-up: positions that predict a token, per second of the whole step. "of
limit" is the share of GEMM peak / 4P: a LoRA step multiplies every weight twice, forward and for the gradient of
its input (P: weights of all products, the output head among them).

The competitor appears as its documentation says, and as fast as we could make it:
    as documented     prepare_model_for_kbit_training (float32 norms and embedding, gradient checkpointing), autocast
    no checkpointing  the same, activations kept: faster, larger
    all bfloat16      no preparation, no autocast: what is not in 4 bits stays bfloat16
    tuned malloc      glibc told to keep freed memory, as qlorag.recipes.training.memory tells it for ours
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness import child, hardware

WARM_UP = 3  # steps that fill caches and pools
LOSS_TOLERANCE = 0.01  # bfloat16 rounding moves it by 0.002; NF4 instead of dense weights by 0.05
NORM_TOLERANCE = 0.05  # bfloat16 rounding moves it by 0.01
RANK, ALPHA, RATE, CLIP = 8, 16, 2e-4, 1.0
ROWS = Path(__file__).parents[1] / "recipes" / "bundled" / "rows" / "train.jsonl"


# base: name: (prepare, checkpointing, environment) of train_peft
COMPETITORS: dict[str, dict[str, tuple[bool, bool, dict[str, str]]]] = {
    "nf4": {
        "peft + bitsandbytes, as documented": (True, True, {}),
        "peft + bitsandbytes, no checkpointing": (True, False, {}),
        "peft + bitsandbytes, all bfloat16": (False, False, {}),
        "peft + bitsandbytes, all bfloat16, tuned malloc": (False, False, child.TUNED_MALLOC),
    },
    "dense": {
        "peft": (False, False, {}),
        "peft, tuned malloc": (False, False, child.TUNED_MALLOC),
    },
}


# The jobs. Each runs in a process of its own and imports what it measures.


def prepare(folder: str, out: str, steps: int) -> dict[str, Any]:
    """What all candidates share: the rows as tokens, their order, the initial adapter (in `out`), and P."""
    from qlorag.lora import LoRAConfig, attach, save_adapter
    from qlorag.recipes.data.examples import batch_indices
    from qlorag.recipes.hub.assemble import assemble
    from qlorag.recipes.training.trainer import learning_rate
    from torch import nn

    it = assemble(folder, quantize="none", dtype="bfloat16")
    products = sum(m.weight.numel() for m in it.model.modules() if isinstance(m, nn.Linear))
    attach(it.model, LoRAConfig(r=RANK, alpha=ALPHA), seed=0)
    save_adapter(it.model, out)
    settings, examples = _settings(steps), _examples(it.tok)
    return {
        "examples": [{"ids": e.ids, "mask": e.mask} for e in examples],
        "order": [batch_indices(len(examples), batch_size=1, seed=0, step=k)[0] for k in range(steps)],
        "rates": [learning_rate(k, settings) for k in range(steps)],
        "product_weights": products,
    }


def train_qlorag(folder: str, base: str, steps: int) -> dict[str, Any]:
    """As `qlorag train` does it."""
    from qlorag.lora import LoRAConfig, attach
    from qlorag.recipes.hub.assemble import assemble
    from qlorag.recipes.training.memory import reuse_freed_memory
    from qlorag.recipes.training.trainer import Trainer, mean_loss

    reuse_freed_memory()
    it = assemble(folder, quantize="nf4" if base == "nf4" else "none", dtype="bfloat16")
    attach(it.model, LoRAConfig(r=RANK, alpha=ALPHA), seed=0)
    examples = _examples(it.tok)
    before = mean_loss(it.model, examples, batch_size=1)
    trainer = Trainer(it.model, examples, _settings(steps))
    reports = [trainer.take_step() for _ in range(steps)]
    return {
        "loss_before": before,
        "tokens": [r.tokens for r in reports],
        "seconds": [r.seconds for r in reports],
        "losses": [r.loss for r in reports],
        "first_norm": reports[0].grad_norm,
    }


def train_peft(
    folder: str,
    base: str,
    adapter: str,
    examples: list[dict[str, Any]],
    order: list[int],
    rates: list[float],
    prepare: bool,
    checkpointing: bool,
) -> dict[str, Any]:
    """The loop a user of peft writes, with nothing in it that ours leaves out."""
    import torch
    from peft import PeftModel, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    options = {"quantization_config": quantization} if base == "nf4" else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options)
    if prepare:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing)
    model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    model.train()  # bitsandbytes' inference path is another kernel, with rounded scales
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0, fused=True)

    def loss_of(example: dict[str, Any]) -> torch.Tensor:
        pairs = zip(example["ids"], example["mask"], strict=True)
        labels = torch.tensor([[token if learned else -100 for token, learned in pairs]])
        with torch.autocast("cpu", torch.bfloat16, enabled=prepare):
            loss: torch.Tensor = model(torch.tensor([example["ids"]]), labels=labels, use_cache=False).loss
        return loss

    learned = [sum(example["mask"][1:]) for example in examples]
    with torch.no_grad():
        before = sum(loss_of(e).item() * n for e, n in zip(examples, learned, strict=True)) / sum(learned)
    seconds, losses, norms = [], [], []
    for index, rate in zip(order, rates, strict=True):
        began = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(examples[index])
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, CLIP).item())
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - began)
    return {
        "loss_before": before,
        "tokens": [len(examples[index]["ids"]) - 1 for index in order],
        "seconds": seconds,
        "losses": losses,
        "first_norm": norms[0],
    }


def _settings(steps: int) -> Any:
    from qlorag.recipes.training.trainer import TrainSettings

    return TrainSettings(iters=steps, batch_size=1, learning_rate=RATE, weight_decay=0.0, clip=CLIP, seed=0)


def _examples(tok: Any) -> Any:
    from qlorag.recipes.data.examples import read_rows, tokenize_rows

    return tokenize_rows(read_rows(ROWS)[0], tok, max_tokens=512)[0]


# The parent: runs them in turn, compares, prints.


def measure(
    folder: Path, bases: list[str], *, steps: int, rounds: int, threads: int
) -> tuple[dict[str, dict[str, list[dict[str, Any]]]], int]:
    """{base: {candidate: its answers, one per round}}, ours first; and P."""
    with tempfile.TemporaryDirectory() as adapter:
        job = child.Job("prepare", {"folder": folder, "out": adapter, "steps": steps})
        prepared = child.run(__file__, job, threads=threads)
        answers = {}
        for base in bases:
            told = {"folder": folder, "base": base}
            jobs = {"qlorag": child.Job("train_qlorag", told | {"steps": steps})}
            told |= {"adapter": adapter, **{key: prepared[key] for key in ("examples", "order", "rates")}}
            for name, (prepare, checkpointing, env) in COMPETITORS[base].items():
                options = {"prepare": prepare, "checkpointing": checkpointing}
                jobs[name] = child.Job("train_peft", told | options, env)
            answers[base] = child.run_rounds(__file__, jobs, rounds=rounds, threads=threads)
    return answers, prepared["product_weights"]


def check(rows: list[dict[str, Any]]) -> None:
    """Raises SystemExit: two candidates over one base do not do the same training."""
    ours = rows[0]
    for row in rows[1:]:
        what = row["name"]
        if row["tokens"] != ours["tokens"]:
            raise SystemExit(f"{what}: trained on other sequences than {ours['name']}; not reported")
        for value, tolerance in (("loss_before", LOSS_TOLERANCE), ("first_norm", NORM_TOLERANCE)):
            got, wanted = row[value], ours[value]
            if not abs(got - wanted) <= tolerance * abs(wanted):
                raise SystemExit(
                    f"{what}: {value} {got:.4f}, {ours['name']} {wanted:.4f}, further apart than {tolerance:.1%}: "
                    "not the same training, so not reported"
                )


def summarize(name: str, rounds: list[dict[str, Any]], *, limit: float) -> dict[str, Any]:
    """One row of the table. Raises SystemExit: a candidate did not repeat itself."""
    if len({tuple(answer["tokens"]) for answer in rounds}) > 1:
        raise SystemExit(f"{name}: the rows differ between rounds; not reported")
    # Not the last bit: torch's sums depend on where memory happens to lie, and so on the process.
    losses = [answer["loss_before"] for answer in rounds]
    if max(losses) - min(losses) > LOSS_TOLERANCE * min(losses):
        raise SystemExit(f"{name}: the loss before training differs between rounds, {losses}; not reported")
    rates = [rate for answer in rounds for rate in _rates(answer)]
    deciles = statistics.quantiles(rates, n=10)
    median = statistics.median(rates)
    return {
        "name": name,
        "tokens_per_s": median,
        "spread": [deciles[0], deciles[-1]],
        "of_limit": median / limit,
        "peak_rss_mib": statistics.median(answer["peak_rss_mib"] for answer in rounds),
        "loss_before": rounds[0]["loss_before"],
        "first_norm": rounds[0]["first_norm"],
        "losses": rounds[0]["losses"],
        "tokens": rounds[0]["tokens"],
    }


def _rates(answer: dict[str, Any]) -> Iterator[float]:
    steps = list(zip(answer["tokens"], answer["seconds"], strict=True))
    return (tokens / seconds for tokens, seconds in steps[WARM_UP:])


def compare(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Ours beside the best that any form of the competitor reached, for speed and for memory alone."""
    ours, others = rows[0], rows[1:]
    fastest, smallest = max(r["tokens_per_s"] for r in others), min(r["peak_rss_mib"] for r in others)
    documented = others[0]
    return {
        "speed_of_fastest": ours["tokens_per_s"] / fastest,
        "memory_of_smallest": ours["peak_rss_mib"] / smallest,
        "speed_of_documented": ours["tokens_per_s"] / documented["tokens_per_s"],
        "memory_of_documented": ours["peak_rss_mib"] / documented["peak_rss_mib"],
    }


def show(base: str, rows: list[dict[str, Any]], comparison: dict[str, Any]) -> None:
    ours = rows[0]
    print(
        f"\n{base:48} {'tok/s':>6} {'[p10 .. p90]':>16} {'of limit':>8} {'ours/it':>8} {'peak RSS':>9} {'ours/it':>8}"
    )
    for row in rows:
        low, high = row["spread"]
        faster, larger = ours["tokens_per_s"] / row["tokens_per_s"], ours["peak_rss_mib"] / row["peak_rss_mib"]
        beside = ("", "") if row is ours else (f"{faster:.2f}x", f"{larger:.0%}")
        print(f"{row['name']:48} {row['tokens_per_s']:6.1f} {f'[{low:.1f} .. {high:.1f}]':>16} {row['of_limit']:8.1%} "
              f"{beside[0]:>8} {row['peak_rss_mib']:5.0f} MiB {beside[1]:>8}")  # fmt: skip
    print(f"ours beside the fastest: {comparison['speed_of_fastest']:.2f}x its speed; "
          f"beside the smallest: {comparison['memory_of_smallest']:.0%} of its memory")  # fmt: skip
    shown = [k for k in (0, 1, 2, 4, 9, 19, 49, 99) if k < len(ours["losses"])]
    print(f"{'loss before, at step; norm of the first gradient':48}  before" + "".join(f"{k + 1:8}" for k in shown)
          + "      norm")  # fmt: skip
    for row in rows:
        losses = "".join(f"{row['losses'][k]:8.4f}" for k in shown)
        print(f"{row['name']:48}{row['loss_before']:8.4f}{losses}{row['first_norm']:10.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="decoder folder (default: the pulled smollm2-135m-instruct)")
    parser.add_argument(
        "--steps", type=int, default=14, help=f"per round, {WARM_UP} of them warm-up (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=child.default_threads(), help="(default: %(default)s)")
    parser.add_argument("--bases", nargs="+", choices=["nf4", "dense"], default=["nf4", "dense"])
    parser.add_argument("--json", type=Path, help="write the results there")
    args = parser.parse_args()
    if args.steps < WARM_UP + 2:
        raise SystemExit(f"--steps {args.steps}: wanted at least {WARM_UP + 2}, {WARM_UP} of them warm-up")
    folder = args.model or child.pulled("smollm2-135m-instruct")
    machine = hardware.machine(args.threads)
    print(hardware.heading(machine))
    answers, weights = measure(folder, args.bases, steps=args.steps, rounds=args.rounds, threads=args.threads)
    limit = machine["peaks"]["bfloat16_gflop_per_s"] * 1e9 / (4 * weights)
    print(f"limit {limit:.0f} tok/s = bfloat16 GEMM peak / 4P, P = {weights / 1e6:.1f} M; "
          f"{args.steps} steps a round, {args.rounds} rounds")  # fmt: skip
    result: dict[str, Any] = {
        "machine": machine,
        "steps": args.steps,
        "rounds": args.rounds,
        "product_weights": weights,
        "limit_tokens_per_s": limit,
        "bases": {},
    }
    for base, found in answers.items():
        rows = [summarize(name, rounds, limit=limit) for name, rounds in found.items()]
        check(rows)
        comparison = compare(rows)
        show(base, rows, comparison)
        result["bases"][base] = {"candidates": rows} | comparison
    if args.json:
        child.write_json(args.json, result)


if __name__ == "__main__":
    child.serve(prepare, train_qlorag, train_peft)
    main()
