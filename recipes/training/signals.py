"""Ctrl-C, SIGTERM and a closed terminal (SIGHUP) as a request to stop between two steps.

A checkpoint therefore never holds half an update.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any


@contextlib.contextmanager
def stop_signals(on_signal: Callable[[], None]) -> Iterator[list[int]]:
    """A list that receives the number of the first SIGINT, SIGTERM or SIGHUP; a second one acts as usual.

    on_signal: called with the first one, from the signal's handler.
    """
    received: list[int] = []
    previous: dict[int, Any] = {}

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        on_signal()
        for n, handler in previous.items():
            signal.signal(n, handler)

    with contextlib.suppress(ValueError):  # only the main thread may set handlers; elsewhere ctrl-C does not arrive
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            previous[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        for n, handler in previous.items():
            signal.signal(n, handler)
