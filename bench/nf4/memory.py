"""What a QuantizedLinear takes while it trains, in bits per weight, by three counts that should agree.

    stored     the bytes of the layer's buffers
    saved      the bytes that autograd keeps between the passes and that are none of those buffers
    resident   how much the process grows per layer, from one layer to several, each time in the middle of a step

What is paid once and not per layer, the memory that the weight is decoded into (without a matrix unit) and the GEMM's
own, is the growth over the first step, named beside them and not spread over the layers.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from harness.timing import return_freed
from qlorag.quant import QuantizedLinear, quantize
from torch import Tensor

ROWS = 32  # of x: more than a product of few rows takes, and little memory of their own

STATM = Path("/proc/self/statm")  # Linux


def resident_bytes() -> int:
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def step(layers: list[QuantizedLinear], x: Tensor) -> tuple[int, int]:
    """One forward and backward pass. Returns (bytes saved that are no buffers, resident bytes between the passes)."""
    buffers = {buffer.untyped_storage().data_ptr() for layer in layers for buffer in layer.buffers()}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in buffers:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    y = x.detach().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        for layer in layers:
            y = layer(y)
    between = resident_bytes()
    y.backward(torch.ones_like(y))  # type: ignore[no-untyped-call]
    return sum(saved.values()), between


def least(layers: list[QuantizedLinear], x: Tensor) -> tuple[int, int]:
    """Like `step`, of three after one to warm up: what malloc holds free between them is no layer's."""
    found = []
    for _ in range(4):
        return_freed()
        found.append(step(layers, x))
    return max(saved for saved, _ in found), min(between for _, between in found[1:])


def measure(size: int, layers: int) -> dict[str, Any]:
    """Job for a child: `layers` layers of [size, size] beside the first one, in bfloat16."""
    random = torch.Generator().manual_seed(0)
    # One dense weight for all, alive throughout, so that none of its pages are in the growth.
    w = (torch.randn(size, size, generator=random) / size**0.5).bfloat16()
    x = torch.randn(ROWS, size, generator=random).bfloat16()
    model = [QuantizedLinear.from_quantized(quantize(w))]
    before = resident_bytes()
    _, after_first = step(model, x)
    _, one = least(model, x)
    model += [QuantizedLinear.from_quantized(quantize(w)) for _ in range(layers)]
    saved, several = least(model, x)
    stored = sum(buffer.nbytes for layer in model for buffer in layer.buffers())
    return {
        "size": size,
        "layers": layers,
        "stored_bits": 8 * stored / (len(model) * w.numel()),
        "saved_bits": 8 * saved / (len(model) * w.numel()),
        "resident_bits": 8 * (several - one) / (layers * w.numel()),
        "scratch_bytes": max(after_first, one) - before,
        "decoded_bytes": w.nbytes,
    }
