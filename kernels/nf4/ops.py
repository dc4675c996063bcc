"""The operations, for everyone: an eager call runs eager.py; what traces records an operation of torch_ops.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import is_traced
from .checks import check_bias, check_kind, check_matrix, check_x
from .eager import dequantize_eager, matmul_backward_eager, matmul_eager, quantize_absmax_eager, quantize_eager
from .tensor import Nested, QuantizedTensor
from .torch_ops import nf4_dequantize, nf4_matmul, nf4_matmul_backward, nf4_quantize, nf4_quantize_absmax


def quantize(
    w: Tensor, *, kind: str = "nf4", block_size: int = 64, double_quant: bool = True, backend: str | None = None
) -> QuantizedTensor:
    """code = nearest(table, w / absmax), two codes to a byte (reference.py has the exact rule).

    w:            float32, float16 or bfloat16, any shape, contiguous, all finite.
    double_quant: whether absmax is quantized too, to 8 bits.
    backend:      "triton", "c", "reference", or None to choose.
    Raises QuantizationError: wrong dtype, empty, not finite, no such kind or block_size, or a named backend
        that cannot run.
    """
    if backend is not None or not is_traced():
        return quantize_eager(w, kind=kind, block_size=block_size, double_quant=double_quant, backend=backend)
    packed, absmax = nf4_quantize(w.detach(), kind, block_size)
    nested = None
    if double_quant:
        absmax, nested = quantize_absmax(absmax)
    return QuantizedTensor(
        packed=packed, absmax=absmax, nested=nested, shape=tuple(w.shape), kind=check_kind(kind),
        block_size=block_size, dtype=w.dtype,
    )  # fmt: skip


def quantize_absmax(absmax: Tensor, *, backend: str | None = None) -> tuple[Tensor, Nested]:
    """8-bit codes of `absmax - mean(absmax)`, and what decodes them: double quantization.

    absmax: float32 [blocks], contiguous. Returns codes uint8 [blocks] and Nested.
    Raises QuantizationError: wrong dtype or shape, not finite, or a named backend that cannot run.
    """
    if backend is not None or not is_traced():
        return quantize_absmax_eager(absmax, backend=backend)
    codes, *nested = nf4_quantize_absmax(absmax.detach())
    return codes, Nested(*nested)


def dequantize(
    q: QuantizedTensor, *, dtype: torch.dtype | None = None, out: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """w[i] = table[code[i]] * absmax[i // block_size]      (QLoRA, arXiv:2305.14314, section 3)

    dtype:   of the result: float32, float16, bfloat16, or (reference only) float64; q.dtype unless told otherwise.
             The product is float32 and is rounded once.
    out:     contiguous tensor of q.shape and `dtype` to write into: a fresh one costs page faults.
    backend: "triton", "c", "reference", or None to choose.
    Returns the result, of q.shape (`out` itself if given).
    Raises QuantizationError: no such dtype, `out` does not fit, or a named backend that cannot run.
    """
    dtype = q.dtype if dtype is None else dtype
    if backend is not None or out is not None or not is_traced():
        return dequantize_eager(q, dtype=dtype, out=out, backend=backend)
    recorded: Tensor = nf4_dequantize(*q.parts, list(q.shape), q.kind, q.block_size, dtype)
    return recorded


def matmul(x: Tensor, q: QuantizedTensor, *, bias: Tensor | None = None, backend: str | None = None) -> Tensor:
    """y = x Wᵀ + b, where W [N, K] is what `dequantize` gives for q.

    x:       [..., K], float32, float16, bfloat16, or (reference only) float64.
    bias:    [N] in the dtype of x. A fused product rounds y before it adds the bias, the platform's GEMM after.
    backend: "triton" and "c" multiply the packed weight, in float32 sums. "reference" decodes it to the dtype
             of x first. None takes a fused one for few rows (crossover.py) where it can run.
    Returns y [..., N] in the dtype of x. It has no gradient: see quant.QuantizedLinear.
    Raises QuantizationError: an argument that does not fit, or a named backend that cannot run.
    """
    if backend is not None or not is_traced():
        return matmul_eager(x, q, bias=bias, backend=backend)
    check_matrix(q.shape)
    check_x(x, q.shape[1], q.device)
    check_bias(bias, q.shape[0], x)
    recorded: Tensor = nf4_matmul(x, *q.parts, q.shape[0], q.kind, q.block_size)
    return recorded if bias is None else recorded + bias


def matmul_backward(dy: Tensor, q: QuantizedTensor, *, backend: str | None = None) -> Tensor:
    """dx = dy W, the gradient of `matmul` with respect to x; W [N, K] is frozen and has none.

    dy:      [..., N], float32, float16, bfloat16, or (reference only) float64.
    backend: "triton", and "c" on a processor with a matrix unit and in bfloat16, multiply the packed weight.
             "reference" decodes it to the dtype of dy first, as does None where neither of the two runs, or on a GPU
             for more than GPU_FUSED_ROWS[dtype] rows.
    Returns dx [..., K] in the dtype of dy.
    Raises QuantizationError: an argument that does not fit, or a named backend that cannot run.
    """
    if backend is not None or not is_traced():
        return matmul_backward_eager(dy, q, backend=backend)
    check_matrix(q.shape)
    check_x(dy, q.shape[0], q.device, name="dy")
    recorded: Tensor = nf4_matmul_backward(dy, *q.parts, q.shape[1], q.kind, q.block_size)
    return recorded
