"""Putting adapters into a model and taking them out again.

`attach` replaces each selected layer by a `LoRALinear` that holds it, and freezes everything else; `detach`
puts the same layer objects back. All checks come before the first replacement.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .config import LoRAConfig
from .errors import AdapterError, some
from .layer import LoRALinear, feature_counts, is_quantized
from .targets import adapted_layers, choose

PREFIX = "base_model.model."  # what PEFT's two wrappers add to every path


def attach(
    model: nn.Module,
    config: LoRAConfig,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    compute_dtype: torch.dtype | None = None,
) -> list[str]:
    """Give every layer that `config` selects a new adapter, freeze all else, return the layers' paths.

    seed:  of the initial values of A (B is zero), the same on every device; torch's global generator is not used.
    dtype, compute_dtype: as in `LoRALinear`.
    Raises AdapterError: a target matches nothing, or the model has adapters already. It is then unchanged.
    """
    refuse_attached(model)
    chosen = choose(model, config)
    generator = torch.Generator().manual_seed(seed)
    adapted = {
        path: LoRALinear(
            layer,
            r=config.rank_of(path),
            alpha=config.alpha_of(path),
            dropout=config.dropout,
            rslora=config.rslora,
            generator=generator,
            dtype=dtype,
            compute_dtype=compute_dtype,
        )
        for path, layer in chosen.items()
    }
    place(model, adapted)
    return list(adapted)


def detach(model: nn.Module) -> list[str]:
    """Put every base layer back (the same objects) and return their paths; parameters stay frozen.

    Raises AdapterError: the model carries no adapter.
    """
    layers = require_attached(model)
    for path, layer in layers.items():
        replace(model, path, layer.base)
    return list(layers)


def trainable_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) of everything that the optimizer updates."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """{key: tensor}: `base_model.model.<path>.lora_A.weight` [R, K], `...lora_B.weight` [N, R]; no copies."""
    state: dict[str, Tensor] = {}
    for path, layer in adapted_layers(model).items():
        state[f"{PREFIX}{path}.lora_A.weight"] = layer.lora_A.detach()
        state[f"{PREFIX}{path}.lora_B.weight"] = layer.lora_B.detach()
    return state


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all): adapters included, tied weights once, a 4-bit layer as N x K weights, not bytes."""
    seen: dict[int, tuple[int, bool]] = {}
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if is_quantized(module):
            k, n = feature_counts(module)
            bias = getattr(module, "bias", None)
            seen[id(module)] = (n * k, False)
            own = [bias] if isinstance(bias, nn.Parameter) else []
        for p in own:
            seen[id(p)] = (p.numel(), p.requires_grad)
    return sum(n for n, trained in seen.values() if trained), sum(n for n, _ in seen.values())


def describe_parameters(model: nn.Module) -> str:
    """For a log line: `trainable 2.44 M of 137.0 M parameters (1.78 %)`."""
    trained, total = count_parameters(model)
    share = 100 * trained / max(total, 1)
    return f"trainable {trained / 1e6:.3g} M of {total / 1e6:.4g} M parameters ({share:.3g} %)"


def place(model: nn.Module, adapted: dict[str, LoRALinear], *, trainable: bool = True) -> None:
    """Put the adapted layers at their paths; only A and B are trainable, or nothing if `trainable` is False."""
    for p in model.parameters():
        p.requires_grad_(False)
    for path, layer in adapted.items():
        replace(model, path, layer)
        layer.train(layer.base.training)
        layer.base.requires_grad_(False)
        layer.lora_A.requires_grad_(trainable)
        layer.lora_B.requires_grad_(trainable)


def replace(model: nn.Module, path: str, module: nn.Module) -> None:
    """`model.<path> = module`."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def refuse_attached(model: nn.Module) -> None:
    """Raise AdapterError if the model carries adapters."""
    if layers := adapted_layers(model):
        raise AdapterError(
            f"the model already carries LoRA on {len(layers)} layers ({some(layers, 2)}): detach or merge it first"
        )


def require_attached(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapted layers; AdapterError if there are none."""
    if not (layers := adapted_layers(model)):
        raise AdapterError(f"{type(model).__name__} carries no LoRA layer: attach or load an adapter first")
    return layers
