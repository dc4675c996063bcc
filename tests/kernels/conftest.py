"""Fixtures of the kernels' tests: instruction sets, unwritten memory, and the kernels as a program of their own."""

from __future__ import annotations

import itertools
import math
import platform
import struct
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from qlorag.kernels import nf4
from qlorag.kernels.native import ISAS, build, isas_up_to
from qlorag.kernels.native.isa import FAMILIES
from qlorag.kernels.nf4 import BLOCK_SIZES, Kind, Nested, QuantizedTensor, codebook, cpu
from torch import Tensor

CPU = torch.device("cpu")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
KINDS = ("nf4", "fp4")
ARM = platform.machine() in ("aarch64", "arm64")


@pytest.fixture(params=FAMILIES[ARM])
def isa(request, monkeypatch):
    """Each instruction set in turn, as far as this processor has them."""
    if request.param not in isas_up_to(cpu.best_isa()):
        pytest.skip(f"this processor has {ISAS[cpu.best_isa()]}, not {request.param}")
    monkeypatch.setenv("QLORAG_CPU_LEVEL", request.param)
    return request.param


@pytest.fixture
def matrix_unit(monkeypatch):
    """The products of amx_forward.c and amx_backward.c."""
    if "amx" not in isas_up_to(cpu.best_isa()):
        pytest.skip("this processor has no AMX")
    monkeypatch.setenv("QLORAG_CPU_LEVEL", "amx")


@pytest.fixture
def poisoned():
    """torch.empty gives NaN, or the largest integer, so that an element left unwritten shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all() and (torch.empty(3, dtype=torch.uint8) == 255).all()
    yield
    torch.use_deterministic_algorithms(False)


# The kernels as a program: driver.c.


def bits(tensor: Tensor) -> Tensor:
    """Its bytes: 0 and -0 differ, and NaN is equal to the same NaN."""
    return tensor.contiguous().view(-1).view(torch.uint8)


OPERATIONS = ("dequantize", "quantize", "quantize_absmax", "matmul", "matmul_backward")


@dataclass(frozen=True)
class Call:
    """One call of a kernel, and what must come of it.

    `inputs` go in, in the order of the C struct (None is a null pointer); `outputs` must come out, bit for bit. A
    product may round: then `exact` is its value in float64, and `outputs` is what torch makes of it.
    """

    operation: str
    inputs: tuple[Tensor | None, ...]
    outputs: tuple[Tensor, ...]
    returns: int = 0
    exact: Tensor | None = None
    dtype: torch.dtype = torch.float32
    threads: int = 1
    stream: bool = False
    block_size: int = 0
    numel: int = 0
    shape: tuple[int, int] = (0, 0)
    rows: int = 0

    def encode(self, isa: str, short: int | None = None, by: int = 1) -> bytes:
        """As driver.c reads it; buffer `short`, if given, is that many bytes too small."""
        header = (
            OPERATIONS.index(self.operation),
            ISAS.index(isa),
            cpu.DTYPES[self.dtype],
            self.threads,
            self.stream,
            self.block_size,
            self.numel,
            *self.shape,
            self.rows,
            codebook.DENOMINATORS["nf4"],  # of every product here in bfloat16
        )
        parts = [struct.pack("<11q", *header)]
        for i, tensor in enumerate(self.inputs):
            content = b"" if tensor is None else bits(tensor).numpy().tobytes()
            content = content[: len(content) - (by if i == short else 0)]
            parts.append(struct.pack("<2q", len(content), tensor is not None) + content)
        for i, tensor in enumerate(self.outputs, len(self.inputs)):
            parts.append(struct.pack("<2q", tensor.nbytes - (by if i == short else 0), 2))
        absent = 8 - len(self.inputs) - len(self.outputs)
        return b"".join(parts) + struct.pack("<2q", 0, 0) * absent


@dataclass(frozen=True)
class Driver:
    """A built driver.c, and how it is started."""

    command: tuple[str, ...]
    folder: Path

    def start(self, content: bytes) -> subprocess.CompletedProcess[str]:
        calls = self.folder / "calls"
        calls.write_bytes(content)
        command = [*self.command, str(calls), str(self.folder / "results")]
        return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=300)

    def run(self, calls: Sequence[Call], isa: str) -> list[list[Tensor]]:
        """Return the outputs of each call."""
        done = self.start(b"".join(call.encode(isa) for call in calls))
        assert done.returncode == 0, done.stderr[-4000:]
        content = (self.folder / "results").read_bytes()
        best = struct.unpack_from("<q", content)[0]
        assert isa in isas_up_to(best), f"this is {ISAS[best]}"
        place, results = 8, []
        for call in calls:
            assert struct.unpack_from("<q", content, place) == (call.returns,), call
            place += 8
            outputs = []
            for want in call.outputs:
                part = torch.frombuffer(bytearray(content[place : place + want.nbytes]), dtype=want.dtype)
                outputs.append(part.view(want.shape))
                place += want.nbytes
            results.append(outputs)
        assert place == len(content)
        return results

    def check(self, calls: Sequence[Call], isa: str) -> None:
        """Run `calls` at `isa`: the bits of the reference, or at most twice torch's error."""
        squares: Counter[tuple[str, torch.dtype]] = Counter()
        for call, got in zip(calls, self.run(calls, isa), strict=True):
            if call.operation == "quantize" and not call.returns:
                continue  # refused: what was written is of no use
            if call.exact is None:
                for part, want in zip(got, call.outputs, strict=True):
                    assert torch.equal(bits(part), bits(want)), call
                continue
            for who, y in (("c", got[0]), ("torch", call.outputs[0])):
                squares[who, call.dtype] += (y.double() - call.exact).square().sum().item() / call.shape[1]
        for dtype in FLOATS:
            assert squares["c", dtype] <= 4 * squares["torch", dtype]  # 2 squared


# The buffers whose last byte is used, whatever the codes are: not 4 of dequantize and matmul, 2 of quantize_absmax.
LAST_BYTE_USED = {
    ("dequantize", torch.float32): (0, 1, 2, 3, 5, 6),
    ("quantize", torch.float32): (0, 1, 2, 3, 4),
    ("quantize_absmax", torch.float32): (0, 1, 3, 4),
    ("matmul", torch.float32): (0, 1, 2, 3, 5, 6, 7),
    ("matmul", torch.bfloat16): (0, 1, 2, 3, 5, 6, 7),
}


@pytest.fixture(
    params=[(*kernel, i) for kernel, buffers in LAST_BYTE_USED.items() for i in buffers],
    ids=lambda p: f"{p[0]}-{str(p[1])[6:]}-{p[2]}",
)
def one_byte_short(request, calls) -> Callable[[str], bytes]:
    """ISA -> an encoded call with one buffer too small."""
    *kernel, buffer = request.param
    of_kernel = [call for group in calls.values() for call in group if [call.operation, call.dtype] == kernel]
    # One byte less than one byte would be none, and of an empty allocation one byte may be read.
    usual = [call for call in of_kernel if all(part is not None and part.nbytes > 1 for part in call.inputs)]
    call = next(call for call in usual if call.numel > 100 and call.rows < 5)  # more are for masked stores, unseen
    return lambda isa: call.encode(isa, short=buffer)


@pytest.fixture(scope="session")
def build_driver(tmp_path_factory) -> Callable[..., Driver]:
    """(compiler, *flags, start=()) -> Driver; skips where the compiler cannot do this with an empty program."""

    def make(compiler: str, *flags: str, start: tuple[str, ...] = ()) -> Driver:
        folder = tmp_path_factory.mktemp("driver")
        empty = folder / "empty.c"
        empty.write_text("int main(void) { return 0; }")
        try:
            subprocess.run([compiler, *flags, str(empty), "-o", str(folder / "empty")], check=True, capture_output=True)
            subprocess.run([*start, str(folder / "empty")], check=True, capture_output=True)
        except FileNotFoundError as error:
            pytest.skip(f"{error.filename} is not installed")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"{' '.join(error.cmd[:-2])}: {error.stderr.decode(errors='replace').strip()[-200:]}")
        source, library = Path(__file__).with_name("driver.c"), Path(cpu.__file__).parent
        flags = (*build.FLAGS, *flags, f"-I{library}")
        command = [compiler, *flags, str(source), "-o", str(folder / "driver"), "-lm"]
        subprocess.run(command, check=True)
        return Driver((*start, str(folder / "driver")), folder)

    return make


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_bytes(count: int, seed: int) -> Tensor:
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator(seed))


def weight(
    shape: tuple[int, ...], block_size: int, *, kind: Kind = "nf4", double_quant: bool, wide: bool = False
) -> QuantizedTensor:
    """Any codes, and scales that differ from block to block: `wide`, from subnormal results to overflow in float16."""
    numel = math.prod(shape)
    blocks = -(-numel // block_size)
    absmax = torch.rand(blocks, generator=generator(1)) + 0.1
    if wide:
        absmax *= 10.0 ** torch.randint(-44, 38, (blocks,), generator=generator(2))
    nested = None
    if double_quant:
        absmax = random_bytes(blocks, 3)
        nested = Nested(torch.rand(-(-blocks // 256), generator=generator(4)), torch.tensor(1.3))
    packed = random_bytes((numel + 1) // 2, numel)
    return QuantizedTensor(packed=packed, absmax=absmax, nested=nested, shape=shape, kind=kind, block_size=block_size)


def weight_inputs(q: QuantizedTensor) -> tuple[Tensor | None, ...]:
    return (*q.parts, codebook.dynamic_table(CPU), codebook.table(q.kind, CPU))


def dequantize_calls() -> Iterable[Call]:
    """Every block size with whole, ragged, odd and one-element tensors, two nested blocks, and 60,000 scales."""
    sizes = [(b, n) for b in BLOCK_SIZES for n in (1, 2, 31, 32, b - 1, 2 * b + 17, 3 * b + 32)] + [(32, 300 * 32 + 5)]
    for (block_size, numel), kind, dtype, double_quant in itertools.product(sizes, KINDS, FLOATS, (False, True)):
        q = weight((numel,), block_size, kind=kind, double_quant=double_quant, wide=True)
        options = {"block_size": block_size, "dtype": dtype}
        want = nf4.dequantize(q, dtype=dtype, backend="reference")
        inputs = weight_inputs(q)
        for stream in (False, True):
            yield Call("dequantize", inputs, (want,), numel=numel, stream=stream, **options)
    bits = torch.randint(0, 0x7F800001, (20_000,), dtype=torch.int32, generator=generator(5))
    packed = torch.full((bits.numel() * 16,), 0xF1, dtype=torch.uint8)  # codes 15 and 1: never 0 * infinity
    for dtype in FLOATS:
        q = QuantizedTensor(packed=packed, absmax=bits.view(torch.float32), shape=(bits.numel() * 32,), block_size=32)
        want = nf4.dequantize(q, dtype=dtype, backend="reference")
        yield Call("dequantize", weight_inputs(q), (want,), numel=q.numel, block_size=32, dtype=dtype)


def quantize_calls() -> Iterable[Call]:
    """The same sizes; every 16-bit number; ties at scales of every magnitude; what is not finite."""
    tensors = []
    for block_size, dtype in itertools.product(BLOCK_SIZES, FLOATS):
        for numel in (1, 31, 32, 33, block_size, 3 * block_size + 1, 5 * block_size + 30):
            exponents = torch.randint(-30, 30, (numel,), generator=generator(numel))
            w = (torch.randn(numel, generator=generator(block_size)) * 2.0**exponents).to(dtype).clamp(-6e4, 6e4)
            w[block_size : 2 * block_size] = 0
            tensors.append((w, block_size))
    for dtype in FLOATS[1:]:
        numbers = torch.randperm(65536, generator=generator(0)).sub(32768).to(torch.int16).view(dtype)
        tensors += [(numbers[numbers.isfinite()], block_size) for block_size in (32, 64)]
    for kind in KINDS:
        bounds, _ = codebook.thresholds(kind, CPU)
        near = [torch.nextafter(bounds, torch.tensor(side)) for side in (2.0, -2.0)]
        block = F.pad(torch.cat([torch.tensor([1.0, -0.0]), bounds, *near]), (0, 17))  # 64 values, the largest is 1
        tensors.append(((2.0 ** torch.arange(-149, 128)[:, None] * block).view(-1), 64))
    for (w, block_size), kind in itertools.product(tensors, KINDS):
        q = nf4.quantize(w, kind=kind, block_size=block_size, double_quant=False, backend="reference")
        inputs, want = (w, *codebook.thresholds(kind, CPU)), (q.packed, q.absmax)
        yield Call("quantize", inputs, want, returns=1, dtype=w.dtype, block_size=block_size, numel=w.numel())
    for dtype, place, bad in itertools.product(FLOATS, (0, 31, 64, 199), (math.nan, math.inf, -math.inf)):
        w = torch.ones(200, dtype=dtype)
        w[place] = bad
        outputs = (torch.empty(100, dtype=torch.uint8), torch.empty(7))
        inputs = (w, *codebook.thresholds("nf4", CPU))
        yield Call("quantize", inputs, outputs, dtype=dtype, block_size=32, numel=200)


def absmax_calls() -> Iterable[Call]:
    for blocks, scale in itertools.product((1, 2, 255, 256, 257, 1357), (1e-38, 1e-3, 1e30)):
        for absmax in (torch.rand(blocks, generator=generator(blocks)) * scale, torch.full((blocks,), scale)):
            codes, nested = nf4.quantize_absmax(absmax, backend="reference")
            inputs = (absmax, nested.offset, codebook.dynamic_grid(CPU))
            yield Call("quantize_absmax", inputs, (codes, nested.absmax), numel=blocks)


def identity_calls() -> Iterable[Call]:
    """x = I: every weight, each in its place, multiplied by 1 and added to zeros, so nothing is rounded."""
    sizes = itertools.product(BLOCK_SIZES[1:], (64, 192))
    for (block_size, k), kind, dtype, double_quant in itertools.product(sizes, KINDS, FLOATS, (False, True)):
        q = weight((7, k), block_size, kind=kind, double_quant=double_quant)
        w = nf4.dequantize(q, dtype=dtype, backend="reference")
        inputs, options = (*weight_inputs(q), torch.eye(k, dtype=dtype)), {"block_size": block_size, "dtype": dtype}
        yield Call("matmul", inputs, (w.T.contiguous(),), 1, numel=7 * k, shape=(7, k), rows=k, **options)


def product_call(rows: int, k: int, n: int, dtype: torch.dtype, block_size: int, *, double_quant: bool) -> Call:
    q = weight((n, k), block_size, double_quant=double_quant)
    x = torch.randn(rows, k, generator=generator(k)).to(dtype)
    exact = F.linear(x.double(), nf4.dequantize(q, dtype=torch.float64))
    torchs = nf4.matmul(x, q, backend="reference")
    inputs = (*weight_inputs(q), x)
    sizes = {"block_size": block_size, "numel": n * k, "shape": (n, k), "rows": rows}
    return Call("matmul", inputs, (torchs,), returns=1, exact=exact, dtype=dtype, **sizes)


def product_calls() -> Iterable[Call]:
    """1 to 9 rows of x; rows of W in and beside groups of four; blocks that end inside a row."""
    block_sizes = itertools.cycle(BLOCK_SIZES[1:])
    for rows, k, n, dtype in itertools.product(range(1, 10), (64, 192, 960, 4096), (1, 4, 7), FLOATS):
        yield product_call(rows, k, n, dtype, next(block_sizes), double_quant=rows % 2 == 0)


def backward_call(rows: int, k: int, n: int, block_size: int, *, double_quant: bool) -> Call:
    q = weight((n, k), block_size, double_quant=double_quant)
    dy = torch.randn(rows, n, generator=generator(n)).bfloat16()
    exact = dy.double() @ nf4.dequantize(q, dtype=torch.float64)
    torchs = nf4.matmul_backward(dy, q, backend="reference")
    inputs = (*weight_inputs(q), dy)
    sizes = {"block_size": block_size, "numel": n * k, "shape": (n, k), "rows": rows}
    return Call("matmul_backward", inputs, (torchs,), returns=1, exact=exact, dtype=torch.bfloat16, **sizes)


def matrix_unit_calls() -> Iterable[Call]:
    """Rows in and beside tiles of 16 and pairs of them; W that ends inside a tile, a pair of rows, a cached block."""
    block_sizes = itertools.cycle(BLOCK_SIZES[1:])
    for rows, k, n in itertools.product((5, 15, 16, 17, 32, 33, 49), (64, 192, 576, 1088), (1, 16, 31, 33, 70, 289)):
        double_quant = rows % 2 == 0
        yield product_call(rows, k, n, torch.bfloat16, next(block_sizes), double_quant=double_quant)
        yield backward_call(rows, k, n, next(block_sizes), double_quant=double_quant)
    for rows in (520, 1):
        yield product_call(max(rows, 5), 128, 50, torch.bfloat16, 64, double_quant=True)
        yield backward_call(rows, 128, 50, 64, double_quant=True)


def large_calls() -> Iterable[Call]:
    """Work for several threads."""
    w = torch.randn(300_001, generator=generator(0))
    q = nf4.quantize(w, double_quant=False, backend="reference")
    options = {"block_size": 64, "numel": w.numel()}
    yield Call("quantize", (w, *codebook.thresholds("nf4", CPU)), (q.packed, q.absmax), returns=1, **options)
    yield Call("dequantize", weight_inputs(q), (nf4.dequantize(q, backend="reference"),), **options)
    yield product_call(3, 576, 701, torch.float32, 64, double_quant=True)
    yield product_call(3, 576, 701, torch.bfloat16, 64, double_quant=True)


def large_matrix_unit_calls() -> Iterable[Call]:
    """The same for tiles: few rows, many, and the gradient; each thread has memory of its own."""
    yield product_call(16, 1088, 701, torch.bfloat16, 64, double_quant=True)
    yield product_call(33, 576, 701, torch.bfloat16, 64, double_quant=True)
    yield backward_call(33, 576, 701, 64, double_quant=True)


@pytest.fixture(scope="session")
def calls() -> dict[str, list[Call]]:
    """What the kernels are asked as a program, by operation."""
    return {
        "dequantize": list(dequantize_calls()),
        "quantize": [*quantize_calls(), *absmax_calls()],
        "matmul": [*identity_calls(), *product_calls()],
        "matrix unit": list(matrix_unit_calls()),
        "large": list(large_calls()),
        "large, matrix unit": list(large_matrix_unit_calls()),
    }
