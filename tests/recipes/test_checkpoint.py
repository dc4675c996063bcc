"""Checkpoints: what is written, what is read back, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from qlorag.lora import LoRAConfig, attach
from qlorag.models import load_model
from qlorag.recipes.data.examples import Example
from qlorag.recipes.errors import TrainingError
from qlorag.recipes.training.checkpoint import checkpoints, read_state, restore_optimizer, save_checkpoint
from qlorag.recipes.training.trainer import Trainer, TrainSettings
from safetensors import SafetensorError, safe_open

EXAMPLES = [Example([5, 6, 7, 8, 9], [False, False, True, True, True], line) for line in (1, 2)]
SETTINGS = {"iters": 9, "lora": {"r": 2}}


def trainer_on(model_dir: Path) -> Trainer:
    model = load_model(model_dir, dtype=torch.float32)
    attach(model, LoRAConfig(r=2, alpha=4), seed=1)
    return Trainer(model, EXAMPLES, TrainSettings(iters=9, batch_size=1))


def save(trainer: Trainer, folder: Path, *, keep: int = 9, settings: dict[str, Any] = SETTINGS) -> Path:
    def write_adapter(building: Path) -> None:
        (building / "adapter").write_text("here")

    return save_checkpoint(trainer, folder, settings=settings, save_adapter=write_adapter, keep=keep)


def test_updates_are_counted_apart_from_steps(tiny_dir: Path, tmp_path: Path) -> None:
    """Two steps of which the first was not finite are one update. Adam's bias correction, 1 - b1^t, counts updates:
    resumed with t = 2 the next step would be about half as long."""
    trainer = trainer_on(tiny_dir)
    norm = trainer.model.model.norm.weight
    good = norm[0].item()
    with torch.no_grad():
        norm[0] = float("nan")
    assert trainer.take_step().skipped
    with torch.no_grad():
        norm[0] = good
    assert not trainer.take_step().skipped
    folder = save(trainer, tmp_path)
    assert folder == tmp_path / "checkpoints" / "step-0000002"
    with safe_open(folder / "optimizer.safetensors", framework="pt") as file:
        assert file.metadata() == {"updates": "1"}

    resumed = trainer_on(tiny_dir)
    for name, p in resumed.parameters.items():
        p.data.copy_(trainer.parameters[name].data)
    restore_optimizer(resumed, folder, step=read_state(folder, settings=SETTINGS))
    assert (resumed.step, resumed.optimizer.steps) == (2, 1)
    assert resumed.take_step().loss == trainer.take_step().loss
    assert all(torch.equal(p, trainer.parameters[name]) for name, p in resumed.parameters.items())


def test_what_a_checkpoint_holds(tiny_dir: Path, tmp_path: Path) -> None:
    trainer = trainer_on(tiny_dir)
    trainer.take_step()
    folder = save(trainer, tmp_path / "new" / "run")
    assert sorted(p.name for p in folder.iterdir()) == ["adapter", "optimizer.safetensors", "trainer.json"]
    assert json.loads((folder / "trainer.json").read_text()) == {"step": 1, "settings": SETTINGS}
    assert [p.name for p in folder.parent.iterdir()] == ["step-0000001"]  # nothing half made stays


def test_a_full_disk_keeps_what_was_there(tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """safetensors reports a full disk by an error of its own, which is no OSError."""
    from qlorag.recipes.training import checkpoint

    trainer = trainer_on(tiny_dir)
    old = save(trainer, tmp_path)

    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", full)
    trainer.step = 1
    with pytest.raises(TrainingError) as error:
        save(trainer, tmp_path)
    assert str(error.value) == (
        f"{old.parent / 'step-0000001'}: cannot be written (I/O error: No space left on device (os error 28)): "
        "older checkpoints are kept"
    )
    assert list(old.parent.iterdir()) == [old] and read_state(old, settings=SETTINGS) == 0


def test_the_newest_are_kept_and_the_same_step_is_written_again(tiny_dir: Path, tmp_path: Path) -> None:
    trainer = trainer_on(tiny_dir)
    for trainer.step in (8, 9, 10, 1000, 10):  # sorted as numbers, since the names have leading zeros
        save(trainer, tmp_path, keep=2)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-0000010", "step-0001000"]


def test_only_whole_checkpoints_are_listed(tmp_path: Path) -> None:
    assert checkpoints(tmp_path) == []
    for name in ("step-0000002", "step-0000010", ".step-0000011", "step-12", "step-0000003.old", "other"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-0000002", "step-0000010"]


@pytest.mark.parametrize(
    ("now", "shown"),
    [
        ({"iters": 8, "lora": {"r": 2}}, r"iters was 9 and is 8: use the old"),
        ({"iters": 9, "lora": {"r": 4}}, r"lora was \{'r': 2\} and is \{'r': 4\}:"),
        ({"iters": 9}, r"lora was \{'r': 2\} and is None:"),
        ({**SETTINGS, "seed": 1}, r"seed was None and is 1:"),
        ({"iters": 1, "lora": 2}, r"iters was 9 and is 1; lora was \{'r': 2\} and is 2:"),
    ],
)
def test_other_settings_are_refused_and_shown(now: dict[str, Any], shown: str, tiny_dir: Path, tmp_path: Path) -> None:
    folder = save(trainer_on(tiny_dir), tmp_path)
    assert read_state(folder, settings=dict(SETTINGS)) == 0
    with pytest.raises(TrainingError, match=rf"trainer\.json: cannot resume with other settings: {shown}"):
        read_state(folder, settings=now)


def test_a_finished_run_goes_on_with_more_steps_and_nothing_else_changed(tiny_dir: Path, tmp_path: Path) -> None:
    trainer = trainer_on(tiny_dir)
    trainer.step = 9
    folder = save(trainer, tmp_path)
    assert read_state(folder, settings={**SETTINGS, "iters": 10}) == 9
    with pytest.raises(TrainingError) as error:
        read_state(folder, settings=SETTINGS)
    assert str(error.value) == f"{folder}: all 9 steps are taken: give a larger --iters to train on"
    with pytest.raises(TrainingError, match=r"other settings: lora was \{'r': 2\} and is None: use"):
        read_state(folder, settings={"iters": 10})


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"step": "x", "settings": {}}', '{"step": 1, "settings": 2}'])
def test_a_state_that_is_none_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "trainer.json").write_text(text)
    with pytest.raises(TrainingError, match=r"trainer\.json: not a checkpoint's state \(.+\): remove"):
        read_state(tmp_path, settings={})
    with pytest.raises(TrainingError, match="not a checkpoint's state"):
        read_state(tmp_path / "nowhere", settings={})


def test_moments_that_cannot_be_used_are_named_and_change_nothing(tiny_dir: Path, tmp_path: Path) -> None:
    trainer = trainer_on(tiny_dir)
    trainer.take_step()
    folder = save(trainer, tmp_path)
    fresh = trainer_on(tiny_dir)
    before = {name: t.clone() for name, t in fresh.optimizer.state_dict().items()}
    path = folder / "optimizer.safetensors"
    whole = path.read_bytes()
    from safetensors.torch import load_file, save_file

    state = load_file(path)
    for damage in ("missing", "cut", "no count", "another shape", "one missing"):
        path.unlink(missing_ok=True)
        if damage == "cut":
            path.write_bytes(whole[:-1])
        elif damage == "no count":
            save_file(state, path)
        elif damage != "missing":
            name, *others = state
            kept = {n: state[n] for n in others}
            save_file(
                kept if damage == "one missing" else {**kept, name: state[name][:1].clone()}, path, {"updates": "1"}
            )
        with pytest.raises(TrainingError, match=r"optimizer\.safetensors: cannot be read \(.+\): remove"):
            restore_optimizer(fresh, folder, step=1)
        assert (fresh.step, fresh.optimizer.steps) == (0, 0), damage
        assert all(torch.equal(before[name], t) for name, t in fresh.optimizer.state_dict().items()), damage
