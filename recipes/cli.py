"""`qlorag`: one verb per job. This file dispatches; each `cli_*` module holds the verbs of one kind.

    qlorag VERB --config run.yaml [flags]     flags in the file are read first, flags given by hand win
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
from typing import Any

from .errors import RecipeError, UsageError

# Before torch is imported, which reads it once: OpenMP's threads spin only briefly while they wait for each other.
# With one other busy process on two cores, a training step takes 1.4 s so, and 6 to 20 s as installed (NOTES.md).
os.environ.setdefault("GOMP_SPINCOUNT", "2000")


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    from . import cli_models, cli_rag, cli_text, cli_train, demo

    parser = argparse.ArgumentParser(
        prog="qlorag", description="QLoRA and RAG from scratch: fine-tune a 4-bit model, ask your documents."
    )
    parser.add_argument("--version", action="version", version=f"qlorag {version('qlorag')}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for module in (cli_models, cli_train, cli_text, cli_rag, demo):
        module.register(verbs)
    for verb in verbs.choices.values():
        verb.add_argument("--config", metavar="FILE", help="YAML file with the same names as the flags")
        verb.add_argument("--json", action="store_true", help="print the result as JSON")
        verb.add_argument("--debug", action="store_true", help="show a traceback with an error")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--debug" in arguments:
        return _run(arguments)
    # Known faults only: a bug shows its traceback, which is what a bug report needs.
    from ..kernels.nf4 import QuantizationError
    from ..lora import AdapterError
    from ..models import ModelError
    from ..retrieval import StoreError

    try:
        return _run(arguments)
    except (RecipeError, ModelError, AdapterError, QuantizationError, StoreError) as fault:
        return _fail(str(fault))
    except OSError as fault:  # disk full, permission denied: the operating system's words name the file
        return _fail(f"{fault.filename or 'system'}: {fault.strerror or fault}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _run(arguments: list[str]) -> int:
    from .display import Display

    parser = build_parser()
    args = parser.parse_args(_with_config(arguments))
    try:
        return int(args.run(args, Display(as_json=args.json)) or 0)
    except BrokenPipeError:  # `qlorag ... | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _fail(message: str) -> int:
    print(f"qlorag: error: {message}", file=sys.stderr)
    return 1


def _with_config(arguments: list[str]) -> list[str]:
    """The arguments with those of `--config FILE` put before them, so that later ones win."""
    for i, argument in enumerate(arguments):
        if argument == "--config" and i + 1 < len(arguments):
            path = arguments[i + 1]
        elif argument.startswith("--config="):
            path = argument.removeprefix("--config=")
        else:
            continue
        return [arguments[0], *_flags(path), *arguments[1:]]
    return arguments


def _flags(path: str) -> list[str]:
    """A YAML mapping as flags: `batch_size: 2` and `batch-size: 2` both become --batch-size 2; `true` a bare flag."""
    import yaml

    try:
        with open(path, encoding="utf-8") as f:
            values = yaml.safe_load(f)
    except OSError as fault:
        raise UsageError(f"{path}: cannot be read ({fault.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as fault:
        raise UsageError(f"{path}: not YAML ({' '.join(str(fault).split())})") from None
    if not isinstance(values, dict):
        raise UsageError(f"{path}: holds a {type(values).__name__}, wanted names and values, one a line")
    flags: list[str] = []
    for name, value in values.items():
        flag = "--" + str(name).replace("_", "-")
        if value is True:
            flags.append(flag)
        elif isinstance(value, list):
            flags += [flag, *map(_scalar, value)]
        elif value is not None and value is not False:
            flags.append(f"{flag}={_scalar(value)}")
    return flags


def _scalar(value: Any) -> str:
    if isinstance(value, (dict, list)):
        raise UsageError(f"a {type(value).__name__} inside a list of the config file: wanted plain values")
    return str(value)


if __name__ == "__main__":
    sys.exit(main())
