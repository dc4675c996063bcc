"""The comparison of quantizers: its measures by hand, its order on real weights, a page that says what was found."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

BENCH = Path(__file__).parents[2] / "bench"
QUANTIZERS = BENCH / "quantizers"


@pytest.fixture(scope="module")
def quantizers() -> Iterator[ModuleType]:
    """bench/quantizers/measure.py; bench is no package, and its files import each other by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        yield import_module("quantizers.measure")


@pytest.fixture(scope="module")
def rendered(quantizers: ModuleType) -> ModuleType:
    """bench/quantizers/page.py."""
    return import_module("quantizers.page")


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((QUANTIZERS / "quantizers.json").read_text())
    return found


@pytest.fixture(scope="module")
def weights(quantizers: ModuleType, minilm_dir: Path) -> list[Tensor]:
    from qlorag.models import load_encoder

    return [layer.weight.detach() for layer in quantizers.linears(load_encoder(minilm_dir, dtype=torch.float32))]


def test_the_error_measures_by_hand(quantizers: ModuleType) -> None:
    sums = quantizers.Sums(4)
    # Two blocks: errors 0 0 1 0 over 3 4 0 0, so 1 of 25; none over zeros.
    w = torch.tensor([[3.0, 4.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    sums.add(w, quantizers.Stored(w + torch.tensor([[0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]]), 5))
    assert sums.result() == {"bits": 5.0, "rms_error": 0.2, "worst_block": 0.2}
    # One more block: errors 0.5 0.5 0.5 0.5 over 1 1 1 1, so 1 of 4, and 2 of 29 in all.
    ones = torch.ones(4)
    sums.add(ones, quantizers.Stored(ones - 0.5, 4))
    assert sums.result() == {"bits": 8 * 9 / 12, "rms_error": pytest.approx(math.sqrt(2 / 29)), "worst_block": 0.5}
    # Zeros that do not come back as zeros have no finite relative error.
    sums.add(torch.zeros(4), quantizers.Stored(ones, 4))
    assert sums.result()["worst_block"] == math.inf


def test_cosines_by_hand(quantizers: ModuleType) -> None:
    a = torch.tensor([[1.0, 0.0], [3.0, 4.0]])
    b = torch.tensor([[2.0, 0.0], [4.0, 3.0]])
    assert quantizers.cosines(a, b) == {"cosine_mean": pytest.approx(0.98), "cosine_min": pytest.approx(0.96)}


def test_affine_by_hand(quantizers: ModuleType) -> None:
    w = torch.tensor([[0.0, 15.0, 7.4, 2.6], [5.0, 5.0, 5.0, 5.0]])
    for dtype, each in ((torch.float16, 2), (torch.float32, 4)):
        weight, size = quantizers.affine(dtype)(w, 4)
        # Steps of 1 from 0, so 7.4 becomes 7 and 2.6 becomes 3; equal weights are their own least value.
        assert weight.tolist() == [[0.0, 15.0, 7.0, 3.0], [5.0, 5.0, 5.0, 5.0]]
        assert size == 8 // 2 + 2 * 2 * each  # codes, then scale and low of two blocks


def test_affine_uses_the_scale_that_is_stored(quantizers: ModuleType) -> None:
    """A range of 0.1 / 15 a step is none of float16's numbers: codes have to fit the rounded one."""
    w = torch.linspace(-0.03, 0.07, 64)[None]
    weight, _ = quantizers.affine(torch.float16)(w, 64)
    low, scale = torch.tensor(-0.03).half().float(), torch.tensor(0.1 / 15).half().float()
    assert scale.item() != pytest.approx(0.1 / 15, rel=1e-5)
    codes = (weight - low) / scale
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-4)
    assert codes.round().int().unique().tolist() == list(range(16))
    assert (weight - w).abs().max() <= scale / 2 * 1.01


def test_our_quantizers_are_the_project_s(quantizers: ModuleType) -> None:
    from qlorag.quant import dequantize, quantize

    w = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    for name, kind, double_quant in (("nf4", "nf4", False), ("fp4 + dq", "fp4", True)):
        q = quantize(w, kind=kind, block_size=32, double_quant=double_quant)
        weight, size = quantizers.QUANTIZERS[name](w, 32)
        assert torch.equal(weight, dequantize(q)) and size == q.nbytes


@pytest.mark.model
def test_order_and_bits_on_real_weights(quantizers: ModuleType, weights: list[Tensor], result: dict[str, Any]) -> None:
    """NF4 errs less than FP4 at every block size; and the committed figures are what these weights give."""
    stored = {(row["name"], row["block_size"]): row for row in result["rows"]}
    assert result["weights"] == sum(w.numel() for w in weights)
    for size in (64, 256):
        found = {name: quantizers.weight_errors(weights, name, size)[0] for name in ("nf4", "nf4 + dq", "fp4")}
        assert found["nf4"]["rms_error"] < found["nf4 + dq"]["rms_error"] < found["fp4"]["rms_error"]
        assert found["nf4"]["bits"] == 4 + 32 / size
        # One nested scale to 256 blocks, and a mean to each matrix.
        assert found["nf4 + dq"]["bits"] == pytest.approx(4 + 8 / size + 32 / (256 * size), rel=1e-4)
        for name, errors in found.items():
            committed = {key: stored[name, size][key] for key in errors}
            assert errors == pytest.approx(committed, rel=1e-6), MEASURE
    assert all(stored["nf4", n]["rms_error"] < stored["fp4", n]["rms_error"] for n in quantizers.BLOCK_SIZES)


@pytest.mark.model
def test_one_committed_cosine_is_found_again(quantizers: ModuleType, minilm_dir: Path, result: dict[str, Any]) -> None:
    """On another version of Python the manual, and so the texts, are others: then the figure is only near."""
    (row,) = quantizers.measure(minilm_dir, ["nf4 + dq"], [64])["rows"]
    (committed,) = (r for r in result["rows"] if (r["name"], r["block_size"]) == ("nf4 + dq", 64))
    assert row["cosine_mean"] == pytest.approx(committed["cosine_mean"], abs=5e-3)
    assert row["cosine_min"] <= row["cosine_mean"] < 1


def test_texts_are_many_and_all_different(quantizers: ModuleType) -> None:
    sample = quantizers.texts()
    assert len(set(sample)) == len(sample) == 100 and sample == quantizers.texts()


MEASURE = "run: python bench/quantizers/measure.py --out bench/quantizers"
RENDER = "run: python bench/quantizers/measure.py --from bench/quantizers/quantizers.json --out bench/quantizers"


def test_the_page_and_the_picture_are_those_of_the_results(rendered: ModuleType, result: dict[str, Any]) -> None:
    page, picture = ((QUANTIZERS / name).read_text() for name in ("QUANTIZERS.md", "quantizers.svg"))
    assert page == rendered.page(result), RENDER
    assert "CPU rule" in page and max(map(len, page.splitlines())) <= 120
    assert rendered.digest(result) in picture, RENDER
    assert "<dc:date>" not in picture


def test_the_picture_is_the_same_each_time_and_follows_the_results(
    rendered: ModuleType, result: dict[str, Any], tmp_path: Path
) -> None:
    other = json.loads(json.dumps(result))
    other["rows"][0]["rms_error"] *= 2
    for name, drawn in (("a", result), ("b", result), ("c", other)):
        rendered.draw(drawn, tmp_path / f"{name}.svg")
    a, b, c = ((tmp_path / f"{name}.svg").read_text() for name in "abc")
    assert a == b != c
    assert rendered.digest(other) in c and rendered.digest(other) not in a
