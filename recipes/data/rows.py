"""Training files: JSON Lines in, one checked `Row` per line out.

    rows, skipped = read_rows("data/train.jsonl")

A line is one row, and its keys say which shape it has. All shapes become one of two: a chat or a text.

    {"messages": [{"role": "user", "content": "..."}, ...], "tools": [...]}  OpenAI, Mistral, mlx-lm
    {"messages": [{"from": "human", "content": "..."}, ...]}   Intel neural-chat
    {"conversations": [{"from": "human", "value": "..."}, ...]}  ShareGPT
    {"prompt": "...", "completion": "..."}                     mlx-lm; also two lists of messages
    {"text": "..."}                                            mlx-lm: plain text, all of it labelled

(`row_shapes` reads them.) Rows of different shapes may stand in one file. A row that fits two shapes is
refused, and so is anything else that would have to be guessed: a wrong type, an unknown role, an unknown key, a key
given twice, NaN. Keys that say where a row comes from ("id", "source") and empty ones (null) pass. JSON written inside
a content, and the arguments of a tool call, stay the strings they are. A list of text parts becomes their text; other
parts (images) are refused. "system" beside the messages is their first message; "train": false on a message is
"weight": 0.

Blank lines, CRLF line ends and a UTF-8 byte-order mark are accepted. Every fault is one line, `file:line:
...`, and ends the reading, unless `skip_invalid` asks to count it and go on. A line is at most
`MAX_LINE_BYTES` long, so that a file without line ends is an error and not all of the memory.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import DataError
from .row_shapes import SHAPES, Fault, Kind, fields_of, finite_number, kind_of, refuse_constant, unique_keys

MAX_LINE_BYTES = 32 << 20


@dataclass(frozen=True)
class Row:
    """One training example, not tokenized yet.

    kind:     "chat"; "completion", whose messages are the prompt as user and the completion as assistant;
              "text".
    messages: [{"role", "content", ...}, ...]; empty for a text.
    text:     the text; "" for the others.
    tools:    JSON schemas of the functions the assistant may call, or None.
    variables: for the chat template (enable_thinking, ...).
    file, line: where it stands, counted from 1.
    """

    file: str
    line: int
    kind: Kind
    messages: tuple[dict[str, Any], ...] = ()
    text: str = ""
    tools: list[dict[str, Any]] | None = None
    variables: dict[str, Any] = field(default_factory=dict)


# What other programs call the same split.
SPLITS = {
    "train": ("train",),
    "valid": ("valid", "validation", "val", "dev"),
    "test": ("test",),
}


def find_split(data: str | Path, split: str) -> Path | None:
    """Where a data folder keeps "train", "valid" or "test"; None if it has no such file.

    data: the folder; or a single file, which is what is trained on or tested.
    Raises DataError: `data` does not exist, the folder has two files for one split, or has no train.jsonl.
    """
    path = Path(data)
    if path.is_file():
        return None if split == "valid" else path
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder: give a .jsonl file, or a folder with train.jsonl")
    found = [file for name in SPLITS[split] if (file := path / f"{name}.jsonl").is_file()]
    if len(found) > 1:
        names = " and ".join(file.name for file in found)
        raise DataError(f"{path}: holds {names}, which are one split under two names: keep one")
    if not found and split == "train":
        there = sorted(entry.name for entry in path.glob("*.jsonl"))
        example = f"--data {path / there[0]}" if there else "--data FILE.jsonl"
        raise DataError(
            f"{path}: no train.jsonl in it, only {', '.join(there) or 'no .jsonl at all'}: rename the file with the "
            f"rows, or name it: {example}"
        )
    return found[0] if found else None


def read_rows(
    path: str | Path, *, skip_invalid: bool = False, ignore_keys: Collection[str] = ()
) -> tuple[list[Row], list[str]]:
    """Every row of a JSON Lines file in order, and one message for each row that was left out.

    skip_invalid: leave faulty rows out instead of raising.
    ignore_keys: keys of rows and messages that are left out instead of refused.
    Raises DataError: `file:line: what was found`, for the first faulty row; the file cannot be read or has no
    rows.
    """
    rows: list[Row] = []
    skipped: list[str] = []
    try:
        with open(path, "rb") as file:
            for number, line, complete in _lines(file):
                try:
                    rows.append(_parse(line, complete=complete, file=str(path), number=number, ignore=ignore_keys))
                except DataError as error:
                    if not skip_invalid:
                        raise
                    skipped.append(str(error))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    if not rows:
        why = f"all {len(skipped)} are invalid, the first: {skipped[0]}" if skipped else "it is empty"
        raise DataError(f"{path}: no rows, {why}: give it at least one, {SHAPES}")
    return rows, skipped


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes | None, bool]]:
    """(number, content, whether a line end closes it) of each line that is not blank.

    The content of a line that is too long is None: it is read over, not kept.
    """
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            while line and not line.endswith(b"\n"):
                line = file.readline(MAX_LINE_BYTES)
            yield number, None, True
            continue
        complete = line.endswith(b"\n")
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line.strip():
            yield number, line.strip(), complete


def _parse(line: bytes | None, *, complete: bool, file: str, number: int, ignore: Collection[str]) -> Row:
    try:
        if line is None:
            raise Fault(f"the line is longer than {MAX_LINE_BYTES >> 20} MiB: one row a line, split long documents")
        row = _decode(line, complete=complete)
        return Row(file=file, line=number, **fields_of(row, ignore=ignore))
    except Fault as fault:
        raise DataError(f"{file}:{number}: {fault}") from fault


def _decode(line: bytes, *, complete: bool) -> dict[str, Any]:
    try:
        row = json.loads(
            line.decode("utf-8"),
            object_pairs_hook=unique_keys,
            parse_constant=refuse_constant,
            parse_float=finite_number,
        )
    except UnicodeDecodeError as error:
        raise Fault(f"byte {error.start} of the line is not UTF-8: save the file as UTF-8") from error
    except RecursionError as error:
        raise Fault("nested too deeply: a row is one flat object") from error
    except ValueError as error:
        if not complete:
            raise Fault("the last line is cut off (no line end, no valid JSON): complete or remove it") from error
        raise Fault(f"not JSON ({error}): write one JSON object a line") from error
    if not isinstance(row, dict):
        raise Fault(f"got {kind_of(row)}, wanted an object: {SHAPES}")
    return row
