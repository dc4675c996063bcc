"""The benchmarks of single operations at tiny sizes, and that every operation of kernels/ has one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
NAMES = ("rms_norm", "rope", "swiglu", "lora", "cross_entropy")
TOKENS, FLOAT = 8, 4  # bytes


@pytest.fixture(scope="module")
def shared() -> Iterator[ModuleType]:
    """harness/operation.py; bench is no package, and its files import each other by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "bench"))
        patch.setattr(import_module("bench_cross_entropy"), "VOCABULARY", 512)
        yield import_module("harness.operation")


def made(shared: ModuleType, name: str, dtype: torch.dtype = torch.float32) -> Any:
    return import_module(f"bench_{name}").operation(shared.Inputs(TOKENS, dtype, CPU))


def test_every_operation_has_tests_and_a_benchmark_of_its_name() -> None:
    operations = {path.parent.name for path in (ROOT / "kernels").glob("*/reference.py")}
    assert operations == {"nf4", *NAMES}
    for name in operations:
        assert (ROOT / "bench" / f"bench_{name}.py").exists(), name
        assert [*(ROOT / "tests" / "kernels").glob(f"test_{name}*.py")], name


def test_make_bench_finds_them_and_the_readme_lists_them() -> None:
    command = [sys.executable, "-m", "bench.run_all", "--only", "layers"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stderr
    table = (ROOT / "bench" / "README.md").read_text()
    for path in (ROOT / "bench").glob("bench_*.py"):
        assert path.stem.removeprefix("bench_") in said.split("choose from")[1], "the choices of --only"
        assert path.name == "bench_demo.py" or f"| `{path.name}` |" in table


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_each_is_right_and_measured(name: str, dtype: torch.dtype, shared: ModuleType) -> None:
    operation = made(shared, name, dtype)
    rows = shared.measure(operation, 2, shared.wall)
    assert [row["candidate"] for row in rows[:2]] == ["qlorag", "torch autograd over the reference"]
    assert [row["candidate"] for row in rows[2:]] == [*operation.others]
    assert all(0 < row["ms_best"] <= row["ms"] for row in rows)
    assert [row["saved_bytes"] is None for row in rows] == [False, False] + [True] * len(operation.others)


def test_what_each_keeps(shared: ModuleType) -> None:
    width, hidden = shared.WIDTH, shared.HIDDEN
    kept = {
        "rms_norm": TOKENS * width + TOKENS,  # x, and a number per row
        "rope": 0,
        "swiglu": 2 * TOKENS * hidden,
        "lora": TOKENS * width + TOKENS * 8,  # x and z
        "cross_entropy": TOKENS * width,  # the gradient
    }
    for name, numbers in kept.items():
        operation = made(shared, name)
        assert shared.saved_bytes(operation.ours, operation.inputs, operation.constants) == FLOAT * numbers, name
    arithmetic = {name: made(shared, name).flop for name in NAMES}
    assert arithmetic == dict.fromkeys(NAMES, 0) | {
        "lora": 6 * TOKENS * 8 * (width + hidden),
        "cross_entropy": 4 * TOKENS * width * 512,
    }


def doubled(x: Tensor) -> Tensor:
    return 2 * x


def one_operation(shared: ModuleType, ours: Any, **more: Any) -> Any:
    return shared.Operation(ours=ours, plain=doubled, inputs=(torch.ones(10, requires_grad=True),), constants=0, **more)


def test_a_wrong_result_or_gradient_is_not_timed(shared: ModuleType) -> None:
    dy = torch.ones(10)
    shared.check(one_operation(shared, doubled), dy)
    for wrong, result in (
        (lambda x: 2.00001 * x, 0),
        (lambda x: 2 * x * float("nan"), 0),
        (lambda x: 2 + 0 * x, 1),  # right at 1, with no slope
    ):
        with pytest.raises(SystemExit, match=f"qlorag, result {result}: error .*a wrong result is not timed"):
            shared.check(one_operation(shared, wrong), dy)
        with pytest.raises(SystemExit, match=f"theirs, result {result}: error"):
            shared.check(one_operation(shared, doubled, others={"theirs": wrong}), dy)


def test_the_limit_is_the_slower_of_moving_and_multiplying(shared: ModuleType) -> None:
    dy, peaks = torch.ones(10), {"read_gb_per_s": 2.0, "float32_gflop_per_s": 4.0}
    limit = partial(shared.limit_seconds, dy=dy, peaks=peaks)
    moved = FLOAT * 10 * 5  # x, y, dy, dx, and x again, which a square keeps
    square = one_operation(shared, torch.square)
    assert limit(square, "float32") == pytest.approx(moved / 2e9)
    assert limit(one_operation(shared, torch.square, flop=1e6), "float32") == pytest.approx(1e6 / 4e9)
    assert limit(square, "float16") is None


@pytest.mark.deep
def test_from_the_command_line_to_the_table(tmp_path: Path, shared: ModuleType) -> None:
    found = {}
    for name in ("rope", "lora"):
        command = [sys.executable, str(ROOT / "bench" / f"bench_{name}.py"), "--tokens", "8", "--repeats", "2"]
        run = subprocess.run([*command, "--json", str(tmp_path / name)], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        assert run.stdout.count("\nqlorag ") == run.stdout.count("\ntorch autograd over the reference ") == 1
        found[name] = json.loads((tmp_path / name).read_text())
        ours = found[name]["rows"][0]
        assert ours["of_limit"] == pytest.approx(found[name]["limit_ms"] / ours["ms"])
    headlines = import_module("harness.summary").headlines
    (rope,) = headlines("rope", found["rope"])  # which keeps nothing to compare
    assert rope.what == "rope, 8 rows, bfloat16: ms" and rope.beside == found["rope"]["rows"][1]["ms"]
    time, kept = headlines("lora", found["lora"])
    assert kept.what == "lora, 8 rows, bfloat16: KiB kept" and kept.ours == kept.beside == (8 * 576 + 8 * 8) * 2 / 1024
    assert time.of_limit == found["lora"]["rows"][0]["of_limit"] and time.line()


def test_a_headline_is_beside_the_fastest_of_the_others(shared: ModuleType) -> None:
    rows = [
        {"candidate": name, "ms": ms, "saved_bytes": saved, "of_limit": 0.5}
        for name, ms, saved in (("qlorag", 3.0, 1024), ("reference", 4.0, 4096), ("theirs", 2.0, None))
    ]
    result = {"tokens": 8, "dtype": "float32", "rows": rows}
    time, kept = import_module("harness.summary").headlines("swiglu", result)
    assert (time.ours, time.beside, time.competitor) == (3.0, 2.0, "theirs")
    assert (kept.ours, kept.beside, kept.competitor) == (1.0, 4.0, "reference")
    assert import_module("harness.summary").headlines("layers", {"rows": []}) == []  # of an older results.json


def test_a_figure_that_is_gone_is_named(
    tmp_path: Path, shared: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tables = import_module("readme_tables")
    (tmp_path / "bench" / "nf4").mkdir(parents=True)
    for name in ("README.md", "bench/results.json", *(name for name, _ in tables.READING)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    tables.main()
    assert capsys.readouterr().err == ""
    results = json.loads((tmp_path / "bench" / "results.json").read_text())
    results["results"].pop("embed")
    (tmp_path / "bench" / "results.json").write_text(json.dumps(results))
    tables.main()
    gone = sorted(figure for figure in tables.figures((ROOT / "README.md").read_text()) if "embedding" in figure)
    assert gone and capsys.readouterr().err.splitlines() == [f"README.md no longer has: {figure}" for figure in gone]
    assert "embedding" not in (tmp_path / "README.md").read_text().split("measured:begin")[1].split("measured:end")[0]
