"""`qlorag export`, and `inspect` on what it wrote: a 4-bit folder is a model like any other to every verb."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from qlorag.models import Checkpoint, load_model
from qlorag.recipes.cli.main import main
from qlorag.recipes.inspection.model import stored_facts

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")


@pytest.fixture(scope="module")
def exported(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "nf4"
    flags = ["--quantize", "nf4", "--format", "bnb", "--dtype", "float32", "--save-path", str(out)]
    assert main(["export", "--model", str(tiny_dir), *flags]) == 0
    return out


def said(capsys: Capture, status: int, *argv: object) -> tuple[str, str]:
    capsys.readouterr()
    assert main([str(a) for a in argv]) == status, capsys.readouterr()
    out = capsys.readouterr()
    return out.out, out.err


def result(capsys: Capture, *argv: object) -> dict[str, Any]:
    out, _ = said(capsys, 0, *argv, "--json")
    value: dict[str, Any] = json.loads(out)
    return value


@torch.no_grad()
def test_the_exported_folder_is_what_quantize_holds(
    exported: Path, tiny_dir: Path, capsys: Capture, tmp_path: Path
) -> None:
    ids = torch.arange(3, 43)[None]
    quantized = load_model(tiny_dir, quantize="nf4", dtype=torch.float32)
    assert torch.equal(load_model(exported, dtype=torch.float32)(ids), quantized(ids))
    answers = [
        result(capsys, "generate", "--model", model, "--prompt", "x", "--max-tokens", "8", *flags)["text"]
        for model, flags in ((exported, ()), (exported, ("--quantize", "nf4")), (tiny_dir, ("--quantize", "nf4")))
    ]
    assert len(set(answers)) == 1
    report = result(capsys, "export", "--model", exported, "--format", "bnb", "--dtype", "float32", "--save-path",
                    tmp_path / "again")  # fmt: skip
    assert report["layers"] == 21 and 4 < report["bits_per_weight"] < 5
    assert report["nbytes"] == sum(p.stat().st_size for p in exported.iterdir())
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (exported / name).read_bytes()


def test_inspect_counts_the_bits_of_a_4_bit_folder(exported: Path, tiny_dir: Path, capsys: Capture) -> None:
    dense, packed = result(capsys, "inspect", tiny_dir), result(capsys, "inspect", exported)
    assert packed["parameters"] == dense["parameters"] and "kinds" not in dense
    assert packed["dtypes"].keys() == {"nf4", "F32"} and sum(packed["dtypes"].values()) == packed["parameters"]
    kinds = {k["kind"]: k for k in packed["kinds"]}
    # q_proj [64, 64]: 2048 bytes of codes, 64 of scales, 4 of their scale and 4 of their mean.
    assert kinds["q_proj"]["stored"] == "nf4" and kinds["q_proj"]["tensors"] == 3
    assert kinds["q_proj"]["bits_per_weight"] == pytest.approx(8 * (2048 + 64 + 8) / 4096)
    assert kinds["embed_tokens"]["bits_per_weight"] == 32 and kinds["input_layernorm"]["stored"] == "F32"
    assert all(k["error"] is None for k in packed["kinds"])
    # What is read off headers is what the layers hold in memory.
    model = load_model(exported)
    for fact in stored_facts(Checkpoint(exported)):
        if fact.packed:
            q = model.get_submodule(fact.name.removesuffix(".weight")).quantized
            assert (fact.nbytes, fact.parameters, fact.bits) == (q.nbytes, q.numel, q.bits_per_weight)
    out, _ = said(capsys, 0, "inspect", exported, "--tensors")
    assert "model.layers.2.mlp.down_proj.weight" in out and "q_proj" in out and "4.141" in out


def test_inspect_measures_the_error_of_quantizing(tiny_dir: Path, capsys: Capture) -> None:
    value = result(capsys, "inspect", tiny_dir, "--quantize", "nf4", "--tensors")
    tensors = {t["name"]: t for t in value["tensors"]}
    dense, packed = load_model(tiny_dir, dtype=torch.float32), load_model(tiny_dir, quantize="nf4")
    errors = []
    for name, parameter in dense.named_parameters():
        row, path = tensors[name], name.removesuffix(".weight")
        if not path.endswith("_proj"):
            assert row["error"] is None and row["bits_per_weight"] == 16 and row["stored"] == "BF16"
            continue
        w = parameter.double()
        wanted = float((packed.get_submodule(path).dequantize(torch.float32).double() - w).norm() / w.norm())
        assert row["error"] == pytest.approx(wanted, rel=1e-4) and row["stored"] == "nf4"
        errors.append((wanted**2, w.numel()))
    assert len(errors) == 21
    mean = (sum(e * n for e, n in errors) / sum(n for _, n in errors)) ** 0.5
    assert value["error"] == pytest.approx(mean, rel=1e-4)
    assert 0.05 < mean < 0.1  # uniform weights, which NF4 is not made for, but also not far from
    fp4 = result(capsys, "inspect", tiny_dir, "--quantize", "fp4")
    assert fp4["error"] > value["error"] and "tensors" not in fp4
    listed = result(capsys, "inspect", tiny_dir, "--tensors")["tensors"]
    assert all(t["error"] is None and t["bits_per_weight"] == 32 for t in listed) and len(listed) == len(tensors)


def test_train_on_a_4_bit_folder_then_fuse(exported: Path, capsys: Capture, tmp_path: Path) -> None:
    """The adapter remembers its base as nf4, fits that folder only, and fusing makes an ordinary dense folder."""
    (tmp_path / "data").mkdir()
    row = {"prompt": "say yes", "completion": "yes"}
    (tmp_path / "data" / "train.jsonl").write_text((json.dumps(row) + "\n") * 2)
    adapter, fused = tmp_path / "adapter", tmp_path / "fused"
    before = exported.joinpath("model.safetensors").read_bytes()
    said(capsys, 0, "train", "--model", exported, "--data", tmp_path / "data", "--iters", "2", "--batch-size", "1",
         "--adapter-path", adapter, "--dtype", "float32", "--learning-rate", "0.01")  # fmt: skip
    assert exported.joinpath("model.safetensors").read_bytes() == before
    assert result(capsys, "inspect", adapter)["quantize"] == {"kind": "nf4"}
    flags = ("--adapter-path", adapter, "--dtype", "float32")
    adapted = result(capsys, "generate", "--model", exported, "--prompt", "x", "--max-tokens", "8", *flags)
    value = result(capsys, "fuse", "--model", exported, "--save-path", fused, *flags)
    assert value["quantize"] == "nf4" and len(value["layers"]) == 21
    assert "quantization_config" not in json.loads((fused / "config.json").read_text())
    alone = result(capsys, "generate", "--model", fused, "--prompt", "x", "--max-tokens", "8", "--dtype", "float32")
    assert alone["text"] == adapted["text"]


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [
        (["--model", "EXPORTED", "--save-path", "EXPORTED"], "already there and not empty"),
        (["--model", "EXPORTED", "--save-path", "OUT", "--quantize", "fp4"], "is stored as nf4"),
        (["--model", "TINY", "--save-path", "OUT", "--block-size", "48"], "block_size=48: use one of 32"),
        (["--model", "TINY", "--save-path", "OUT", "--dtype", "int8"], "--dtype int8: wanted auto"),
        (["--model", "nowhere", "--save-path", "OUT"], "nowhere"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(
    argv: list[str], wanted: str, exported: Path, tiny_dir: Path, capsys: Capture, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    names = {"TINY": str(tiny_dir), "EXPORTED": str(exported)}
    _, err = said(capsys, 1, "export", "--format", "bnb", *(names.get(a, a) for a in argv))
    assert err.startswith("qlorag: error: ") and err.count("\n") == 1 and wanted in err
    assert list(tmp_path.iterdir()) == []
