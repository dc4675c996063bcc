"""The tokens at which generation stops, kept beside an adapter or a model in generation_config.json.

Training may teach an end that the base's files do not name: Qwen's base models stop at "<|endoftext|>", and their chat
template ends a turn with "<|im_end|>". An adapter trained on such turns would write on into the next turn.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ...models.files.folders import new_file
from ..errors import UsageError

NAME = "generation_config.json"


def read_end_ids(folder: Path) -> tuple[int, ...]:
    """The end tokens that a folder names; () if it names none. Raises UsageError: the file is malformed."""
    value = _read(folder / NAME).get("eos_token_id", [])
    ids = value if isinstance(value, list) else [value]
    if any(type(i) is not int or i < 0 for i in ids):
        raise UsageError(f"{folder / NAME}: eos_token_id is {value!r:.60}, wanted token ids")
    return tuple(ids)


def write_end_ids(folder: Path, ids: Iterable[int]) -> None:
    """Names the end tokens in a folder's generation_config.json, whose other settings stay; writes nothing for none."""
    wanted = sorted(set(ids))
    if wanted:
        config = {**_read(folder / NAME), "eos_token_id": wanted[0] if len(wanted) == 1 else wanted}
        with new_file(folder / NAME) as building:
            building.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _read(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as fault:
        raise UsageError(f"{path}: not JSON ({fault}): write it again, or remove it") from None
    if not isinstance(config, dict):
        raise UsageError(f"{path}: holds a JSON {type(config).__name__}, wanted an object")
    return config
