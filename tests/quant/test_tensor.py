"""QuantizedTensor: what it costs, what it refuses, that it moves whole."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from qlorag.quant import QuantizationError, dequantize, quantize


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize(
    ("block_size", "double_quant", "bits"),
    [(64, True, 4.127), (64, False, 4.5), (32, False, 5.0), (128, True, 4.063), (4096, False, 4.008)],
)
def test_bits_per_weight_count_all_state(block_size, double_quant, bits):
    q = quantize(randn(1024, 1024), block_size=block_size, double_quant=double_quant)
    parts = [p for p in (q.packed, q.absmax, q.nested_absmax, q.nested_offset) if p is not None]
    assert q.nbytes == sum(p.numel() * p.element_size() for p in parts)
    assert q.bits_per_weight == pytest.approx(bits, abs=6e-4)
    assert q.double_quant is double_quant


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dequantize_gives_the_dtype_it_was_made_from_unless_told(dtype):
    q = quantize(randn(3, 5, 7, dtype=dtype))
    assert dequantize(q).dtype == dtype and dequantize(q).shape == (3, 5, 7)
    exact = dequantize(q, dtype=torch.float64)
    assert torch.equal(dequantize(q, dtype=dtype).double(), exact.to(dtype).double())
    out = torch.full((3, 5, 7), float("nan"))
    assert dequantize(q, dtype=torch.float32, out=out) is out and torch.equal(out.double(), exact)


def test_the_error_is_that_of_a_4_bit_normal_code():
    """About 0.09 sigma RMS on normal weights; FP4 loses more; double quantization adds less than 1%."""
    w = randn(512, 512)

    def rms(**options):
        return (dequantize(quantize(w, **options)) - w).pow(2).mean().sqrt().item()

    single, double, fp4 = rms(double_quant=False), rms(), rms(kind="fp4", double_quant=False)
    assert 0.085 < single < 0.1
    assert single < double < 1.01 * single
    assert fp4 > 1.2 * single


def test_to_moves_every_part():
    for double_quant in (True, False):
        moved = quantize(randn(4, 64), double_quant=double_quant).to("meta")
        parts = [p for p in (moved.packed, moved.absmax, moved.nested_absmax, moved.nested_offset) if p is not None]
        assert len(parts) == (4 if double_quant else 2)
        assert {p.device.type for p in parts} == {"meta"} and moved.device.type == "meta"


@pytest.mark.parametrize(("missing", "message"), [
    (0, "packed or absmax is missing"), (1, "packed or absmax is missing"),
    (2, "nested_absmax is missing"), (3, "nested_offset is missing"),
])  # fmt: skip
def test_a_missing_part_is_refused(missing, message):
    q = quantize(randn(4, 64))
    with pytest.raises(QuantizationError, match=message):
        q.with_parts([None if i == missing else part for i, part in enumerate(q.parts)])
    assert q.with_parts(q.parts).parts == q.parts


def test_parts_that_do_not_fit_are_refused():
    q = quantize(randn(4, 64))
    with pytest.raises(QuantizationError, match="packed has 128 elements, but shape"):
        replace(q, shape=(5, 64))
    with pytest.raises(QuantizationError, match="nested is missing"):
        replace(q, nested=None)
