"""AddressSanitizer and UndefinedBehaviorSanitizer over the C kernels: every operation at every instruction set.

driver.c runs them outside of Python, each buffer in a heap allocation of exactly its size, so that one byte read or
written beyond is an error. It is built without OpenMP, where each task runs on the one thread, and with it for what is
large enough to be divided. NEON is in test_neon.py, with closed pages instead.
"""

from __future__ import annotations

import dataclasses
from signal import SIGBUS, SIGSEGV

import pytest
from qlorag.kernels.nf4.cpu import DTYPES

pytestmark = pytest.mark.deep

FLAGS = ("-O1", "-g", "-DHEAP", "-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all")


@pytest.fixture(scope="module")
def driver(build_driver):
    return build_driver("cc", *FLAGS)


@pytest.mark.parametrize("operation", ["dequantize", "quantize", "matmul", "large"])
def test_nothing_outside_the_buffers_nothing_undefined(driver, calls, isa, operation):
    driver.check(calls[operation], isa)


@pytest.fixture(scope="module")
def threaded(build_driver):
    return build_driver("cc", *FLAGS, "-fopenmp")


@pytest.mark.parametrize("threads", [2, 3, 16])
def test_several_threads(threaded, calls, isa, threads):
    large = calls["large"] + (calls["large, matrix unit"] if isa == "amx" else [])
    threaded.check([dataclasses.replace(call, threads=threads) for call in large], isa)


def test_the_matrix_unit(driver, calls, matrix_unit):
    driver.check(calls["matrix unit"], "amx")


def test_one_byte_too_few_is_caught(driver, one_byte_short, isa):
    done = driver.start(one_byte_short(isa))
    assert done.returncode != 0 and "ERROR: AddressSanitizer" in done.stderr


def test_what_is_undefined_is_caught(driver, calls, isa):
    done = driver.start(dataclasses.replace(calls["dequantize"][0], block_size=0).encode(isa))
    assert done.returncode != 0 and "runtime error: division by zero" in done.stderr


@pytest.fixture(scope="module")
def guarded(build_driver):
    return build_driver("cc")


def test_streaming_stores_end_with_the_buffer(guarded, calls, isa):
    """The sanitizer does not know these instructions. The processor does: the next page is closed."""
    streamed = [call for call in calls["dequantize"] if call.stream and call.outputs[0].nbytes % 64 == 0]
    assert {call.dtype for call in streamed} == set(DTYPES)
    guarded.check(streamed, isa)
    short = streamed[-1].encode(isa, short=6, by=64)  # 64, so that it begins where it may be streamed to
    assert guarded.start(short).returncode in (-SIGSEGV, -SIGBUS)


@pytest.mark.parametrize("operation", ["matmul", "matmul_backward"])
@pytest.mark.parametrize("buffer", [0, 1, 2, 3, 5, 6, 7])  # not 4, the 256 numbers of a second table
def test_the_matrix_unit_ends_with_the_buffer(guarded, calls, matrix_unit, operation, buffer):
    """Nor does the sanitizer know tiles and masked stores."""
    calls_of_32 = [c for c in calls["matrix unit"] if c.operation == operation and c.rows == 32 and c.numel > 10_000]
    guarded.check(calls_of_32, "amx")
    assert guarded.start(calls_of_32[0].encode("amx", short=buffer)).returncode in (-SIGSEGV, -SIGBUS)
