"""How the NF4 kernels are timed: candidates interleaved, on the processor's clock or between events of a GPU.

A timer is a function that runs one call and returns its seconds. `wall` is the processor's. `EventTimer` is a GPU's:
its two events stand around the call in the GPU's own queue. Before them it overwrites a buffer larger than any cache,
so that a weight is read from memory each time, as in a model of many layers; while the GPU is at that, the call is
queued, so its launch is not in the figure unless the call itself waits for the GPU.
"""

from __future__ import annotations

import ctypes
import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

Timer = Callable[[Callable[[], Any]], float]
FLUSH_BYTES = 512 * 2**20  # the largest cache of a GPU today is 126 MB


class Event(Protocol):
    """What is used of torch.cuda.Event."""

    def record(self) -> None: ...
    def elapsed_time(self, end: Any) -> float: ...


def wall(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


class EventTimer:
    """event: makes one that can be timed; synchronize: waits for all that was queued; flush: overwritten before."""

    def __init__(self, event: Callable[[], Event], synchronize: Callable[[], None], flush: Tensor) -> None:
        self.event, self.synchronize, self.flush = event, synchronize, flush

    def __call__(self, call: Callable[[], Any]) -> float:
        start, end = self.event(), self.event()
        self.flush.zero_()
        start.record()
        call()
        end.record()
        self.synchronize()
        return start.elapsed_time(end) / 1e3  # of milliseconds


def cuda_timer(device: torch.device) -> EventTimer:
    return EventTimer(
        lambda: torch.cuda.Event(enable_timing=True),  # type: ignore[no-untyped-call]
        torch.cuda.synchronize,
        torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device),
    )


def return_freed() -> None:
    """Memory that malloc keeps, free, goes back to the system, where malloc is glibc's: as in a new process."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def interleave(
    candidates: Mapping[str, Callable[[], Any]], repeats: int, timer: Timer = wall
) -> dict[str, list[float]]:
    """Seconds of each call: every candidate once per round, in a new order each round."""
    order = random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name in order.sample([*candidates], len(candidates)):
            times[name].append(timer(candidates[name]))
    return times


def statistics_of(name: str, seconds: list[float]) -> dict[str, Any]:
    """A row: median, best, and the 10th and 90th percentile, in milliseconds."""
    deciles = statistics.quantiles(seconds, n=10, method="inclusive")
    return {
        "candidate": name,
        "ms": statistics.median(seconds) * 1e3,
        "ms_best": min(seconds) * 1e3,
        "ms_p10": deciles[0] * 1e3,
        "ms_p90": deciles[-1] * 1e3,
    }


def check_products(candidates: Mapping[str, Callable[[], Tensor]], exact: Tensor, beside: str) -> dict[str, float]:
    """Root mean square distance of each product from `exact`, in float64.

    Raises SystemExit: one is more than twice as far as that of `beside`, a dense product of torch.
    """
    errors = {name: (run().double() - exact).square().mean().sqrt().item() for name, run in candidates.items()}
    for name, error in errors.items():
        if not error <= 2 * errors[beside]:
            raise SystemExit(f"{name}: error {error:.3g}, torch's {errors[beside]:.3g}; a wrong result is not timed")
    return errors
