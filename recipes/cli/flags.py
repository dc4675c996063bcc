"""Flags that several verbs share, and how a verb is added to the command line.

Nothing here or at the head of a verb's file may import torch: `qlorag --help` shows every verb and has to be quick. A
verb imports what it needs when it runs.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .display import Display

Run = Callable[[argparse.Namespace, "Display"], int]
ENCODER = "minilm-l6"
# Verb -> what `qlorag --help` says of it, and the first sentences of its own help.
VERBS = {
    "pull": ("fetch a model", "Fetches a model, checks it, and prints its folder."),
    "fuse": (
        "write an adapter into its base model",
        "Adds an adapter's update to the weights of its base model and saves an ordinary model folder, which "
        "needs neither of them afterwards.",
    ),
    "export": (
        "write a model as other programs read it",
        "Writes a model as other programs read it: a folder for transformers and bitsandbytes.",
    ),
    "inspect": (
        "say what a folder holds",
        "Says what a folder holds: a model with its layers and bits, an adapter, a training run, a store, or "
        "training rows. Without a path, --backends says which kernels run here.",
    ),
    "train": (
        "fine-tune a model with LoRA or QLoRA",
        "Trains a LoRA adapter on rows of text or chat; with --quantize over a base in 4 bits (QLoRA). Ctrl-C "
        "saves, --resume goes on.",
    ),
    "evaluate": (
        "loss, perplexity and exact match on test.jsonl",
        "Measures a model, with or without an adapter, on test rows: loss, perplexity, and how many answers "
        "are exactly those of the rows.",
    ),
    "generate": (
        "answer one prompt",
        "Answers one prompt. The answer goes to standard output, the statistics go to standard error.",
    ),
    "chat": ("talk with a model", "Talks with a model, turn by turn; /help lists what can be typed besides."),
    "index": (
        "put documents into a store",
        "Cuts documents into passages, embeds them and puts them into a store. A document that is there and "
        "has not changed is not embedded again.",
    ),
    "search": ("find passages in a store", "Finds the passages of a store that are nearest to a question."),
    "ask": (
        "answer from a store, with sources",
        "Finds passages, lets a model answer from them, and names the sources that each sentence rests on.",
    ),
    "demo": (
        "fine-tune a real model, then ask documents, in a few minutes",
        "Fetches two small models, fine-tunes one in 4 bits on twelve rows and asks it before and after; then "
        "asks the untrained one with documents beside it.",
    ),
}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default where there is one to speak of."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        shown = action.default not in (None, False, "", []) and "default" not in (action.help or "")
        return super()._get_help_string(action) if shown else action.help


class VerbParser(argparse.ArgumentParser):
    """The parser of one verb: a flag's beginning is no flag, since it would mean another once a longer one is added."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "allow_abbrev": False, "formatter_class": HelpFormatter})


def nearest(name: str, known: Iterable[str]) -> str:
    """What a mistyped name may have meant, for an error message."""
    close = difflib.get_close_matches(name, list(known), n=2, cutoff=0.7)
    return f"did you mean {' or '.join(close)}?" if close else f"known are {', '.join(known)}"


def add_verb(verbs: Any, name: str, run: Run) -> argparse.ArgumentParser:
    """A verb's parser. `run` returns the exit status."""
    help, about = VERBS[name]
    p: argparse.ArgumentParser = verbs.add_parser(name, help=help, description=about)
    p.set_defaults(run=run)
    return p


def add_common_flags(p: argparse.ArgumentParser) -> None:
    """The flags that every verb has, last in its help."""
    p.add_argument("--config", metavar="FILE", help="YAML file with the same names as the flags")
    p.add_argument("--json", action="store_true", help="print the result as JSON")
    p.add_argument("--debug", action="store_true", help="show a traceback with an error")


def add_model_flags(
    p: argparse.ArgumentParser, *, model: str | None = None, required: bool = True, dtype: str = "auto"
) -> None:
    """Which model, and in which form it is held. model: the default; without one the flag is required, or the verb
    finds the model in another way and says so.
    """
    about = "a model folder, or a name that `qlorag pull` knows"
    p.add_argument("--model", default=model, required=required and model is None, help=about)
    p.add_argument("--quantize", choices=["nf4", "fp4", "none"], help="hold the projections in 4 bits")
    p.add_argument("--dtype", default=dtype, help="of arithmetic and dense weights: auto, bfloat16, float16, float32")


def add_data_flags(p: argparse.ArgumentParser, *, data: str, required: bool = True) -> None:
    """Which rows, and what becomes of those that are too long or invalid. data: what --data means, for its help."""
    p.add_argument("--data", required=required, help=data)
    p.add_argument("--max-seq-length", type=int, default=2048, help="tokens of an example; longer ones are cut")
    p.add_argument("--skip-invalid", action="store_true", help="leave out rows that cannot be read, and count them")
    p.add_argument("--ignore-keys", nargs="+", default=[], metavar="KEY", help="keys of rows to leave out, not refuse")


def add_generation_flags(p: argparse.ArgumentParser) -> None:
    """How text is generated."""
    p.add_argument("--adapter-path", help="adapter to use")
    p.add_argument("--system", help="system message")
    p.add_argument("--max-tokens", type=int, default=256, help="most tokens generated")
    p.add_argument("--temp", type=float, default=0.0, help="temperature; 0 always takes the likeliest token")
    p.add_argument("--top-k", type=int, default=0, help="choose among the k likeliest, 0 for all")
    p.add_argument("--top-p", type=float, default=1.0, help="choose among the likeliest that reach this probability")
    p.add_argument("--min-p", type=float, default=0.0, help="leave out tokens this much less likely than the likeliest")
    p.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1 makes seen tokens less likely")
    p.add_argument("--seed", type=int, help="makes sampling repeatable")
    p.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends the answer; may be repeated")


def generation_options(args: argparse.Namespace) -> dict[str, Any]:
    """Those flags as `generate` takes them. Raises UsageError: a number outside its range."""
    from ...models import Sampling
    from ..errors import UsageError

    if args.max_tokens < 1:
        raise UsageError(f"--max-tokens {args.max_tokens}: wanted at least 1")
    options = {
        "temperature": args.temp,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "min_p": args.min_p,
        "repetition_penalty": args.repetition_penalty,
        "seed": args.seed,
    }
    try:
        Sampling(**options)
    except ValueError as fault:
        name, _, rest = str(fault).partition("=")
        flag = "temp" if name == "temperature" else name.replace("_", "-")
        raise UsageError(f"--{flag}={rest}") from None
    return {**options, "stop": args.stop, "max_tokens": args.max_tokens}


def add_store_flags(p: argparse.ArgumentParser) -> None:
    """Which store, and which encoder its texts were embedded with."""
    p.add_argument("--store", required=True, help="folder of the store")
    p.add_argument("--encoder", default=ENCODER, help="an encoder's folder, or a name that `qlorag pull` knows")


def add_search_flags(p: argparse.ArgumentParser) -> None:
    """How many passages are found."""
    p.add_argument("--k", type=int, default=3, help="most passages")
    p.add_argument("--score-threshold", type=float, default=0.4, help="smallest cosine that counts as found")
