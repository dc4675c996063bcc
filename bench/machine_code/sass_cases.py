"""The Triton kernels that sass.py compiles, each with the arguments that its launches give it.

Sizes are those of a model of width 4096: W [4096, 4096] at block size 64, rows of 4096, heads of 128.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from qlorag.kernels.cross_entropy import triton_kernels as cross_entropy
from qlorag.kernels.lora import triton_kernels as lora
from qlorag.kernels.nf4 import gpu
from qlorag.kernels.nf4.codebook import BUCKETS, TABLES, Kind
from qlorag.kernels.nf4.gpu import triton_dequantize, triton_matmul, triton_quantize
from qlorag.kernels.rms_norm import triton_kernels as rms_norm
from qlorag.kernels.rope import triton_kernels as rope
from qlorag.kernels.swiglu import triton_kernels as swiglu

# Pointers are aligned, and these sizes multiples of 16: what a launch finds, and compiles for.
DIVISIBLE = (
    "n", "numel", "packed_bytes", "rows_per_split", "rows", "columns", "batch_stride", "head_stride", "token_stride"
)  # fmt: skip
FLOATS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
WIDTHS = {name: dtype.itemsize for name, dtype in FLOATS.items()}
SIZES = {"m": "i32", "n": "i32", "units": "i32"}


class Case(NamedTuple):
    """One kernel with its compile-time arguments, and what a program of it does."""

    name: str
    kernel: Any
    signature: dict[str, str]  # of the run-time arguments
    constants: dict[str, Any]
    options: dict[str, Any]
    elements: int  # in one pass through the hot code: of W, or, where there is none, of the result
    bytes_per_element: float  # of memory, with what is used again and again in caches
    tensor_cores: int = 0  # operations per element that they do
    loops: bool = True  # False: a jump back only waits for something


def cases(dtype: str = "bf16") -> list[Case]:
    """Every kernel, for tensors of this dtype."""
    return [*nf4_cases(dtype), *layer_cases(dtype)]


def page_cases() -> list[Case]:
    """What the page lists: every kernel for bfloat16, and those of nf4 for float32."""
    return [*cases(), *(case._replace(name=f"{case.name}, float32") for case in nf4_cases("fp32"))]


def weight(nested: bool = True) -> dict[str, str]:
    return {
        "packed": "*i32", "absmax": "*u8" if nested else "*fp32", "nested_absmax": "*fp32", "nested_offset": "*fp32",
        "dynamic": "*fp32", "table": "*fp32",
    }  # fmt: skip


def nf4_cases(dtype: str) -> list[Case]:
    """As the launches of kernels/nf4/gpu/launches.py make them; x and y of a product are in caches."""
    width = WIDTHS[dtype]
    pointer, stored = f"*{dtype}", 0.5 + 1 / 64 + 4 / (64 * 256)  # codes and scales
    listed = [
        Case(
            "dequantize", triton_dequantize.dequantize_kernel,
            {**weight(), "packed": "*u8", "out": pointer, "numel": "i32", "packed_bytes": "i32"},
            {"BLOCK_SIZE": 64, "NESTED": True, "TILE": gpu.TILE}, {"num_warps": 4}, gpu.TILE, stored + width,
        ),
        *(quantize_case(dtype, kind) for kind in TABLES),
    ]  # fmt: skip
    for m in (1, 2, 16, 128):
        plan = gpu.plan_forward(m, 4096, 4096, 64, FLOATS[dtype], 132)
        rows = {"ROWS": plan.rows} if plan.few else {"BN": plan.rows}
        listed.append(
            Case(
                f"few rows, M={m}" if plan.few else f"many rows, {plan.bm} at a time",
                triton_matmul.few_rows_kernel if plan.few else triton_matmul.many_rows_kernel,
                {"x": pointer, **weight(), "sums": "*fp32" if plan.splits > 1 else pointer, **SIZES,
                 "units_per_split": "i32"},
                {**tiles(plan), **rows}, {"num_warps": plan.warps}, plan.rows * plan.unit * plan.units, stored,
                0 if plan.few or dtype == "fp32" else 2 * plan.bm,
            )
        )  # fmt: skip
    plan = gpu.plan_backward(128, 4096, 4096, 64, FLOATS[dtype], 132)
    listed.append(
        Case(
            f"backward, {plan.bm} at a time", triton_matmul.backward_kernel,
            {"dy": pointer, **weight(), "sums": "*fp32" if plan.splits > 1 else pointer, **SIZES,
             "rows_per_split": "i32"},
            {**tiles(plan), "BN": plan.rows}, {"num_warps": plan.warps}, plan.rows * plan.unit * plan.units, stored,
            0 if dtype == "fp32" else 2 * plan.bm,
        )
    )  # fmt: skip
    return listed


def quantize_case(dtype: str, kind: Kind, ragged: bool = False) -> Case:
    """Whole blocks, or the launch of a last block that is not whole."""
    width, blocks = WIDTHS[dtype], 1 if ragged else gpu.QUANTIZE_TILE // 64
    return Case(
        f"quantize{', FP4' * (kind == 'fp4')}{', last block' * ragged}", triton_quantize.quantize_kernel,
        {"w": f"*{dtype}", "buckets": "*i32", "codes": "*u8", "packed": "*u8" if ragged else "*i32",
         "absmax": "*fp32", "first": "i32", "numel": "i32", "packed_bytes": "i32"},
        {"BLOCK_SIZE": 64, "BLOCKS": blocks, "BUCKETS": BUCKETS[kind], "IN_ORDER": kind == "nf4", "RAGGED": ragged},
        {"num_warps": 4}, 64 * blocks, width + 0.5 + 4 / 64,
    )  # fmt: skip


def tiles(plan: gpu.Plan) -> dict[str, Any]:
    return {"BLOCK_SIZE": 64, "NESTED": True, "UNIT": plan.unit, "UNITS": plan.units, "BM": plan.bm}


def rare_cases(dtype: str) -> list[Case]:
    """Kernels that take no time, but are held to the same rules."""
    splits = {"sums": "*fp32", "out": f"*{dtype}", "numel": "i32"}
    return [
        *(quantize_case(dtype, kind, ragged=True) for kind in TABLES),
        Case(
            "add splits", triton_matmul.add_splits_kernel, splits, {"SPLITS": 4, "TILE": 1024}, {"num_warps": 4},
            1024, 4 * 4 + WIDTHS[dtype],
        ),
    ]  # fmt: skip


def layer_cases(dtype: str) -> list[Case]:
    """The operations between the products; weights, tables and A and B of the adapter are in caches."""
    width, pointer = WIDTHS[dtype], f"*{dtype}"
    plan = rms_norm.tile(4096)
    warps, held = {"num_warps": plan.pop("num_warps")}, plan["ROWS"] * plan["COLUMNS"]
    rows = {"rstd": "*fp32", "rows": "i32", "columns": "i32"}
    gradient = {"dy": pointer, "x": pointer, "weight": pointer, "dx": pointer, "dw": "*fp32", **rows}
    tile, few = {"TILE": swiglu.TILE}, {"num_warps": 4}
    listed = [
        Case(
            "rms_norm", rms_norm.forward_kernel, {"x": pointer, "weight": pointer, "y": pointer, **rows, "eps": "fp32"},
            plan, warps, held, 2 * width,
        ),
        *(
            Case(
                f"rms_norm backward{', dw' * wants_weight}", rms_norm.backward_kernel,
                {**gradient, "rows_per_program": "i32"}, {**plan, "WANTS_WEIGHT": wants_weight}, warps, held, 3 * width,
            )
            for wants_weight in (False, True)
        ),
        *(
            Case(
                f"rope{' backward' * inverse}", rope.rotate_kernel,
                {**dict.fromkeys(("x", "cos", "sin", "y"), pointer),
                 **dict.fromkeys(("heads", "tokens", "batch_stride", "head_stride", "token_stride"), "i32")},
                {"HALF": 64, "WIDTH": 64, "TOKENS": rope.TILE // 64, "INVERSE": inverse}, few, 2 * rope.TILE, 2 * width,
            )
            for inverse in (False, True)
        ),
        Case(
            "swiglu", swiglu.forward_kernel,
            {"gate": pointer, "up": pointer, "h": pointer, "numel": "i32"}, tile, few, swiglu.TILE, 3 * width,
        ),
        Case(
            "swiglu backward", swiglu.backward_kernel,
            {**dict.fromkeys(("dh", "gate", "up", "dgate", "dup"), pointer), "numel": "i32"},
            tile, few, swiglu.TILE, 5 * width,
        ),
        # Of two loops the longer is counted. The second reading of a row of logits comes from a cache, if it is large.
        Case(
            "cross_entropy", cross_entropy.loss_and_gradient_kernel,
            {"z": pointer, "labels": "*i64", "losses": "*fp32", "columns": "i32"},
            {"GRADIENT": True, "BLOCK": cross_entropy.BLOCK}, few, cross_entropy.BLOCK, 3 * width,
        ),
    ]  # fmt: skip
    for rank in (8, 64):
        step = min(max(16, rank), lora.STEPS[FLOATS[dtype]])
        listed.append(
            Case(
                f"lora, R={rank}", lora.add_product_kernel,
                {"base": pointer, "z": pointer, "lora_b": "*fp32", "y": pointer, "m": "i32", "n": "i32",
                 "scaling": "fp32"},
                {"RANK": rank, "STEP": step, "BM": lora.BM, "BN": lora.BN},
                few, lora.BM * lora.BN, 2 * width, 0 if dtype == "fp32" else 2 * max(16, rank), rank > step,
            )
        )  # fmt: skip
    return listed
