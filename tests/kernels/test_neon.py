"""NEON against the reference. On another processor, cross-compiled and run under qemu: driver.c says how."""

from __future__ import annotations

import dataclasses
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from signal import SIGBUS, SIGSEGV

import pytest
import torch
from qlorag.kernels.native import ISAS, IsaError, build, choose_isa, isas_up_to
from qlorag.kernels.nf4 import cpu

pytestmark = pytest.mark.deep

COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"  # Debian: gcc-aarch64-linux-gnu, qemu-user
AT_EVERY_ISA = pytest.mark.parametrize("isa", ["scalar", "neon"])


@pytest.fixture(scope="module")
def driver(build_driver):
    if platform.machine() in ("aarch64", "arm64"):
        return build_driver("cc", "-fopenmp")
    return build_driver(COMPILER, "-static", "-fopenmp", start=(EMULATOR,))


ZIG = (sys.executable, "-m", "ziglang", "cc")  # a clang with headers for every target, from the package index


@pytest.mark.parametrize(
    "compiler",
    [
        pytest.param((COMPILER, "-fopenmp"), id="gcc"),
        pytest.param((*ZIG, "-target", "aarch64-linux-musl"), id="clang"),
        pytest.param((*ZIG, "-target", "x86_64-linux-gnu", "-mcpu=x86_64"), id="clang-x86"),  # a second opinion
        pytest.param((*ZIG, "-target", "riscv64-linux-musl"), id="clang-scalar"),  # neither of the two families
    ],
)
def test_it_compiles_without_a_warning(compiler, tmp_path, monkeypatch):
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"{compiler[0]} is not installed")
    for name in ("ZIG_LOCAL_CACHE_DIR", "ZIG_GLOBAL_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "zig"))
    flags = (*build.FLAGS, "-Wall", "-Wextra", "-Werror")
    source = Path(cpu.__file__).with_name("cpu.c")
    subprocess.run([*compiler, *flags, "-c", str(source), "-o", str(tmp_path / "cpu.o")], check=True)
    assert (tmp_path / "cpu.o").stat().st_size > 10_000


@AT_EVERY_ISA
@pytest.mark.parametrize("operation", ["dequantize", "quantize", "matmul", "large"])
def test_bits_of_the_reference_and_error_of_the_product(driver, calls, operation, isa):
    driver.check(calls[operation], isa)


@AT_EVERY_ISA
def test_one_byte_too_few_is_caught(driver, one_byte_short, isa):
    """So the calls above, which were not caught, read and wrote nothing beyond their buffers."""
    assert driver.start(one_byte_short(isa)).returncode in (-SIGSEGV, -SIGBUS, 128 + SIGSEGV)


def test_a_level_that_the_processor_lacks_is_noticed(driver, calls):
    with pytest.raises(AssertionError, match="this is neon"):
        driver.check(calls["large"], "avx2")


@AT_EVERY_ISA
def test_the_thread_count_does_not_change_a_bit(driver, calls, isa):
    one = driver.run(calls["large"], isa)
    for threads in (2, 3):
        many = driver.run([dataclasses.replace(call, threads=threads) for call in calls["large"]], isa)
        for a, b in zip(one, many, strict=True):
            assert all(map(torch.equal, a, b))


@AT_EVERY_ISA
def test_a_row_of_the_product_does_not_depend_on_the_others(driver, calls, isa):
    products = [call for call in calls["matmul"] if call.rows == 9]
    for call, (together,) in zip(products, driver.run(products, isa), strict=True):
        *w, x = call.inputs
        alone = [
            dataclasses.replace(call, inputs=(*w, row[None]), outputs=(want[None],), rows=1)
            for row, want in zip(x, call.outputs[0], strict=True)
        ]
        assert torch.equal(torch.cat([y for (y,) in driver.run(alone, isa)]), together)


@AT_EVERY_ISA
@pytest.mark.parametrize("pattern", [0x7FFFFFFF, 0x7FC00000, 0x7F800001])
def test_a_nan_scale_stays_nan(driver, calls, isa, pattern):
    """All-ones is the NaN that rounding by addition would turn into -0."""
    nan = torch.tensor([pattern], dtype=torch.int32).view(torch.float32)
    bad = []
    for call in calls["dequantize"]:
        packed, absmax, nested, *tables = call.inputs
        if nested is None:
            bad.append(dataclasses.replace(call, inputs=(packed, nan.expand_as(absmax), None, *tables)))
    assert bad and all(out.isnan().all() for (out,) in driver.run(bad, isa))


def test_the_names_of_levels(monkeypatch):
    assert [isas_up_to(ISAS.index(name)) for name in ("scalar", "avx2", "avx512", "neon")] == [
        ("scalar",),
        ("scalar", "avx2"),
        ("scalar", "avx2", "avx512"),
        ("scalar", "neon"),
    ]
    neon, avx512 = ISAS.index("neon"), ISAS.index("avx512")
    assert choose_isa(neon) == neon
    for name in ("scalar", "neon"):
        monkeypatch.setenv("QLORAG_CPU_LEVEL", name)
        assert choose_isa(neon) == ISAS.index(name)
    with pytest.raises(IsaError, match="neon, but this processor has avx512: use one of scalar, avx2, avx512, or"):
        choose_isa(avx512)
    monkeypatch.setenv("QLORAG_CPU_LEVEL", "avx2")
    with pytest.raises(IsaError, match="avx2, but this processor has neon: use one of scalar, neon, or unset"):
        choose_isa(neon)
