"""Replace the dense linear layers of a model by quantized ones, in place."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn

from ..kernels.nf4 import QuantizationError
from .linear import QuantizedLinear

DEFAULT_SKIP = ("lm_head",)


def quantize_linears(
    model: nn.Module,
    *,
    kind: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    skip: str | Iterable[str] = (),
    default_skip: Iterable[str] = DEFAULT_SKIP,
) -> list[str]:
    """Replace every nn.Linear inside `model` by a QuantizedLinear, in place, one at a time.

    skip: layers to leave alone beside those of default_skip, as a dotted path, its last parts, or a glob:
        "out_proj", "mlp.down_proj", "model.layers.0.*".
    default_skip: the output head, as in the QLoRA paper: its error goes straight to the logits. It need not fit
        a layer; `default_skip=()` quantizes the head too.
    Returns the dotted names that were replaced, in the order of the model. Raises QuantizationError: nothing
    to replace; a skip pattern that fits no linear layer; a layer whose owner reads its weight; a weight that
        another module also holds (a tied head): the model is then unchanged. Or a weight that holds a NaN: the
        layers before it are then replaced.
    """
    more = (skip,) if isinstance(skip, str) else tuple(skip)
    left_out = (*default_skip, *more)
    # Exactly nn.Linear: the owner of a subclass may read its weight in ways that 4 bits do not serve.
    modules = model.named_modules(remove_duplicate=False)
    found = {name: module for name, module in modules if type(module) is nn.Linear and name}
    exist = ", ".join(found) or "none"
    for pattern in more:
        if pattern not in DEFAULT_SKIP and not any(_fits(name, pattern) for name in found):
            raise QuantizationError(f"skip={pattern!r} fits no linear layer: there are {exist}")
    targets = {name: m for name, m in found.items() if not any(_fits(name, pattern) for pattern in left_out)}
    if not targets:
        raise QuantizationError(f"no linear layer to quantize: there are {exist}, and skip={left_out}")
    _refuse_tied(model, targets)
    _refuse_read(model, targets)

    names = list(targets)
    places: dict[nn.Linear, list[str]] = {}  # one layer can stand in several places
    for name, linear in targets.items():
        places.setdefault(linear, []).append(name)
    del found, targets
    while places:  # `places` lets go of each layer before the next: the peak is one layer above the model
        linear, where = next(iter(places.items()))
        try:
            layer = QuantizedLinear.from_linear(linear, kind=kind, block_size=block_size, double_quant=double_quant)
        except QuantizationError as error:
            raise QuantizationError(f"{where[0]}.weight: {error}") from error
        layer.train(linear.training)
        for name in places.pop(linear):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer)
    return names


def _fits(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, "*." + pattern)


def _refuse_tied(model: nn.Module, targets: dict[str, nn.Linear]) -> None:
    """A weight held by another module too would be kept in memory by it, and no longer be shared."""
    weights = {id(linear.weight): (name, linear) for name, linear in targets.items()}
    for other, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            name, linear = weights.get(id(parameter), ("", module))
            if linear is not module:
                raise QuantizationError(f"{name} shares its weight with {other}: add it to skip, or untie them first")


def _refuse_read(model: nn.Module, targets: dict[str, nn.Linear]) -> None:
    """In eval mode nn.TransformerEncoderLayer gives the weights of its layers to one fused operation."""
    for owner, module in model.named_modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            prefix = f"{owner}." if owner else ""
            read = [name for name in (f"{prefix}linear1", f"{prefix}linear2") if name in targets]
            if read:
                raise QuantizationError(
                    f"{read[0]}: {owner or 'the model'} is an nn.TransformerEncoderLayer, which in eval mode reads the "
                    "weight itself: add linear1 and linear2 to skip"
                )
