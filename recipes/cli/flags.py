"""Flags that several verbs share, and how a verb is added to the command line.

Nothing here or at the head of a verb's file may import torch: `qlorag --help` shows every verb and has to be quick. A
verb imports what it needs when it runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .display import Display

Run = Callable[[argparse.Namespace, "Display"], int]
ENCODER = "minilm-l6"


def add_verb(verbs: Any, name: str, run: Run, *, help: str) -> argparse.ArgumentParser:
    """A verb's parser. `run` returns the exit status."""
    p: argparse.ArgumentParser = verbs.add_parser(
        name,
        help=help,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,  # a flag's beginning would mean something else once a longer flag is added
    )
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
    p.add_argument("--stop", nargs="*", default=[], help="texts that end the answer")


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
        raise UsageError(f"--{str(fault).replace('_', '-', 1)}") from None
    return {**options, "stop": args.stop, "max_tokens": args.max_tokens}


def add_store_flags(p: argparse.ArgumentParser) -> None:
    """Which store, and which encoder its texts were embedded with."""
    p.add_argument("--store", required=True, help="folder of the store")
    p.add_argument("--encoder", default=ENCODER, help="an encoder's folder, or a name that `qlorag pull` knows")


def add_search_flags(p: argparse.ArgumentParser) -> None:
    """How many passages are found."""
    p.add_argument("--k", type=int, default=3, help="most passages")
    p.add_argument("--score-threshold", type=float, default=0.4, help="smallest cosine that counts as found")
