"""What the Triton kernels compile to: instructions per element, registers, loads.

    python bench/machine_code/sass.py                     the table
    python bench/machine_code/sass.py --only "few rows" --target sm_90 --dump

No GPU is needed. Each kernel (sass_cases.py) is compiled for each target with 16-byte divisibility stated for its
pointers, as a launch would find it, and the machine code is disassembled with the tools that come with Triton. From the
code:

    inst/elem   warp instructions of the hot code x 32 threads x warps, divided by the elements it does: of W, or, where
                there is none, of the result. The hot code of a kernel with a loop is the loop, of one without it
                everything.
    regs        registers of a thread; "spill" counts bytes of stack and local memory, which must be 0
    shared      bytes of shared memory of a program
    BAR         barriers in the hot code
    LDG, STG    widths in bits of the loads and stores of global memory in the hot code
    MMA         tensor-core instructions in the hot code

roofline.py sets these figures beside what the memory of a card allows.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what Triton 3.9 does unasked, after a warning

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # bench/, from which its files import each other

import triton
from machine_code.sass_cases import DIVISIBLE, Case, cases
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Compiled(NamedTuple):
    """What the machine code of one kernel on one target holds."""

    registers: int
    spilled: int  # bytes of stack and local memory per thread
    shared: int  # bytes per program
    per_element: float | None  # instructions, of one thread; None where the disassembler has no listing (AMD)
    loads: dict[int, int]  # width in bits -> number, in the hot code
    stores: dict[int, int]
    barriers: int
    shared_per_element: float | None  # passes of shared memory, 32 lanes of 4 bytes each, of one thread
    tensor_cores: dict[str, int]
    text: str


def compile_case(case: Case, target: GPUTarget) -> Compiled:
    """Compile `case` for `target` and read its machine code."""
    compiled, threads = _build(case, target), target.warp_size * case.options["num_warps"]
    return _read_amd(compiled, case, threads) if target.backend == "hip" else _read_nvidia(compiled, case, threads)


def spilled(case: Case, target: GPUTarget) -> int:
    """Bytes of stack and local memory per thread; quicker, since reading machine code takes as long as making it."""
    compiled = _build(case, target)
    return _spilled_amd(compiled.asm["amdgcn"]) if target.backend == "hip" else _usage(compiled)[1]


def _build(case: Case, target: GPUTarget) -> Any:
    names = list(case.kernel.arg_names)
    signature = {name: case.signature.get(name, "constexpr") for name in names}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if case.signature.get(name, "").startswith("*") or (name in case.signature and name in DIVISIBLE)
    }
    source = ASTSource(case.kernel, signature, case.constants, attributes)
    return triton.compile(source, target=target, options=case.options)


def _usage(compiled: Any) -> tuple[int, int]:
    """(registers, bytes of stack and local memory) of a thread."""
    text = _output(compiled, "cuobjdump", "-res-usage")
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return used["REG"], used["STACK"] + used["LOCAL"]


def _read_nvidia(compiled: Any, case: Case, threads: int) -> Compiled:
    registers, spills = _usage(compiled)
    text = _output(compiled, "nvdisasm", "-c", "-ndf")
    code = instructions(text)
    hot = (loop_of(code) if case.loops else []) or code
    opcodes = [line.opcode for line in hot]
    return Compiled(
        registers=registers,
        spilled=spills,
        shared=compiled.metadata.shared,
        per_element=len(hot) * threads / case.elements,
        loads=widths(opcodes, ("LDG", "LDGSTS")),
        stores=widths([line.opcode for line in code], ("STG",)),
        barriers=sum(op.startswith("BAR") for op in opcodes),
        shared_per_element=sum(map(passes, opcodes)) * threads / case.elements,
        tensor_cores=dict(Counter(op.split(".")[0] for op in opcodes if re.match(r"(H|I|Q|UTCH|UTCQ)G?MMA", op))),
        text=text,
    )


def _read_amd(compiled: Any, case: Case, threads: int) -> Compiled:
    text = compiled.asm["amdgcn"]
    code = [line.split()[0] for line in text.splitlines() if re.match(r"\s+[vs]_|\s+(ds|global|buffer)_", line)]
    bits = {"dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128, "ushort": 16, "ubyte": 8, "short": 16, "byte": 8}

    def found(kind: str) -> dict[int, int]:
        matched = [re.match(rf"(?:global|buffer)_{kind}_(\w+?)(?:_d16(?:_hi)?)?$", op) for op in code]
        return dict(Counter(bits[m[1]] for m in matched if m and m[1] in bits))

    return Compiled(
        registers=_field("vgpr_count", text),
        spilled=_spilled_amd(text),
        shared=compiled.metadata.shared,
        per_element=None,
        loads=found("load"),
        stores=found("store"),
        barriers=sum(op == "s_barrier" for op in code),
        shared_per_element=None,
        tensor_cores=dict(Counter("MFMA" for op in code if op.startswith("v_mfma"))),
        text=text,
    )


def _field(name: str, text: str) -> int:
    return int(re.findall(rf"\.{name}:\s+(\d+)", text)[0])


def _spilled_amd(text: str) -> int:
    return 4 * _field("vgpr_spill_count", text) + _field("private_segment_fixed_size", text)


class Instruction(NamedTuple):
    address: int
    opcode: str
    target: int | None  # of a branch
    goes_on: bool  # the next instruction may follow


def instructions(text: str) -> list[Instruction]:
    """The instructions of a kernel, without its subroutines and the padding after its end."""
    code, labels, pending = [], {}, []
    for line in text.splitlines():
        if line.startswith("$__internal") and line.endswith(":"):
            break  # subroutines lie after the kernel
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            pending.append(label[1])
        found = re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:\{\s*)?(@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)", line)
        if not found:
            continue
        address, predicate, opcode = int(found[1], 16), found[2], found[3]
        labels.update(dict.fromkeys(pending, address))
        pending = []
        jump = re.search(r"(.*)`\((\.L_x_\d+)\)", found[4]) if opcode.startswith("BRA") else None
        always = not predicate and (opcode == "EXIT" or (jump is not None and not jump[1].strip()))
        code.append((address, opcode, jump[2] if jump else None, not always))
    listed = [Instruction(at, op, labels.get(label) if label else None, goes_on) for at, op, label, goes_on in code]
    while listed and (listed[-1].opcode == "NOP" or listed[-1].target == listed[-1].address):  # the trap after EXIT
        listed.pop()
    return listed


def loop_of(code: list[Instruction]) -> list[Instruction]:
    """The longest loop, [] where there is none: all that lies on a way from its head back to its head.

    A jump back is not yet a loop: code for rare cases is moved to the end of a kernel and jumps back from there. The
    head of a loop is a target without which the jump back to it would not be reached.
    """
    place = {line.address: i for i, line in enumerate(code)}
    after: list[list[int]] = [[] for _ in code]
    before: list[list[int]] = [[] for _ in code]
    for i, line in enumerate(code):
        if line.goes_on and i + 1 < len(code):
            after[i].append(i + 1)
        if line.target in place:
            after[i].append(place[line.target])
        for other in after[i]:
            before[other].append(i)

    bodies: dict[int, set[int]] = {}
    for i in range(len(code)):
        for head in after[i]:
            if head <= i and i not in _reached(after, 0, head):
                bodies.setdefault(head, {head}).update(_reached(before, i, head))
    return [code[i] for i in sorted(max(bodies.values(), key=len, default=set()))]


def _reached(ways: list[list[int]], start: int, without: int) -> set[int]:
    """What can be reached from `start` on ways that do not lead through `without`."""
    found, left = set(), [start]
    while left:
        i = left.pop()
        if i != without and i not in found:
            found.add(i)
            left += ways[i]
    return found


def widths(opcodes: list[str], families: tuple[str, ...]) -> dict[int, int]:
    """Width in bits -> how many of these loads or stores there are."""
    found: Counter[int] = Counter()
    for op in opcodes:
        family, *parts = op.split(".")
        if family in families:
            bits = [int(part) for part in parts if part in ("64", "128", "256")]
            small = 8 if {"U8", "S8"} & set(parts) else 16 if {"U16", "S16"} & set(parts) else 32
            found[bits[-1] if bits else small] += 1
    return dict(sorted(found.items()))


def passes(opcode: str) -> int:
    """How often a warp's access occupies shared memory, if no two lanes are in each other's way."""
    if not opcode.startswith(("LDS", "STS")):
        return 0
    parts = opcode.split(".")
    if "LDSM" in parts[0] or "STSM" in parts[0]:
        return int(parts[-1]) if parts[-1] in ("2", "4") else 1
    return 4 if "128" in parts else 2 if "64" in parts else 1


def _output(compiled: Any, tool: str, *options: str) -> str:
    """What a tool says of the machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return subprocess.run(
            [str(TOOLS / tool), *options, file.name], capture_output=True, text=True, check=True
        ).stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", choices=TARGETS, nargs="+", default=list(TARGETS), help="default: all of them")
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "fp16", "fp32"], help="default: %(default)s")
    parser.add_argument("--only", default="", help="kernels whose name holds this")
    parser.add_argument("--dump", action="store_true", help="print the machine code too")
    args = parser.parse_args()
    print(
        f"{'kernel':27} {'target':7} {'regs':>5} {'spill':>5} {'shared':>7} {'inst/elem':>9} {'BAR':>4}  LDG, STG, MMA"
    )
    for case in [case for case in cases(args.dtype) if args.only in case.name]:
        for name in args.target:
            c = compile_case(case, TARGETS[name])
            per = "-" if c.per_element is None else f"{c.per_element:.2f}"
            tail = f"{counts(c.loads)}, {counts(c.stores)}, {counts(c.tensor_cores)}"
            print(f"{case.name:27} {name:7} {c.registers:5} {c.spilled:5} {c.shared:7} {per:>9} {c.barriers:4}  {tail}")
            if args.dump:
                print(c.text)
    return 0


def counts(found: dict[Any, int]) -> str:
    return " ".join(f"{number}x{what}" for what, number in found.items()) or "none"


if __name__ == "__main__":
    sys.exit(main())
