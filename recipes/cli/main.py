"""`qlorag`: one verb per job. This file dispatches; each module beside it holds the verbs of one kind.

    qlorag VERB --config run.yaml [flags]     the file's values are defaults, flags given by hand win
    --json    the result as one JSON document on standard output
    --debug   a traceback with an error

Exit status: 0 done, 1 an error that is named in one line, 2 a wrong command line, 130 / 143 interrupted.
"""

from __future__ import annotations

import os
import sys

# Everything else is imported inside `main`, `typing` too, so that ctrl-C during an import is one line.
TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

# Set before torch is imported, which reads it once: OpenMP's threads then spin only briefly while they wait. With one
# other busy process on two cores, a training step takes 1.4 s with it and 6 to 20 s without (recipes/NOTES.md).
os.environ.setdefault("GOMP_SPINCOUNT", "2000")


def build_parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The whole command line, and each verb's part of it by name."""
    import argparse
    from importlib.metadata import version

    from .flags import VerbParser, add_common_flags
    from .verbs import chat, demo, inspection, models, rag, text, train

    parser = argparse.ArgumentParser(
        prog="qlorag", description="QLoRA and RAG from scratch: fine-tune a 4-bit model, ask your documents."
    )
    parser.add_argument("--version", action="version", version=f"qlorag {version('qlorag')}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=VerbParser)
    for module in (models, inspection, train, text, chat, rag, demo):
        module.register(verbs)
    for verb in verbs.choices.values():
        add_common_flags(verb)
    return parser, dict(verbs.choices)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns the exit status."""
    try:
        return _main(list(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _main(arguments: list[str]) -> int:
    debug = "--debug" in arguments
    try:
        args = _parse(arguments)
        debug = args.debug  # the config file may say it, too
        return _run(args)
    except OSError as fault:  # disk full, permission denied: the operating system's words name the file
        if debug:
            raise
        # What writes files names them; what is left is output into a full disk, as in `qlorag generate > answer.txt`.
        return _fail(f"{fault.filename or 'standard output'}: {fault.strerror or fault}")
    except ValueError as fault:
        if debug or not _is_for_the_user(fault):
            raise
        return _fail(str(fault))


def _is_for_the_user(fault: ValueError) -> bool:
    """Whether the message is written for users. Any other fault is a bug, and a bug report needs its traceback."""
    from ..errors import RecipeError

    if isinstance(fault, RecipeError):
        return True
    # Not before: these import torch, which has been imported by now if such a fault was raised.
    from ...kernels.nf4 import QuantizationError
    from ...lora import AdapterError
    from ...models import ModelError
    from ...retrieval import StoreError

    return isinstance(fault, (ModelError, AdapterError, QuantizationError, StoreError))


def _parse(arguments: list[str]) -> argparse.Namespace:
    """The command line, on top of the verb's `--config` file if it names one."""
    import argparse

    parser, verbs = build_parser()
    _check_names(arguments, parser, verbs)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", nargs="?")  # without FILE: the whole parser says so
    path = first.parse_known_args(arguments)[0].config
    if path is not None and arguments[0] in verbs:
        from .config_file import apply_config

        given = apply_config(verbs[arguments[0]], path)
    args = parser.parse_args(arguments)
    args.given = _given(arguments) | (given if path is not None and arguments[0] in verbs else frozenset())
    return args


def _check_names(
    arguments: list[str], parser: argparse.ArgumentParser, verbs: dict[str, argparse.ArgumentParser]
) -> None:
    """Ends the program for a mistyped verb or flag, with the nearest that exists: argparse would first miss others."""
    from .flags import nearest

    if not arguments or arguments[0].startswith("-"):
        return
    name = arguments[0]
    if name not in verbs:
        parser.error(f"there is no verb {name!r}: {nearest(name, verbs)}")
    known = [flag for action in verbs[name]._actions for flag in action.option_strings]
    for argument in arguments[1:]:
        flag = argument.partition("=")[0]
        if argument == "--":
            return
        if flag.startswith("--") and " " not in argument and flag not in known:
            verbs[name].error(f"{name} has no flag {flag}: {nearest(flag, known)}")


def _given(arguments: list[str]) -> frozenset[str]:
    """The names of the flags that stand on the command line, whatever their values."""
    import argparse

    parser, verbs = build_parser()
    for verb in verbs.values():
        for action in verb._actions:  # argparse has no public list of them
            action.default, action.required = argparse.SUPPRESS, False
    return frozenset(vars(parser.parse_args(arguments)))


def _run(args: argparse.Namespace) -> int:
    from .display import Display

    try:
        return int(args.run(args, Display(as_json=args.json)) or 0)
    except BrokenPipeError:  # `qlorag ... | head`: the reader wants no more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _fail(message: str) -> int:
    from .printable import one_line

    print(f"qlorag: error: {one_line(message)}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
