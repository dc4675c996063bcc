"""The verbs `train` and `evaluate`: files and terminal around `trainer`, which knows neither."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ...lora import LoRAConfig
from ..data.examples import Example, read_rows, tokenize_rows
from ..data.show_mask import show_mask
from ..errors import TrainingError, UsageError
from ..hub.assemble import Assembled, assemble
from ..training.checkpoint import checkpoints
from ..training.memory import reuse_freed_memory
from ..training.run import TrainingRun
from ..training.trainer import OPTIMIZERS, TrainSettings, mean_loss, perplexity
from .display import Display


def register(verbs: Any) -> None:
    """Adds the verbs' flags."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    p = verbs.add_parser("train", help="fine-tune a model with LoRA or QLoRA", formatter_class=formatter)
    p.set_defaults(run=train)
    add_model_flags(p)
    p.add_argument("--data", required=True, help="folder with train.jsonl and, if wanted, valid.jsonl")
    p.add_argument("--adapter-path", default="adapters", help="where adapter, checkpoints and metrics go")
    p.add_argument("--train", action="store_true", help=argparse.SUPPRESS)  # mlx-lm's habit: lora --train
    add_lora_flags(p)
    d = TrainSettings()
    p.add_argument("--iters", type=int, default=d.iters, help="optimizer steps")
    p.add_argument("--batch-size", type=int, default=d.batch_size, help="examples in a micro-batch")
    p.add_argument("--grad-accumulation-steps", type=int, default=d.grad_accumulation, help="micro-batches in a step")
    p.add_argument("--learning-rate", type=float, default=d.learning_rate, help="peak learning rate")
    p.add_argument("--warmup", type=float, default=d.warmup, help="fraction of the steps that warm up")
    p.add_argument("--optimizer", choices=list(OPTIMIZERS), default=d.optimizer,
                   help="adamw8bit keeps its moments in 8 bits: about 2 bytes a parameter, not 8")  # fmt: skip
    p.add_argument("--weight-decay", type=float, default=d.weight_decay, help="AdamW's")
    p.add_argument("--clip", type=float, default=d.clip, help="largest gradient norm, 0 for none")
    p.add_argument("--max-seq-length", type=int, default=2048, help="tokens of an example; longer ones are cut")
    p.add_argument("--steps-per-report", type=int, default=10, help="steps between printed lines")
    p.add_argument("--steps-per-eval", type=int, default=50, help="steps between validations, 0 for none")
    p.add_argument("--save-every", type=int, default=50, help="steps between checkpoints, 0 for none")
    p.add_argument("--keep", type=int, default=2, help="newest checkpoints kept")
    p.add_argument("--seed", type=int, default=d.seed, help="of order, initial weights and dropout")
    p.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --adapter-path")
    p.add_argument("--overwrite", action="store_true", help="replace what an earlier run left in --adapter-path")
    p.add_argument("--skip-invalid", action="store_true", help="leave out rows that cannot be read, and count them")
    p.add_argument("--show-mask", action="store_true", help="print the first row with its trained tokens marked, stop")

    p = verbs.add_parser("evaluate", help="loss, perplexity and exact match on test.jsonl", formatter_class=formatter)
    p.set_defaults(run=evaluate)
    add_model_flags(p)
    p.add_argument("--data", required=True, help="folder with test.jsonl, or the file itself")
    p.add_argument("--adapter-path", help="adapter to evaluate; none evaluates the model itself")
    p.add_argument("--max-seq-length", type=int, default=2048, help="tokens of an example; longer ones are cut")
    p.add_argument("--max-tokens", type=int, default=64, help="tokens generated for an exact match")
    p.add_argument("--no-generate", action="store_true", help="loss and perplexity only")
    p.add_argument("--skip-invalid", action="store_true", help="leave out rows that cannot be read, and count them")


def add_model_flags(p: argparse.ArgumentParser, *, dtype: str = "auto") -> None:
    """The flags that say which model, and how it is held."""
    p.add_argument("--model", required=True, help="a model folder, or a name that `qlorag pull` knows")
    p.add_argument("--quantize", choices=["nf4", "fp4", "none"], help="hold the projections in 4 bits")
    p.add_argument("--dtype", default=dtype, help="of arithmetic and dense weights: auto, bfloat16, float16, float32")


def add_lora_flags(p: argparse.ArgumentParser) -> None:
    """The flags of an adapter."""
    d = LoRAConfig()
    p.add_argument("--rank", "--r", type=int, default=d.r, dest="rank", help="LoRA rank")
    p.add_argument("--alpha", type=float, default=d.alpha, help="LoRA alpha; the update is scaled by alpha / rank")
    p.add_argument("--dropout", type=float, default=d.dropout, help="of the LoRA branch's input")
    p.add_argument("--num-layers", "--lora-layers", type=int, dest="num_layers", help="adapt the last N blocks only")
    p.add_argument("--targets", nargs="+", default=["all-linear"], help="names of layers to adapt, or all-linear")
    p.add_argument("--rslora", action="store_true", help="scale by alpha / sqrt(rank)")


def train(args: argparse.Namespace, display: Display) -> int:
    """`qlorag train`."""
    for name, least in (("keep", 1), ("save_every", 0), ("steps_per_eval", 0), ("steps_per_report", 0)):
        if getattr(args, name) < least:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(args, name)}: wanted at least {least}")
    settings = TrainSettings(
        iters=args.iters,
        batch_size=args.batch_size,
        grad_accumulation=args.grad_accumulation_steps,
        learning_rate=args.learning_rate,
        warmup=args.warmup,
        weight_decay=args.weight_decay,
        clip=args.clip,
        seed=args.seed,
        optimizer=args.optimizer,
    )
    lora = LoRAConfig(
        r=args.rank,
        alpha=args.alpha,
        dropout=args.dropout,
        targets="all-linear" if args.targets == ["all-linear"] else args.targets,
        num_layers=args.num_layers,
        rslora=args.rslora,
    )
    out = Path(args.adapter_path)
    newest = None if args.show_mask else _starting_point(out, resume=args.resume, overwrite=args.overwrite)
    base = assemble(args.model, quantize=args.quantize, dtype=args.dtype)
    examples, valid = _examples(args, base, display)
    reuse_freed_memory()  # not before: what loading frees may well be given back
    if args.show_mask:
        shown = show_mask(examples[0], base.tok)
        display.console.print(shown)
        display.result({"text": shown.plain, "ids": examples[0].ids, "mask": examples[0].mask})
        return 0
    run = TrainingRun(base, examples, valid, lora=lora, settings=settings, out=out, name=args.model, resume_from=newest)
    status = run.go(
        display,
        report=args.steps_per_report,
        evaluate=args.steps_per_eval,
        save=args.save_every,
        keep=args.keep,
    )
    display.result(run.result)
    return status


def _starting_point(out: Path, *, resume: bool, overwrite: bool) -> Path | None:
    """The checkpoint to go on from, if any; refuses to write over an earlier run unasked."""
    found = checkpoints(out)
    if resume:
        if not found:
            raise TrainingError(f"{out}: no checkpoint to resume from: start without --resume")
        return found[-1]
    taken = [p for p in (out / "adapter_model.safetensors", out / "metrics.jsonl", *found) if p.exists()]
    if taken and not overwrite:
        raise TrainingError(
            f"{out}: holds an earlier run ({taken[0].name}): choose another --adapter-path, or --resume it, or "
            "--overwrite it"
        )
    return None


def _examples(args: argparse.Namespace, base: Assembled, display: Display) -> tuple[list[Example], list[Example]]:
    folder = Path(args.data)
    sets: list[list[Example]] = []
    for name in ("train", "valid"):
        path = folder / f"{name}.jsonl"
        if name == "valid" and not path.exists():
            sets.append([])
            continue
        sets.append(read_examples(path, args, base, display))
    return sets[0], sets[1]


def read_examples(path: Path, args: argparse.Namespace, base: Assembled, display: Display) -> list[Example]:
    """A file's rows, tokenized; says what was left out."""
    rows, skipped = read_rows(path, skip_invalid=args.skip_invalid)
    if skipped:
        display.say(f"{path}: kept {len(rows)} rows, skipped {len(skipped)} that could not be read", style="yellow")
    examples, report = tokenize_rows(rows, base.tok, max_tokens=args.max_seq_length, skip_invalid=args.skip_invalid)
    if report.dropped or report.truncated or report.joined_plain:
        display.say(f"{path}: {report.summary()}", style="yellow")
    return examples


def evaluate(args: argparse.Namespace, display: Display) -> int:
    """`qlorag evaluate`."""
    from ..evaluation.exact_match import exact_match

    path = Path(args.data)
    path = path / "test.jsonl" if path.is_dir() else path
    if not path.exists():
        raise UsageError(f"{path}: not found: --data is a folder with test.jsonl, or a .jsonl file")
    base = assemble(args.model, adapter_path=args.adapter_path, quantize=args.quantize, dtype=args.dtype)
    examples = read_examples(path, args, base, display)
    loss = mean_loss(base.model, examples)
    result: dict[str, Any] = {"loss": loss, "perplexity": perplexity(loss), "examples": len(examples)}
    rows = [("examples", f"{len(examples)}"), ("loss", f"{loss:.4f}"), ("perplexity", f"{perplexity(loss):.3f}")]
    if not args.no_generate:
        raw, _ = read_rows(path, skip_invalid=args.skip_invalid)
        matches = exact_match(base.model, base.tok, raw, max_tokens=args.max_tokens, display=display)
        if matches:
            right = sum(m.right for m in matches)
            result |= {"exact_match": right / len(matches), "answers": [vars(m) for m in matches]}
            rows.append(("exact match", f"{right} of {len(matches)} ({100 * right / len(matches):.1f} %)"))
            wrong = [m for m in matches if not m.right]
            if wrong:
                display.table(["prompt", "wanted", "got"], [(m.prompt, m.wanted, m.got) for m in wrong[:10]],
                              title=f"answers that differ ({len(wrong)})")  # fmt: skip
    display.table(["", path.name], rows)
    display.result(result)
    return 0
