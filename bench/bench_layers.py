"""What a layer needs beside its products: norm, rotation, activation, adapter, loss; forward and backward.

    python bench/bench_layers.py [--tokens 256] [--dtype bfloat16] [--threads N] [--repeats 15] [--json FILE]

Each operation of kernels/ beside its own reference.py under torch's autograd, in one interleaved loop at the shapes of
SmolLM2-135M. Two figures: the time of a forward and its backward, and the bytes that wait in memory between the two
(what autograd saves, weights left out). Nothing is timed before its results and gradients are within twice the error
of the reference's from float64. On a GPU the same, with the Triton kernels.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import child
import hardware
import torch
from nf4_timing import cuda_timer, interleave, statistics_of, wall
from qlorag.kernels import cross_entropy, lora, rms_norm, rope, swiglu
from qlorag.kernels.cross_entropy import reference as plain_cross_entropy
from qlorag.kernels.lora import reference as plain_lora
from qlorag.kernels.rms_norm import reference as plain_rms_norm
from qlorag.kernels.rope import reference as plain_rope
from qlorag.kernels.swiglu import reference as plain_swiglu
from torch import Tensor

WIDTH, HIDDEN, HEADS, HEAD, RANK, VOCABULARY = 576, 1536, 9, 64, 8, 49152  # SmolLM2-135M
EPS = 1e-5


class Operation(NamedTuple):
    """ours and plain take the inputs; `constants` of them are weights or tables, not activations."""

    name: str
    ours: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]  # those that require a gradient do so
    constants: int


def operations(tokens: int, dtype: torch.dtype, device: torch.device) -> Iterator[Operation]:
    generator = torch.Generator().manual_seed(0)

    def new(*shape: int, trained: bool = True, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(device, dtype).requires_grad_(trained)

    angles = torch.rand(tokens, HEAD // 2, generator=generator).repeat(1, 2) * 6.28
    cos, sin = angles.cos().to(device, dtype), angles.sin().to(device, dtype)
    labels = torch.randint(VOCABULARY, (tokens,), generator=generator).to(device)
    x, weight = new(tokens, WIDTH), new(WIDTH, trained=False)
    yield Operation(
        "rms_norm",
        lambda x, w: rms_norm.rms_norm(x, w, eps=EPS),
        lambda x, w: plain_rms_norm.rms_norm(x, w, eps=EPS),
        (x, weight),
        1,
    )
    yield Operation("rope", rope.rope, plain_rope.rope, (new(1, HEADS, tokens, HEAD), cos, sin), 2)
    yield Operation("swiglu", swiglu.swiglu, plain_swiglu.swiglu, (new(tokens, HIDDEN), new(tokens, HIDDEN)), 0)
    adapter = (new(RANK, WIDTH, scale=WIDTH**-0.5), new(HIDDEN, RANK))
    yield Operation(
        "lora",
        lambda *inputs: lora.add_lora(*inputs, scaling=2.0),
        lambda *inputs: plain_lora.add_lora(*inputs, scaling=2.0),
        (new(tokens, HIDDEN), new(tokens, WIDTH), *adapter),
        2,
    )
    head = new(VOCABULARY, WIDTH, trained=False, scale=WIDTH**-0.5)
    yield Operation(
        "cross_entropy",
        cross_entropy.linear_cross_entropy,
        plain_cross_entropy.linear_cross_entropy,
        (new(tokens, WIDTH), head, labels),
        2,
    )


def step(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """The result, and the gradients of its sum of squares (of itself, where it is one number)."""
    y = function(*inputs)
    loss = y.float() if y.ndim == 0 else y.float().square().mean()
    trained = [t for t in inputs if t.requires_grad]
    return [y.detach(), *torch.autograd.grad(loss, trained)]


def saved_bytes(operation: Operation, function: Callable[..., Tensor]) -> int:
    """Bytes of activations that autograd holds between forward and backward, each memory counted once."""
    constants = operation.inputs[len(operation.inputs) - operation.constants :]
    known = {t.untyped_storage().data_ptr() for t in constants}
    held: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            held[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = function(*operation.inputs)  # alive, so that no memory is counted for two
    del y
    return sum(held.values())


def check(operation: Operation) -> None:
    """Raises SystemExit: ours is further from float64 than twice the reference."""
    exact = step(
        operation.plain,
        tuple(
            (t.detach().double() if t.is_floating_point() else t).requires_grad_(t.requires_grad)
            for t in operation.inputs
        ),
    )
    ours, plain = (step(function, operation.inputs) for function in (operation.ours, operation.plain))
    for place, (want, got, other) in enumerate(zip(exact, ours, plain, strict=True)):
        error, allowed = ((value.double() - want).norm().item() for value in (got, other))
        if not error <= 2 * allowed + 1e-6 * want.norm().item():
            raise SystemExit(
                f"{operation.name}, result {place}: error {error:.3g}, torch {allowed:.3g}; a wrong result is not timed"
            )


def measure(operation: Operation, repeats: int, timer: Any) -> list[dict[str, Any]]:
    check(operation)
    functions = {"qlorag": operation.ours, "torch autograd over the reference": operation.plain}
    candidates = {name: (lambda f=f: step(f, operation.inputs)) for name, f in functions.items()}
    for call in candidates.values():
        call()
    return [
        {"operation": operation.name, "saved_bytes": saved_bytes(operation, functions[name])}
        | statistics_of(name, seconds)
        for name, seconds in interleave(candidates, repeats, timer).items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="bfloat16")
    parser.add_argument("--threads", type=int, default=child.default_threads())
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    timer = cuda_timer(device) if device.type == "cuda" else wall
    print(f"{hardware.heading(hardware.machine(args.threads))}\n{args.tokens} tokens, {args.dtype}, {device}\n")
    print(f"{'forward and backward':52} {'ms':>8}  {'[p10 .. p90]':>18} {'saved, KiB':>11}")
    rows = []
    for operation in operations(args.tokens, getattr(torch, args.dtype), device):
        for row in measure(operation, args.repeats, timer):
            rows.append(row)
            spread = f"[{row['ms_p10']:.3f} .. {row['ms_p90']:.3f}]"
            title = f"{row['operation']}: {row['candidate']}"
            print(f"{title:52} {row['ms']:8.3f}  {spread:>18} {row['saved_bytes'] / 1024:11.0f}")
    if args.json:
        setting = {"tokens": args.tokens, "dtype": args.dtype, "device": str(device), "threads": args.threads}
        child.write_json(args.json, setting | {"rows": rows})


if __name__ == "__main__":
    sys.exit(main())
