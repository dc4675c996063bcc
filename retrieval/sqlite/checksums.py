"""One number per row, by which damage is noticed: CRC-32 misses one random change in four billion."""

from __future__ import annotations

import zlib

from ..errors import CorruptStoreError


def checksum(*values: str | int | bytes) -> int:
    """CRC-32 of the values, in order, each with its length in front."""
    total = 0
    for value in values:
        data = value if isinstance(value, bytes) else str(value).encode()
        total = zlib.crc32(data, zlib.crc32(f"{len(data)}:".encode(), total))
    return total


def check(stored: object, what: str, *values: str | int | bytes) -> None:
    """Raise CorruptStoreError unless `stored` is the checksum of the values. what: names the row."""
    if stored != checksum(*values):
        raise CorruptStoreError(
            f"{what}: damaged on the disk, its checksum differs: restore the store from a copy, or index the "
            "documents again into another folder"
        )
