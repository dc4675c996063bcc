"""`--config FILE`: a YAML file whose names are those of a verb's flags.

    model: smollm2-135m
    batch_size: 2            # --batch-size; dashes do as well
    targets: [q_proj, v_proj]
    rslora: true

The file's values become the verb's defaults and satisfy what it requires; then the command line is parsed as ever, so
a flag given by hand wins. Each value is checked by the flag's own type and choices. An empty value (`seed:`) leaves
the flag as it is.
"""

from __future__ import annotations

import argparse
import difflib
from typing import Any

import yaml

from ..errors import UsageError


def apply_config(verb: argparse.ArgumentParser, path: str) -> frozenset[str]:
    """Makes the values in `path` the defaults of `verb`. Returns the names of those that it sets.

    Raises UsageError: the file cannot be read, or a name or value in it is not one of the verb's.
    """
    known = _names(verb)
    given: dict[str, str] = {}
    for key, value in _read(path).items():
        where, name = f"{path}: {key}", str(key).replace("_", "-")
        if name not in known:
            raise UsageError(f"{where}: no such flag of this verb: {_suggestion(name, known)}")
        action = known[name]
        if action.dest in given:
            raise UsageError(f"{where}: says again what {given[action.dest]} says: leave one out")
        given[action.dest] = str(key)
        if value is None:
            continue
        verb.set_defaults(**{action.dest: _convert(action, value, where)})
        action.required = False
    return frozenset(given)


def _names(verb: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """Every name the file may use: the long flags without their dashes, and the positional arguments."""
    names: dict[str, argparse.Action] = {}
    for action in verb._actions:  # argparse has no public list of them
        if action.dest not in ("help", "config"):
            flags = [f.removeprefix("--") for f in action.option_strings if f.startswith("--")]
            names |= dict.fromkeys(flags or [action.dest.replace("_", "-")], action)
    return names


def _suggestion(name: str, known: dict[str, argparse.Action]) -> str:
    close = difflib.get_close_matches(name, known)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"known are {', '.join(n for n, a in known.items() if a.help != argparse.SUPPRESS)}"


def _read(path: str) -> dict[Any, Any]:
    try:
        with open(path, encoding="utf-8") as f:
            values = yaml.safe_load(f)
    except OSError as fault:
        raise UsageError(f"{path}: cannot be read ({fault.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as fault:
        raise UsageError(f"{path}: not YAML ({' '.join(str(fault).split())})") from None
    if not isinstance(values, dict):
        raise UsageError(f"{path}: holds a {type(values).__name__}, wanted names and values, one a line")
    return values


def _convert(action: argparse.Action, value: Any, where: str) -> Any:
    """The value as the flag would have given it."""
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise UsageError(f"{where}: got {value!r}, wanted true or false")
        return value
    if action.nargs in ("*", "+") or isinstance(action, argparse._AppendAction):
        items = value if isinstance(value, list) else [value]
        if action.nargs == "+" and not items:
            raise UsageError(f"{where}: got an empty list, wanted at least one value")
        return [_scalar(action, item, where) for item in items]
    return _scalar(action, value, where)


def _scalar(action: argparse.Action, value: Any, where: str) -> Any:
    if isinstance(value, (dict, list)) or value is None:
        kind = "nothing" if value is None else "a mapping" if isinstance(value, dict) else "a list"
        raise UsageError(f"{where}: got {kind}, wanted a plain value")
    if isinstance(value, bool):  # YAML reads a bare yes, no, on and off so, too
        raise UsageError(f"{where}: got {str(value).lower()}, wanted a value: put a word like yes or no in quotes")
    convert = action.type if callable(action.type) else str
    try:
        # By way of text, as on the command line: YAML reads 1e-4 as a string, and 2024 where a name is meant.
        converted = convert(str(value))
    except ValueError:
        raise UsageError(f"{where}: got {value!r}, wanted {getattr(convert, '__name__', 'a value')}") from None
    if action.choices is not None and converted not in action.choices:
        raise UsageError(f"{where}: got {value!r}, wanted {', '.join(map(str, action.choices))}")
    return converted
