"""The verbs `generate` and `chat`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from .display import Display
from .flags import add_generation_flags, add_model_flags, add_verb, generation_options

if TYPE_CHECKING:
    from ..hub.assemble import LoadedModel


def register(verbs: Any) -> None:
    """Adds the verbs' flags."""
    p = add_verb(verbs, "generate", run_generate, help="answer one prompt")
    add_model_flags(p)
    p.add_argument("--prompt", required=True, help="the question; - reads standard input")
    p.add_argument("--raw", action="store_true", help="continue the prompt as it is, without a chat template")
    add_generation_flags(p)

    p = add_verb(verbs, "chat", run_chat, help="talk with a model")
    add_model_flags(p)
    add_generation_flags(p)


def run_generate(args: argparse.Namespace, display: Display) -> int:
    """`qlorag generate`."""
    from ...models import generate
    from ..hub.assemble import assemble

    options = generation_options(args)
    if args.raw and args.system is not None:
        raise UsageError("--system with --raw: a raw prompt has no turns: leave one of them out")
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    loaded = assemble(args.model, adapter_path=args.adapter_path, quantize=args.quantize, dtype=args.dtype)
    run = generate(loaded.model, loaded.tok, prompt, system=args.system, raw=args.raw, **options)
    stream(run, display)
    display.say("==========")
    display.say(run.stats.lines())
    display.result({"text": run.text, **vars(run.stats)})
    return 0


def stream(pieces: Iterable[str], display: Display) -> None:
    """Prints an answer while it is made."""
    for piece in pieces:
        display.piece(piece)
    display.piece("\n")


def run_chat(args: argparse.Namespace, display: Display) -> int:
    """`qlorag chat`: turn by turn, until an empty line or the end of input."""
    from ..hub.assemble import assemble

    options = generation_options(args)
    loaded = assemble(args.model, adapter_path=args.adapter_path, quantize=args.quantize, dtype=args.dtype)
    display.say("An empty line ends the conversation, /reset starts it again.", style="dim")
    start: list[Mapping[str, Any]] = [{"role": "system", "content": args.system}] if args.system else []
    messages = list(start)
    while text := _ask(display):
        if text == "/reset":
            messages = list(start)
            continue
        messages.append({"role": "user", "content": text})
        messages.append({"role": "assistant", "content": _answer(loaded, messages, options, display)})
    display.result({"messages": messages})
    return 0


def _ask(display: Display) -> str:
    display.piece("> ")
    line = sys.stdin.readline()
    return line.strip()


def _answer(loaded: LoadedModel, messages: list[Mapping[str, Any]], options: dict[str, Any], display: Display) -> str:
    from ...models import generate

    run = generate(loaded.model, loaded.tok, messages, **options)
    try:
        stream(run, display)
    except KeyboardInterrupt:  # ends the answer, not the conversation
        display.piece("\n")
    return run.text
