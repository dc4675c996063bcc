"""The exception of this package: an adapter cannot be attached, read, written or merged."""

from __future__ import annotations

from collections.abc import Iterable


class AdapterError(ValueError):
    """One line: the file (if any), the field or tensor, what was found, what was wanted, what to do."""


def some(names: Iterable[str], limit: int = 4) -> str:
    """`a, b, c and 5 more`: the first names of a list that may be long, for a one-line message."""
    listed = list(names)
    more = len(listed) - limit
    return ", ".join(listed[:limit]) + (f" and {more} more" if more > 0 else "")
