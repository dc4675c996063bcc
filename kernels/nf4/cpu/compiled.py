"""The compiled cpu.c: its structures, how it is loaded, and the instruction set (ISA) that it runs with."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path

import torch

from ...native import ISAS, IsaError, Library, choose_isa, load
from ..checks import QuantizationError


class PackedTensor(ctypes.Structure):
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


class DequantizeArgs(ctypes.Structure):
    """`dequantize_args` of dequantize.c."""

    _fields_ = [
        ("q", PackedTensor),
        ("out", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        ("isa", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("stream", ctypes.c_int32),
    ]


class QuantizeArgs(ctypes.Structure):
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
        ("isa", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    ]


class MatmulArgs(ctypes.Structure):
    """`matmul_args` of matmul.c."""

    _fields_ = [
        ("w", PackedTensor),
        ("out_features", ctypes.c_int64),
        ("in_features", ctypes.c_int64),
        ("isa", ctypes.c_int32),
        ("denominator", ctypes.c_int32),
    ]


@lru_cache(maxsize=1)
def library() -> Library:
    """The compiled cpu.c. Raises NativeBuildError."""
    loaded = load(Path(__file__).with_name("cpu.c"))
    handle, pointer = loaded.handle, ctypes.c_void_p
    sizes = (ctypes.c_int64 * 4)()
    handle.qlorag_nf4_sizes(sizes)
    mine = [ctypes.sizeof(structure) for structure in (PackedTensor, DequantizeArgs, QuantizeArgs, MatmulArgs)]
    assert [*sizes] == mine, f"structures of C and of this file differ: {[*sizes]} and {mine} bytes"
    handle.qlorag_nf4_best_isa.restype = ctypes.c_int32
    handle.qlorag_nf4_dequantize.argtypes = [ctypes.POINTER(DequantizeArgs)]
    handle.qlorag_nf4_dequantize.restype = None
    handle.qlorag_nf4_quantize.argtypes = [ctypes.POINTER(QuantizeArgs)]
    handle.qlorag_nf4_quantize.restype = ctypes.c_int32
    handle.qlorag_nf4_quantize_absmax.argtypes = [pointer] * 3 + [ctypes.c_int64] + [pointer] * 2
    handle.qlorag_nf4_quantize_absmax.restype = None
    handle.qlorag_nf4_matmul.argtypes = [pointer] * 3 + [ctypes.c_int64, ctypes.c_int32, ctypes.c_int32]
    handle.qlorag_nf4_matmul.restype = ctypes.c_int32
    handle.qlorag_nf4_matmul_backward.argtypes = [pointer] * 3 + [ctypes.c_int64, ctypes.c_int32]
    handle.qlorag_nf4_matmul_backward.restype = ctypes.c_int32
    return loaded


def threads() -> int:
    """How many threads a call may use."""
    return torch.get_num_threads() if library().openmp else 1


@lru_cache(maxsize=1)
def best_isa() -> int:
    """The index into ISAS of the best that this processor runs."""
    return int(library().handle.qlorag_nf4_best_isa())


def isa() -> int:
    """The index into ISAS of the one to use now. Raises QuantizationError: QLORAG_CPU_LEVEL names no usable one."""
    try:
        return choose_isa(best_isa())
    except IsaError as error:
        raise QuantizationError(str(error)) from error


def has_matrix_unit() -> bool:
    """Whether bfloat16 products run on one (amx_forward.c). Raises QuantizationError, NativeBuildError as isa does."""
    return ISAS[isa()] == "amx"


def describe() -> str:
    """How the kernels run here, in words."""
    parallel = f"{torch.get_num_threads()} threads" if library().openmp else "1 thread: built without OpenMP"
    return f"{ISAS[isa()]}, {parallel}"
