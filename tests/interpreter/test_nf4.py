"""The NF4 kernels of Triton against the reference: the same bits where they decode, its error where they sum."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from qlorag.kernels import nf4
from qlorag.kernels.nf4 import BLOCK_SIZES, QuantizationError, QuantizedTensor, codebook, gpu
from qlorag.kernels.nf4.gpu import launches

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
CPU = torch.device("cpu")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def packed_weight(*shape, kind="nf4", block_size=64, double_quant=True, seed=0):
    """Any codes, and scales that differ from block to block."""
    numel = torch.Size(shape).numel()
    packed = torch.randint(0, 256, ((numel + 1) // 2,), dtype=torch.uint8, generator=generator(seed))
    absmax = torch.rand(-(-numel // block_size), generator=generator(seed + 1)) + 0.1
    nested = None
    if double_quant:
        absmax, nested = nf4.quantize_absmax(absmax, backend="reference")
    return QuantizedTensor(packed=packed, absmax=absmax, nested=nested, shape=shape, kind=kind, block_size=block_size)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_dequantize_has_the_bits_of_the_reference(block_size, kind, double_quant):
    for numel, dtype in itertools.product((1, 31, block_size, 4096, 4097, 2 * 4096 + block_size + 77), FLOATS):
        w = packed_weight(numel, kind=kind, block_size=block_size, double_quant=double_quant)
        want = nf4.dequantize(w, dtype=dtype, backend="reference")
        out = torch.empty(numel, dtype=dtype)
        assert nf4.dequantize(w, dtype=dtype, out=out, backend="triton") is out
        assert torch.equal(out, want), (numel, dtype)


def test_dequantize_rounds_every_code_as_the_reference_does():
    """16 codes under 4,096 scales from subnormal to huge, some of which overflow float16."""
    scales = torch.logspace(-42, 30, 4096, dtype=torch.float64).float()
    packed = torch.arange(16, dtype=torch.uint8).repeat(4096 * 4).view(-1, 2)
    packed = (packed[:, 0] << 4 | packed[:, 1]).contiguous()
    for dtype in FLOATS:
        w = QuantizedTensor(packed=packed, absmax=scales, shape=(4096, 64), dtype=dtype)
        assert torch.equal(nf4.dequantize(w, backend="triton"), nf4.dequantize(w, backend="reference"))


def test_dequantize_writes_nothing_past_the_end():
    w = packed_weight(4096 + 65)
    memory = torch.full((4096 + 65 + 64,), 7.0)
    nf4.dequantize(w, out=memory[: 4096 + 65], backend="triton")
    assert (memory[4096 + 65 :] == 7).all() and torch.isfinite(memory).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("block_size", [32, 64, 256, 4096])
def test_quantize_has_the_bits_of_the_reference(block_size, kind, dtype):
    for numel in (1, 2, 31, block_size, 4096, 4096 + block_size + 33):
        w = torch.randn(numel, generator=generator(numel)).to(dtype)
        w[block_size // 2 : block_size + 3] = 0  # half a block of zeros, and the next one's beginning
        (got, got_absmax), (want, want_absmax) = bits_of_both(w, kind=kind, block_size=block_size)
        assert torch.equal(got, want) and torch.equal(got_absmax, want_absmax), numel


def bits_of_both(w, **options):
    """Packed codes and absmax of Triton, and the reference's."""
    both = [nf4.quantize(w, **options, double_quant=False, backend=backend) for backend in ("triton", "reference")]
    return [(q.packed, q.absmax) for q in both]


def after_ones(w):
    """Rows of 64 that begin with 1, the largest magnitude: scaled, they are w itself. Padded with zeros."""
    rows = F.pad(w, (0, -w.numel() % 63)).view(-1, 63)
    return torch.cat([torch.ones_like(rows[:, :1]), rows], dim=1)


# Also scales whose reciprocal is subnormal, below reference.TINY, and subnormal themselves.
@pytest.mark.parametrize("scale", [1.0, 0.3, 1.7e-9, 2.9e38, 1.1e-38, 9.9e-39, 3e-42])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_quantize_decides_as_the_reference_does_wherever_it_is_close(kind, scale):
    """Every threshold, every edge of a bucket, the float32 on both sides of them, zeros, and what is subnormal."""
    bounds, _ = codebook.thresholds(kind, CPU)
    count = codebook.BUCKETS[kind]
    edges = (torch.arange(1 - count // 2, count // 2, dtype=torch.float64) * 4 - 2.5) / (2 * count - 4)
    close = torch.cat([bounds, edges[1:].float(), torch.tensor([0.0, 1e-38, 1e-45])])
    inf = torch.tensor(torch.inf)
    w = torch.cat([close, -close, torch.nextafter(close, inf), torch.nextafter(close, -inf)])
    assert codebook.bucket_of(edges[1].item() + 1e-5, count) == codebook.bucket_of(edges[1].item() - 1e-5, count) + 1
    whole = after_ones(w) * scale
    (got, got_absmax), (want, want_absmax) = bits_of_both(whole, kind=kind)
    assert torch.equal(got, want) and torch.equal(got_absmax, want_absmax)
    for part in (w[:2047], w[-2048:]):  # in a block that is not whole, which divides
        ragged = torch.cat([torch.ones(1), part]) * scale
        assert torch.equal(*(packed for packed, _ in bits_of_both(ragged, kind=kind, block_size=4096)))


def test_quantize_sends_ties_to_the_lower_code():
    """By hand: NF4's threshold between codes 7 (zero) and 8, and the next number up."""
    tie = codebook.thresholds("nf4", CPU)[0][7]
    w = after_ones(torch.stack([tie, torch.nextafter(tie, torch.tensor(1.0)), -tie]))
    q = nf4.quantize(w, backend="triton")
    assert q.packed[:2].tolist() == [0xF7, 0x87]


@pytest.mark.parametrize("numel", [64, 65, 3 * 64 + 5])
def test_quantize_zeros(numel):
    """The scale of a last block that is not whole is 1e-38."""
    (got, got_absmax), (want, want_absmax) = bits_of_both(torch.zeros(numel))
    assert torch.equal(got, want) and torch.equal(got_absmax, want_absmax)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_quantize_every_16_bit_number_up_to_1(kind, dtype):
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    w = after_ones(every[every.abs() <= 1])
    assert w.numel() > 1 << 14
    assert torch.equal(*(packed for packed, _ in bits_of_both(w, kind=kind)))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [3, 64 * 3 + 5])  # in a whole block, in the ragged last one
def test_quantize_refuses_what_is_not_finite(value, place):
    w = torch.randn(64 * 3 + 9, generator=generator())
    w[place] = value
    with pytest.raises(QuantizationError, match=rf"w\[{place}\] is "):
        nf4.quantize(w, backend="triton")


SHAPES = [(70, 192, 64), (33, 96, 64), (64, 576, 128), (9, 1024, 4096), (130, 64, 32)]  # n, k, block_size


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("n", "k", "block_size"), SHAPES)
def test_products_have_at_most_twice_the_error_of_torch(n, k, block_size, dtype, double_quant):
    w = packed_weight(n, k, block_size=block_size, double_quant=double_quant)
    wide = nf4.dequantize(w, dtype=torch.float64, backend="reference")
    forward = {"triton": 0.0, "reference": 0.0}
    backward = dict(forward)
    for m in (1, 3, 17, 65 if dtype == torch.float32 else 130):  # few rows, one program, several
        x = torch.randn(m, k, generator=generator(m)).to(dtype)
        dy = torch.randn(m, n, generator=generator(m)).to(dtype)
        for backend in forward:
            y = nf4.matmul(x, w, backend=backend).double()
            dx = nf4.matmul_backward(dy, w, backend=backend).double()
            forward[backend] += (y - x.double() @ wide.T).square().mean().item()
            backward[backend] += (dx - dy.double() @ wide).square().mean().item()
    assert forward["triton"] <= 4 * forward["reference"]  # of squares: 2 squared
    assert backward["triton"] <= 4 * backward["reference"]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("n", "k", "block_size"), SHAPES)
def test_unit_vectors_give_the_weight_itself(n, k, block_size, dtype):
    """Each weight in its place, multiplied by 1 and added to zeros: nothing is rounded but W, once."""
    w = packed_weight(n, k, kind="fp4" if n == 33 else "nf4", block_size=block_size)
    want = nf4.dequantize(w, dtype=dtype, backend="reference")
    eye = torch.eye(k, dtype=dtype)
    most = eye[:: 5 if k > 512 else 1]  # 5 has no factor in common with a tile, so that every place in one is met
    for rows in (eye[:1], eye[k - gpu.FEW_ROWS :], eye[: gpu.FEW_ROWS + 1], most):  # few, few, many, many programs
        got = nf4.matmul(rows, w, backend="triton")
        assert torch.equal(got.T, want[:, rows.argmax(1)])
    assert torch.equal(nf4.matmul_backward(torch.eye(n, dtype=dtype), w, backend="triton"), want)


def test_what_is_not_finite_reaches_its_own_results_only():
    w = packed_weight(70, 128, double_quant=False)
    w.absmax[5] = float("nan")  # row 2, second block
    for m in (gpu.FEW_ROWS, 20):
        x = torch.randn(m, 128, generator=generator())
        x[1, 70] = float("nan")
        expected = torch.zeros(m, 70, dtype=torch.bool)
        expected[1], expected[:, 2] = True, True
        assert torch.equal(nf4.matmul(x, w, backend="triton").isnan(), expected)


def test_splits_are_added_in_order_and_cover_everything(monkeypatch):
    """A long K over few rows of W, as a decoding step has it: many programs share one row."""
    monkeypatch.setattr(launches, "processors", lambda device: 132)
    w = packed_weight(8, 16384)
    plan = gpu.plan_forward(1, 8, 16384, 64, torch.float32, 132)
    assert plan.splits == 4 and plan.per_split * plan.splits >= 256
    x = torch.randint(-8, 8, (1, 16384), generator=generator()).float()
    first, second = (nf4.matmul(x, w, backend="triton") for _ in range(2))
    assert torch.equal(first, second)
    exact = x.double() @ nf4.dequantize(w, dtype=torch.float64, backend="reference").T
    torch.testing.assert_close(first.double(), exact, rtol=1e-5, atol=1e-3)
    tall = packed_weight(4096, 64)
    plan = gpu.plan_backward(5, 4096, 64, 64, torch.float32, 132)
    assert plan.splits > 4 and plan.per_split * plan.splits >= 4096
    dy = torch.randn(5, 4096, generator=generator())
    exact = dy.double() @ nf4.dequantize(tall, dtype=torch.float64, backend="reference")
    torch.testing.assert_close(nf4.matmul_backward(dy, tall, backend="triton").double(), exact, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("leading", [(), (1,), (2, 0), (2, 1, 3)])
def test_leading_dimensions_and_strides(leading):
    w = packed_weight(40, 64)
    x = torch.randn(*leading, 64, 2, generator=generator())[..., 0]  # every second number in memory
    y = nf4.matmul(x, w, backend="triton")
    assert y.shape == (*leading, 40)
    assert torch.equal(y, nf4.matmul(x.contiguous(), w, backend="triton"))
    assert nf4.matmul_backward(y, w, backend="triton").shape == (*leading, 64)


def test_packed_bytes_that_do_not_begin_on_a_word():
    w = packed_weight(40, 64)
    memory = torch.empty(40 * 32 + 1, dtype=torch.uint8)
    memory[1:] = w.packed
    x = torch.randn(2, 64, generator=generator())
    moved = nf4.matmul(x, replace(w, packed=memory[1:]), backend="triton")
    assert torch.equal(moved, nf4.matmul(x, w, backend="triton"))


def test_a_row_that_does_not_split_into_units_is_refused_by_name():
    w = packed_weight(4, 80, block_size=64)
    with pytest.raises(QuantizationError, match="backend='triton' cannot run: K=80, and it takes K that is a multiple"):
        nf4.matmul(torch.zeros(1, 80), w, backend="triton")
