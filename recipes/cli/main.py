"""`qlorag`: one verb per job. This file dispatches; each `cli_*` module holds the verbs of one kind.

    qlorag VERB --config run.yaml [flags]     the file's values are defaults, flags given by hand win
    --json    the result as one JSON document on standard output
    --debug   a traceback with an error

Exit status: 0 done, 1 an error that is named in one line, 2 a wrong command line, 130 / 143 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version

from ..errors import RecipeError

# Before torch is imported, which reads it once: OpenMP's threads spin only briefly while they wait for each other.
# With one other busy process on two cores, a training step takes 1.4 s so, and 6 to 20 s as installed (NOTES.md).
os.environ.setdefault("GOMP_SPINCOUNT", "2000")


def build_parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The whole command line, and each verb's part of it by name."""
    from . import demo, models, rag, text, train

    parser = argparse.ArgumentParser(
        prog="qlorag", description="QLoRA and RAG from scratch: fine-tune a 4-bit model, ask your documents."
    )
    parser.add_argument("--version", action="version", version=f"qlorag {version('qlorag')}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for module in (models, train, text, rag, demo):
        module.register(verbs)
    for verb in verbs.choices.values():
        verb.allow_abbrev = False  # a flag's beginning would mean something else once a longer flag is added
        verb.add_argument("--config", metavar="FILE", help="YAML file with the same names as the flags")
        verb.add_argument("--json", action="store_true", help="print the result as JSON")
        verb.add_argument("--debug", action="store_true", help="show a traceback with an error")
    return parser, verbs.choices


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Known faults only: a bug shows its traceback, which is what a bug report needs.
    from ...kernels.nf4 import QuantizationError
    from ...lora import AdapterError
    from ...models import ModelError
    from ...retrieval import StoreError

    debug = "--debug" in arguments
    try:
        args = _parse(arguments)
        debug = args.debug  # the config file may say it, too
        return _run(args)
    except (RecipeError, ModelError, AdapterError, QuantizationError, StoreError) as fault:
        if debug:
            raise
        return _fail(str(fault))
    except OSError as fault:  # disk full, permission denied: the operating system's words name the file
        if debug:
            raise
        return _fail(f"{fault.filename or 'system'}: {fault.strerror or fault}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _parse(arguments: list[str]) -> argparse.Namespace:
    """The command line, on top of the verb's `--config` file if it names one."""
    from .config_file import apply_config

    parser, verbs = build_parser()
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", nargs="?")  # without FILE: the whole parser says so
    path = first.parse_known_args(arguments)[0].config
    if path is not None and arguments[0] in verbs:
        apply_config(verbs[arguments[0]], path)
    return parser.parse_args(arguments)


def _run(args: argparse.Namespace) -> int:
    from .display import Display

    try:
        return int(args.run(args, Display(as_json=args.json)) or 0)
    except BrokenPipeError:  # `qlorag ... | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _fail(message: str) -> int:
    print(f"qlorag: error: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
