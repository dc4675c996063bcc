"""The C kernels of cpu.c, called through ctypes. Arguments have been checked in checks.py."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from ...native import LEVELS, LevelError, Library, choose_level, load
from ..checks import Packed
from ..codebook import DENOMINATORS, DYNAMIC, TABLES, Kind, ascending, grid_codes, midpoints
from ..errors import QuantizationError
from ..reference import NESTED_BLOCK_SIZE, Nested, name_nonfinite, nested_offset

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
# From this size on the result is written past the caches. Ordinary stores read each line of memory before
# they overwrite it, which doubles the traffic; what fits in a cache is better left there for the product that
# follows.
STREAM_BYTES = 8 << 20
UNIT = 64  # elements of a row that matmul.c takes at a time, under one scale
MAX_IN_FEATURES = 1024 * UNIT
_CPU = torch.device("cpu")


def _floats(values: Sequence[float]) -> ctypes.Array[ctypes.c_float]:
    return (ctypes.c_float * len(values))(*values)


# The tables, in memory that is there for good: no tracer, mode or device of torch has a part in them.
_DYNAMIC = _floats(DYNAMIC)
_TABLES = {kind: _floats(values) for kind, values in TABLES.items()}
_THRESHOLDS = {kind: _floats(midpoints(ascending(kind)[0])) for kind in TABLES}
_CODES = {kind: (ctypes.c_uint8 * 16)(*ascending(kind)[1]) for kind in TABLES}


class _PackedTensor(ctypes.Structure):
    """`packed_tensor` of common.c, field by field."""

    _fields_ = [
        ("packed", ctypes.c_void_p),
        ("absmax", ctypes.c_void_p),
        ("nested_absmax", ctypes.c_void_p),
        ("nested_offset", ctypes.c_void_p),
        ("dynamic", ctypes.c_void_p),
        ("table", ctypes.c_void_p),
        ("numel", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
    ]


class _DequantizeArgs(ctypes.Structure):
    """`dequantize_args` of dequantize.c."""

    _fields_ = [
        ("q", _PackedTensor),
        ("out", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        ("level", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("stream", ctypes.c_int32),
    ]


class _QuantizeArgs(ctypes.Structure):
    """`quantize_args` of quantize.c."""

    _fields_ = [
        ("w", ctypes.c_void_p),
        ("thresholds", ctypes.c_void_p),
        ("codes", ctypes.c_void_p),
        ("packed", ctypes.c_void_p),
        ("absmax", ctypes.c_void_p),
        ("numel", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("level", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    ]


class _MatmulArgs(ctypes.Structure):
    """`matmul_args` of matmul.c."""

    _fields_ = [
        ("w", _PackedTensor),
        ("out_features", ctypes.c_int64),
        ("in_features", ctypes.c_int64),
        ("level", ctypes.c_int32),
        ("denominator", ctypes.c_int32),
    ]


def _address(t: Tensor) -> int:
    """Where its elements are. Raises QuantizationError: nowhere, as in a tensor that only stands for one."""
    address = t.data_ptr()
    if address == 0 and t.numel():
        raise QuantizationError(
            f"a {t.dtype} tensor {list(t.shape)} has no memory (a fake or traced one?): these kernels take real ones; "
            f"under a tracer, use torch.ops.{__name__.split('.')[0]}.nf4_matmul or nf4_dequantize"
        )
    return address


def _is_plain(x: Tensor) -> bool:
    """Whether its elements lie in memory in their order, and as they are."""
    return x.is_contiguous() and not x.is_neg()


@lru_cache(maxsize=1)
def library() -> Library:
    """The compiled cpu.c. Raises NativeBuildError."""
    loaded = load(Path(__file__).with_name("cpu.c"))
    handle, pointer = loaded.handle, ctypes.c_void_p
    sizes = (ctypes.c_int64 * 4)()
    handle.qlorag_nf4_sizes(sizes)
    mine = [ctypes.sizeof(structure) for structure in (_PackedTensor, _DequantizeArgs, _QuantizeArgs, _MatmulArgs)]
    assert [*sizes] == mine, f"structures of C and of this file differ: {[*sizes]} and {mine} bytes"
    handle.qlorag_nf4_best_level.restype = ctypes.c_int32
    handle.qlorag_nf4_dequantize.argtypes = [ctypes.POINTER(_DequantizeArgs)]
    handle.qlorag_nf4_dequantize.restype = None
    handle.qlorag_nf4_quantize.argtypes = [ctypes.POINTER(_QuantizeArgs)]
    handle.qlorag_nf4_quantize.restype = ctypes.c_int32
    handle.qlorag_nf4_quantize_absmax.argtypes = [pointer] * 3 + [ctypes.c_int64] + [pointer] * 2
    handle.qlorag_nf4_quantize_absmax.restype = None
    handle.qlorag_nf4_matmul.argtypes = [pointer] * 3 + [ctypes.c_int64, ctypes.c_int32, ctypes.c_int32]
    handle.qlorag_nf4_matmul.restype = ctypes.c_int32
    handle.qlorag_nf4_matmul_backward.argtypes = [pointer] * 3 + [ctypes.c_int64, ctypes.c_int32]
    handle.qlorag_nf4_matmul_backward.restype = ctypes.c_int32
    return loaded


def _threads() -> int:
    return torch.get_num_threads() if library().openmp else 1


@lru_cache(maxsize=1)
def best_level() -> int:
    """The index into LEVELS of the highest that this processor runs."""
    return int(library().handle.qlorag_nf4_best_level())


def level() -> int:
    """The level to run now. Raises QuantizationError: QLORAG_CPU_LEVEL asks for one that cannot run."""
    try:
        return choose_level(best_level())
    except LevelError as error:
        raise QuantizationError(str(error)) from error


def has_matrix_unit() -> bool:
    """Whether bfloat16 products run on one (amx.c). Raises QuantizationError, NativeBuildError as level does."""
    return LEVELS[level()] == "amx"


def describe() -> str:
    """How the kernels run here, in words."""
    threads = f"{torch.get_num_threads()} threads" if library().openmp else "1 thread: built without OpenMP"
    return f"{LEVELS[level()]}, {threads}"


def quantize(w: Tensor, *, kind: Kind, block_size: int) -> tuple[Tensor, Tensor]:
    """As reference.quantize."""
    w = w.detach()
    packed = torch.empty((w.numel() + 1) // 2, dtype=torch.uint8, device=_CPU)
    absmax = torch.empty(-(-w.numel() // block_size), dtype=torch.float32, device=_CPU)
    args = _QuantizeArgs(
        w=_address(w),
        thresholds=ctypes.addressof(_THRESHOLDS[kind]),
        codes=ctypes.addressof(_CODES[kind]),
        packed=_address(packed),
        absmax=_address(absmax),
        numel=w.numel(),
        block_size=block_size,
        dtype=DTYPES[w.dtype],
        level=level(),
        threads=_threads(),
    )
    if not library().handle.qlorag_nf4_quantize(ctypes.byref(args)):
        raise QuantizationError(name_nonfinite(w))
    return packed, absmax


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Nested]:
    """As reference.quantize_absmax."""
    offset = nested_offset(absmax)
    codes = torch.empty(absmax.numel(), dtype=torch.uint8, device=_CPU)
    nested = torch.empty(-(-absmax.numel() // NESTED_BLOCK_SIZE), dtype=torch.float32, device=_CPU)
    library().handle.qlorag_nf4_quantize_absmax(
        _address(absmax),
        _address(offset),
        grid_codes().ctypes.data,
        absmax.numel(),
        _address(codes),
        _address(nested),
    )
    return codes, Nested(nested, offset)


def _packed_tensor(w: Packed) -> _PackedTensor:
    return _PackedTensor(
        packed=_address(w.packed),
        absmax=_address(w.absmax),
        nested_absmax=None if w.nested is None else _address(w.nested.absmax),
        nested_offset=None if w.nested is None else _address(w.nested.offset),
        dynamic=ctypes.addressof(_DYNAMIC),
        table=ctypes.addressof(_TABLES[w.kind]),
        numel=w.numel,
        block_size=w.block_size,
    )


def dequantize(w: Packed, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    """As ops.dequantize."""
    if out is None:
        out = torch.empty(w.shape, dtype=dtype, device=_CPU)
    args = _DequantizeArgs(
        q=_packed_tensor(w),
        out=_address(out),
        dtype=DTYPES[dtype],
        level=level(),
        threads=_threads(),
        stream=out.nbytes >= STREAM_BYTES and out.data_ptr() % 64 == 0,
    )
    library().handle.qlorag_nf4_dequantize(ctypes.byref(args))
    return out


class Matmul:
    """y = x Wᵀ over one W [N, K], which it keeps alive. All but x is looked up once, so that a call costs little."""

    def __init__(self, w: Packed) -> None:
        self._parts = (w.packed, w.absmax, *(w.nested or (None, None)))  # kept alive
        self._addresses = [0 if part is None else part.data_ptr() for part in self._parts]
        self.out_features, self.in_features = w.shape
        self._args = _MatmulArgs(
            w=_packed_tensor(w),
            out_features=self.out_features,
            in_features=self.in_features,
            level=level(),
            denominator=DENOMINATORS[w.kind],
        )
        self._address = ctypes.addressof(self._args)
        self._run = library().handle.qlorag_nf4_matmul
        self._run_backward = library().handle.qlorag_nf4_matmul_backward
        self._has_matrix_unit = has_matrix_unit()

    def is_over(
        self, packed: Tensor | None, absmax: Tensor | None, nested_absmax: Tensor | None, nested_offset: Tensor | None
    ) -> bool:
        """Whether W still consists of these tensors, and they are where they were in memory.

        A tensor can be replaced by another, and its memory by other memory (share_memory_, set_).
        """
        a, b, c, d = self._parts
        same = a is packed and b is absmax and c is nested_absmax and d is nested_offset
        return same and [0 if part is None else part.data_ptr() for part in self._parts] == self._addresses

    def has_backward(self, dtype: torch.dtype) -> bool:
        """Whether `backward` takes this dtype: bfloat16, on a processor with a matrix unit."""
        return self._has_matrix_unit and dtype == torch.bfloat16

    def __call__(self, x: Tensor) -> Tensor:
        """Map x [..., K] to y [..., N] in its dtype; x is contiguous, on the CPU, float32, float16 or bfloat16.

        Raises QuantizationError: it is not.
        """
        *rows, k = x.shape or (0,)
        if k != self.in_features or x.dtype not in DTYPES or not x.is_cpu or not _is_plain(x):
            raise QuantizationError(
                f"x is {x.dtype} {list(x.shape)} on {x.device}, strides {x.stride()}: wanted float32, float16 or "
                f"bfloat16 [..., {self.in_features}] on cpu, contiguous (and no lazy negative)"
            )
        y = x.new_empty((*rows, self.out_features))
        threads = _threads()
        if not self._run(self._address, _address(x), _address(y), x.numel() // k, DTYPES[x.dtype], threads):
            raise MemoryError(f"no memory for a copy of x, {list(x.shape)}")
        return y

    def backward(self, dy: Tensor) -> Tensor:
        """Map dy [..., N] to dx = dy W [..., K]; dy is contiguous, on the CPU, and has_backward(its dtype) is true."""
        *rows, n = dy.shape or (0,)
        if n != self.out_features or not self.has_backward(dy.dtype) or not dy.is_cpu or not _is_plain(dy):
            raise QuantizationError(
                f"dy is {dy.dtype} {list(dy.shape)} on {dy.device}, strides {dy.stride()}: wanted bfloat16 "
                f"[..., {self.out_features}] on cpu, contiguous, on a processor with a matrix unit"
            )
        dx = dy.new_empty((*rows, self.in_features))
        count, threads = dy.numel() // n, _threads()
        if not self._run_backward(self._address, _address(dy), _address(dx), count, threads):
            raise MemoryError(f"no memory for a copy of dy, {list(dy.shape)}")
        return dx
