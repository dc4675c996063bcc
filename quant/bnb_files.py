"""bitsandbytes' 4-bit weights as they lie in a checkpoint, read and written without bitsandbytes.

The weight W [N, K] of a linear layer P is these tensors, named as transformers saves them:

    P.weight                                uint8   [ceil(N K / 2), 1]      two codes to a byte, the high nibble first
    P.weight.absmax                         float32 [blocks]                uint8 if double-quantized
    P.weight.quant_map                      float32 [16]                    the code table
    P.weight.nested_absmax                  float32 [ceil(blocks / 256)]    only if double-quantized
    P.weight.nested_quant_map               float32 [256]                   only if double-quantized
    P.weight.quant_state.bitsandbytes__nf4  uint8   [...]                   the rest, as JSON in UTF-8 (or ...__fp4):

    {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [N, K],
     "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.05}     nested_*: only if double-quantized

`dtype` is what was quantized. Codes, absmax and their order are this project's own, so nothing is computed
either way: the bytes of a file are the bytes in memory, and a file read and written again is the same file.

The tensors are untrusted input. Each one is held against the shape in the JSON before a kernel sees it, and what is
stored twice (the kind, the tables) must agree: decoding by another table would give another weight and no error.

Left out: tables other than bitsandbytes' own (its API takes any; files made with one are refused), and weights that it
repacked for its CPU kernel, which it undoes itself when it saves.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels import nf4
from ..kernels.nf4 import Kind, QuantizationError, QuantizedTensor
from ..kernels.nf4.tensor import NESTED_BLOCK_SIZE  # which is also all that bitsandbytes writes

MAX_STATE_BYTES = 1 << 16  # the JSON takes about 200
# bitsandbytes makes the table of the scales with torch.linspace, whose last bits depend on the processor: without AVX2,
# 42 of 256 entries are off by up to 2 units in the last place (findings/). Such scales are decoded by the usual table.
_ULPS = 2 * 2.0**-23

_PART = re.compile(r"(.+)\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__[^.]*)")
_STATE = "quant_state.bitsandbytes__"
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# bnb_4bit_quant_storage: the same bytes under another dtype, for the sake of FSDP.
_STORAGES = (torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.float32, torch.float64)
_DAMAGED = "the file is damaged or was put together from two: download or save it again"


@dataclass(frozen=True)
class BnbState:
    """What the JSON of one weight says."""

    kind: Kind
    block_size: int
    shape: tuple[int, int]
    dtype: torch.dtype
    nested_offset: float | None  # None: not double-quantized

    @property
    def blocks(self) -> int:
        return -(-math.prod(self.shape) // self.block_size)


def owner(key: str) -> str | None:
    """The weight that a tensor is a part of: "P.weight" for "P.weight.absmax"; None for a tensor of its own."""
    found = _PART.fullmatch(key)
    return None if found is None else found[1]


def state_key(keys: Iterable[str], name: str) -> str:
    """The one key that holds the JSON of the weight `name`. Raises QuantizationError: none does, or several."""
    found = sorted(key for key in keys if key.startswith(f"{name}.{_STATE}"))
    if len(found) != 1:
        got = ", ".join(key.removeprefix(f"{name}.") for key in found) or "none"
        raise QuantizationError(f"{name}: got {got}, wanted {_STATE}nf4 or {_STATE}fp4, one of them: {_DAMAGED}")
    return found[0]


def read_state(state: Tensor, key: str) -> BnbState:
    """The JSON of one weight, checked.

    state: uint8 [bytes of JSON].  key: its name, which ends in the kind.
    Raises QuantizationError: it is not such JSON, or says something that is not implemented; the message has the key.
    """
    if state.dtype != torch.uint8 or state.numel() > MAX_STATE_BYTES:
        raise QuantizationError(f"{key}: got {_words(state)}, wanted uint8, at most {MAX_STATE_BYTES}: {_DAMAGED}")
    try:
        # ValueError: not UTF-8, or not JSON; RecursionError: brackets nested by the thousand.
        fields = json.loads(state.detach().cpu().contiguous().numpy().tobytes().decode("utf-8"))
    except (ValueError, RecursionError) as fault:
        raise QuantizationError(f"{key}: got bytes that are not JSON ({fault}), wanted JSON: {_DAMAGED}") from None
    if not isinstance(fields, dict):
        raise QuantizationError(f"{key}: got a JSON {type(fields).__name__}, wanted an object: {_DAMAGED}")
    kind = fields.get("quant_type")
    if kind not in ("nf4", "fp4"):
        raise _refusal(key, fields, "quant_type", "'nf4' or 'fp4'")
    if not key.endswith(f"{_STATE}{kind}"):
        raise _refusal(key, fields, "quant_type", f"the one in the key: {_DAMAGED}")
    block_size, shape, dtype = fields.get("blocksize"), fields.get("shape"), fields.get("dtype")
    if type(block_size) is not int or block_size not in nf4.BLOCK_SIZES:
        raise _refusal(key, fields, "blocksize", f"one of {', '.join(map(str, nf4.BLOCK_SIZES))}")
    if not isinstance(shape, list) or len(shape) != 2 or not all(type(n) is int and n > 0 for n in shape):
        raise _refusal(key, fields, "shape", f"[N, K], both at least 1: {_DAMAGED}")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise _refusal(key, fields, "dtype", f"one of {', '.join(_DTYPES)}")
    offset = _nested_offset(key, fields) if any(field.startswith("nested_") for field in fields) else None
    return BnbState(kind, block_size, (shape[0], shape[1]), _DTYPES[dtype], offset)


def from_bnb(tensors: Mapping[str, Tensor], name: str) -> QuantizedTensor:
    """The weight `name`, sharing the memory of its tensors where they are contiguous.

    tensors: all tensors of that weight under their full keys (module docstring); those of other weights are ignored.
    Raises QuantizationError: a part is missing, unknown, of the wrong dtype or length, or contradicts another one.
    """
    mine = {key: tensor for key, tensor in tensors.items() if key == name or key.startswith(name + ".")}
    key = state_key(mine, name)
    state = read_state(mine.pop(key), key)
    numel, blocks, nested = math.prod(state.shape), state.blocks, state.nested_offset is not None
    packed = _packed(_take(mine, name), name, numel)
    _check_table(_take(mine, f"{name}.quant_map"), f"{name}.quant_map", nf4.NF4 if state.kind == "nf4" else nf4.FP4)
    absmax = _part(mine, f"{name}.absmax", torch.uint8 if nested else torch.float32, blocks)
    nested_absmax = nested_offset = None
    if nested:
        nested_absmax = _part(mine, f"{name}.nested_absmax", torch.float32, -(-blocks // NESTED_BLOCK_SIZE))
        _check_table(_take(mine, f"{name}.nested_quant_map"), f"{name}.nested_quant_map", nf4.DYNAMIC, _ULPS)
        nested_offset = torch.tensor(state.nested_offset, dtype=torch.float32, device=packed.device)
    if mine:
        extra = ", ".join(sorted(mine))
        why = "" if nested else f"; {key} has no nested_offset"
        raise QuantizationError(f"{name}: got {extra}, wanted no such part{why}: {_DAMAGED}")
    return QuantizedTensor.from_parts(
        (packed, absmax, nested_absmax, nested_offset),
        shape=state.shape,
        kind=state.kind,
        block_size=state.block_size,
        dtype=state.dtype,
    )


def to_bnb(q: QuantizedTensor, name: str) -> dict[str, Tensor]:
    """The tensors of `q` under the keys that transformers gives the weight `name`, on the device of `q`.

    Codes and scales share the memory of `q`; the tables are fresh, since safetensors wants no memory twice in a file.
    Raises QuantizationError: q is not a matrix.
    """
    if len(q.shape) != 2:
        raise QuantizationError(f"{name}: got shape {list(q.shape)}, wanted [N, K]: only linear weights have this form")
    fields: dict[str, Any] = {
        "quant_type": q.kind,
        "blocksize": q.block_size,
        "dtype": str(q.dtype).removeprefix("torch."),
        "shape": list(q.shape),
    }
    tensors = {
        name: q.packed.reshape(-1, 1),
        f"{name}.absmax": q.absmax,
        f"{name}.quant_map": _table(nf4.NF4 if q.kind == "nf4" else nf4.FP4, q),
    }
    if q.nested is not None:
        fields |= {
            "nested_blocksize": NESTED_BLOCK_SIZE,
            "nested_dtype": "float32",
            "nested_offset": q.nested.offset.item(),  # a float32 as a double, which JSON holds exactly
        }
        tensors[f"{name}.nested_absmax"] = q.nested.absmax
        tensors[f"{name}.nested_quant_map"] = _table(nf4.DYNAMIC, q)
    state = torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8, device=q.device)
    tensors[f"{name}.{_STATE}{q.kind}"] = state
    return tensors


def _table(values: Sequence[float], q: QuantizedTensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=q.device)


def _nested_offset(key: str, fields: dict[str, Any]) -> float:
    if fields.get("nested_blocksize") != NESTED_BLOCK_SIZE:
        raise _refusal(key, fields, "nested_blocksize", str(NESTED_BLOCK_SIZE))
    if fields.get("nested_dtype") != "float32":
        raise _refusal(key, fields, "nested_dtype", "float32")
    offset: Any = fields.get("nested_offset")
    if type(offset) not in (int, float) or not abs(offset) <= torch.finfo(torch.float32).max:  # nor is NaN
        raise _refusal(key, fields, "nested_offset", f"a finite float32: {_DAMAGED}")
    return float(offset)


def _take(tensors: dict[str, Tensor], key: str) -> Tensor:
    if key not in tensors:
        beside = f" beside {', '.join(tensors)}" if tensors else ""
        raise QuantizationError(f"{key}: got no such tensor, wanted one{beside}: {_DAMAGED}")
    return tensors.pop(key)


def _packed(stored: Tensor, name: str, numel: int) -> Tensor:
    """The codes as uint8 [ceil(numel / 2)], whatever dtype their bytes are stored under."""
    # Not [1, n]: that is how bitsandbytes writes down a transposed weight.
    column = stored.dim() == 2 and stored.shape[1] == 1
    if stored.dtype not in _STORAGES or not column or stored.nbytes != (numel + 1) // 2:
        raise QuantizationError(
            f"{name}: got {_words(stored)}, {stored.nbytes} bytes, wanted uint8 [{(numel + 1) // 2}, 1] for "
            f"{numel} weights: {_DAMAGED}"
        )
    return stored.detach().contiguous().view(-1).view(torch.uint8)


def _part(tensors: dict[str, Tensor], key: str, dtype: torch.dtype, numel: int) -> Tensor:
    part = _take(tensors, key)
    if part.dtype != dtype or part.numel() != numel:
        wanted = str(dtype).removeprefix("torch.")
        raise QuantizationError(f"{key}: got {_words(part)}, wanted {wanted} [{numel}]: {_DAMAGED}")
    return part.detach().contiguous().view(-1)


def _check_table(stored: Tensor, key: str, table: tuple[float, ...], tolerance: float = 0.0) -> None:
    if stored.dtype != torch.float32 or stored.numel() != len(table):
        raise QuantizationError(f"{key}: got {_words(stored)}, wanted float32 [{len(table)}]: {_DAMAGED}")
    values = stored.detach().reshape(-1).tolist()
    for place, (got, wanted) in enumerate(zip(values, table, strict=True)):
        if not abs(got - wanted) <= tolerance * abs(wanted):  # NaN too
            raise QuantizationError(
                f"{key}: got {got} at place {place}, wanted {wanted}: weights of another table are not read here; "
                "quantize the original ones"
            )


def _refusal(key: str, fields: dict[str, Any], field: str, wanted: str) -> QuantizationError:
    got = f"{fields[field]!r:.60}" if field in fields else "nothing"
    return QuantizationError(f"{key}: {field}: got {got}, wanted {wanted}")


def _words(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
