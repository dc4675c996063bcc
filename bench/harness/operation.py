"""What the benchmarks of one operation share: bench_rms_norm.py, _rope, _swiglu, _lora and _cross_entropy.

    def operation(new: Inputs) -> Operation: ...     what such a file says: inputs, ours, the reference, its arithmetic
    main(operation, __doc__)                         all the rest: arguments, the check, times, bytes, table, JSON

Each is timed forward and backward, in one interleaved loop with its reference.py under torch's autograd, at the shapes
of SmolLM2-135M. Nothing is timed before results and gradients are within twice the reference's error from float64.

    saved       bytes that wait in memory between forward and backward: what autograd holds, constants left out. Not
                for competitors, which may keep things where autograd does not see them
    of limit    the time this processor needs at its peaks / the time measured. At its peaks it reads and writes every
                tensor once per direction, at the read bandwidth, or does the products' arithmetic at the rate of a
                large GEMM, whichever takes longer. Tensors of some MB stay in caches, and may be moved faster.

On a GPU the same with the Triton kernels, without a limit: hardware.py knows the processor's peaks alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import child, hardware
from harness.names import OURS
from harness.timing import cuda_timer, interleave, statistics_of, wall
from torch import Tensor

WIDTH, HIDDEN, HEADS, HEAD, VOCABULARY = 576, 1536, 9, 64, 49152  # SmolLM2-135M
REFERENCE = "torch autograd over the reference"


@dataclass(frozen=True)
class Operation:
    """ours, plain and others take the inputs and return one tensor.

    inputs:    those that require a gradient do so.
    constants: the last so many of them are weights or tables, which exist anyway.
    flop:      of the products, forward and backward.
    others:    competitors by name.
    """

    ours: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    constants: int
    flop: float = 0.0
    others: Mapping[str, Callable[..., Tensor]] = field(default_factory=dict)

    def candidates(self) -> dict[str, Callable[..., Tensor]]:
        return {OURS: self.ours, REFERENCE: self.plain, **self.others}


class Inputs:
    """Makes an operation's inputs: new(T, D) is drawn from N(0, scale²) and wants a gradient unless trained=False."""

    def __init__(self, tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        self.tokens, self.dtype, self.device = tokens, dtype, device
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int, trained: bool = True, scale: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=self.generator) * scale
        return values.to(self.device, self.dtype).requires_grad_(trained)


def step(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], dy: Tensor) -> list[Tensor]:
    """The result, and the gradients for `dy` of those inputs that want one."""
    y = function(*inputs)
    trained = [t for t in inputs if t.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, trained, dy.to(y.dtype))]


def check(operation: Operation, dy: Tensor) -> None:
    """Raises SystemExit: a candidate is further from float64 than twice the reference."""
    wide = (t.detach().double() if t.is_floating_point() else t for t in operation.inputs)
    kept = tuple(t.requires_grad_(own.requires_grad) for t, own in zip(wide, operation.inputs, strict=True))
    exact = step(operation.plain, kept, dy)
    allowed = _errors(step(operation.plain, operation.inputs, dy), exact)
    for name, function in operation.candidates().items():
        errors = _errors(step(function, operation.inputs, dy), exact)
        for place, (error, most, want) in enumerate(zip(errors, allowed, exact, strict=True)):
            if not error <= 2 * most + 1e-6 * want.norm().item():
                raise SystemExit(
                    f"{name}, result {place}: error {error:.3g}, torch's {most:.3g}; a wrong result is not timed"
                )


def _errors(results: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [(got.double() - want).norm().item() for got, want in zip(results, exact, strict=True)]


def saved_bytes(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], constants: int) -> int:
    """Bytes that autograd holds between forward and backward, the last inputs left out; each memory counts once."""
    known = {t.untyped_storage().data_ptr() for t in inputs[len(inputs) - constants :]}
    held: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            held[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = function(*inputs)  # alive, so that no memory is counted for two
    del y
    return sum(held.values())


def limit_seconds(operation: Operation, dtype: str, dy: Tensor, peaks: Mapping[str, Any]) -> float | None:
    """The module's time at the processor's peaks; None if they were not measured for this dtype."""
    rate = peaks.get(f"{dtype}_gflop_per_s")
    if rate is None:
        return None
    y, *gradients = step(operation.ours, operation.inputs, dy)
    moved = sum(t.nbytes for t in (*operation.inputs, y, *gradients)) + y.nbytes  # and dy
    moved += saved_bytes(operation.ours, operation.inputs, 0)
    return float(max(moved / peaks["read_gb_per_s"], operation.flop / rate)) / 1e9


def measure(operation: Operation, repeats: int, timer: Callable[[Callable[[], Any]], float]) -> list[dict[str, Any]]:
    """A row for each candidate."""
    dy = torch.randn_like(operation.ours(*operation.inputs).detach())
    check(operation, dy)
    functions = operation.candidates()
    calls = {name: partial(step, f, operation.inputs, dy) for name, f in functions.items()}
    seconds = interleave(calls, repeats, timer)
    known = {f: saved_bytes(f, operation.inputs, operation.constants) for f in (operation.ours, operation.plain)}
    return [statistics_of(name, seconds[name]) | {"saved_bytes": known.get(f)} for name, f in functions.items()]


def main(make: Callable[[Inputs], Operation], doc: str | None) -> None:
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=256, help="rows of the inputs; default: %(default)s")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="bfloat16")
    parser.add_argument("--threads", type=int, default=child.default_threads(), help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=15, help="default: %(default)s")
    parser.add_argument("--json", type=Path, help="write the results there")
    args = parser.parse_args()
    machine = hardware.machine(args.threads)
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    operation = make(Inputs(args.tokens, getattr(torch, args.dtype), device))
    rows = measure(operation, args.repeats, cuda_timer(device) if device.type == "cuda" else wall)
    peaks = machine["peaks"] if device.type == "cpu" else {}
    limit = limit_seconds(operation, args.dtype, operation.ours(*operation.inputs).detach(), peaks)
    print(f"{hardware.heading(machine)}\n{args.tokens} tokens, {args.dtype}, {device}\n")
    print(f"{'forward and backward':44} {'ms':>8} {'[p10 .. p90]':>20} {'of limit':>9} {'saved, KiB':>11}")
    for row in rows:
        row["of_limit"] = None if limit is None else 1e3 * limit / row["ms"]
        share = "" if limit is None else f"{row['of_limit']:.1%}"
        saved = "" if row["saved_bytes"] is None else f"{row['saved_bytes'] / 1024:.0f}"
        spread = f"[{row['ms_p10']:.3f} .. {row['ms_p90']:.3f}]"
        print(f"{row['candidate']:44} {row['ms']:8.3f} {spread:>20} {share:>9} {saved:>11}")
    if args.json:
        setting = {"tokens": args.tokens, "dtype": args.dtype, "device": str(device), "threads": args.threads}
        child.write_json(args.json, setting | {"limit_ms": limit and 1e3 * limit, "rows": rows})
