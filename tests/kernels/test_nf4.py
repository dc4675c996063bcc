"""NF4 and FP4: the tables, the definition against bitsandbytes, dequantizing in C against the definition."""

from __future__ import annotations

import hashlib
import itertools
import os
import struct
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qlorag.kernels import nf4
from qlorag.kernels.native import ISAS
from qlorag.kernels.nf4 import (
    BLOCK_SIZES,
    DYNAMIC,
    FP4,
    NF4,
    Nested,
    QuantizationError,
    QuantizedTensor,
    codebook,
    cpu,
    reference,
)
from qlorag.kernels.nf4.backends import choose_backend
from qlorag.kernels.nf4.cpu import calls, compiled

pytestmark = pytest.mark.isa

CPU = torch.device("cpu")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
KINDS = ("nf4", "fp4")


def sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def round_trip(w, *, kind="nf4", block_size=64, double_quant=False, dtype=torch.float32, backend=None):
    q = nf4.quantize(w, kind=kind, block_size=block_size, double_quant=double_quant)
    return nf4.dequantize(q, dtype=dtype, backend=backend)


# The tables.

NF4_HEX = (
    "bf800000 bf3239b1 bf066b30 beca32a0 be91a24d be3d353f bdba7871 00000000 "
    "3da2faff 3e24cae3 3e7c04dd 3ead033a 3ee1a4b8 3f1007ab 3f3913b3 3f800000"
)
FP4_HEX = (
    "00000000 3baaaaab 3f2aaaab 3f800000 3eaaaaab 3f000000 3e2aaaab 3e800000 "
    "00000000 bbaaaaab bf2aaaab bf800000 beaaaaab bf000000 be2aaaab be800000"
)
NF4_THRESHOLDS = (
    -0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544, -0.23460740596055984,
    -0.13791173323988914, -0.045525018125772476, 0.03979014977812767, 0.1202552504837513, 0.2035212516784668,
    0.2920137718319893, 0.3893125355243683, 0.5016634166240692, 0.6427869200706482, 0.8614784181118011,
)  # fmt: skip


def test_tables_have_the_published_bits():
    assert " ".join(struct.pack(">f", v).hex() for v in NF4) == NF4_HEX
    assert " ".join(struct.pack(">f", v).hex() for v in FP4) == FP4_HEX
    dynamic = struct.pack("<256f", *DYNAMIC)
    assert hashlib.sha256(dynamic).hexdigest() == ("e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c")
    assert (DYNAMIC[0], DYNAMIC[127], DYNAMIC[255]) == (pytest.approx(-0.99296874), 0.0, 1.0)
    assert len(set(DYNAMIC)) == 256


@pytest.mark.oracle
def test_tables_equal_bitsandbytes():
    import bitsandbytes.functional as bnb

    for kind in KINDS:
        assert torch.equal(codebook.table(kind, CPU), bnb.get_4bit_type(kind, device="cpu"))
    assert torch.equal(codebook.dynamic_table(CPU), bnb.create_dynamic_map(signed=True))


def test_nf4_codes_are_equally_likely_for_normal_weights():
    """What the quantiles are for. absmax of 64 elements is about 2.4 sigma, so the ends are rarer."""
    generator = torch.Generator().manual_seed(0)
    packed = nf4.quantize(torch.randn(1 << 18, generator=generator)).packed
    codes = torch.stack([packed >> 4, packed & 15]).view(-1)
    share = torch.bincount(codes.int(), minlength=16) / codes.numel()
    assert share.min() > 0.01 and share.max() < 0.11  # an even 4-bit grid puts 0.19 on its middle codes


def test_denominators_of_fixed_point():
    """Each entry to 15 bits, and no common error that a sum would collect; FP4 has none at all."""
    for kind, most, common in (("nf4", 2.0**-15, 4e-7), ("fp4", 3e-8, 1e-8)):
        denominator, table = codebook.DENOMINATORS[kind], torch.tensor(codebook.TABLES[kind], dtype=torch.float64)
        errors = (table * denominator).round() / denominator - table
        packed = nf4.quantize(torch.randn(2**20, generator=torch.Generator().manual_seed(0)), kind=kind).packed
        used = torch.cat([packed >> 4, packed & 15]).long()
        assert denominator <= 2**14 and errors.abs().max() < most
        assert errors.mean().abs() < common and errors[used].mean().abs() < common


def test_thresholds_and_their_ties():
    bounds, codes = codebook.thresholds("nf4", CPU)
    assert torch.equal(bounds, torch.tensor(NF4_THRESHOLDS))
    assert codes.tolist() == list(range(16))
    for i, threshold in enumerate(bounds):
        up, down = (
            torch.nextafter(threshold, torch.tensor(2.0)),
            torch.nextafter(threshold, torch.tensor(-2.0)),
        )
        w = torch.zeros(32)
        w[:4] = torch.stack([torch.tensor(1.0), threshold, up, down])  # absmax 1: scaling changes nothing
        q = nf4.quantize(w, block_size=32, double_quant=False)
        assert q.absmax.item() == 1.0
        first, second = q.packed[:2].tolist()
        assert (first & 15, second >> 4, second & 15) == (i, i + 1, i)  # the tie takes the lower code


# The definition.


def test_worked_by_hand():
    """The example of quant/README.md: eight numbers, one block, absmax 0.8."""
    w = torch.tensor([0.8, -0.4, 0.0, 0.2, -0.8, 0.1, 0.55, -0.05])
    q = nf4.quantize(w, block_size=64, double_quant=False)
    assert q.packed.tolist() == [0xF2, 0x7A, 0x09, 0xE6]
    assert q.absmax.tolist() == [struct.unpack("<f", struct.pack("<f", 0.8))[0]]
    expected = torch.tensor([NF4[c] for c in (15, 2, 7, 10, 0, 9, 14, 6)]) * q.absmax
    assert torch.equal(nf4.dequantize(q), expected)


def golden_a() -> torch.Tensor:
    values = [(((i * 37) % 101) - 50) / 64 * (0.25 if i >= 64 else 1.0) for i in range(128)]
    return torch.tensor(values).view(2, 64)


def golden_b() -> torch.Tensor:
    s, values = 12345, []
    for i in range(19200):
        s = (s * 1103515245 + 12345) % 2**31
        values.append(((s >> 16) % 2001 - 1000) / 8192 * ((i // 64) % 7 + 1))
    return torch.tensor(values).view(300, 64)


def test_golden_a():
    q = nf4.quantize(golden_a(), double_quant=False)
    assert q.packed.numpy().tobytes().hex() == (
        "04c16e29f3b05d17e29f3c05d18e2af4c16e18e3b05d17e29f3b05d18e2af4c1"
        "6d18e3b04c17e29f3b05d17e2af4c06d18e2a04c16e29f3b05d17e29f3c05d18"
    )
    assert q.absmax.tolist() == [0.78125, 0.1953125]
    assert sha256(nf4.dequantize(q)) == "01d0a55f13cfa41f9be578d031969f3d7a31055c5e12c962ad32ac4d503e3ac8"

    double = nf4.quantize(golden_a())
    assert torch.equal(double.packed, q.packed) and double.absmax.tolist() == [255, 0]
    assert (double.nested.absmax.tolist(), double.nested.offset.item()) == ([0.29296875], 0.48828125)
    recovered = reference.dequantize_absmax(double.absmax, double.nested)
    assert recovered.numpy().tobytes().hex() == "0000483f001c4a3e"
    assert sha256(nf4.dequantize(double)) == "f7f429c61048550ff6d69d7c01b3966e55dccfa5ec6dfd2e3d4dd9be6a5df355"


def test_golden_b_has_two_nested_blocks():
    q = nf4.quantize(golden_b(), double_quant=False)
    assert sha256(q.packed) == "4e7951b44113ce625f5d4c86eae2bfa12859041580e714ef3cc36c7996dcee62"
    assert sha256(q.absmax) == "d191d82660b588aa39aa6c7823504bfb030095ae478993118236bf44d38e5a64"
    assert sha256(nf4.dequantize(q)) == "925ba0a07fd9a512ab8e9cbbe34ee4d1fd4aa3c92c55a708f89bccdbcb86e4f5"

    double = nf4.quantize(golden_b())
    codes, nested = double.absmax, double.nested
    assert torch.equal(double.packed, q.packed)
    assert sha256(codes) == "9cbbf410be3f2ba821766bda8a7e58acfa0436f66b1efd380fa083e224a903bd"
    assert codes[:16].tolist() == [2, 26, 48, 162, 205, 229, 255, 2, 24, 48, 162, 208, 231, 252, 2, 26]
    assert nested.absmax.tolist() == pytest.approx([0.374665529, 0.372102052], abs=5e-10)
    assert nested.offset.item() == pytest.approx(0.479826659, abs=5e-10)
    assert sha256(nf4.dequantize(double)) == "0bccbe1b84c1639d33dd09a9582b577de17bc192d5af492f71f55c95b48170bc"


@pytest.mark.oracle
@pytest.mark.parametrize("backend", ["reference", "c"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_quantize_equals_bitsandbytes(block_size, kind, dtype, backend):
    """Bytes, absmax and nested state, on whole blocks, a ragged tail, an odd count, and zero blocks."""
    import bitsandbytes.functional as bnb

    generator = torch.Generator().manual_seed(block_size)
    for numel in (3 * block_size, 5 * block_size + 7, 1, min(300, 60_000 // block_size) * block_size + 32):
        w = torch.randn(numel, generator=generator) * 10.0 ** torch.randint(-4, 3, (numel,), generator=generator)
        w[block_size : 2 * block_size] = 0
        w = w.to(dtype)
        want_packed, want = bnb.quantize_4bit(w, blocksize=block_size, quant_type=kind)
        _, double = bnb.quantize_4bit(w, blocksize=block_size, quant_type=kind, compress_statistics=True)
        options = {"kind": kind, "block_size": block_size, "backend": backend}
        q = nf4.quantize(w, **options, double_quant=False)
        assert torch.equal(q.packed, want_packed.view(-1))
        assert torch.equal(q.absmax, want.absmax)
        q = nf4.quantize(w, **options)
        assert torch.equal(q.packed, want_packed.view(-1))
        assert torch.equal(q.absmax, double.absmax)
        assert torch.equal(q.nested.absmax, double.state2.absmax)
        assert torch.equal(q.nested.offset, double.offset)


@pytest.mark.slow
@pytest.mark.oracle
@pytest.mark.parametrize("backend", ["reference", "c"])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_dequantize_equals_bitsandbytes(block_size, double_quant, backend):
    """Only where bitsandbytes' CPU kernel is right: rows that are a multiple of the block size."""
    import bitsandbytes.functional as bnb

    for kind, dtype in itertools.product(KINDS, FLOATS):
        w = torch.randn(6, 2 * block_size, generator=torch.Generator().manual_seed(7)).to(dtype)
        options = {"kind": kind, "block_size": block_size}
        packed, state = bnb.quantize_4bit(w, blocksize=block_size, quant_type=kind, compress_statistics=double_quant)
        want = bnb.dequantize_4bit(packed, state)
        got = round_trip(w, **options, double_quant=double_quant, dtype=dtype, backend=backend)
        assert torch.equal(got, want), (kind, dtype, backend)


@pytest.mark.oracle
@pytest.mark.parametrize("backend", ["reference", "c"])
def test_absmax_codes_equal_bitsandbytes_on_many_values(backend):
    """The 65536-point grid is not the nearest code everywhere: it takes many values to see it is the same."""
    import bitsandbytes.functional as bnb

    for seed, scale in itertools.product(range(4), (1e-3, 1.0, 40.0)):
        absmax = torch.rand(40_000 + 77, generator=torch.Generator().manual_seed(seed)) ** 3 * scale
        mean = absmax.expand(2, -1).mean(dim=1)[0]  # in the order of one thread, as nested_offset says
        want, state = bnb.quantize_blockwise(absmax - mean, blocksize=256)
        codes, nested = nf4.quantize_absmax(absmax, backend=backend)
        assert torch.equal(codes, want)
        assert torch.equal(nested.absmax, state.absmax)


def test_zero_blocks_stay_zero():
    w = torch.zeros(3 * 64 + 5)
    w[64:128] = torch.linspace(-1, 1, 64)
    q = nf4.quantize(w, double_quant=False)
    assert q.packed[:32].tolist() == [0x77] * 32 and q.packed[64:].tolist() == [0x77] * 35
    assert q.absmax[0] == 0 and q.absmax[2] == 0
    for double_quant in (False, True):  # with an inexact absmax too: the code of zero is exactly 0
        back = round_trip(w, double_quant=double_quant)
        assert not back[:64].any() and not back[128:].any()


def test_equal_scales_lose_nothing_in_double_quantization():
    w = torch.full((512,), 0.375)
    q = nf4.quantize(w)
    assert q.nested.absmax.tolist() == [0.0] and q.absmax.tolist() == [0] * 8
    assert torch.equal(round_trip(w, double_quant=True), w)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=200),
    kind=st.sampled_from(KINDS),
    block_size=st.sampled_from((32, 64, 128)),
)
def test_error_is_at_most_half_the_widest_gap(values, kind, block_size):
    w = torch.tensor(values)
    back = round_trip(w, kind=kind, block_size=block_size)
    ordered, _ = codebook.ascending(kind)
    half_gap = max(high - low for low, high in itertools.pairwise(ordered)) / 2
    for block, decoded in zip(w.split(block_size), back.split(block_size), strict=True):
        # 4 float32 roundings on the way (reciprocal, scaling, threshold, product), each 2**-24 relative.
        # Below 1e-38 the scale is held at 1e-38, and everything decodes to 0.
        bound = max(half_gap * (1 + 2**-21) * block.abs().max().item(), 1e-38)
        assert (block - decoded).abs().max().item() <= bound


def test_large_tensors_are_quantized_in_chunks_without_a_seam():
    w = torch.randn(reference.CHUNK + 2 * 4096 + 33, generator=torch.Generator().manual_seed(3))
    start = reference.CHUNK - 4096
    whole, tail = (
        nf4.quantize(part, block_size=4096, double_quant=False, backend="reference") for part in (w, w[start:].clone())
    )
    assert torch.equal(whole.packed[start // 2 :], tail.packed)
    assert torch.equal(whole.absmax[start // 4096 :], tail.absmax)


def test_reference_in_float64_widens_the_float32_product():
    w = torch.randn(5, 33, generator=torch.Generator().manual_seed(1))
    assert torch.equal(round_trip(w, dtype=torch.float64), round_trip(w).double())


# Dequantizing in C.


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_c_equals_the_reference(isa, kind, dtype):
    """Every tail; scales from subnormal results to overflow; nothing written outside `out`."""
    generator = torch.Generator().manual_seed(11)
    counts = (1, 2, 31, 32, 33, 63, 65, 4095, 4096, 3 * 4096 + 49)
    for block_size, numel in itertools.product((32, 64, 4096), counts):
        packed = torch.randint(0, 256, ((numel + 1) // 2,), dtype=torch.uint8, generator=generator)
        blocks = -(-numel // block_size)
        exponents = torch.randint(-44, 39, (blocks,), generator=generator)
        absmax = torch.rand(blocks, generator=generator) * 10.0**exponents
        codes = torch.randint(0, 256, (blocks,), dtype=torch.uint8, generator=generator)
        nested = Nested(torch.rand(-(-blocks // 256), generator=generator), torch.tensor(0.3))
        for scales, second in ((absmax, None), (codes, nested)):
            q = QuantizedTensor(
                packed=packed, absmax=scales, nested=second, shape=(numel,), kind=kind, block_size=block_size
            )
            want = nf4.dequantize(q, dtype=dtype, backend="reference")
            around = torch.full((numel + 70,), float("nan"), dtype=dtype)  # and off the 64-byte alignment
            got = nf4.dequantize(q, dtype=dtype, out=around[37 : 37 + numel], backend="c")
            assert torch.equal(got, want), (block_size, numel, second is not None)
            assert around[:37].isnan().all() and around[37 + numel :].isnan().all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_c_equals_the_reference_when_streaming(isa, dtype, monkeypatch):
    w = torch.randn(200, 333, generator=torch.Generator().manual_seed(5))
    want = round_trip(w, double_quant=True, dtype=dtype, backend="reference")
    monkeypatch.setattr(calls, "STREAM_BYTES", 0)
    assert torch.equal(round_trip(w, double_quant=True, dtype=dtype, backend="c"), want)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_c_rounds_every_kind_of_float_as_torch_does(isa, dtype):
    """One block per scale: 100,000 float32 bit patterns, finite or infinite, are rounded."""
    generator = torch.Generator().manual_seed(13)
    bits = torch.randint(0, 0x7F800001, (100_000,), dtype=torch.int32, generator=generator)
    absmax = bits.view(torch.float32)
    packed = torch.full((absmax.numel() * 16,), 0xF1, dtype=torch.uint8)  # codes 15 and 1: never 0 * inf
    q = QuantizedTensor(packed=packed, absmax=absmax, shape=(absmax.numel(), 32), block_size=32)
    got = nf4.dequantize(q, dtype=dtype, backend="c")
    assert torch.equal(got, nf4.dequantize(q, dtype=dtype, backend="reference"))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_nan_scale_stays_nan(isa, dtype):
    """Files can hold what quantize refuses; all-ones is the NaN that integer rounding would turn into -0."""
    absmax = torch.tensor([0x7FFFFFFF, 0x7FC00000, 0x7F800001], dtype=torch.int32).view(torch.float32)
    packed = torch.randint(0, 256, (48,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    q = QuantizedTensor(packed=packed, absmax=absmax, shape=(96,), block_size=32)
    assert nf4.dequantize(q, dtype=dtype, backend="c").isnan().all()


def test_the_thread_count_does_not_change_a_bit(isa):
    w = torch.randn(700, 513, generator=torch.Generator().manual_seed(2))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(round_trip(w, double_quant=True, dtype=torch.bfloat16, backend="c"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.compiler
def test_dispatch_takes_c_on_the_cpu_and_the_reference_elsewhere():
    assert choose_backend(CPU, torch.float32, None) == "c"
    assert choose_backend(CPU, torch.float64, None) == "reference"
    assert choose_backend(torch.device("meta"), torch.float32, None) == "reference"
    statuses = {(s.operation, s.backend): s for s in nf4.available_backends()}
    c = statuses["nf4.dequantize", "c"]
    assert c.available and os.environ.get("QLORAG_CPU_LEVEL", ISAS[cpu.best_isa()]) in c.detail
    assert "thread" in c.detail


@pytest.mark.compiler
def test_levels_are_refused_by_name(monkeypatch):
    q = nf4.quantize(torch.ones(64))
    monkeypatch.setenv("QLORAG_CPU_LEVEL", "sse9")
    with pytest.raises(QuantizationError, match="QLORAG_CPU_LEVEL=sse9: use one of"):
        nf4.dequantize(q)
    assert any("sse9" in s.detail and not s.available for s in nf4.available_backends())
    monkeypatch.setenv("QLORAG_CPU_LEVEL", "avx512")
    monkeypatch.setattr(compiled, "best_isa", lambda: 1)
    with pytest.raises(QuantizationError, match="avx512, but this processor has avx2"):
        nf4.dequantize(q)


@pytest.mark.parametrize("backend", ["reference", "c", None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_parts_may_have_any_shape(backend, dtype):
    """As bitsandbytes stores codes [n, 1], and somebody may store scales [N, blocks of a row]."""
    if backend == "c" and dtype == torch.float64:
        pytest.skip("C decodes to at most 32 bits")
    plain, double = (
        nf4.quantize(torch.randn(64, 256, generator=torch.Generator().manual_seed(0)), double_quant=double_quant)
        for double_quant in (False, True)
    )
    nested = Nested(double.nested.absmax[None], double.nested.offset[None])
    columns = {"packed": plain.packed[:, None], "shape": (64, 256)}
    reshaped = QuantizedTensor(**columns, absmax=plain.absmax.view(64, 4))
    reshaped_double = QuantizedTensor(**columns, absmax=double.absmax.view(64, 4), nested=nested)
    options = {"dtype": dtype, "backend": backend}
    for q, other in ((plain, reshaped), (double, reshaped_double)):
        assert torch.equal(nf4.dequantize(other, **options), nf4.dequantize(q, **options))
    x = torch.ones(1, 256, dtype=torch.float64)
    y = nf4.matmul(x, reshaped_double)
    assert torch.equal(y, x @ nf4.dequantize(reshaped_double, dtype=dtype).double().T)


# Bad input.


@pytest.mark.parametrize(
    ("w", "options", "message"),
    [
        (torch.tensor([[1.0, 2.0], [3.0, float("nan")]]), {}, r"w\[1, 1\] is nan"),
        (torch.tensor([0.0, float("-inf")]), {}, r"w\[1\] is -inf"),
        (torch.ones(2, dtype=torch.float16) / 0, {}, r"w\[0\] is inf"),
        (torch.ones(4, dtype=torch.float64), {}, "w is torch.float64: quantize takes float32"),
        (torch.ones(4, dtype=torch.int32), {}, "w is torch.int32"),
        (torch.ones(0, 4), {}, r"w has shape \[0, 4\]"),
        (torch.ones(4, 6).T, {}, r"w \[6, 4\] is not contiguous \(strides \(1, 6\)\)"),
        (torch._neg_view(torch.ones(4)), {}, r"w is a negative .* pass w\.resolve_neg\(\)"),
        (torch.ones(4), {"block_size": 100}, "block_size=100: use one of 32, 64"),
        (torch.ones(4, 4).to_sparse_csr(), {}, "w is torch.sparse_csr: wanted an ordinary, dense tensor"),
        (torch.ones(4, device="meta"), {}, "w is on meta, where tensors have no values"),
        ([1.0, 2.0], {}, "w is a list: wanted a tensor"),
        (torch.ones(4), {"kind": "int4"}, "kind='int4' is not a 4-bit code: use 'nf4' or 'fp4'"),
    ],
)
@pytest.mark.parametrize("backend", ["reference", "c"])
def test_quantize_refuses(w, options, message, backend):
    with pytest.raises(QuantizationError, match=message):
        nf4.quantize(w, **options, backend=backend)


def test_out_may_not_lie_over_what_is_decoded_into_it():
    q = nf4.quantize(torch.randn(256, 128))
    memory = torch.zeros(256 * 128 * 5, dtype=torch.uint8)
    inside = replace(q, packed=memory[: q.packed.numel()].copy_(q.packed))
    over, beside = (memory[first : first + 4 * 256 * 128].view(torch.float32).view(256, 128) for first in (0, 1 << 14))
    with pytest.raises(QuantizationError, match="out shares memory with what is decoded into it"):
        nf4.dequantize(inside, out=over)
    nf4.dequantize(inside, out=beside)  # one memory, but apart
    assert torch.equal(beside, nf4.dequantize(q))


@pytest.mark.parametrize("backend", ["reference", "c"])
def test_quantize_absmax_refuses(backend):
    with pytest.raises(QuantizationError, match=r"absmax is torch\.float16"):
        nf4.quantize_absmax(torch.ones(4, dtype=torch.float16), backend=backend)
    with pytest.raises(QuantizationError, match="beyond float32"):
        nf4.quantize_absmax(torch.full((4,), 3e38), backend=backend)


GOOD = {
    "packed": torch.zeros(50, dtype=torch.uint8),
    "absmax": torch.ones(2),
    "shape": (10, 10),
    "block_size": 64,
}
U8, ONE, HALF = torch.zeros(2, dtype=torch.uint8), torch.ones(1), torch.float16


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"packed": torch.zeros(49, dtype=torch.uint8)}, "packed has 49 elements, .* ask for 50"),
        ({"packed": torch.zeros(51, dtype=torch.uint8)}, "packed has 51 elements, .* ask for 50"),
        ({"packed": torch.zeros(50)}, "packed is torch.float32: wanted torch.uint8"),
        ({"packed": torch.zeros(100, dtype=torch.uint8)[::2]}, r"packed \[50\] is not contiguous"),
        ({"absmax": torch._neg_view(torch.ones(2))}, r"absmax is a negative .* pass absmax\.resolve_neg\(\)"),
        ({"absmax": torch.ones(1)}, "absmax has 1 elements, .* ask for 2"),
        ({"absmax": torch.ones(2, dtype=HALF)}, "absmax is torch.float16: wanted torch.float32"),
        ({"absmax": torch.ones(2, device="meta")}, "absmax is on meta, packed on cpu"),
        ({"absmax": U8}, "nested is missing"),
        ({"nested": Nested(ONE, ONE)}, "absmax is torch.float32: wanted torch.uint8"),
        ({"absmax": U8, "nested": Nested(torch.ones(2), ONE)}, "nested.absmax has 2 elements, .* ask for 1"),
        ({"absmax": U8, "nested": Nested(ONE, torch.ones(3))}, "nested.offset has 3 elements, .* ask for 1"),
        ({"absmax": U8, "nested": Nested(ONE, ONE.double())}, "nested.offset is torch.float64"),
        ({"block_size": 48}, "block_size=48"),
        ({"block_size": 32}, "absmax has 2 elements, .* ask for 4"),
        ({"shape": (10, 0)}, r"shape=\[10, 0\]: every dimension must be at least 1"),
        ({"shape": (-10, -10)}, r"shape=\[-10, -10\]"),
        ({"kind": "nf8"}, "kind='nf8'"),
        ({"absmax": U8, "nested": (ONE, ONE)}, r"nested is a tuple: wanted nf4\.Nested\(absmax, offset\)"),
        ({"kind": ["nf4"]}, r"kind=\['nf4'\] is not a 4-bit code"),
        ({"packed": None}, "packed is None: wanted a torch.uint8 tensor of 50"),
        ({"absmax": None}, "absmax is None: wanted a torch.float32 tensor of 2"),
        ({"absmax": U8, "nested": Nested(ONE, None)}, "nested.offset is None: wanted a torch.float32 tensor of 1"),
        ({"absmax": U8, "nested": Nested(None, ONE)}, "nested.absmax is None: wanted a torch.float32 tensor of 1"),
        ({"absmax": U8, "nested": Nested(ONE, 1.0)}, "nested.offset is 1.0: wanted"),
        ({"block_size": 64.0}, "block_size=64.0: use one of"),
        ({"shape": 100}, "shape=100: wanted a tuple of whole numbers"),
        ({"shape": [10, 10]}, r"shape=\[10, 10\]: wanted a tuple of whole numbers"),
        ({"shape": (10.0, 10.0)}, r"shape=\(10.0, 10.0\): wanted a tuple of whole numbers"),
        ({"shape": "ab"}, "shape='ab': wanted a tuple of whole numbers"),
        ({"dtype": torch.float64}, "dtype=torch.float64: float32, float16 or bfloat16 can be quantized"),
    ],
)
def test_parts_that_do_not_fit_each_other_make_no_tensor(changed, message):
    q = QuantizedTensor(**GOOD)
    with pytest.raises(QuantizationError, match=message):
        QuantizedTensor(**{**GOOD, **changed})
    with pytest.raises(QuantizationError, match=message):
        replace(q, **changed)


@pytest.mark.parametrize("backend", ["reference", "c"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": torch.int8}, "dtype=torch.int8"),
        (
            {"out": torch.zeros(10, 10, dtype=HALF)},
            r"out is torch.float16 \[10, 10\] on cpu: wanted torch.float32",
        ),
        ({"out": torch.zeros(100)}, r"out is torch.float32 \[100\] on cpu: wanted torch.float32 \[10, 10\]"),
        ({"out": torch.zeros(10, 20)[:, ::2]}, r"out \[10, 10\] is not contiguous"),
        ({"out": torch._neg_view(torch.zeros(10, 10))}, "out is a negative that torch has not written out"),
        ({"out": torch.zeros(10, 10, requires_grad=True)}, "out requires a gradient"),
        ({"out": [0.0] * 100}, "out is a list: wanted a tensor"),
    ],
)
def test_dequantize_refuses(options, message, backend):
    with pytest.raises(QuantizationError, match=message):
        nf4.dequantize(QuantizedTensor(**GOOD), **options, backend=backend)


def test_autograd_notices_what_is_written_into_out():
    out, x = torch.ones(10, 10), torch.ones(10, 10, requires_grad=True)
    y = (x * out).sum()  # keeps out for the gradient of x
    nf4.dequantize(QuantizedTensor(**GOOD), out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
    with torch.inference_mode():  # tensors of which no version is kept
        nf4.dequantize(QuantizedTensor(**GOOD), out=torch.ones(10, 10))


def test_a_scalar_comes_back():
    assert nf4.dequantize(nf4.quantize(torch.tensor(1.5))).item() == 1.5


def test_a_named_backend_that_cannot_run_says_why():
    with pytest.raises(QuantizationError, match="backend='cuda' does not exist: there are triton, c, reference"):
        nf4.dequantize(QuantizedTensor(**GOOD), backend="cuda")
    with pytest.raises(QuantizationError, match=r"backend='c' cannot run: dtype=torch.float64"):
        nf4.dequantize(QuantizedTensor(**GOOD), dtype=torch.float64, backend="c")
