"""The C kernel of cpu.c, called through ctypes."""

from __future__ import annotations

import ctypes
import math
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from ..native import LEVELS, LevelError, Library, choose_level, load
from .codebook import Kind, dynamic_table, table
from .errors import QuantizationError
from .reference import Nested

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
# From this size on the result is written past the caches. Ordinary stores read each line of memory before
# they overwrite it, which doubles the traffic; what fits in a cache is better left there for the product that
# follows.
STREAM_BYTES = 8 << 20
_CPU = torch.device("cpu")


class _DequantizeArgs(ctypes.Structure):
    """`dequantize_args` of cpu.c, field by field."""

    _fields_ = [
        ("packed", ctypes.c_void_p),
        ("absmax", ctypes.c_void_p),
        ("nested_absmax", ctypes.c_void_p),
        ("nested_offset", ctypes.c_void_p),
        ("dynamic", ctypes.c_void_p),
        ("table", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("numel", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("level", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("stream", ctypes.c_int32),
    ]


@lru_cache(maxsize=1)
def library() -> Library:
    """The compiled cpu.c. Raises NativeBuildError."""
    loaded = load(Path(__file__).with_name("cpu.c"))
    loaded.handle.qlorag_nf4_dequantize.argtypes = [ctypes.POINTER(_DequantizeArgs)]
    loaded.handle.qlorag_nf4_dequantize.restype = None
    loaded.handle.qlorag_nf4_best_level.restype = ctypes.c_int32
    return loaded


@lru_cache(maxsize=1)
def best_level() -> int:
    """The highest index into LEVELS that this processor runs."""
    return int(library().handle.qlorag_nf4_best_level())


def level() -> int:
    """The level to run now. Raises QuantizationError: QLORAG_CPU_LEVEL asks for one that cannot run."""
    try:
        return choose_level(best_level())
    except LevelError as error:
        raise QuantizationError(str(error)) from error


def describe() -> str:
    """How the kernel runs here, in words."""
    threads = f"{torch.get_num_threads()} threads" if library().openmp else "1 thread: built without OpenMP"
    return f"{LEVELS[level()]}, {threads}"


def dequantize(
    packed: Tensor,
    absmax: Tensor,
    nested: Nested | None,
    shape: tuple[int, ...],
    kind: Kind,
    block_size: int,
    dtype: torch.dtype,
    out: Tensor | None,
) -> Tensor:
    """As ops.dequantize, which has checked everything: on the CPU, contiguous, of the right length."""
    if out is None:
        out = torch.empty(shape, dtype=dtype)
    args = _DequantizeArgs(
        packed=packed.data_ptr(),
        absmax=absmax.data_ptr(),
        nested_absmax=None if nested is None else nested.absmax.data_ptr(),
        nested_offset=None if nested is None else nested.offset.data_ptr(),
        dynamic=dynamic_table(_CPU).data_ptr(),
        table=table(kind, _CPU).data_ptr(),
        out=out.data_ptr(),
        numel=math.prod(shape),
        block_size=block_size,
        dtype=DTYPES[dtype],
        level=level(),
        threads=torch.get_num_threads(),
        stream=out.nbytes >= STREAM_BYTES and out.data_ptr() % 64 == 0,
    )
    library().handle.qlorag_nf4_dequantize(ctypes.byref(args))
    return out
