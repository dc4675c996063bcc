"""bitsandbytes as the competitor: over the very bytes that our kernels are given, in each form it has.

Its bytes are ours (quant/bnb_files.py), so nothing is quantized twice. On a processor with AVX512-BF16 its
`Linear4bit`, once in eval mode, rearranges its weight for a product of its own (`packing_format_for_cpu`), with scales
in bfloat16: 4.25 bits a weight instead of 4.127, and no way to train. That is its best form for few rows there.
"""

from __future__ import annotations

import copy
import ctypes
import logging
from collections.abc import Callable
from typing import Any

import torch
from harness.names import AS_DOCUMENTED, REPACKED
from qlorag.kernels import nf4
from torch import Tensor

SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def why_not() -> str | None:
    """Why there is no bitsandbytes to compare with, or None."""
    logging.disable(logging.WARNING)  # it announces an optional package
    try:
        import bitsandbytes  # noqa: F401
    except Exception as error:  # a library for another CUDA fails in many ways
        return f"bitsandbytes does not import: {error}"
    return None


def state(
    scales: Tensor, nested: nf4.Nested | None, *, shape: tuple[int, ...], block_size: int, dtype: torch.dtype
) -> Any:
    """bitsandbytes' QuantState over our scales."""
    import bitsandbytes.functional as bnb

    options: dict[str, Any] = {}
    if nested is not None:
        table = bnb.create_dynamic_map().to(scales.device)
        second = bnb.QuantState(absmax=nested.absmax, blocksize=256, code=table, dtype=torch.float32)
        options = {"offset": nested.offset, "state2": second}
    code = bnb.get_4bit_type("nf4", device=scales.device)
    options |= {"shape": torch.Size(shape), "dtype": dtype, "blocksize": block_size, "code": code, "quant_type": "nf4"}
    return bnb.QuantState(absmax=scales, **options)


def kernel(packed: Tensor, absmax: Tensor, out: Tensor, block_size: int) -> Callable[[], None]:
    """bitsandbytes' own C function for the CPU, called as its Python does, into `out`."""
    from bitsandbytes.cextension import lib

    function = getattr(lib, f"cdequantize_blockwise_cpu_nf4_{SHORT[out.dtype]}")
    arguments = (
        ctypes.c_void_p(packed.data_ptr()),
        ctypes.c_void_p(absmax.data_ptr()),
        ctypes.c_void_p(out.data_ptr()),
        ctypes.c_longlong(block_size),
        ctypes.c_longlong(out.shape[0]),
        ctypes.c_longlong(out.shape[1]),
    )
    return lambda: function(*arguments)


def products(x: Tensor, q: nf4.QuantizedTensor) -> dict[str, Callable[[], Tensor]]:
    """x Wᵀ by each form of bitsandbytes that runs here; none without it."""
    if why_not():
        return {}
    import bitsandbytes as bnb

    theirs = state(q.absmax, q.nested, shape=q.shape, block_size=64, dtype=x.dtype)
    column = q.packed.view(-1, 1)
    candidates = {AS_DOCUMENTED: lambda: bnb.matmul_4bit(x, column.t(), quant_state=theirs)}
    has_form = x.device.type == "cpu" and bnb.functional.has_avx512bf16()
    if has_form and x.dtype == torch.bfloat16 and q.shape[0] % 32 == 0:
        rearranged, other = bnb.functional._convert_weight_packed_for_cpu(column, copy.deepcopy(theirs))
        candidates[REPACKED] = lambda: bnb.matmul_4bit(x, rearranged, quant_state=other)
    return candidates
