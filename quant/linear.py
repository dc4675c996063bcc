"""A linear layer whose frozen weight is stored in 4 bits: the base of QLoRA (arXiv:2305.14314, eq. 5).

    y  = x Wᵀ + b        x [..., K], W [N, K] in 4 bits
    dx = dy W            db = sum of dy over all but the last dimension

Nothing of the size of W in 16 or 32 bits outlives either pass. W is frozen, so dW is not needed and x need
not be saved: what autograd keeps of this layer is a reference to the packed weight it already has.

kernels/nf4 decides by the number of rows whether the packed weight is multiplied as it is, or decoded into scratch
memory that all layers share and given to the platform's GEMM. As it is, everything but x is looked up once and kept by
the layer. The backward decodes, but for bfloat16 on a processor with a matrix unit.

Under torch.compile both passes are one operation each of kernels/nf4/torch_ops.py: no graph breaks.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..kernels import nf4
from ..kernels.dispatch import is_traced, is_transformed
from ..kernels.nf4 import QuantizationError, QuantizedTensor, dequantize, quantize
from .ddp import keep_out_of_ddp

_RECORD = "_extra_state"  # the name under which nn.Module keeps what get_extra_state returns
_AGAIN = "make the layer as that one was made, or load its dense weight and quantize it again"


def _add(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y.add_(bias)


class _QuantizedLinearFunction(torch.autograd.Function):
    """y = x Wᵀ + b; what is kept for the backward is the packed weight."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, q: QuantizedTensor, fused: nf4.Matmul | None = None
    ) -> Tensor:
        # y = x Wᵀ + b          [..., K] @ [K, N] -> [..., N]
        # Saved as tensors, though they are buffers, so that autograd notices if someone writes to them meanwhile.
        ctx.save_for_backward(*q.parts)
        ctx.q, ctx.fused = q, fused
        return nf4.matmul(x, q, bias=bias) if fused is None else _add(fused(x), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx = db = None
        if ctx.needs_input_grad[0]:
            # dx = dy W         [..., N] @ [N, K] -> [..., K]
            parts = ctx.saved_tensors
            if ctx.fused is not None and ctx.fused.has_backward(dy.dtype) and ctx.fused.is_over(parts):
                dx = ctx.fused.backward(dy)
            else:
                dx = nf4.matmul_backward(dy, ctx.q.with_parts(parts))
        if ctx.needs_input_grad[1]:
            # db = sum over rows of dy
            db = dy.reshape(-1, dy.shape[-1]).sum(dim=0)
        return dx, db, None, None


class QuantizedLinear(nn.Module):
    """y = x Wᵀ + b, W [N, K] frozen in 4 bits.

    The parts of W are buffers: they follow `.to(device)` and appear in `state_dict` as `packed`, `absmax`,
    `nested_absmax`, `nested_offset`. `.to(dtype)`, `.half()` and the like leave them as they are, because a
    rounded absmax would be another weight; the layer computes in the dtype of its input. `state_dict` also has
    `_extra_state`, which says in JSON how W is quantized, and loading refuses the state of another kind of layer.
    """

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_offset: Tensor | None
    bias: nn.Parameter | None

    def __init__(self, q: QuantizedTensor, bias: Tensor | None = None) -> None:
        super().__init__()
        if len(q.shape) != 2:
            raise QuantizationError(f"a linear weight has shape [N, K], got {list(q.shape)}")
        self.out_features, self.in_features = q.shape
        if bias is not None and tuple(bias.shape) != (self.out_features,):
            raise QuantizationError(f"bias has shape {list(bias.shape)}: wanted [{self.out_features}]")
        self.kind, self.block_size, self.weight_dtype = q.kind, q.block_size, q.dtype
        for name, part in zip(("packed", "absmax", "nested_absmax", "nested_offset"), q.parts, strict=True):
            self.register_buffer(name, part)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self._leave_inference_mode()
        self._fused: nf4.Matmul | None = None
        self._fused_code = (self.kind, self.block_size)
        keep_out_of_ddp(_is_quantized_linear)

    @classmethod
    def from_quantized(cls, q: QuantizedTensor, bias: Tensor | None = None) -> QuantizedLinear:
        """A layer over `q`, whose tensors it shares. bias: [N], frozen."""
        return cls(q, bias)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, *, kind: str = "nf4", block_size: int = 64, double_quant: bool = True
    ) -> QuantizedLinear:
        """Quantize the weight of `linear`; its bias is shared and frozen.

        Raises QuantizationError: the weight cannot be quantized.
        """
        weight = linear.weight.detach().contiguous()
        return cls(quantize(weight, kind=kind, block_size=block_size, double_quant=double_quant), linear.bias)

    @property
    def quantized(self) -> QuantizedTensor:
        """The weight, sharing this layer's tensors. Raises QuantizationError: its scales were cast."""
        for name in ("absmax", "nested_absmax", "nested_offset"):
            part = self._buffers[name]
            if part is not None and part.dtype not in (torch.float32, torch.uint8):
                raise QuantizationError(
                    f"{name} was cast to {part.dtype}, which is another weight: leave buffer_dtype out of FSDP's "
                    "MixedPrecision, and do not write to the scales"
                )
        return QuantizedTensor.from_parts(
            self._parts(),
            shape=(self.out_features, self.in_features),
            kind=self.kind,
            block_size=self.block_size,
            dtype=self.weight_dtype,
        )

    def _parts(self) -> tuple[Tensor | None, ...]:
        held = self._buffers  # not by attribute, which nn.Module looks up in three places
        return held["packed"], held["absmax"], held["nested_absmax"], held["nested_offset"]

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """W [N, K] in `dtype` (default: the dtype it was quantized from), in memory of its own."""
        return dequantize(self.quantized, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., K] to y [..., N], in the dtype of x, or under autocast in autocast's."""
        if x.shape[-1:] != (self.in_features,):
            raise QuantizationError(f"x is {list(x.shape)}: wanted [..., {self.in_features}]")
        if x.device != self.packed.device:
            raise QuantizationError(f"x is on {x.device}, the weight on {self.packed.device}: move them together")
        device = x.device.type
        if device != "meta" and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(device))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if is_traced() or is_transformed():
            product: Callable[..., Tensor] = nf4.nf4_matmul if is_traced() else nf4.TransformedMatmul.apply
            compiled = product(x, *self._parts(), self.out_features, self.kind, self.block_size)
            return compiled if bias is None else compiled + bias
        fused = self._fused_for(x)
        if not (torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))):
            return nf4.matmul(x, self.quantized, bias=bias) if fused is None else _add(fused(x), bias)
        q = self.quantized if fused is None else fused.q
        y: Tensor = _QuantizedLinearFunction.apply(x, bias, q, fused)  # type: ignore[no-untyped-call]
        return y

    def _fused_for(self, x: Tensor) -> nf4.Matmul | None:
        """The fused product, if it is the one to take for so many rows."""
        if not x.is_cpu or x.dtype not in nf4.FUSED_ROWS:
            return None
        rows = x.numel() // self.in_features  # the table first: to ask the processor takes 4 microseconds
        few = rows <= nf4.FUSED_ROWS[x.dtype] or rows <= nf4.fused_rows(x.dtype, x.device)
        return self._fused_matmul() if few else None

    def _fused_matmul(self) -> nf4.Matmul | None:
        """The fused product with the weight this layer holds now, or None where there is none."""
        code = (self.kind, self.block_size)
        if self._fused is None or self._fused_code != code or not self._fused.is_over(self._parts()):
            self._fused, self._fused_code = nf4.prepare_matmul(self.quantized), code
        return self._fused

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_fused": None}  # addresses mean nothing in a copy

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        keep_out_of_ddp(_is_quantized_linear)  # this may be another process

    def _leave_inference_mode(self) -> None:
        """Replace tensors made under torch.inference_mode, of which autograd refuses to keep any for a backward."""
        with torch.inference_mode(False):
            for name, part in self._buffers.items():
                if part is not None and part.is_inference():
                    self._buffers[name] = part.clone()
            if self.bias is not None and self.bias.is_inference():
                self.bias = nn.Parameter(self.bias.clone(), requires_grad=False)

    def get_extra_state(self) -> Tensor:
        """How W is quantized, as JSON in uint8 [bytes]: a tensor, so that any file of tensors can hold it."""
        text = json.dumps(self._record())
        return torch.tensor(list(text.encode()), dtype=torch.uint8, device=self.packed.device)

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing: _load_from_state_dict compares the record before it copies, and the layer stays what it is."""

    def _record(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "block_size": self.block_size,
            "double_quant": self._buffers["nested_absmax"] is not None,
            "shape": [self.out_features, self.in_features],
        }

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """As torch's; but the state of a layer that is quantized in another way, or of another shape, is an error.

        Copied, the codes would mean other numbers, and float scales would become whole ones. A state without a
        record, of an older version, is held against the dtypes only.
        """
        wrong = self._contradictions(state_dict.get(prefix + _RECORD), prefix)
        wrong += [
            f"{prefix}{name} is {given.dtype}, wanted {held.dtype}: it comes from a layer that was quantized in "
            "another way (double_quant)"
            for name, held in self._buffers.items()
            if held is not None and isinstance(given := state_dict.get(prefix + name), Tensor)
            if given.dtype != held.dtype
        ]
        local_metadata, strict, missing, unexpected, errors = args
        if wrong:
            errors.extend(wrong)
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        if prefix + _RECORD in missing:
            missing.remove(prefix + _RECORD)
        self._leave_inference_mode()  # load_state_dict(..., assign=True) takes the tensors as they are

    def _contradictions(self, record: object, prefix: str) -> list[str]:
        """What a state's record says that this layer is not, in words."""
        if not isinstance(record, Tensor) or record.is_meta:  # an older state, or one without values
            return []
        try:
            says = json.loads(record.detach().cpu().to(torch.uint8).numpy().tobytes())
        except ValueError:
            says = None
        if not isinstance(says, dict):
            return [f"{prefix}{_RECORD} is not the JSON of a quantized layer: the state is damaged, save it again"]
        return [
            f"{prefix}packed comes from a layer with {key}={says.get(key)!r}, wanted {held!r}: {_AGAIN}"
            for key, held in self._record().items()
            if says.get(key) != held
        ]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, was in before.items():
            now = self._buffers[name]
            if was is not None and now is not None and now.dtype != was.dtype:
                self._buffers[name] = was.to(now.device)
        self._leave_inference_mode()
        return self

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, kind={self.kind}, block_size={self.block_size}, "
            f"bits_per_weight={self.quantized.bits_per_weight:.3f}"
        )


def _is_quantized_linear(module: nn.Module) -> bool:
    return isinstance(module, QuantizedLinear)
