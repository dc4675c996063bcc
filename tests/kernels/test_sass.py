"""The machine code that the Triton kernels become, compiled here for cards that are not here.

No GPU is needed, and no speed is claimed: these are gates on what would make a kernel slow for certain. Ceilings are a
few percent above what Triton 3.9 gave (bench/machine_code/ROOFLINE.md); one that trips after an upgrade is worth a
look.

Compiling takes a second, most of it outside of Python. So all that the collected tests will ask for is handed to as
many threads as there are processors when the first of them runs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
from machine_code import sass, sass_cases
from triton.backends.compiler import GPUTarget

pytestmark = pytest.mark.deep

DTYPES = ("bf16", "fp16", "fp32")
NVIDIA = [name for name, target in sass.TARGETS.items() if target.backend == "cuda"]
CASES = {dtype: {case.name: case for case in sass.cases(dtype)} for dtype in DTYPES}
RARE = {dtype: {case.name: case for case in sass_cases.rare_cases(dtype)} for dtype in DTYPES}
TARGETS = {
    **sass.TARGETS,
    **{arch: GPUTarget("hip", arch, 32 if arch == "gfx1100" else 64) for arch in ("gfx90a", "gfx950", "gfx1100")},
}
# Instructions per element: (sm_80, sm_90, sm_100).
CEILINGS = {
    "bf16": {
        "dequantize": (11, 11.5, 11.5),
        "quantize": (13.6, 13.6, 13),
        "quantize, FP4": (17, 17, 16.7),
        "few rows, M=1": (6.6, 6.6, 6.6),
        "few rows, M=2": (11, 11, 10.5),
        "many rows, 16 at a time": (10.5, 10.5, 10.5),
        "many rows, 128 at a time": (28, 14, 15),
        "backward, 128 at a time": (28, 15.5, 15.5),
        "rms_norm": (11, 12, 12),
        "rms_norm backward": (14, 14, 11.5),
        "rms_norm backward, dw": (15, 15.5, 13),
        "rope": (6, 6, 5),
        "rope backward": (6, 6, 5),
        "swiglu": (20.5, 20.5, 20),
        "swiglu backward": (29, 29, 26),
        "cross_entropy": (23, 23, 20.5),
        "lora, R=8": (12, 10.5, 16),
        "lora, R=64": (17, 13.5, 18.5),
    },
    "fp16": {
        "dequantize": (11, 11.5, 11.5),
        "quantize": (13.6, 13.6, 13),
        "quantize, FP4": (17, 17, 16.7),
        "few rows, M=1": (6.6, 6.6, 6.6),
        "few rows, M=2": (11, 11, 10.5),
        "many rows, 16 at a time": (10.5, 10.5, 10.5),
        "many rows, 128 at a time": (28, 14, 15),
        "backward, 128 at a time": (28, 15.5, 15.5),
    },
    "fp32": {
        "dequantize": (14, 15.3, 15.3),
        "quantize": (14.8, 14.8, 14.4),
        "quantize, FP4": (18.2, 18.1, 18),
        "few rows, M=1": (6.6, 6.6, 6.6),
        "few rows, M=2": (11, 11, 10.5),
        "many rows, 16 at a time": (36, 36, 36),
        "many rows, 32 at a time": (54, 54, 55),
        "backward, 32 at a time": (55, 54.5, 53),
    },
}
TENSOR_CORES = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "MFMA"}


def read(dtype: str, name: str, target: str) -> sass.Compiled:
    return sass.compile_case(CASES[dtype][name], TARGETS[target])


def spilled(dtype: str, name: str, target: str, ones: tuple[str, ...] = ()) -> int:
    """Bytes; `ones` are sizes that are 1, which a launch makes constants of the program."""
    case = CASES[dtype].get(name) or RARE[dtype][name]
    signature = {key: kind for key, kind in case.signature.items() if key not in ones}
    constants = {**case.constants, **dict.fromkeys(ones, 1)}
    return sass.spilled(case._replace(signature=signature, constants=constants), TARGETS[target])


# What each test asks for, from its parameters.
WANTED: dict[str, Callable[..., list[tuple[Any, ...]]]] = {
    "test_memory_moves_in_wide_words_and_nothing_spills": lambda of, target: [(read, *of, target)],
    "test_what_is_not_read_does_not_spill_either": lambda of, target: [(spilled, *of, target)],
    "test_sizes_of_one_compile": lambda name: [(spilled, "bf16", name, "sm_90", ones) for ones in sizes_of_one(name)],
    "test_other_cards_of_amd_compile_the_products": lambda name, arch: [(spilled, "bf16", name, arch)],
}


def sizes_of_one(name: str) -> list[tuple[str, ...]]:
    """All sizes, and the first alone, which is often the number of rows of x."""
    sizes = tuple(size for size, kind in CASES["bf16"][name].signature.items() if kind == "i32")
    return [sizes, sizes[:1]]


@pytest.fixture(scope="module")
def result(request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    """Of a function above, as `result(read, "bf16", "quantize", "sm_90")`; the work began when the first test did."""
    futures: dict[tuple[Any, ...], Future[Any]] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:

        def start(function: Callable[..., Any], *arguments: Any) -> Future[Any]:
            key = (function, *arguments)
            if key not in futures:
                futures[key] = pool.submit(function, *arguments)
            return futures[key]

        for item in request.session.items:
            if item.path == Path(__file__) and (wanted := WANTED.get(item.originalname)):
                for job in wanted(**item.callspec.params):
                    start(*job)
        yield lambda function, *arguments: start(function, *arguments).result()
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("target", sass.TARGETS)
@pytest.mark.parametrize("of", [(dtype, name) for dtype in DTYPES for name in CEILINGS[dtype]], ids=", ".join)
def test_memory_moves_in_wide_words_and_nothing_spills(of, target, result):
    """The kernels of nf4 for every dtype, the others for bfloat16."""
    (dtype, name), code = of, result(read, *of, target)
    assert code.spilled == 0
    assert not [op for op in code.text.split() if op.startswith(("LDL", "STL"))]
    if target in NVIDIA:
        assert code.per_element <= CEILINGS[dtype][name][NVIDIA.index(target)]
        # 16 x 16 float32 of x are 8 bytes to a thread.
        assert max(code.loads) == (64 if of == ("fp32", "many rows, 16 at a time") else 128)
        if not name.startswith("few"):  # whose results are single numbers
            assert 128 in code.stores
    elif dtype != "fp32":
        assert max(code.loads) >= 64
    if CASES[dtype][name].tensor_cores:
        # With 16 rows of x there is too little for the wide instructions of Hopper and Blackwell.
        wanted = "HMMA" if name.startswith("many rows, 16") and target in NVIDIA else TENSOR_CORES[target]
        # One instruction of Hopper's multiplies 64 x 64 by 16, all that rank 8 needs.
        assert code.tensor_cores.get(wanted, 0) >= (1 if name == "lora, R=8" else 4)


def test_every_case_has_a_ceiling():
    assert [*CEILINGS["bf16"]] == [*CASES["bf16"]]
    for dtype in ("fp16", "fp32"):
        assert [*CEILINGS[dtype]] == [case.name for case in sass_cases.nf4_cases(dtype)]


@pytest.mark.parametrize(
    ("of", "target"),
    [((dtype, name), "sm_90") for dtype in DTYPES for name in CASES[dtype] if name not in CEILINGS[dtype]]
    + [((dtype, name), target) for dtype in DTYPES for name in RARE[dtype] for target in ("sm_90", "gfx942")],
)
def test_what_is_not_read_does_not_spill_either(of, target, result):
    """The other kernels for float16 and float32; launches that are too short to matter."""
    assert result(spilled, *of, target) == 0


@pytest.mark.parametrize("name", CASES["bf16"])
def test_sizes_of_one_compile(name, result):
    """A launch makes an integer that is 1 a constant of the program, which the interpreter does not."""
    for ones in sizes_of_one(name):
        assert ones and result(spilled, "bf16", name, "sm_90", ones) == 0


@pytest.mark.parametrize("arch", [arch for arch in TARGETS if arch not in sass.TARGETS])
@pytest.mark.parametrize("name", ["many rows, 16 at a time", "backward, 128 at a time", "lora, R=8"])
def test_other_cards_of_amd_compile_the_products(name, arch, result):
    """Which names of precision `tl.dot` takes differs between them."""
    assert result(spilled, "bf16", name, arch) == 0


def test_16_bit_results_are_rounded_to_nearest_even(result):
    """What the interpreter does not do (tests/interpreter/conftest.py), the hardware is told to."""
    text = result(read, "bf16", "dequantize", "sm_90").text
    packs = [line for line in text.splitlines() if "F2FP.BF16" in line]
    assert packs and not [line for line in packs if ".RZ" in line]


@pytest.mark.parametrize("target", NVIDIA)
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_rounds_the_scaled_number_before_it_subtracts(dtype, target, result):
    """An fma of w, 1 / absmax and the threshold would be one rounding short, and send ties astray."""
    lines = result(read, dtype, "quantize", target).text.splitlines()
    elements = sass_cases.gpu.QUANTIZE_TILE // (32 * CASES[dtype]["quantize"].options["num_warps"])
    assert sum(" FADD " in line for line in lines) + 2 * sum(" FADD2 " in line for line in lines) >= elements


def test_the_reader_finds_loop_and_widths():
    text = """
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_0:
        /*0010*/                   LDG.E.128.CONSTANT R4, [R2.64] ;
        /*0020*/              @!P1 BRA `(.L_x_3) ;
.L_x_1:
        /*0030*/              @!P0 LDG.E.U8 R5, [R2.64+0x4] ;
        /*0040*/               @P1 BRA `(.L_x_0) ;
        /*0050*/                   STG.E.64 [R8.64], R4 ;
        /*0060*/                   EXIT ;
.L_x_3:
        /*0070*/                   NANOSLEEP 0x20 ;
        /*0080*/                   BRA `(.L_x_1) ;
.L_x_2:
        /*0090*/                   BRA `(.L_x_2);
        /*00a0*/                   NOP;
$__internal_0_$__cuda_sm3x_div_rn_noftz_f32_slowpath:
        /*00b0*/                   MUFU.RCP R0, R1 ;
"""
    code = sass.instructions(text)
    # What waits at the end jumps back into the loop, and belongs to it; the store between them does not.
    assert [line.opcode for line in sass.loop_of(code)] == [
        "LDG.E.128.CONSTANT", "BRA", "LDG.E.U8", "BRA", "NANOSLEEP", "BRA"
    ]  # fmt: skip
    assert code[-1].address == 0x80
    opcodes = [line.opcode for line in code]
    assert sass.widths(opcodes, ("LDG",)) == {8: 1, 128: 1} and sass.widths(opcodes, ("STG",)) == {64: 1}
