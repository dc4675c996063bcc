"""Folding an adapter into its base:  W' = W + s B A.

Both the product and the sum are taken in float32, then rounded once. A quantized base is decoded first: those
decoded weights, not the original ones, are what the adapter was trained against and what it corrects
(huggingface/peft#2105). The result is dense; encoding it into 4 bits again would lose part of the update.

Rounding to bf16 keeps 8 bits of each weight, so an update much smaller than its weights is partly lost. The
report says how much: `rounding` is the norm of what was rounded off over the norm of the update.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .attach import replace, require_attached
from .errors import AdapterError
from .layer import feature_counts, is_quantized


@dataclass(frozen=True)
class LayerMerge:
    """What merging did to one layer; norms are Frobenius norms."""

    path: str
    max_abs_delta: float  # max |s B A|
    relative: float  # ||s B A|| / ||W||
    rounding: float  # ||W' - (W + s B A)|| / ||s B A||; 0 if the update is 0


@dataclass(frozen=True)
class MergeReport:
    """What `merge` did, layer by layer."""

    layers: tuple[LayerMerge, ...]

    @property
    def largest(self) -> LayerMerge:
        """The layer with the largest single change."""
        return max(self.layers, key=lambda layer: layer.max_abs_delta)

    def __str__(self) -> str:
        """For a log line."""
        mean = sum(layer.relative for layer in self.layers) / len(self.layers)
        lost = max(layer.rounding for layer in self.layers)
        return (
            f"merged {len(self.layers)} layers: largest change {self.largest.max_abs_delta:.3g} in "
            f"{self.largest.path}, mean ||delta|| / ||W|| {mean:.3g}, "
            f"at most {lost:.2g} of an update rounded off"
        )


def merge(model: nn.Module, *, dtype: torch.dtype | None = None) -> MergeReport:
    """Replace every adapted layer by a plain `nn.Linear` that holds W + s B A, and report what changed.

    dtype: of the new weights; None keeps a dense base's own. A quantized base has none, so it must be given.
    The base layers are not written to; layers without an adapter stay unchanged (`to_dense` decodes one).
    Raises AdapterError: no adapter; a 4-bit base without `dtype`; a weight shared with another module; values
    that are not finite. All but an overflow of `dtype` are found before the first layer is replaced.
    """
    layers = require_attached(model)
    _check(model, dtype)
    reports = []
    for path, layer in layers.items():
        weight = dense_weight(layer.base)
        delta = layer.delta()
        total = weight + delta
        merged = to_dense(layer.base, dtype or _own_dtype(layer.base), weight=total)
        if not torch.isfinite(merged.weight).all():
            raise AdapterError(
                f"{path}: W + s B A is not finite in {merged.weight.dtype}: merge in float32 or bfloat16"
            )
        norm = float(delta.norm())
        lost = float((merged.weight.to(total.dtype) - total).norm())
        reports.append(
            LayerMerge(
                path=path,
                max_abs_delta=float(delta.abs().max()),
                relative=norm / max(float(weight.norm()), 1e-30),
                rounding=lost / norm if norm > 0 else 0.0,
            )
        )
        replace(model, path, merged)
    return MergeReport(tuple(reports))


def dense_weight(layer: nn.Module) -> Tensor:
    """W [N, K] of a layer in float32 (float64 if it is that), decoded if it is quantized."""
    weight = layer.dequantize(torch.float32) if is_quantized(layer) else layer.weight  # type: ignore[operator]
    assert isinstance(weight, Tensor)
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))


def _own_dtype(layer: nn.Module) -> torch.dtype:
    assert isinstance(layer.weight, Tensor)  # `_check` has refused the others
    return layer.weight.dtype


def to_dense(layer: nn.Module, dtype: torch.dtype, *, weight: Tensor | None = None) -> nn.Linear:
    """A frozen `nn.Linear` in `dtype` that computes what `layer` does, or holds `weight` [N, K]."""
    k, n = feature_counts(layer)
    bias = getattr(layer, "bias", None)
    dense = nn.Linear(k, n, bias=bias is not None, device="meta")
    dense.weight = nn.Parameter((dense_weight(layer) if weight is None else weight).to(dtype), requires_grad=False)
    if bias is not None:
        dense.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
    return dense.train(layer.training)


def _check(model: nn.Module, dtype: torch.dtype | None) -> None:
    """All checks that come before the first layer is replaced."""
    layers = require_attached(model)
    owners: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(p), []).append(name)
    for path, layer in layers.items():
        if not all(bool(torch.isfinite(p).all()) for p in (layer.lora_A, layer.lora_B)):
            raise AdapterError(
                f"{path}: lora_A or lora_B is not finite: the training diverged, use an earlier checkpoint"
            )
        weight = getattr(layer.base, "weight", None)
        if is_quantized(layer.base):
            if dtype is None:
                raise AdapterError(f"{path}: its base is quantized, so merge needs dtype=, for example torch.bfloat16")
        elif not isinstance(weight, Tensor):
            raise AdapterError(f"{path}: {type(layer.base).__name__} has neither weight nor dequantize(dtype)")
        elif len(names := owners.get(id(weight), [])) > 1:
            raise AdapterError(f"{path}: its weight is also {names[0]}: a tied weight cannot be merged, untie it first")
