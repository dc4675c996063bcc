"""A saved model: loads here and in transformers with the same numbers, and appears whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from qlorag.models import WeightsError, load_model, load_tokenizer, save_model
from qlorag.models.files.folders import new_file


@torch.no_grad()
@pytest.mark.oracle
def test_round_trip_and_transformers(tiny_dir: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = load_model(tiny_dir, dtype=torch.float32)
    out = save_model(model, tmp_path / "out", source=tiny_dir, dtype=torch.float32)
    ids = torch.randint(3, 200, (1, 20))
    assert torch.equal(load_model(out, dtype=torch.float32)(ids), model(ids))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    torch.testing.assert_close(theirs(ids).logits, model(ids), atol=1e-5, rtol=0)
    messages = [{"role": "user", "content": "hi"}]
    their_ids = transformers.AutoTokenizer.from_pretrained(out).apply_chat_template(messages, return_dict=False)
    assert load_tokenizer(out).chat(messages, add_generation_prompt=False) == their_ids


def test_what_is_there_stays_there(tiny_dir: Path, tmp_path: Path) -> None:
    model = load_model(tiny_dir)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "diary.txt").write_text("dear")
    with pytest.raises(WeightsError, match="not empty"):
        save_model(model, tmp_path / "full", source=tiny_dir)
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["diary.txt"]
    with pytest.raises(WeightsError, match="merge and dequantize"):
        save_model(load_model(tiny_dir, quantize="nf4"), tmp_path / "packed", source=tiny_dir)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full"]


def test_a_failure_on_the_way_leaves_nothing(tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qlorag.models.files.save.shutil.copyfile", full)
    with pytest.raises(OSError, match="No space"):
        save_model(load_model(tiny_dir), tmp_path / "out", source=tiny_dir)
    assert list(tmp_path.iterdir()) == []


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "numbers.json"
    path.write_text("old")
    with pytest.raises(OSError, match="disk full"), new_file(path) as building:
        building.write_text("ne")
        assert path.read_text() == "old"
        raise OSError("disk full")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["numbers.json"]
    with new_file(path) as building:
        building.write_text("new")
    assert path.read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["numbers.json"]
