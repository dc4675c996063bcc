"""The verb `generate`, and how an answer is shown."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ...errors import UsageError
from ..display import Display
from ..flags import add_generation_flags, add_model_flags, add_verb, generation_options

if TYPE_CHECKING:
    from ...hub.assemble import LoadedModel


def register(verbs: Any) -> None:
    """Adds the verb's flags."""
    p = add_verb(verbs, "generate", run_generate)
    add_model_flags(p, required=False)
    p.add_argument("--prompt", required=True, help="the question; - reads standard input")
    p.add_argument("--raw", action="store_true", help="continue the prompt as it is, without a chat template")
    p.add_argument(
        "--special-tokens", action="store_true", help="with --raw: <|im_start|> and the like are tokens, not plain text"
    )
    add_generation_flags(p)


def run_generate(args: argparse.Namespace, display: Display) -> int:
    """`qlorag generate`."""
    from ....models import generate
    from ...hub.assemble import assemble

    options = generation_options(args)
    if args.raw and args.system is not None:
        raise UsageError("--system with --raw: a raw prompt has no turns: leave one of them out")
    if args.special_tokens and not args.raw:
        raise UsageError("--special-tokens without --raw: in a chat the template writes them: add --raw")
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    loaded = assemble(args.model, adapter_path=args.adapter_path, quantize=args.quantize, dtype=args.dtype)
    say_doubt(loaded, display)
    special = args.special_tokens
    run = generate(loaded.model, loaded.tok, prompt, system=args.system, raw=args.raw, raw_special=special, **options)
    stream(run, display)
    display.aside("==========")
    display.aside(run.stats.lines())
    display.result({"text": run.text, **vars(run.stats)})
    return 0


def say_doubt(loaded: LoadedModel, display: Display) -> None:
    """Says, each time, that an adapter may be on the wrong base."""
    if loaded.doubt:
        display.aside(f"note: {loaded.doubt}")


def stream(pieces: Iterable[str], display: Display) -> None:
    """Prints an answer while it is made."""
    for piece in pieces:
        display.piece(piece)
    display.piece("\n")
