"""The verbs `train` and `evaluate`."""

from __future__ import annotations

import argparse
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import TrainingError, UsageError
from ...training.settings import OPTIMIZERS, TrainSettings
from ..display import Display
from ..flags import add_data_flags, add_model_flags, add_verb

if TYPE_CHECKING:
    from ....lora import LoRAConfig
    from ....models import Tokenizer
    from ...data import Example, Row
    from ...training.observer import RunResult

# As in LoRAConfig(), which cannot be asked here: its package imports torch. A test compares them.
LORA_DEFAULTS: dict[str, Any] = {"r": 8, "alpha": 16.0, "dropout": 0.0}


ADAPTER_FLAGS = ("rank", "alpha", "dropout", "num_layers", "targets", "rslora")


def register(verbs: Any) -> None:
    """Adds the verbs' flags."""
    p = add_verb(verbs, "train", run_train)
    add_model_flags(p, required=False)
    add_data_flags(p, data="folder with train.jsonl and, if wanted, valid.jsonl; or one file", required=False)
    p.add_argument("--adapter-path", default="adapters", help="where adapter, checkpoints and metrics go")
    p.add_argument("--train", action="store_true", help=argparse.SUPPRESS)  # mlx-lm's users write: lora --train
    _add_lora_flags(p)
    _add_step_flags(p)
    p.add_argument("--steps-per-report", type=int, default=10, help="steps between printed lines")
    p.add_argument("--steps-per-eval", type=int, default=50, help="steps between validations, 0 for none")
    p.add_argument("--save-every", type=int, default=50, help="steps between checkpoints, 0 for none")
    p.add_argument("--keep", type=int, default=2, help="newest checkpoints kept")
    p.add_argument("--resume", action="store_true",
                   help="go on from the newest checkpoint in --adapter-path, with the flags of its run")  # fmt: skip
    p.add_argument("--resume-adapter-file", metavar="ADAPTER", help="begin with the weights of a finished adapter")
    p.add_argument("--overwrite", action="store_true", help="replace what an earlier run left in --adapter-path")
    p.add_argument("--show-mask", action="store_true", help="print the first row with its labelled tokens marked, stop")

    p = add_verb(verbs, "evaluate", run_evaluate)
    add_model_flags(p, required=False)
    add_data_flags(p, data="folder with test.jsonl, or the file itself")
    p.add_argument("--adapter-path", help="adapter to evaluate; none evaluates the model itself")
    p.add_argument("--max-tokens", type=int, default=64, help="tokens generated for an exact match")
    p.add_argument("--no-generate", action="store_true", help="loss and perplexity only")


def _add_lora_flags(p: argparse.ArgumentParser) -> None:
    d = LORA_DEFAULTS
    p.add_argument("--rank", "--r", type=int, default=d["r"], dest="rank", help="LoRA rank")
    p.add_argument("--alpha", type=float, default=d["alpha"], help="LoRA alpha; the update is scaled by alpha / rank")
    p.add_argument("--dropout", type=float, default=d["dropout"], help="of the LoRA branch's input")
    p.add_argument(
        "--num-layers", "--lora-layers", type=int, dest="num_layers", help="adapt the last N blocks only; -1: all"
    )
    p.add_argument("--targets", nargs="+", default=["all-linear"], help="names of layers to adapt, or all-linear")
    p.add_argument("--rslora", action="store_true", help="scale by alpha / sqrt(rank)")


def _add_step_flags(p: argparse.ArgumentParser) -> None:
    d = TrainSettings()
    p.add_argument("--iters", type=int, default=d.iters, help="optimizer steps")
    p.add_argument("--batch-size", type=int, default=d.batch_size, help="examples in a micro-batch")
    p.add_argument("--grad-accumulation-steps", type=int, default=d.grad_accumulation, help="micro-batches in a step")
    p.add_argument("--learning-rate", type=float, default=d.learning_rate, help="peak learning rate")
    p.add_argument("--warmup", type=float, default=d.warmup, help="fraction of the steps that warm up")
    p.add_argument("--optimizer", choices=OPTIMIZERS, default=d.optimizer,
                   help="adamw8bit keeps its moments in 8 bits: about 2 bytes a parameter, not 8")  # fmt: skip
    p.add_argument("--weight-decay", type=float, default=d.weight_decay, help="AdamW's")
    p.add_argument("--clip", type=float, default=d.clip, help="largest gradient norm, 0 for none")
    p.add_argument("--seed", type=int, default=d.seed, help="of order, initial weights and dropout")


def run_train(args: argparse.Namespace, display: Display) -> int:
    """`qlorag train`."""
    from ...training.run_flags import resumed_flags

    for name, least in (("keep", 1), ("save_every", 0), ("steps_per_eval", 0), ("steps_per_report", 0)):
        if getattr(args, name) < least:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(args, name)}: wanted at least {least}")
    out = Path(args.adapter_path)
    now = None
    if args.resume:
        flags, now = resumed_flags(out, vars(args), given=args.given)
        args = argparse.Namespace(**flags)
    own = [name for name in ADAPTER_FLAGS if name in args.given]
    if args.resume_adapter_file is not None and own:
        named = ", ".join("--" + name.replace("_", "-") for name in own)
        raise UsageError(f"{named} with --resume-adapter-file: the adapter has its own: leave it out")
    missing = [flag for flag in ("model", "data") if getattr(args, flag) is None]
    if missing:
        raise UsageError(f"--{' and --'.join(missing)} missing: name the model and the rows to train on")
    return _train(args, display, out, now or datetime.now())


def _train(args: argparse.Namespace, display: Display, out: Path, now: datetime) -> int:
    from ...data.rows import find_split
    from ...data.show_mask import show_mask
    from ...hub.assemble import assemble
    from ...training.adapter import prepare, run_record
    from ...training.lock import only_run
    from ...training.memory import reuse_freed_memory
    from ...training.objectives import SFT
    from ...training.run import TrainingRun
    from ...training.run_flags import save_flags
    from ..training_progress import TrainingProgress

    settings, lora = _settings(args), _lora(args)
    train_path, valid_path = find_split(args.data, "train"), find_split(args.data, "valid")
    assert train_path is not None
    newest = None if args.show_mask else _starting_point(out, resume=args.resume, overwrite=args.overwrite)
    base = assemble(args.model, quantize=args.quantize, dtype=args.dtype)
    tok = base.tok.at(now) if base.tok.prints_the_date else base.tok
    _, examples, ends = read_examples(train_path, args, tok, display)
    valid = []
    if valid_path is not None:
        if valid_path.name != "valid.jsonl":
            display.say(f"validating on {valid_path.name}")
        valid = read_examples(valid_path, args, tok, display)[1]
    reuse_freed_memory()  # not before: what loading frees may well be given back
    if taught := ends - tok.eos_ids:
        names = tok.decode(taught, skip_special=False)
        display.say(f"the rows end turns with {names}, which the model's files do not stop at: kept with the adapter")
    if args.show_mask:
        shown = show_mask(examples[0], tok)
        display.console.print(shown)
        display.result({"text": shown.plain, "ids": examples[0].ids, "mask": examples[0].mask})
        return 0
    objective = SFT()
    record = run_record(base, examples, lora=lora, settings=settings, objective=objective)
    start_from = None if args.resume_adapter_file is None or newest else Path(args.resume_adapter_file)
    prepared = prepare(
        base, lora, record, name=args.model, seed=settings.seed, end_ids=ends, resume_from=newest, start_from=start_from
    )
    run = TrainingRun(prepared, examples, valid, objective=objective, settings=settings, out=out)
    with only_run(out):
        if _starting_point(out, resume=args.resume, overwrite=args.overwrite) != newest:
            raise TrainingError(f"{out}: another run wrote there meanwhile: start again")
        save_flags(out, vars(args), now)
        result = run.run(
            TrainingProgress(display),
            report_every=args.steps_per_report,
            evaluate_every=args.steps_per_eval,
            save_every=args.save_every,
            keep=args.keep,
        )
    display.result({} if result.stopped_by else result_as_json(result))
    return 128 + result.stopped_by if result.stopped_by else 0


def result_as_json(result: RunResult) -> dict[str, Any]:
    """What `--json` shows of a complete run."""
    names = ("steps", "loss", "valid_loss", "seconds", "tokens_per_second", "peak_memory_bytes")
    return {"adapter_path": str(result.adapter_path), **{name: getattr(result, name) for name in names}}


def _settings(args: argparse.Namespace) -> TrainSettings:
    return TrainSettings(
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


def _lora(args: argparse.Namespace) -> LoRAConfig:
    from ....lora import LoRAConfig

    return LoRAConfig(
        r=args.rank,
        alpha=args.alpha,
        dropout=args.dropout,
        targets="all-linear" if args.targets == ["all-linear"] else args.targets,
        num_layers=None if args.num_layers == -1 else args.num_layers,
        rslora=args.rslora,
    )


def _starting_point(out: Path, *, resume: bool, overwrite: bool) -> Path | None:
    """The checkpoint to go on from, if any; refuses to write over an earlier run unasked."""
    from ...training.checkpoint import checkpoints

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


def read_examples(
    path: Path, args: argparse.Namespace, tok: Tokenizer, display: Display
) -> tuple[list[Row], list[Example], frozenset[int]]:
    """A file's rows, the examples made of them, and the tokens that end what they teach; says what was left out."""
    from ...data import read_rows, tokenize_rows

    rows, skipped = read_rows(path, skip_invalid=args.skip_invalid, ignore_keys=args.ignore_keys)
    if skipped:
        display.say(f"{path}: kept {len(rows)} rows, skipped {len(skipped)} that could not be read", style="yellow")
    examples, report = tokenize_rows(rows, tok, max_tokens=args.max_seq_length, skip_invalid=args.skip_invalid)
    if report.remarkable:
        display.say(f"{path}: {report.summary()}", style="yellow")
    return rows, examples, report.ends


def run_evaluate(args: argparse.Namespace, display: Display) -> int:
    """`qlorag evaluate`."""
    from ...data.rows import find_split
    from ...evaluation.exact_match import exact_match
    from ...hub.assemble import assemble
    from ...training.trainer import mean_loss, perplexity

    path = find_split(args.data, "test")
    if path is None:
        raise UsageError(f"{args.data}: no test.jsonl in it: --data is a folder with one, or a .jsonl file")
    base = assemble(args.model, adapter_path=args.adapter_path, quantize=args.quantize, dtype=args.dtype)
    rows, examples, _ = read_examples(path, args, base.tok, display)
    loss = mean_loss(base.model, examples)
    result: dict[str, Any] = {"loss": loss, "perplexity": perplexity(loss), "examples": len(examples)}
    shown = [("examples", f"{len(examples)}"), ("loss", f"{loss:.4f}"), ("perplexity", f"{perplexity(loss):.3f}")]
    if not args.no_generate:
        with display.counting("asking") as progress:
            matches = exact_match(base.model, base.tok, rows, max_tokens=args.max_tokens, progress=progress)
        if matches:
            right = sum(m.right for m in matches)
            result |= {"exact_match": right / len(matches), "answers": [vars(m) for m in matches]}
            shown.append(("exact match", f"{right} of {len(matches)} ({100 * right / len(matches):.1f} %)"))
            wrong = [m for m in matches if not m.right]
            if wrong:
                display.table(["prompt", "wanted", "got"], [(m.prompt, m.wanted, m.got) for m in wrong[:10]],
                              title=f"answers that differ ({len(wrong)})")  # fmt: skip
    display.table(["", path.name], shown)
    display.result(result)
    return 0
