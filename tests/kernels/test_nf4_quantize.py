"""Quantizing in C: the bits of the reference, at every instruction set."""

from __future__ import annotations

import itertools

import pytest
import torch
from qlorag.kernels import nf4
from qlorag.kernels.nf4 import BLOCK_SIZES, QuantizationError, codebook, eager

pytestmark = pytest.mark.isa

CPU = torch.device("cpu")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
KINDS = ("nf4", "fp4")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_c_is_the_reference(w: torch.Tensor, **options) -> None:
    got, want = (nf4.quantize(w, **options, double_quant=False, backend=backend) for backend in ("c", "reference"))
    assert torch.equal(got.absmax, want.absmax), options
    assert torch.equal(got.packed, want.packed), options


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_block_size_and_tail(isa, poisoned, kind, dtype):
    for block_size in BLOCK_SIZES:
        for numel in (1, 31, 32, 33, block_size, 3 * block_size + 1, 5 * block_size + 30):
            exponents = torch.randint(-30, 30, (numel,), generator=generator(numel))
            w = torch.randn(numel + 5, generator=generator(block_size))[5:]  # off the 64-byte alignment
            w = (w * 2.0**exponents).to(dtype).clamp(-6e4, 6e4)
            w[block_size : 2 * block_size] = 0
            assert_c_is_the_reference(w, kind=kind, block_size=block_size)


@pytest.mark.parametrize("kind", KINDS)
def test_ties_and_their_neighbours(isa, kind):
    """Scales of every magnitude that float32 has, at which a threshold is exact or one bit away."""
    bounds, _ = codebook.thresholds(kind, CPU)
    up, down = (torch.nextafter(bounds, torch.tensor(s)) for s in (2.0, -2.0))
    block = torch.cat([torch.tensor([1.0, 0.0, -0.0]), bounds, up, down])  # 48 values, the largest is 1
    scales = 2.0 ** torch.arange(-149, 128)
    w = torch.nn.functional.pad(scales[:, None] * block, (0, 16))  # one block of 64 per scale
    assert_c_is_the_reference(w, kind=kind, block_size=64)
    assert_c_is_the_reference(block * 3, kind=kind, block_size=64)  # ragged: divides, where others multiply


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_16_bit_number(isa, dtype):
    bits = torch.randperm(65536, generator=generator()).sub(32768).to(torch.int16)
    w = bits.view(dtype)
    w = w[w.isfinite()]
    for kind, block_size in itertools.product(KINDS, (32, 64)):
        assert_c_is_the_reference(w, kind=kind, block_size=block_size)


@pytest.mark.compiler
def test_ten_million_numbers():
    """Random float32 scales, so that products fall on both sides of every threshold's last bit."""
    w = torch.randn(10_000_000, generator=generator(4))
    assert_c_is_the_reference(w, kind="nf4", block_size=64)


def test_the_thread_count_does_not_change_a_bit(isa):
    w = torch.randn(700, 513, generator=generator(2))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            q = nf4.quantize(w, double_quant=False, backend="c")
            results.append(torch.cat([part.view(torch.uint8) for part in (q.packed, q.absmax)]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_one_bad_number_anywhere_is_found(isa, dtype):
    for numel, place, bad in itertools.product(
        (200, 70_001), (0, 63, 64, 130, -1), (float("nan"), float("inf"), float("-inf"))
    ):
        w = torch.ones(numel, dtype=dtype)
        w[place] = bad
        with pytest.raises(QuantizationError, match=rf"w\[{place % numel}\] is {bad}: only finite values"):
            nf4.quantize(w, backend="c")
    nan = torch.full((64,), -1, dtype=torch.int32).view(torch.float32)  # sign and all payload bits set
    with pytest.raises(QuantizationError, match=r"w\[0\] is nan"):
        nf4.quantize(nan, backend="c")


@pytest.mark.compiler
@pytest.mark.parametrize("blocks", [1, 2, 255, 256, 257, 5 * 256 + 77])
def test_scales_get_the_codes_of_the_reference(poisoned, blocks):
    for seed, scale in itertools.product(range(3), (1e-38, 1e-3, 1.0, 1e30)):
        absmax = torch.rand(blocks, generator=generator(seed)) ** 3 * scale
        assert_same_scales(absmax)
    assert_same_scales(torch.full((blocks,), 0.375))  # all equal: nothing is left after the mean
    assert_same_scales(torch.zeros(blocks))
    assert_same_scales(torch.linspace(-1e35, 1e35, blocks))  # not from quantize, but what anyone may pass


def assert_same_scales(absmax: torch.Tensor) -> None:
    codes, nested = nf4.quantize_absmax(absmax, backend="c")
    want_codes, want = nf4.quantize_absmax(absmax, backend="reference")
    assert torch.equal(codes, want_codes)
    assert torch.equal(nested.absmax, want.absmax) and torch.equal(nested.offset, want.offset)


@pytest.mark.compiler
def test_backends_are_named():
    statuses = {(s.operation, s.backend): s for s in nf4.available_backends()}
    assert statuses["nf4.quantize", "c"].available and statuses["nf4.quantize", "reference"].available
    assert set(eager.QUANTIZE) == set(eager.QUANTIZE_ABSMAX) == {"triton", "c", "reference"}
    for call in (nf4.quantize, nf4.quantize_absmax):
        with pytest.raises(QuantizationError, match="backend='cuda' does not exist: there are triton, c, reference"):
            call(torch.ones(4), backend="cuda")
    with pytest.raises(QuantizationError, match=r"absmax \[4\] is not contiguous \(strides \(2,\)\)"):
        nf4.quantize_absmax(torch.ones(8)[::2])


@pytest.mark.parametrize("backend", [None, "reference"])
def test_threads_change_no_bit_of_the_offset(backend):
    """torch's mean of so many scales may depend on them, here for seed 3: the offset is that of one thread."""
    before = torch.get_num_threads()
    try:
        for seed in range(2, 6):
            absmax = torch.randn(262144, generator=generator(seed)).abs() * 0.05
            torch.set_num_threads(1)
            mean = absmax.mean()
            codes, nested = nf4.quantize_absmax(absmax, backend=backend)
            assert torch.equal(nested.offset, mean)
            for threads in (2, 3, 8):
                torch.set_num_threads(threads)
                other_codes, other = nf4.quantize_absmax(absmax, backend=backend)
                assert torch.equal(other.offset, mean) and torch.equal(other.absmax, nested.absmax)
                assert torch.equal(other_codes, codes)
    finally:
        torch.set_num_threads(before)
