"""Calls of the C kernels through ctypes. Arguments have been checked before."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from ...dispatch import has_tangent
from ..checks import QuantizationError
from ..codebook import DENOMINATORS, DYNAMIC, TABLES, Kind, ascending, grid_codes, midpoints
from ..reference import name_nonfinite, nested_offset
from ..tensor import NESTED_BLOCK_SIZE, Nested, QuantizedTensor
from .compiled import DequantizeArgs, MatmulArgs, PackedTensor, QuantizeArgs, has_matrix_unit, isa, library, threads

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


def _address(t: Tensor) -> int:
    """Where its elements are. Raises QuantizationError: nowhere, as in a tensor that only stands for one."""
    address = t.data_ptr()
    if address == 0 and t.numel():
        raise QuantizationError(
            f"a {t.dtype} tensor {list(t.shape)} has no memory (a fake or traced one?): these kernels take real ones; "
            f"under a tracer, use torch.ops.{__name__.split('.')[0]}.nf4_matmul or nf4_dequantize"
        )
    return address


def _as_stored(x: Tensor) -> Tensor:
    """`x` with its elements in memory in their order, and as they are: a copy where torch keeps strides or a sign."""
    return x if x.is_contiguous() and not x.is_neg() else x.resolve_neg().contiguous()


def quantize(w: Tensor, *, kind: Kind, block_size: int) -> tuple[Tensor, Tensor]:
    """As reference.quantize."""
    w = w.detach()
    packed = torch.empty((w.numel() + 1) // 2, dtype=torch.uint8, device=_CPU)
    absmax = torch.empty(-(-w.numel() // block_size), dtype=torch.float32, device=_CPU)
    args = QuantizeArgs(
        w=_address(w),
        thresholds=ctypes.addressof(_THRESHOLDS[kind]),
        codes=ctypes.addressof(_CODES[kind]),
        packed=_address(packed),
        absmax=_address(absmax),
        numel=w.numel(),
        block_size=block_size,
        dtype=DTYPES[w.dtype],
        isa=isa(),
        threads=threads(),
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


def _packed_tensor(q: QuantizedTensor) -> PackedTensor:
    return PackedTensor(
        packed=_address(q.packed),
        absmax=_address(q.absmax),
        nested_absmax=None if q.nested is None else _address(q.nested.absmax),
        nested_offset=None if q.nested is None else _address(q.nested.offset),
        dynamic=ctypes.addressof(_DYNAMIC),
        table=ctypes.addressof(_TABLES[q.kind]),
        numel=q.numel,
        block_size=q.block_size,
    )


def dequantize(q: QuantizedTensor, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    """As reference.dequantize."""
    if out is None:
        out = torch.empty(q.shape, dtype=dtype, device=_CPU)
    args = DequantizeArgs(
        q=_packed_tensor(q),
        out=_address(out),
        dtype=DTYPES[dtype],
        isa=isa(),
        threads=threads(),
        stream=out.nbytes >= STREAM_BYTES and out.data_ptr() % 64 == 0,
    )
    library().handle.qlorag_nf4_dequantize(ctypes.byref(args))
    return out


class Matmul:
    """y = x Wᵀ over one W [N, K], which it keeps alive. All but x is looked up once, so that a call costs little."""

    def __init__(self, q: QuantizedTensor) -> None:
        self.q = q
        self._parts = q.parts
        self._addresses = self._data_ptrs()
        self.out_features, self.in_features = q.shape
        self._args = MatmulArgs(
            w=_packed_tensor(q),
            out_features=self.out_features,
            in_features=self.in_features,
            isa=isa(),
            denominator=DENOMINATORS[q.kind],
        )
        self._address = ctypes.addressof(self._args)
        self._run = library().handle.qlorag_nf4_matmul
        self._run_backward = library().handle.qlorag_nf4_matmul_backward
        self._has_matrix_unit = has_matrix_unit()

    def _data_ptrs(self) -> list[int]:
        return [0 if part is None else part.data_ptr() for part in self._parts]

    def is_over(self, parts: Sequence[Tensor | None]) -> bool:
        """Whether W still consists of these tensors, and they are where they were in memory.

        A tensor can be replaced by another, and its memory by other memory (share_memory_, set_).
        """
        a, b, c, d = parts
        mine = self._parts
        return a is mine[0] and b is mine[1] and c is mine[2] and d is mine[3] and self._data_ptrs() == self._addresses

    def has_backward(self, dtype: torch.dtype) -> bool:
        """Whether `backward` takes this dtype: bfloat16, on a processor with a matrix unit."""
        return self._has_matrix_unit and dtype == torch.bfloat16

    def __call__(self, x: Tensor) -> Tensor:
        """Map x [..., K] to y [..., N] in its dtype; x is on the CPU, float32, float16 or bfloat16.

        Raises QuantizationError: it is not, or carries a forward-mode derivative, which would be lost.
        """
        *rows, k = x.shape or (0,)
        if k != self.in_features or x.dtype not in DTYPES or not x.is_cpu or has_tangent(x):
            raise QuantizationError(
                f"x is {x.dtype} {list(x.shape)} on {x.device}: wanted float32, float16 or bfloat16 "
                f"[..., {self.in_features}] on cpu, without a forward-mode tangent"
            )
        x, y = _as_stored(x), x.new_empty((*rows, self.out_features))
        at_most = threads()
        if not self._run(self._address, _address(x), _address(y), x.numel() // k, DTYPES[x.dtype], at_most):
            raise MemoryError(f"no memory for a copy of x, {list(x.shape)}")
        return y

    def backward(self, dy: Tensor) -> Tensor:
        """Map dy [..., N] to dx = dy W [..., K]; dy is on the CPU, and has_backward(its dtype) is true."""
        *rows, n = dy.shape or (0,)
        if n != self.out_features or not self.has_backward(dy.dtype) or not dy.is_cpu:
            raise QuantizationError(
                f"dy is {dy.dtype} {list(dy.shape)} on {dy.device}: wanted bfloat16 [..., {self.out_features}] on cpu, "
                "on a processor with a matrix unit"
            )
        dy, dx = _as_stored(dy), dy.new_empty((*rows, self.in_features))
        count, at_most = dy.numel() // n, threads()
        if not self._run_backward(self._address, _address(dy), _address(dx), count, at_most):
            raise MemoryError(f"no memory for a copy of dy, {list(dy.shape)}")
        return dx
