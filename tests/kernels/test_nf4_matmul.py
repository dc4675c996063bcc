"""The product with a packed weight: exact where it can be, otherwise closer than torch at the same dtype."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from qlorag.kernels import nf4
from qlorag.kernels.nf4 import BLOCK_SIZES, FUSED_ROWS, QuantizationError, QuantizedTensor, cpu, fused_rows
from torch.autograd import forward_ad

pytestmark = pytest.mark.isa

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def packed_weight(n, k, *, kind="nf4", block_size=64, double_quant=True, seed=0):
    """Any codes, and scales that differ from block to block."""
    blocks = -(-n * k // block_size)
    packed = torch.randint(0, 256, (n * k // 2,), dtype=torch.uint8, generator=generator(seed))
    absmax = torch.rand(blocks, generator=generator(seed + 1)) + 0.1
    nested = None
    if double_quant:
        absmax, nested = nf4.quantize_absmax(absmax)
    return QuantizedTensor(packed=packed, absmax=absmax, nested=nested, shape=(n, k), kind=kind, block_size=block_size)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_the_identity_gives_the_weight_itself(isa, poisoned, kind, dtype):
    """x = I: every weight, each in its place, multiplied by 1 and added to zeros, so nothing is rounded."""
    for block_size, k, double_quant in itertools.product(BLOCK_SIZES[1:], (64, 192, 576), (True, False)):
        w = packed_weight(7, k, kind=kind, block_size=block_size, double_quant=double_quant)
        y = nf4.matmul(torch.eye(k, dtype=dtype), w, backend="c")
        assert torch.equal(y.T, nf4.dequantize(w, dtype=dtype, backend="reference"))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 11, 700])  # rows of W are taken in fours, and 700 by all threads
def test_error_is_at_most_twice_that_of_torch(isa, poisoned, n, dtype):
    squares = {"c": 0.0, "reference": 0.0}
    for rows, k in itertools.product((1, 2, 3, 4, 5, 8, 13), (64, 640, 4096)):
        w = packed_weight(n, k, seed=n)
        x = torch.randn(rows, k, generator=generator(k)).to(dtype)
        exact = F.linear(x.double(), nf4.dequantize(w, dtype=torch.float64))
        for backend in squares:
            error = nf4.matmul(x, w, backend=backend).double() - exact
            squares[backend] += error.square().sum().item() / k  # a sum of k products has a size of sqrt(k)
    assert squares["c"] <= 4 * squares["reference"]  # 2 squared


def test_blocks_may_end_inside_a_row_and_nested_blocks_too(isa):
    w = packed_weight(37, 960, block_size=128)  # 7.5 blocks to a row, 277.5 blocks: a second nested scale
    x = torch.randn(2, 960, dtype=torch.float32, generator=generator())
    exact = F.linear(x.double(), nf4.dequantize(w, dtype=torch.float64))
    # 960 products of about 0.5, each rounded to 2**-24 of itself and of a sum of about 15.
    torch.testing.assert_close(nf4.matmul(x, w, backend="c").double(), exact, rtol=0, atol=1e-4)


def test_a_row_depends_neither_on_the_others_nor_on_the_threads(isa):
    w = packed_weight(701, 576)
    x = torch.randn(11, 576, generator=generator())
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = torch.cat([nf4.matmul(row[None], w, backend="c") for row in x])
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(nf4.matmul(x, w, backend="c"), one)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_what_is_not_finite_reaches_its_own_results_only(isa, dtype):
    w = packed_weight(6, 128, double_quant=False)
    w.absmax[5] = float("nan")  # row 2, second block
    x = torch.randn(3, 128, generator=generator()).to(dtype)
    x[1, 70] = float("nan")
    y = nf4.matmul(x, w, backend="c")
    expected = torch.zeros(3, 6, dtype=torch.bool)
    expected[1], expected[:, 2] = True, True
    assert torch.equal(y.isnan(), expected)


def test_a_float16_result_is_the_float32_one_rounded_once(isa):
    w = packed_weight(50, 320)
    x = torch.randn(9, 320, generator=generator()).half() * 10.0 ** torch.arange(-8, 10, 2)[:, None].half()
    x = x.clamp(-6e4, 6e4)  # from sums that are subnormal to sums that are infinite
    y = nf4.matmul(x, w, backend="c")
    assert torch.equal(y, nf4.matmul(x.float(), w, backend="c").half())
    assert y.isinf().any()


@pytest.mark.compiler
@pytest.mark.parametrize("leading", [(), (1,), (3,), (2, 0), (2, 1, 3)])
def test_leading_dimensions_and_strides(leading):
    w = packed_weight(5, 64)
    x = torch.randn(*leading, 64, 2, generator=generator())[..., 0]  # every second number in memory
    y = nf4.matmul(x, w, backend="c")
    assert y.shape == (*leading, 5)
    assert torch.equal(y, nf4.matmul(x.contiguous(), w, backend="c"))


@pytest.mark.parametrize("rows", [1, 50])
@pytest.mark.parametrize("backend", [None, "c", "reference"])
def test_a_negative_that_torch_has_not_written_out(backend, rows):
    w = packed_weight(5, 64)
    x = torch.randn(rows, 64, generator=generator())
    assert torch.equal(nf4.matmul(torch._neg_view(x), w, backend=backend), nf4.matmul(-x, w, backend=backend))
    dy = torch.randn(rows, 5, generator=generator()).bfloat16()
    assert torch.equal(nf4.matmul_backward(torch._neg_view(dy), w), nf4.matmul_backward(-dy, w))


def test_the_choice_of_backend(isa):
    w = packed_weight(9, 128)
    for dtype in FLOATS:
        most = fused_rows(dtype, torch.device("cpu"))
        assert most >= FUSED_ROWS[dtype]
        few = torch.randn(min(most, 512), 128, generator=generator()).to(dtype)
        assert torch.equal(nf4.matmul(few, w), nf4.matmul(few, w, backend="c"))
        if (isa, dtype) == ("amx", torch.bfloat16):
            assert most > 10**9
        else:
            more = torch.randn(most + 1, 128, generator=generator()).to(dtype)
            assert torch.equal(nf4.matmul(more, w), F.linear(more, nf4.dequantize(w, dtype=dtype)))
    wide = few.double()
    assert torch.equal(nf4.matmul(wide, w), F.linear(wide, nf4.dequantize(w, dtype=torch.float64)))
    for unfit in (packed_weight(4, 96), packed_weight(4, 128, block_size=32)):
        x = torch.randn(1, unfit.shape[1], generator=generator())
        assert torch.equal(nf4.matmul(x, unfit), nf4.matmul(x, unfit, backend="reference"))
        assert nf4.prepare_matmul(unfit) is None
        with pytest.raises(QuantizationError, match=r"backend='c' cannot run: K=\d+ and block_size=\d+, and it"):
            nf4.matmul(x, unfit, backend="c")
        with pytest.raises(QuantizationError, match=r"backend='c' cannot run: K=\d+ and block_size=\d+, and it"):
            nf4.matmul_backward(torch.ones(1, 4, dtype=torch.bfloat16), unfit, backend="c")
    assert any(s.operation == "nf4.matmul" and s.backend == "c" for s in nf4.available_backends())


def test_the_backward_is_the_product_with_the_decoded_weight(isa):
    w = packed_weight(9, 128)
    for dtype in FLOATS:
        dy = torch.randn(2, 3, 9, generator=generator()).to(dtype)
        assert torch.equal(nf4.matmul_backward(dy, w, backend="reference"), dy @ nf4.dequantize(w, dtype=dtype))
        if cpu.has_matrix_unit() and dtype == torch.bfloat16:
            assert torch.equal(nf4.matmul_backward(dy, w), nf4.matmul_backward(dy, w, backend="c"))
            continue
        assert torch.equal(nf4.matmul_backward(dy, w), dy @ nf4.dequantize(w, dtype=dtype))
        with pytest.raises(QuantizationError, match="backend='c' cannot run: its C kernel takes bfloat16 on a proc"):
            nf4.matmul_backward(dy, w, backend="c")
    with pytest.raises(QuantizationError, match=r"dy has shape \[2, 8\]: wanted \[..., 9\]"):
        nf4.matmul_backward(torch.zeros(2, 8), w)


def test_a_bias_is_added():
    w, bias = packed_weight(9, 128), torch.randn(9, generator=generator())
    for rows in (1, 50):  # fused, decoded
        x = torch.randn(rows, 128, generator=generator())
        torch.testing.assert_close(nf4.matmul(x, w, bias=bias), nf4.matmul(x, w) + bias)


@pytest.mark.compiler
def test_a_prepared_product_keeps_its_weight_alive():
    w = packed_weight(33, 128)
    x = torch.randn(2, 128, generator=generator())
    expected = nf4.matmul(x, w)
    product = nf4.prepare_matmul(w)
    assert product is not None
    del w
    torch.full((33 * 64,), 255, dtype=torch.uint8)  # would take the memory of `packed`, were it free
    assert torch.equal(product(x), expected)


@pytest.mark.compiler
@pytest.mark.parametrize(
    "x",
    [
        torch.ones(1, 64 * 20_000),
        torch.ones(()),
        torch.ones(1, 64, dtype=torch.float64),
        torch.ones(1, 64, device="meta"),
    ],
    ids=lambda x: f"{list(x.shape)}-{x.dtype}-{x.device}",
)
def test_a_prepared_product_takes_any_strides_and_refuses_other_x(x):
    product = nf4.prepare_matmul(packed_weight(33, 64))
    assert product is not None
    strided, negative = torch.ones(64, 2).T, torch._neg_view(torch.ones(2, 64))
    assert torch.equal(product(strided), product(torch.ones(2, 64)))
    assert torch.equal(product(negative), product(-torch.ones(2, 64)))
    with pytest.raises(
        QuantizationError, match=r"x is torch.*: wanted float32, float16 or bfloat16 \[..., 64\] on cpu"
    ):
        product(x)
    with pytest.raises(QuantizationError, match=r"dy is torch.*: wanted bfloat16 \[..., 33\] on cpu"):
        product.backward(torch.ones(1, 64))


# A few rows of bfloat16 (fixed.c): a weight is round(D table[code]) / D times its scale.

FEW = 4  # rows: from 5 on the matrix unit takes over, where there is one


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("k", [64, 192, 576, 1024, 4096, 16384])
def test_in_fixed_point_a_result_is_the_float32_one_but_for_a_rounding(isa, kind, k):
    w, random = packed_weight(301, k, kind=kind), generator(k)
    x = torch.randn(FEW, k, generator=random)
    x[1] *= 10.0 ** torch.randint(-6, 7, (k // 64,), generator=random).repeat_interleave(64)
    x[2, :: k // 8] *= 1e3
    x[3] = x[3].abs()  # what the errors have in common adds up
    x = x.bfloat16()
    exact = x.double() @ nf4.dequantize(w, dtype=torch.float64).T
    y = nf4.matmul(x, w, backend="c")
    differs = y != nf4.matmul(x.float(), w, backend="c").bfloat16()
    assert differs[:3].float().mean() < 0.04  # close to the middle of two bfloat16 numbers
    assert differs[3].float().mean() < 0.1
    assert (y - exact).norm(dim=1).le(2.0**-8 * exact.norm(dim=1)).all()


def test_in_fixed_point_outliers_take_nothing_from_their_neighbours(isa):
    """Eight elements share a power of two. A row that loses by it is multiplied in float32."""
    w, random = packed_weight(101, 576), generator()
    w.packed.view(101, 288)[:, 100::40] = 0x77  # weights of 0
    x = torch.randn(FEW, 576, generator=random).bfloat16()
    places = torch.arange(200, 576, 80)
    places = torch.cat([places, places + 1])
    x[:, places] = 0
    before = nf4.matmul(x, w, backend="c").double()
    for size in (2.0, 1e1, 1e2, 1e3, 1e4, 1e6, 1e12, 1e30):
        x[:, places] = size
        after = nf4.matmul(x, w, backend="c").double()
        assert (after - before).norm() <= 2e-3 * before.norm(), size


def test_in_fixed_point_small_results_survive_a_processor_without_subnormal_numbers(isa):
    """Nothing on the way is much smaller than x, w and y."""
    w = packed_weight(1024, 1024)
    x = (torch.randn(1, 1024, generator=generator()) * 2.0**-38).bfloat16()
    y = nf4.matmul(x, w, backend="c")
    assert (y != nf4.matmul(x.float(), w, backend="c").bfloat16()).any()  # it was in fixed point
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot go without")
    try:
        assert torch.equal(nf4.matmul(x, w, backend="c"), y)
    finally:
        torch.set_flush_denormal(False)
    assert (y / 2.0**-38 - nf4.matmul(x.float() / 2.0**-38, w, backend="c")).abs().max() < 0.5


def test_in_fixed_point_every_power_of_two(isa):
    """Beyond 2^-40 and 2^40 a row is multiplied in float32, without a step between the two."""
    w = packed_weight(9, 192)
    x = torch.randn(FEW, 192, generator=generator()).bfloat16()
    y = nf4.matmul(x, w, backend="c")
    for power in range(-110, 110):
        scaled = nf4.matmul(x * 2.0**power, w, backend="c") / 2.0**power
        assert (scaled != y).float().mean() < 0.15 if abs(power) > 37 else torch.equal(scaled, y), power
        torch.testing.assert_close(scaled, y, rtol=2.0**-7, atol=0)


@pytest.mark.parametrize("suits", ["", "-", "x", "---x", "x---", "--x-----x-x"])
def test_in_fixed_point_rows_that_do_not_suit_are_multiplied_together(isa, suits):
    """As alone, wherever they stand."""
    w = packed_weight(37, 192)
    x = torch.randn(len(suits), 192, generator=generator()).bfloat16()
    for m, sign in enumerate(suits):
        if sign == "-":
            x[m, 1:] = 0
    if isa == "amx":
        x = x[:FEW]
    y = nf4.matmul(x, w, backend="c")
    assert y.shape == (len(x), 37)
    for m, row in enumerate(x):
        assert torch.equal(y[m], nf4.matmul(row, w, backend="c"))
        if suits[m] == "-":
            assert torch.equal(y[m], nf4.matmul(row.float(), w, backend="c").bfloat16())


@pytest.mark.parametrize("sign", [1, -1])
def test_in_fixed_point_the_largest_sums_fit(isa, sign):
    w = packed_weight(5, 4096, double_quant=False)
    w.absmax.fill_(0.5)
    w.packed.fill_(0xFF if sign > 0 else 0x00)  # every weight is 0.5, or -0.5
    x = torch.full((FEW, 4096), 1.9921875).bfloat16()
    assert torch.equal(nf4.matmul(x, w, backend="c"), (sign * 2048 * x[:, :5].float()).bfloat16())


def test_in_fixed_point_a_row_depends_neither_on_the_others_nor_on_the_threads(isa):
    w = packed_weight(701, 576)
    x = torch.randn(11, 576, generator=generator()).bfloat16()
    x[4, 17], x[5, 3], x[10, 0] = float("inf"), float("nan"), -float("inf")  # go through matmul.c, alone
    rows = (1, 2, 3, 4) if isa == "amx" else (1, 2, 3, 7, 11)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = torch.cat([nf4.matmul(row[None], w, backend="c") for row in x])
        for threads, count in itertools.product((1, 2, 3), rows):
            torch.set_num_threads(threads)
            for first in range(12 - count):
                y = nf4.matmul(x[first : first + count], w, backend="c")
                assert torch.equal(y.view(torch.int16), one[first : first + count].view(torch.int16))
    finally:
        torch.set_num_threads(before)
    exact = nf4.matmul(x, w, backend="reference")
    assert torch.equal(one.isnan(), exact.isnan()) and torch.equal(one.isinf(), exact.isinf())


def test_in_fixed_point_many_rows_are_taken_in_blocks(isa):
    if isa == "amx":
        pytest.skip("many rows are for the matrix unit")
    w, x = packed_weight(5, 65536), torch.randn(21, 65536, generator=generator()).bfloat16()
    together = nf4.matmul(x, w, backend="c")
    assert torch.equal(together, torch.cat([nf4.matmul(row[None], w, backend="c") for row in x]))


# The matrix unit (amx_forward.c, amx_backward.c): the weight is the bits of dequantize, forward and backward.

MANY = (5, 6, 15, 16, 17, 31, 32, 33, 48, 49, 520)  # rows: tiles are 16 high, pairs of them multiplied, 512 at a time


def normal(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed)).bfloat16()


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_on_the_matrix_unit_the_identity_gives_the_weight_itself(matrix_unit, poisoned, kind):
    for block_size, n, double_quant in itertools.product(BLOCK_SIZES[1:], (1, 7, 33, 130), (True, False)):
        w = packed_weight(n, 192, kind=kind, block_size=block_size, double_quant=double_quant)
        decoded = nf4.dequantize(w, dtype=torch.bfloat16, backend="reference")
        assert torch.equal(nf4.matmul(torch.eye(192).bfloat16(), w, backend="c").T, decoded)
        assert torch.equal(nf4.matmul_backward(torch.eye(n).bfloat16(), w, backend="c"), decoded)


@pytest.mark.parametrize("n", [1, 16, 31, 64, 65, 300])
def test_on_the_matrix_unit_error_is_at_most_twice_that_of_torch(matrix_unit, poisoned, n):
    for k in (64, 192, 576, 1088, 4096):
        w = packed_weight(n, k, seed=n)
        decoded = nf4.dequantize(w, dtype=torch.float64)
        rounded = decoded.bfloat16()
        for rows in MANY:
            x, dy = normal(rows, k, seed=rows), normal(rows, n, seed=rows)
            for got, torchs, exact in (
                (nf4.matmul(x, w, backend="c"), F.linear(x, rounded), x.double() @ decoded.T),
                (nf4.matmul_backward(dy, w, backend="c"), dy @ rounded, dy.double() @ decoded),
            ):
                assert (got - exact).norm() <= 2 * (torchs - exact).norm(), (rows, k)


def test_the_longest_row(matrix_unit):
    w = packed_weight(5, 65536)
    x = normal(17, 65536)
    torch.testing.assert_close(nf4.matmul(x, w, backend="c"), nf4.matmul(x, w, backend="reference"))


def test_on_the_matrix_unit_a_row_depends_neither_on_the_others_nor_on_the_threads(matrix_unit):
    w = packed_weight(701, 1216)
    x, dy = normal(71, 1216), normal(71, 701)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        y, dx = nf4.matmul(x, w, backend="c"), nf4.matmul_backward(dy, w, backend="c")
        for count in (5, 16, 17, 33, 50):
            assert torch.equal(nf4.matmul(x[-count:], w, backend="c"), y[-count:])
            assert torch.equal(nf4.matmul_backward(dy[-count:], w, backend="c"), dx[-count:])
        for threads in (2, 3, 16):
            torch.set_num_threads(threads)
            for count in (9, 71):
                assert torch.equal(nf4.matmul(x[:count], w, backend="c"), y[:count])
                assert torch.equal(nf4.matmul_backward(dy[:count], w, backend="c"), dx[:count])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("rows", [6, 20])
def test_on_the_matrix_unit_what_is_not_finite_reaches_its_own_results_only(matrix_unit, rows):
    w = packed_weight(37, 192, double_quant=False)
    w.absmax[5 * 3 + 1] = float("nan")  # row 5, second block
    x, dy = normal(rows, 192), normal(rows, 37)
    x[1, 70], x[3, 5], dy[2, 36] = float("nan"), float("inf"), float("nan")
    y = nf4.matmul(x, w, backend="c")
    expected = torch.zeros(rows, 37, dtype=torch.bool)
    expected[1], expected[:, 5] = True, True
    assert torch.equal(y.isnan(), expected | nf4.matmul(x, w, backend="reference").isnan())
    assert not y[4:, :5].isnan().any()
    dx = nf4.matmul_backward(dy, w, backend="c")
    expected = torch.zeros(rows, 192, dtype=torch.bool)
    expected[2], expected[:, 64:128] = True, True
    assert torch.equal(dx.isnan(), expected)


def test_what_is_smaller_than_normal_numbers_counts_as_nothing(matrix_unit):
    """As in torch's own bfloat16 product on this unit; said in amx_forward.c."""
    w = packed_weight(3, 64, double_quant=False)
    w.absmax.fill_(1.0)
    tiny = torch.full((5, 64), 2.0**-130, dtype=torch.bfloat16)
    assert (tiny != 0).all() and (nf4.matmul(tiny, w, backend="c") == 0).all()
    w.absmax.fill_(2.0**-130)
    assert (nf4.matmul(torch.ones(5, 64, dtype=torch.bfloat16), w, backend="c") == 0).all()


def test_torchs_products_in_between_are_not_disturbed(matrix_unit):
    """Both configure the tiles, each for itself."""
    w = packed_weight(100, 320)
    x, other, right = normal(40, 320), normal(64, 96), normal(96, 48)
    ours, theirs = nf4.matmul(x, w), other @ right
    for rows in (5, 40, 16, 33):
        assert torch.equal(nf4.matmul(x[:rows], w), ours[:rows])
        assert torch.equal(other @ right, theirs)


def test_from_several_python_threads(matrix_unit):
    w = packed_weight(300, 640)
    inputs = [normal(5 + 7 * i, 640, seed=i) for i in range(8)]
    alone = [nf4.matmul(x, w) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda i: nf4.matmul(inputs[i % 8], w), range(160)))
    assert all(torch.equal(y, alone[i % 8]) for i, y in enumerate(together))


def test_no_rows(matrix_unit):
    w = packed_weight(5, 64)
    assert nf4.matmul(torch.empty(0, 64, dtype=torch.bfloat16), w, backend="c").shape == (0, 5)
    assert nf4.matmul_backward(torch.empty(2, 0, 5, dtype=torch.bfloat16), w, backend="c").shape == (2, 0, 64)


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (torch.zeros(2, 63), {}, r"x has shape \[2, 63\]: wanted \[..., 64\]"),
        (torch.zeros(()), {}, r"x has shape \[\]"),
        (torch.zeros(2, 64, dtype=torch.int64), {}, "x is torch.int64: wanted float32"),
        (torch.zeros(2, 64, device="meta"), {}, "x is on meta, packed on cpu"),
        (torch.zeros(2, 64, requires_grad=True), {}, "x requires a gradient, and this product has none"),
        (
            torch.zeros(2, 64),
            {"bias": torch.zeros(4)},
            r"bias is torch.float32 \[4\] on cpu: wanted torch.float32 \[5\]",
        ),
        (torch.zeros(2, 64), {"backend": "cuda"}, "backend='cuda' does not exist"),
        ([0.0] * 64, {}, "x is a list: wanted a tensor"),
        (torch.zeros(2, 64).to_sparse(), {}, "x is torch.sparse_coo: wanted an ordinary, dense tensor"),
        (torch.zeros(2, 64), {"bias": [0.0] * 5}, "bias is a list: wanted a tensor"),
    ],
)
def test_matmul_refuses(x, options, message):
    with pytest.raises(QuantizationError, match=message):
        nf4.matmul(x, packed_weight(5, 64), **options)


@pytest.mark.parametrize("shape", [(5, 1, 64), (5, 64, 1), (320,)])
def test_products_refuse_a_weight_that_is_no_matrix(shape):
    w = replace(packed_weight(5, 64), shape=shape)
    for call in (
        lambda: nf4.matmul(torch.zeros(2, 64), w),
        lambda: nf4.matmul_backward(torch.zeros(2, 5), w),
        lambda: nf4.prepare_matmul(w),
    ):
        with pytest.raises(QuantizationError, match=r"shape=\[[\d, ]+\]: the weight of a product has shape \[N, K\]"):
            call()


@pytest.mark.compiler
def test_a_forward_derivative_is_refused():
    w, x = packed_weight(5, 64), torch.ones(1, 64)
    with forward_ad.dual_level():
        with pytest.raises(QuantizationError, match="x has a tangent, and this product no forward-mode derivative"):
            nf4.matmul(forward_ad.make_dual(x, x), w)
        assert torch.equal(nf4.matmul(x, w), nf4.matmul(x, w, backend="c"))
