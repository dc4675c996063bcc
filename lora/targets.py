"""Which layers of a model a configuration selects.

The rules are PEFT's (`check_target_module_exists`), so that a file means the same modules there and here:
a name in a list matches a path that equals it or ends in "." + name; a string is a regular expression for
the whole path; `exclude` takes precedence. "all-linear" is every linear layer but the output head. One rule
is not PEFT's: a name that matches nothing is an error that lists what exists, because a typo would otherwise
silently train fewer layers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import nn

from .config import ALL_LINEAR, LoRAConfig
from .errors import AdapterError, some
from .layer import LoRALinear, is_linear

HEAD = "lm_head"
_BLOCK = re.compile(r"(?:^|\.)layers?\.(\d+)\.")


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of the model without adapters: the modules inside a LoRALinear are left out."""
    skip: tuple[str, ...] = ()
    for path, module in model.named_modules(remove_duplicate=False):
        if path.startswith(skip) and skip:
            continue
        if isinstance(module, LoRALinear):
            skip += (f"{path}.",)
        yield path, module


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """{path: layer} of every layer that can be adapted."""
    return {path: module for path, module in walk(model) if path and is_linear(module)}


def adapted_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """{path: layer} of every adapted layer."""
    return {path: module for path, module in walk(model) if isinstance(module, LoRALinear)}


def matches(patterns: str | Sequence[str], path: str) -> bool:
    """Whether `patterns` select `path`: one regular expression for the whole path, or a list of names or path ends."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in patterns)


def selected(paths: Iterable[str], targets: str | Sequence[str], exclude: str | Sequence[str] = ()) -> list[str]:
    """Those of `paths` that `targets` selects and `exclude` does not."""
    chosen = [path for path in paths if not (exclude and matches(exclude, path))]
    if targets == ALL_LINEAR:
        return [path for path in chosen if not matches((HEAD,), path)]
    return [path for path in chosen if matches(targets, path)]


def choose(model: nn.Module, config: LoRAConfig) -> dict[str, nn.Module]:
    """{path: layer} to be adapted under `config`, in the model's order.

    Raises AdapterError: a target matches nothing, num_layers exceeds the blocks, or a layer has two paths.
    """
    layers = linear_layers(model)
    if not layers:
        raise AdapterError(f"{type(model).__name__} has no linear layer: nothing to attach to")
    for name in () if isinstance(config.targets, str) else config.targets:
        if not selected(layers, (name,)):
            raise AdapterError(f"targets: {name!r} matches no linear layer; {what_exists(layers)}")
    chosen = selected(layers, config.targets, config.exclude)
    if config.num_layers is not None:
        last = _last_blocks(model, config.num_layers)
        chosen = [path for path in chosen if block_of(path) in last]
    if not chosen:
        raise AdapterError(f"{_described(config)} matches no linear layer; {what_exists(layers)}")
    refuse_shared(layers, chosen)
    return {path: layers[path] for path in chosen}


def what_exists(layers: Iterable[str]) -> str:
    """The distinct last names with their counts, and a few whole paths."""
    paths = list(layers)
    counts = Counter(path.rpartition(".")[2] for path in paths)
    names = some((f"{name} ({count})" for name, count in sorted(counts.items())), 16)
    return f"this model has {names}, for example {some(paths, 2)}"


def block_of(path: str) -> int | None:
    """The i of `...layers.<i>...`, or None outside the blocks."""
    found = _BLOCK.search(path)
    return int(found.group(1)) if found else None


def _last_blocks(model: nn.Module, count: int) -> range:
    total = 1 + max((block for path, _ in walk(model) if (block := block_of(path)) is not None), default=-1)
    if total == 0:
        raise AdapterError(f"num_layers={count}, but no module path has the form layers.<i>: leave num_layers out")
    if count > total:
        raise AdapterError(f"num_layers={count}, but the model has {total} blocks: choose 1 to {total}")
    return range(total - count, total)


def _described(config: LoRAConfig) -> str:
    """The selection in words; a bare name given as a string is probably a mistake and gets a hint."""
    text = f"targets={config.targets!r}"
    text += f" with exclude={config.exclude!r}" if config.exclude else ""
    text += f" in the last {config.num_layers} blocks" if config.num_layers is not None else ""
    if isinstance(config.targets, str) and re.fullmatch(r"\w+", config.targets) and config.targets != ALL_LINEAR:
        text += f" (a string is a regular expression for the whole path; for a name write [{config.targets!r}])"
    return text


def refuse_shared(layers: Mapping[str, nn.Module], chosen: Sequence[str]) -> None:
    """Raise AdapterError if a chosen layer is in the model at two paths: both would have to change."""
    paths_of: dict[int, list[str]] = {}
    for path, layer in layers.items():
        paths_of.setdefault(id(layer), []).append(path)
    for path in chosen:
        if len(paths := paths_of[id(layers[path])]) > 1:
            raise AdapterError(
                f"{some(paths)} are one and the same layer: exclude it, one adapter cannot serve two places"
            )
