"""Checkpoints from which a run goes on as if it had never stopped.

    ADAPTER_PATH/checkpoints/step-0000050/
        adapter_config.json, adapter_model.safetensors   the adapter, as PEFT reads it
        optimizer.safetensors                            AdamW's two moments: float32, or 8-bit codes and scales
        trainer.json                                     step, and the settings the run was started with

A checkpoint is written into a hidden folder beside its place and renamed when every file in it is on disk. A folder
named step-* is therefore complete; whatever a killed process left hidden is removed by the next one. No pickle.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from ...models.files.folders import new_folder
from ..errors import TrainingError
from .trainer import Trainer

FOLDER = "checkpoints"
_NAME = re.compile(r"step-(\d{7})")


def save_checkpoint(
    trainer: Trainer, adapter_path: Path, *, settings: dict[str, Any], save_adapter: Callable[[Path], None], keep: int
) -> Path:
    """Writes the trainer's state, then removes all but the newest `keep` checkpoints. Returns the new folder.

    settings: what must be equal when the run is resumed, as JSON types.  save_adapter: writes the adapter into the
    folder it is given.
    """
    parent = adapter_path / FOLDER
    parent.mkdir(parents=True, exist_ok=True)
    target = parent / f"step-{trainer.step:07d}"
    with new_folder(target) as building:
        save_adapter(building)
        # The number of updates is not the step: a step that was not finite made none.
        updates = {"updates": str(trainer.optimizer.steps)}
        try:
            save_file(trainer.optimizer.state_dict(), building / "optimizer.safetensors", metadata=updates)
        except SafetensorError as fault:  # its own type, also for a full disk
            raise TrainingError(f"{target}: cannot be written ({fault}): older checkpoints are kept") from None
        (building / "trainer.json").write_text(
            json.dumps({"step": trainer.step, "settings": settings}, indent=2) + "\n", encoding="utf-8"
        )
        if target.exists():  # the same step again, after a resume: equal bits, so the old one may go
            shutil.rmtree(target)
    for old in checkpoints(adapter_path)[:-keep]:
        shutil.rmtree(old)
    return target


def checkpoints(adapter_path: Path) -> list[Path]:
    """The complete checkpoints, oldest first."""
    parent = adapter_path / FOLDER
    return sorted(p for p in parent.glob("step-*") if _NAME.fullmatch(p.name)) if parent.is_dir() else []


def read_state(folder: Path, *, settings: dict[str, Any]) -> int:
    """The step of a checkpoint. More iters than before are fine: the run goes on.

    Raises TrainingError: it is damaged, or was made with other settings (shown), or there is no step left to take.
    """
    path = folder / "trainer.json"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        step, old = int(state["step"]), dict(state["settings"])
    except (OSError, ValueError, KeyError, TypeError) as fault:
        raise TrainingError(f"{path}: not a checkpoint's state ({fault}): remove {folder} and resume again") from None
    changed = [
        f"{key} was {old.get(key)!r} and is {settings.get(key)!r}"
        for key in sorted({*old, *settings})
        if old.get(key) != settings.get(key) and not (key == "iters" and settings["iters"] > old.get(key, 0))
    ]
    if changed:
        raise TrainingError(f"{path}: cannot resume with other settings: {'; '.join(changed)}: use the old ones")
    if step >= settings["iters"]:
        raise TrainingError(f"{folder}: all {step} steps are taken: give a larger --iters to train on")
    return step


def restore_optimizer(trainer: Trainer, folder: Path, *, step: int) -> None:
    """Puts the moments back. Raises TrainingError: they are damaged or do not belong to these parameters."""
    path = folder / "optimizer.safetensors"
    try:
        with safe_open(path, framework="pt") as file:
            updates = int((file.metadata() or {})["updates"])
        trainer.optimizer.load_state_dict(load_file(path), steps=updates)
    except (SafetensorError, OSError, ValueError, KeyError) as fault:
        raise TrainingError(f"{path}: cannot be read ({fault}): remove {folder} and resume again") from None
    trainer.step = step
