"""The verbs `generate` and `chat`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from typing import Any

from ...models import Generation, generate
from ..errors import UsageError
from ..hub.assemble import Assembled, assemble
from .display import Display
from .train import add_model_flags


def register(verbs: Any) -> None:
    """Adds the verbs' flags."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    p = verbs.add_parser("generate", help="answer one prompt", formatter_class=formatter)
    p.set_defaults(run=run_generate)
    add_model_flags(p)
    p.add_argument("--prompt", required=True, help="the question; - reads standard input")
    p.add_argument("--raw", action="store_true", help="continue the prompt as it stands, without a chat template")
    add_generation_flags(p)

    p = verbs.add_parser("chat", help="talk with a model", formatter_class=formatter)
    p.set_defaults(run=chat)
    add_model_flags(p)
    add_generation_flags(p)


def add_generation_flags(p: argparse.ArgumentParser) -> None:
    """The flags that say how to generate."""
    p.add_argument("--adapter-path", help="adapter to use")
    p.add_argument("--system", help="system message")
    p.add_argument("--max-tokens", type=int, default=256, help="most tokens generated")
    add_sampling_flags(p)


def add_sampling_flags(p: argparse.ArgumentParser) -> None:
    """The flags that say how tokens are chosen."""
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


def run_generate(args: argparse.Namespace, display: Display) -> int:
    """`qlorag generate`."""
    options = generation_options(args)
    if args.raw and args.system is not None:
        raise UsageError("--system with --raw: a raw prompt has no turns to put it before: leave one of them out")
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    it = assemble(args.model, adapter_path=args.adapter_path, quantize=args.quantize, dtype=args.dtype)
    run = generate(it.model, it.tok, prompt, system=args.system, raw=args.raw, **options)
    stream(run, display)
    display.say("==========")
    display.say(run.stats.lines())
    display.result({"text": run.text, **vars(run.stats)})
    return 0


def stream(run: Generation, display: Display) -> None:
    """Prints an answer while it is made."""
    for piece in run:
        display.piece(piece)
    display.piece("\n")


def chat(args: argparse.Namespace, display: Display) -> int:
    """`qlorag chat`: turn by turn, until an empty line or the end of input."""
    options = generation_options(args)
    it = assemble(args.model, adapter_path=args.adapter_path, quantize=args.quantize, dtype=args.dtype)
    display.say("An empty line ends the conversation, /reset starts it anew.", style="dim")
    start: list[Mapping[str, Any]] = [{"role": "system", "content": args.system}] if args.system else []
    messages = list(start)
    while text := _ask(display):
        if text == "/reset":
            messages = list(start)
            continue
        messages.append({"role": "user", "content": text})
        messages.append({"role": "assistant", "content": _answer(it, messages, options, display)})
    display.result({"messages": messages})
    return 0


def _ask(display: Display) -> str:
    display.piece("> ")
    line = sys.stdin.readline()
    return line.strip()


def _answer(it: Assembled, messages: list[Mapping[str, Any]], options: dict[str, Any], display: Display) -> str:
    run = generate(it.model, it.tok, messages, **options)
    try:
        stream(run, display)
    except KeyboardInterrupt:  # ends the answer, not the conversation
        display.piece("\n")
    return run.text
