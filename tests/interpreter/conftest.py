"""The Triton kernels in Triton's interpreter: numpy on the CPU, for machines without a GPU.

TRITON_INTERPRET decides at import what a kernel is, so these tests have a process of their own (`make test` starts
it); any other run of pytest leaves this folder out.

The interpreter of Triton 3.9 has two faults with bfloat16, mended here. It cuts float32 off instead of rounding it,
where the hardware rounds to nearest even (tests/kernels/test_sass.py sees the instruction). And its `dot` multiplies
the bits of bfloat16 numbers as if they were integers.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton.language as tl
from triton import knobs
from triton.runtime import interpreter

assert knobs.runtime.interpret, "these tests need TRITON_INTERPRET=1, set before Python starts"


@pytest.fixture(autouse=True, scope="session")
def _bfloat16_as_in_hardware():
    builder = interpreter.InterpreterBuilder
    cast = builder.cast_impl

    def rounding_cast(self, src, dst_type):
        if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, src, dst_type)
        bits = torch.from_numpy(np.ascontiguousarray(src.data)).bfloat16().view(torch.int16).numpy().view(np.uint16)
        return interpreter.TensorHandle(bits.reshape(src.data.shape), tl.bfloat16)

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle.data
        return (handle.data.astype(np.uint32) << 16).view(np.float32)

    def dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        product = np.matmul(widened(a), widened(b), dtype=d.data.dtype)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "cast_impl", rounding_cast)
        patch.setattr(builder, "create_dot", dot)
        yield


@pytest.fixture(autouse=True)
def _poisoned():
    """torch.empty gives NaN, or the largest integer, so that an element left unwritten shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all() and (torch.empty(3, dtype=torch.uint8) == 255).all()
    yield
    torch.use_deterministic_algorithms(False)
