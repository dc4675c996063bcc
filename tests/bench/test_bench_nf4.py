"""bench_nf4.py and its parts at tiny sizes: what is measured is right, and the targets say what the figures say."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

BENCH = Path(__file__).parents[2] / "bench"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    """bench_nf4.py; bench is no package, and its files import each other by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        import bench_nf4

        yield bench_nf4


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """The benchmarks silence logging for their process, which here is that of all other tests."""
    yield
    logging.disable(logging.NOTSET)


class Event:
    """torch.cuda.Event on the CPU: time stands still between two flushes, and each call takes 2 ms."""

    clock = 0.0
    recorded: ClassVar[list[Event]] = []

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing, "an event that cannot be timed"

    def record(self) -> None:
        Event.clock += 2.0
        self.at = Event.clock
        Event.recorded.append(self)

    def elapsed_time(self, end: Event) -> float:
        return end.at - self.at


@pytest.fixture
def cuda(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What nf4/gpu.py asks of torch.cuda, answered by the CPU; the list says when the GPU was waited for."""
    waits: list[str] = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append("wait"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a processor")
    monkeypatch.setattr(bench.nf4.gpu, "DEVICE", "cpu")
    monkeypatch.setattr(sys.modules["harness.timing"], "FLUSH_BYTES", 1 << 12)
    small = bench.nf4.gpu.Sizes((256, 256), (512, 256), (1, 4), (16,), 64, 2)
    monkeypatch.setattr(bench.nf4.gpu, "SIZES", small)
    return waits


@pytest.mark.compiler
def test_dequantize_and_quantize_at_a_tiny_size(bench: ModuleType) -> None:
    rows = bench.nf4.cpu.dequantize([256, 256], ["bfloat16", "float32"], 64, 2)["rows"]
    assert len(rows) == 2 * 7
    for row in rows:
        moved = 256 * 256 * (0.5 + 1 / 64 + (2 if row["dtype"] == "bfloat16" else 4))
        assert row["gb_per_s"] == pytest.approx(moved / row["ms"] / 1e6)
    coded = bench.nf4.cpu.quantize([256, 256], ["float32"], 64, 2)["rows"]
    assert [row["candidate"] for row in coded] == ["qlorag C", "qlorag reference", "bitsandbytes"]


@pytest.mark.compiler
def test_a_wrong_result_is_not_timed(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = torch.ones(4, dtype=torch.float64)
    close, far = torch.full((4,), 1.125), torch.full((4,), 1.3125)
    check = sys.modules["harness.timing"].check_products
    assert check({"a": lambda: close, "b": lambda: close}, exact, "b") == {"a": 0.125, "b": 0.125}
    for wrong in (far, torch.full((4,), float("nan"))):
        with pytest.raises(SystemExit, match="a: error"):
            check({"a": lambda wrong=wrong: wrong, "b": lambda: close}, exact, "b")
    # bitsandbytes' C function, replaced by one that writes nothing
    monkeypatch.setattr(sys.modules["nf4.competitor"], "kernel", lambda *arguments: lambda: None)
    with pytest.raises(SystemExit, match=r"C kernel, reused out.*differs from the reference"):
        bench.nf4.cpu.dequantize([64, 64], ["float32"], 64, 2)


def test_every_candidate_of_the_products_is_there_and_close(bench: ModuleType) -> None:
    products = bench.nf4.products
    few = products.few_rows([(256, 256)], [1, 4], 2)
    names = {row["candidate"] for row in few}
    assert {"qlorag", "torch, dense weight", "bitsandbytes matmul_4bit"} <= names
    import bitsandbytes.functional as bnb

    assert ("bitsandbytes, repacked for inference" in names) == bool(bnb.has_avx512bf16())
    dense = {row["m"]: row["error"] for row in few if row["candidate"] == "torch, dense weight"}
    assert all(row["error"] <= 2 * dense[row["m"]] for row in few)
    many = products.many_rows((256, 512), [16], 2)
    assert [(r["direction"], r["n"], r["k"]) for r in many[::2]] == [("forward", 256, 512), ("backward", 256, 512)]


def test_part_of_a_large_weight_is_that_part(bench: ModuleType) -> None:
    weight = bench.nf4.products.Weight.of_random_codes((512, 256))
    whole = weight.dense(torch.float64)
    for first, count in ((0, 64), (128, 64), (448, 64), (64, 130)):
        assert torch.equal(weight.rows(first, count).dense(torch.float64), whole[first : first + count])
    row = bench.nf4.products.beyond_cache(512, 2, read_bytes=1 << 16)
    nbytes = 512 * 512 // 2 + 512 * 512 // 64 + 4 * 512 * 512 // 64 // 256
    assert row["gb_per_s"] == pytest.approx(nbytes / row["ms"] / 1e6)
    assert row["of_read"] == pytest.approx(row["gb_per_s"] / row["read_gb_per_s"])


def test_difficult_numbers_hold_exact_ties(bench: ModuleType) -> None:
    from qlorag.kernels.nf4.codebook import thresholds

    w = bench.nf4.cpu.difficult(64 * 8, torch.float32).view(-1, 64)
    scaled = w[::4] / w[::4].abs().amax(dim=1, keepdim=True)
    bounds = thresholds("nf4", CPU)[0]
    assert w.numel() == 512 and torch.isin(bounds, scaled).all()
    for dtype in (torch.bfloat16, torch.float16):
        assert bench.nf4.cpu.difficult(10_000, dtype).isfinite().all()


@pytest.mark.compiler
def test_exactness_counts_what_differs(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    dtypes = ["float32", "bfloat16", "float16"]
    for backend in ("c", "bitsandbytes"):
        found = bench.nf4.cpu.exactness(10_000, backend, dtypes)
        assert found["differ"] == dict.fromkeys(dtypes, 0) and found["values"] >= 10_000
    theirs = bench.nf4.cpu._theirs

    def spoilt(w: Tensor) -> tuple[Tensor, ...]:
        packed, *rest = theirs(w)
        packed[[3, 5, 8]] ^= 1
        return packed, *rest

    monkeypatch.setattr(bench.nf4.cpu, "_theirs", spoilt)
    assert bench.nf4.cpu.exactness(10_000, "bitsandbytes", ["float32"])["differ"] == {"float32": 3}


def test_what_autograd_saves_is_seen(bench: ModuleType) -> None:
    """The layer saves nothing but its buffers; a layer that keeps its decoded weight would be found out."""
    from qlorag.quant import QuantizedLinear, quantize

    memory = bench.nf4.memory
    layer = QuantizedLinear.from_quantized(quantize(torch.randn(64, 64)))
    x = torch.randn(memory.ROWS, 64)
    assert memory.step([layer], x)[0] == 0

    class Keeps(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x @ layer.dequantize().T

    assert memory.step([Keeps()], x)[0] >= 64 * 64 * 4
    found = memory.measure(256, 2)
    assert found["stored_bits"] == pytest.approx(4 + 8 / 64 + 32 / 64 / 256, abs=1e-3) and found["saved_bits"] == 0


def test_the_gpu_s_part_runs_on_any_device(bench: ModuleType, cuda: list[str], capsys: Any) -> None:
    Event.clock, Event.recorded = 0.0, []
    found = bench.nf4.gpu.job()
    assert {row["ms"] for part in ("dequantize", "quantize", "few_rows", "many_rows") for row in found[part]} == {2.0}
    assert len(Event.recorded) == 2 * len(cuda)  # each timed call is waited for, once
    assert found["gemm_tflop_per_s"] == pytest.approx(2 * 64**3 / 2e-3 / 1e12)
    copies = {row["dtype"]: row for row in found["dequantize"] if row["candidate"].startswith("copy")}
    assert {row["of_copy"] for row in copies.values()} == {1.0}
    assert found["copy_gb_per_s"] == copies["float32"]["gb_per_s"] > copies["bfloat16"]["gb_per_s"]
    ours = [row for row in found["few_rows"] if row["candidate"] == "qlorag"]
    assert all(row["of_copy"] == row["packed_gb_per_s"] / found["copy_gb_per_s"] for row in ours) and len(ours) == 4
    bench.show_gpu(found)
    assert "100% of a copy" in capsys.readouterr().out
    assert bench.nf4.targets.gpu_line({"gpu": found}).startswith("a processor: decoding to bfloat16 100%, one row ")


def test_the_flush_comes_before_the_clock(bench: ModuleType) -> None:
    order: list[str] = []

    class Flush:
        def zero_(self) -> None:
            order.append("flush")

    class Clock(Event):
        def record(self) -> None:
            order.append("record")
            super().record()

    def event() -> Event:
        return Clock(enable_timing=True)

    timer = sys.modules["harness.timing"].EventTimer(event, lambda: order.append("wait"), Flush())
    assert timer(lambda: order.append("call")) == pytest.approx(2e-3)
    assert order == ["flush", "record", "call", "record", "wait"]


def test_a_gpu_without_bitsandbytes_or_c(bench: ModuleType, cuda: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["nf4.competitor"], "why_not", lambda: "bitsandbytes does not import: no")
    monkeypatch.setattr(bench.nf4.products.nf4, "prepare_matmul", lambda *a, **k: None)
    found = bench.nf4.gpu.job()
    assert found["bitsandbytes"] == "bitsandbytes does not import: no"
    assert not any("bits" in row["candidate"] for part in ("dequantize", "few_rows") for row in found[part])


def test_on_a_machine_with_a_gpu(bench: ModuleType, cuda: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Which jobs are started there; what they do is tested above."""
    started: list[tuple[str, Any]] = []

    def run(script: str, job: Any, *, threads: int) -> dict[str, Any]:
        started.append((job.name, job.arguments.get("backend")))
        return bench.nf4.gpu.job() if job.name == "job" else {"backend": job.arguments["backend"]}

    monkeypatch.setattr(bench.child, "run", run)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [one["title"] for one in bench.exactness(64)] == ["C", "bitsandbytes on the CPU", "Triton"]
    assert bench.on_gpu()["device"] == "a processor"
    assert set(started[:3]) == {("exactness", "c"), ("exactness", "bitsandbytes"), ("exactness", "triton")}
    assert started[3:] == [("job", None)]


def test_without_a_gpu_triton_is_interpreted(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(script: str, job: Any, *, threads: int) -> dict[str, Any]:
        return {"job": job}

    monkeypatch.setattr(bench.child, "run", run)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(bench, "why_no_triton", lambda: None)
    *_, last = bench.exactness(64)
    assert last["job"].arguments == {"values": 64, "backend": "triton", "dtypes": ["float32"]}
    assert last["job"].env == {"TRITON_INTERPRET": "1"}
    monkeypatch.setattr(bench, "why_no_triton", lambda: "no triton")
    assert [one["title"] for one in bench.exactness(64)] == ["C", "bitsandbytes on the CPU"]
    assert bench.on_gpu() is None


def result() -> dict[str, Any]:
    """A result of bench_nf4.py with round figures."""
    one = {"n": 4096, "k": 4096, "threads": 1}
    decode = {"qlorag C, double-quantized, out=": 2.0, "bitsandbytes C kernel, reused out": 3.0,
              "bitsandbytes dequantize_4bit, as installed": 10.0}  # fmt: skip
    few = {(1, "qlorag"): 2.0, (4, "qlorag"): 5.0, (8, "qlorag"): 7.0, (1, "bitsandbytes matmul_4bit"): 30.0,
           (1, "bitsandbytes, repacked for inference"): 2.5}  # fmt: skip
    many = {(128, "qlorag"): 10.0, (128, "torch, dense weight"): 9.0, (512, "qlorag"): 10.0,
            (512, "torch, dense weight"): 9.0}  # fmt: skip
    rows = [one | {"dtype": "bfloat16", "candidate": name, "ms": ms, "gelem_per_s": 25 / ms}
            for name, ms in decode.items()]  # fmt: skip
    return {
        "rows": rows,
        "quantize": [one | {"dtype": "float32", "candidate": c, "ms": ms}
                     for c, ms in (("qlorag C", 1.0), ("bitsandbytes", 50.0))],
        "matmul": [one | {"m": m, "candidate": c, "ms": ms, "malloc": "tuned", "has_target": True}
                   for (m, c), ms in few.items()],
        "beyond_cache": [one | {"m": 1, "of_read": 0.8}],
        "many_rows": [one | {"m": m, "candidate": c, "ms": ms, "direction": "forward", "tflop_per_s": 1 / ms}
                      for (m, c), ms in many.items()],
        "exactness": [{"title": "C", "backend": "c", "values": 10**7, "differ": {"float32": 0, "bfloat16": 2}},
                      {"title": "b", "backend": "bitsandbytes", "values": 10**7, "differ": {"float32": 9}}],
        "memory": {"size": 4096, "stored_bits": 4.0, "saved_bits": 0.5, "resident_bits": 4.125,
                   "scratch_bytes": 1 << 25, "decoded_bytes": 1 << 25},
    }  # fmt: skip


def test_the_targets_by_hand(bench: ModuleType) -> None:
    found = bench.nf4.targets.targets(result())
    got = [(target.got, target.target, target.met) for target in found]
    assert got == [
        (12.5, 12.0, True), (1.5, 1.3, True), (5.0, 10, False),  # decode: 25/2, 3/2, 10/2
        (50.0, 20, True),
        (15.0, 10, True), (1.25, 10, False),  # one row beside each form of bitsandbytes: 30/2, 2.5/2
        (2.5, 2.2, False), (3.5, 4.0, True),  # 4 and 8 rows to one: 5/2, 7/2
        (80.0, 80, True),
        (90.0, 85.0, True), (90.0, 95.0, False),  # dense over ours: 9/10
        (2, 0, False),
        (4.5, 4.2, False), (4.125, 4.2, True),
    ]  # fmt: skip
    verdicts = [target.verdict for target in found]
    assert verdicts[2] == "missed by 50.0%" and verdicts[6] == "missed by 13.6%" and verdicts[11] == "missed by 2"
    assert verdicts[0] == "met" and bench.nf4.targets.table(found).count(" met") == sum(target.met for target in found)
    for target in found:
        entry = json.loads(json.dumps(target.as_dict()))
        assert {"work", "got", "target", "unit", "met"} <= entry.keys()
        assert bench.nf4.targets.Target.from_dict(entry) == target


def test_as_installed_has_the_higher_target(bench: ModuleType) -> None:
    rows = [row | {"malloc": "as installed"} for row in result()["matmul"]]
    found = bench.nf4.targets.targets({"matmul": rows})
    assert [(target.got, target.target) for target in found] == [(15.0, 40), (1.25, 40)]
    assert bench.nf4.targets.targets({"matmul": [row | {"has_target": False} for row in rows]}) == []


def test_headlines_stand_beside_the_best_form(bench: ModuleType) -> None:
    summary = pytest.importorskip("harness.summary")
    lines = {h.what: h for h in summary.headlines("nf4", result())}
    product = lines["NF4 product, 1 row, 4096x4096: per second"]
    assert (product.ours, product.beside) == (500, 400) and "repacked" in product.competitor
    assert lines["NF4 product, 512 rows, forward: TFLOP/s"].beside == pytest.approx(1 / 9)


def test_the_page_is_that_of_the_results(bench: ModuleType) -> None:
    committed = json.loads((BENCH / "results.json").read_text())
    written = (BENCH / "nf4" / "TARGETS.md").read_text()
    assert written == bench.nf4.targets.page(committed), "run: python bench/readme_tables.py"
    found = result() | {
        "targets": [target.as_dict() for target in bench.nf4.targets.targets(result())],
        "environment": {"cpu": "a processor", "kernel": "avx512", "torch": "2", "bitsandbytes": "0"},
    }
    page = bench.nf4.targets.page({"date": "2030-01-31T", "commit": "abc", "results": {"nf4": found}})
    assert "8 of 14 met" in page and page.count("| met |") == 8 and page.count("| missed by") == 6
    assert "| 12.5 Gelem/s | ≥ 12 | met |" in page and "not per layer: 32 MiB. A weight decoded to 32 MiB" in page
    assert page.endswith("GPU speed: not measured.\n")
    missed = [line.split(" | ")[0].removeprefix("| ") for line in page.splitlines() if "| missed by" in line]
    reasons = sys.modules["nf4.reasons"].REASONS
    told = {r.what for r in reasons if f"- **{r.what}.** {r.why}" in page}
    assert told == {r.what for r in reasons if any(map(r.fits, missed))} and told


def test_every_missed_target_has_a_reason(bench: ModuleType) -> None:
    """In the committed results; what is wrong or too large has none, and would fail here."""
    committed = json.loads((BENCH / "results.json").read_text())["results"]["nf4"]
    targets = [bench.nf4.targets.Target.from_dict(entry) for entry in committed["targets"]]
    for target in targets:
        if not target.met:
            assert any(reason.fits(target.work) for reason in sys.modules["nf4.reasons"].REASONS), target.work


@pytest.mark.oracle
@pytest.mark.deep
def test_the_whole_of_it_runs(bench: ModuleType, tmp_path: Path) -> None:
    """Every part, in its own process, as the command line starts it; at sizes where the figures mean nothing."""
    import subprocess

    command = [sys.executable, str(BENCH / "bench_nf4.py"), "--small", "--repeats", "2", "--json", str(tmp_path / "r")]
    run = subprocess.run([*command, "--only", "few", "crossover", "memory"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    told = json.loads((tmp_path / "r").read_text())
    assert [bench.nf4.targets.Target.from_dict(entry) for entry in told["targets"]] == bench.nf4.targets.targets(told)
    assert {entry["work"] for entry in told["targets"]} and f"of {len(told['targets'])} met" in run.stdout
    sizes = {(row["n"], row["k"]): row["has_target"] for row in told["matmul"]}
    assert sizes == {(256, 256): True, (512, 256): True} | dict.fromkeys(bench.SMOLLM2, False)
    variants = [(level, dtype) for level, dtype, _ in bench.nf4.crossover.variants()]
    assert len(variants) >= 3
    assert [(row["level"], row["dtype"], row["m"]) for row in told["crossover"]] == [
        (level, dtype, m) for level, dtype in variants for m in (4, 8)
    ]
    for row in told["crossover"]:
        assert row["times_as_fast"] == row["decoded_ms"] / row["fused_ms"] > 0


def test_the_table_of_crossovers(bench: ModuleType) -> None:
    row = {"level": "amx", "n": 8, "k": 64, "dtype": "float32"}
    rows = [row | {"m": 4, "times_as_fast": 2.0}, row | {"m": 16, "times_as_fast": 0.5}]
    rows += [r | {"dtype": "bfloat16", "times_as_fast": 3.0} for r in rows]
    head, first, second = bench.nf4.crossover.table(rows).splitlines()
    assert head.split() == ["4", "16", "fused", "up", "to"]
    assert first == "float32, amx, [m, 64] x [8, 64]ᵀ               2.00   0.50            64"
    assert second.split()[-3:] == ["3.00", "3.00", "any"]
