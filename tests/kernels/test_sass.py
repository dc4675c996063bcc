"""The machine code that the Triton kernels become, compiled here for cards that are not here.

No GPU is needed, and no speed is claimed: these are gates on what would make a kernel slow for certain. Ceilings are a
few percent above what was seen with Triton 3.9 (bench/ROOFLINE.md); one that trips after an upgrade is worth a look.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import sass
from triton.backends.compiler import GPUTarget

NVIDIA = [name for name, target in sass.TARGETS.items() if target.backend == "cuda"]
CASES = {case.name: case for case in sass.cases("bf16")}
# Instructions per element: (sm_80, sm_90, sm_100).
CEILINGS = {
    "dequantize": (11, 11.5, 11.5),
    "quantize": (36, 39, 39),
    "few rows, M=1": (6.6, 6.6, 6.6),
    "few rows, M=2": (11, 11, 10.5),
    "many rows, 16 at a time": (10.5, 10.5, 10.5),
    "many rows, 128 at a time": (28, 14, 21),
    "backward, 128 at a time": (28, 15.5, 21),
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
}
TENSOR_CORES = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "MFMA"}


@pytest.mark.parametrize("target", sass.TARGETS)
@pytest.mark.parametrize("name", CASES)
def test_nothing_spills_and_memory_moves_in_wide_words(name, target):
    case, code = CASES[name], sass.compile_case(CASES[name], sass.TARGETS[target])
    assert code.spilled == 0
    assert not [op for op in code.text.split() if op.startswith(("LDL", "STL"))]
    if target in NVIDIA:
        assert code.per_element <= CEILINGS[name][NVIDIA.index(target)]
        assert 128 in code.loads
        if not name.startswith("few"):  # whose results are single numbers
            assert 128 in code.stores
    else:
        assert max(code.loads) >= 64
    if case.tensor_cores:
        # With 16 rows of x there is too little for the wide instructions of Hopper and Blackwell.
        wanted = "HMMA" if name.startswith("many rows, 16") and target in NVIDIA else TENSOR_CORES[target]
        # One instruction of Hopper's multiplies 64 x 64 by 16, all that rank 8 needs.
        assert code.tensor_cores.get(wanted, 0) >= (1 if name == "lora, R=8" else 4)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_other_dtypes_do_not_spill_either(dtype):
    for case in sass.cases(dtype):
        if dtype == "fp16" or not case.name.startswith(("few rows, M=2", "many rows", "backward")):
            assert sass.compile_case(case, sass.TARGETS["sm_90"]).spilled == 0, case.name


@pytest.mark.parametrize("name", CASES)
def test_sizes_of_one_compile(name):
    """A launch makes an integer that is 1 a constant of the program, which the interpreter does not: all, and each."""
    case = CASES[name]
    sizes = [size for size, kind in case.signature.items() if kind == "i32"]
    for ones in (sizes, sizes[:1]):  # the first is often the number of rows of x
        signature = {key: kind for key, kind in case.signature.items() if key not in ones}
        made = case._replace(signature=signature, constants={**case.constants, **dict.fromkeys(ones, 1)})
        assert sizes and sass.compile_case(made, sass.TARGETS["sm_90"]).spilled == 0


@pytest.mark.parametrize("arch", ["gfx90a", "gfx950", "gfx1100"])
def test_other_cards_of_amd_compile_the_products(arch):
    """Which names of precision `tl.dot` takes differs between them."""
    target = GPUTarget("hip", arch, 32 if arch == "gfx1100" else 64)
    for name in ("many rows, 16 at a time", "backward, 128 at a time", "lora, R=8"):
        assert sass.compile_case(CASES[name], target).registers


def test_16_bit_results_are_rounded_to_nearest_even():
    """What the interpreter does not do (tests/interpreter/conftest.py), the hardware is told to."""
    case = CASES["dequantize"]
    text = sass.compile_case(case, sass.TARGETS["sm_90"]).text
    packs = [line for line in text.splitlines() if "F2FP.BF16" in line]
    assert packs and not [line for line in packs if ".RZ" in line]


def test_the_reader_finds_loop_and_widths():
    text = """
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_0:
        /*0010*/                   LDG.E.128.CONSTANT R4, [R2.64] ;
        /*0020*/              @!P0 LDG.E.U8 R5, [R2.64+0x4] ;
        /*0030*/               @P1 BRA `(.L_x_0) ;
        /*0040*/                   STG.E.64 [R8.64], R4 ;
        /*0050*/                   EXIT ;
.L_x_1:
        /*0060*/                   BRA `(.L_x_1);
        /*0070*/                   NOP;
"""
    code = sass.instructions(text)
    assert [line.opcode for line in sass.loop_of(code)] == ["LDG.E.128.CONSTANT", "LDG.E.U8", "BRA"]
    assert code[-1].opcode == "EXIT"
    opcodes = [line.opcode for line in code]
    assert sass.widths(opcodes, ("LDG",)) == {8: 1, 128: 1} and sass.widths(opcodes, ("STG",)) == {64: 1}
