"""The flags of a training run, kept in its folder so that `--resume` needs none repeated.

    ADAPTER_PATH/run.json    {"flags": {"model": ..., "data": ..., "rank": 8, ...}, "now": "2026-11-28T18:20:00"}

A flag given again must say the same, but for --iters, which may grow, and for what only decides what is printed or
kept. `now` is the time that chat templates print (Llama 3.1 and 3.2 print the date): a run that goes on tomorrow has
the same rows.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from ..errors import TrainingError

NAME = "run.json"
# What may differ when a run goes on: it changes neither rows nor numbers.
FREE = frozenset((
    "verb", "run", "given", "config", "json", "debug", "resume", "overwrite", "show_mask", "train", "adapter_path",
    "steps_per_report", "steps_per_eval", "save_every", "keep",
))  # fmt: skip


def save_flags(folder: Path, flags: Mapping[str, Any], now: datetime) -> None:
    """Writes the flags of a run, as JSON types."""
    from ...models.files.folders import new_file

    with new_file(folder / NAME) as building:
        kept = {name: value for name, value in flags.items() if name not in FREE}
        record = {"flags": kept, "now": now.isoformat()}
        building.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def resumed_flags(
    folder: Path, flags: Mapping[str, Any], *, given: Collection[str]
) -> tuple[dict[str, Any], datetime | None]:
    """`flags` completed by those that the run in `folder` was started with, and the time that it keeps.

    given: the names of those that the user gave now; the others are defaults.
    Raises TrainingError: the record is damaged, or a flag given now contradicts it.
    """
    path = folder / NAME
    if not path.exists():  # of a run before this record was kept: every flag has to be given again
        return dict(flags), None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        old, now = dict(record["flags"]), datetime.fromisoformat(record["now"])
    except (OSError, ValueError, KeyError, TypeError) as fault:
        raise TrainingError(f"{path}: not a run's record ({fault}): remove it and give every flag again") from None
    complete = dict(flags)
    for name in old.keys() & flags.keys() - FREE:
        if name not in given:
            complete[name] = old[name]
        elif flags[name] != old[name] and not (name == "iters" and flags[name] > old[name]):
            raise TrainingError(
                f"{path}: the run was started with --{name.replace('_', '-')} {_shown(old[name])}, and "
                f"{_shown(flags[name])} is given: leave the flag out, or start another run in another --adapter-path"
            )
    return complete, now


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
