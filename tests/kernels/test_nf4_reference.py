"""The definition of 4-bit quantization against the same rules in ordinary Python numbers."""

from __future__ import annotations

import math
import struct
from dataclasses import replace

import pytest
import torch
from qlorag.kernels.nf4 import FP4, NF4, Nested, QuantizationError, QuantizedTensor, codebook, reference

TABLES = {"nf4": NF4, "fp4": FP4}


def float32(x: float) -> float:
    """x rounded to float32."""
    return struct.unpack("<f", struct.pack("<f", x))[0]


def by_hand(values: list[float], kind: str, block_size: int) -> tuple[list[int], list[float]]:
    """One code per value, and one absmax per block. float32 values; each step is rounded once."""
    bounds, numbers = codebook.thresholds(kind, torch.device("cpu"))
    codes, scales = [], []
    for start in range(0, len(values), block_size):
        block = values[start : start + block_size]
        scale = max(map(abs, block))
        ragged = len(block) < block_size
        scales.append(max(scale, float32(1e-38)) if ragged else scale)
        inverse = float32(1 / max(scale, float32(1e-38)))
        for x in block:
            scaled = float32(x / scales[-1]) if ragged else float32(x * inverse)
            scaled = min(1.0, max(-1.0, scaled))
            codes.append(numbers[sum(bound < scaled for bound in bounds.tolist())].item())
    return codes, scales


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("numel", [1, 2, 31, 32, 33, 64, 65, 100, 131])
def test_quantize_by_hand(kind: str, numel: int):
    """Whole and ragged blocks, odd counts, blocks of zeros at both ends, and a block that is one number."""
    w = torch.randn(numel, generator=torch.Generator().manual_seed(numel)) * 3
    for zeros in (slice(0, 0), slice(0, 32), slice(-(numel % 32 or 32), None)):
        x = w.clone()
        x[zeros] = 0
        packed, absmax = reference.quantize(x, kind=kind, block_size=32)
        codes, scales = by_hand(x.tolist(), kind, 32)
        zero_code = next(c for c, v in enumerate(TABLES[kind]) if v == 0)
        padded = codes + [zero_code] * (numel % 2)
        assert packed.tolist() == [high * 16 + low for high, low in zip(padded[::2], padded[1::2], strict=True)]
        assert absmax.tolist() == scales
        assert (packed.dtype, absmax.dtype) == (torch.uint8, torch.float32)


def test_chunks_are_joined_without_a_seam(monkeypatch: pytest.MonkeyPatch):
    w = torch.randn(7, 43, generator=torch.Generator().manual_seed(0))  # 301 elements: 4 chunks of 64 and a ragged one
    whole = reference.quantize(w, kind="nf4", block_size=32)
    monkeypatch.setattr(reference, "CHUNK", 64)
    for part, wanted in zip(reference.quantize(w, kind="nf4", block_size=32), whole, strict=True):
        assert torch.equal(part, wanted)


def test_nothing_is_quantized_into_nothing():
    packed, absmax = reference.quantize(torch.empty(0, 5), kind="nf4", block_size=32)
    assert (packed.shape, absmax.shape) == ((0,), (0,))
    with pytest.raises(QuantizationError, match=r"shape=\[0, 5\]: every dimension must be at least 1"):
        QuantizedTensor(packed=packed, absmax=absmax, shape=(0, 5), block_size=32)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_first_value_that_is_not_finite_is_named(value: float):
    w = torch.zeros(3, 4, requires_grad=True)
    with torch.no_grad():
        w[1, 2] = value
        w[2, 0] = math.nan
    with pytest.raises(QuantizationError) as error:
        reference.quantize(w, kind="nf4", block_size=32)
    assert str(error.value) == (f"w[1, 2] is {value}: only finite values can be quantized; find out what produced it")


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_dequantize_by_hand(kind: str):
    """Bytes of all 256 pairs of codes; block i has the scale (i + 1) / 3."""
    packed = torch.arange(256, dtype=torch.uint8)
    absmax = torch.tensor([(i + 1) / 3 for i in range(16)])
    wanted = [
        float32(TABLES[kind][code] * absmax[i // 32].item())
        for i, code in enumerate(c for byte in range(256) for c in (byte >> 4, byte & 15))
    ]
    q = QuantizedTensor(packed=packed, absmax=absmax, shape=(2, 256), kind=kind, block_size=32)
    got = reference.dequantize(q, torch.float32)
    assert got.shape == (2, 256) and got.view(-1).tolist() == wanted
    odd = reference.dequantize(replace(q, packed=packed[:33], absmax=absmax[:3], shape=(65,)), torch.bfloat16)
    assert odd.dtype == torch.bfloat16 and odd.tolist() == torch.tensor(wanted[:65]).bfloat16().tolist()


@pytest.mark.parametrize("blocks", [1, 255, 256, 257, 600])
def test_scales_by_hand(blocks: int):
    """Code = grid[round(65535 (x + 1) / 2)] of x = (absmax - mean) / max |absmax - mean| in each 256; decoded, the
    error is at most half the widest gap of the 8-bit table."""
    absmax = torch.rand(blocks, generator=torch.Generator().manual_seed(blocks)) + 0.5
    codes, nested = reference.quantize_absmax(absmax)
    assert (codes.dtype, codes.shape, nested.absmax.shape) == (torch.uint8, (blocks,), (-(-blocks // 256),))
    assert nested.offset.shape == () and nested.offset.item() == absmax.mean().item()
    table, grid = codebook.dynamic_table(torch.device("cpu")), codebook.dynamic_grid(torch.device("cpu"))
    centred = (absmax - nested.offset).tolist()
    for i in range(0, blocks, 256):
        part = centred[i : i + 256]
        largest = max(map(abs, part))
        assert nested.absmax[i // 256].item() == largest
        for x, code in zip(part, codes[i : i + 256].tolist(), strict=True):
            scaled = 0.0 if largest == 0 else max(-1.0, min(1.0, float32(x * float32(1 / largest))))
            place = float32(float32(float32(scaled + 1) * 0.5 * 65535) + 0.5)
            assert blocks == 1 or code == grid[int(place)].item()
    decoded = reference.dequantize_absmax(codes, nested)
    wanted = [
        float32(float32(table[c].item() * nested.absmax[j // 256].item()) + nested.offset.item())
        for j, c in enumerate(codes.tolist())
    ]
    assert decoded.dtype == torch.float32 and decoded.tolist() == wanted
    gaps = table.sort().values.diff().max().item() / 2
    assert (decoded - absmax).abs().max().item() <= gaps * nested.absmax.max().item() * 1.001


def test_equal_scales_have_code_0_and_come_back():
    codes, nested = reference.quantize_absmax(torch.full((300,), 0.375))
    assert codes.tolist() == [0] * 300 and nested.absmax.tolist() == [0, 0] and nested.offset.item() == 0.375
    assert reference.dequantize_absmax(codes, nested).tolist() == [0.375] * 300
    assert codes.untyped_storage().nbytes() == 300  # the padding to 512 is not kept


def test_a_mean_beyond_float32_is_refused():
    with pytest.raises(QuantizationError) as error:
        reference.quantize_absmax(torch.full((4,), 3e38))
    assert str(error.value) == ("the mean of absmax is beyond float32: scale the weights down, or double_quant=False")


def test_scales_whose_reciprocal_overflows_have_the_outermost_codes():
    """1 / 2^-141 is infinite in float32, and so is what it scales; it counts as ±1."""
    codes, nested = reference.quantize_absmax(torch.tensor([0.0, 2.0**-140, 0.0, 2.0**-140]))
    assert nested.absmax.tolist() == [2.0**-141] and codes.tolist() == [0, 255, 0, 255]


def test_scales_are_float32_whatever_the_default():
    torch.set_default_dtype(torch.float64)
    try:
        assert reference.quantize(torch.ones(64), kind="nf4", block_size=32)[1].dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_dequantize_with_8_bit_scales_is_that_with_their_values():
    """In parts of any shape, as files hold them, and into memory that is given."""
    packed = torch.randint(256, (300 * 16,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    codes, nested = reference.quantize_absmax(torch.rand(300, generator=torch.Generator().manual_seed(1)))
    scales = reference.dequantize_absmax(codes, nested)
    plain = QuantizedTensor(packed=packed, absmax=scales, shape=(100, 96), block_size=32)
    wanted = reference.dequantize(plain, torch.float32)
    shaped = Nested(nested.absmax.view(2, 1), nested.offset.view(1))
    q = QuantizedTensor(
        packed=packed.view(-1, 1), absmax=codes.view(30, 10), nested=shaped, shape=(100, 96), block_size=32
    )
    assert torch.equal(reference.dequantize(q, torch.float32), wanted)
    out = torch.full((100, 96), torch.nan)
    assert reference.dequantize(q, torch.float32, out) is out and torch.equal(out, wanted)
