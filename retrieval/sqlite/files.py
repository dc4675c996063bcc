"""Publish a file so that a reader, or a machine that lost power, sees all of it or none of it."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def publish(temporary: Path, final: Path) -> None:
    """Make a finished temporary file durable under its final name: fsync, rename, fsync of the folder."""
    _fsync(temporary, os.O_RDONLY)
    os.replace(temporary, final)
    _fsync(final.parent, os.O_RDONLY | os.O_DIRECTORY)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _fsync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
