"""A folder, or a file, that appears whole or not at all.

It is built under a hidden name beside its place, every file in it is forced to the disk, and one rename makes it
appear. A reader never sees half of it; a killed process leaves only the hidden name, which the next attempt clears.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from ..errors import WeightsError


def check_free(folder: str | os.PathLike[str]) -> Path:
    """The path of a folder that can be written: there is nothing, or an empty folder.

    Raises WeightsError: something is there.
    """
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise WeightsError(f"{target}: already there and not empty: choose another folder or remove it")
    return target


def fsync(path: Path) -> None:
    """Forces a file's bytes, or a folder's names, to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """What fails in the block names `path`, where the operating system names no file: a write to a full disk."""
    try:
        yield
    except OSError as fault:
        if fault.errno is not None and fault.filename is None:
            fault.filename = str(path)
        raise


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a name beside `path` to write to; when the block ends without an exception, that file becomes `path`."""
    building = beside(path, str(os.getpid()))
    try:
        with naming(path):
            yield building
            fsync(building)
            building.replace(path)
            fsync(path.parent)
    except BaseException:  # ctrl-C too: nothing half-made stays behind
        building.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def new_folder(folder: Path, *, resume: bool = False) -> Iterator[Path]:
    """Yield a folder beside `folder`; when the block ends without an exception it becomes `folder`, at once.

    One process at a time may make a folder: what an earlier attempt left beside it is cleared first.
    resume: it is kept instead, and a failure keeps what there is, so that a download can go on.
    """
    work = beside(folder, "partial")
    if not resume:
        shutil.rmtree(work, ignore_errors=True)
    work.mkdir(exist_ok=resume)
    try:
        with naming(folder):
            yield work
            _settle(work)
            work.rename(folder)
            fsync(folder.parent)
    except BaseException:  # ctrl-C too: nothing half-made stays behind
        if not resume:
            shutil.rmtree(work, ignore_errors=True)
        elif not any(work.iterdir()):
            work.rmdir()
        raise


def _settle(work: Path) -> None:
    """Force every file and folder to the disk, with the rights a plain `open` would have given it."""
    os.umask(mask := os.umask(0o077))  # the only way to read it is to set it
    for where, _, names in os.walk(work, topdown=False):
        for name in names:
            os.chmod(os.path.join(where, name), 0o666 & ~mask)  # safetensors writes 0600
            fsync(Path(where, name))
        fsync(Path(where))


def beside(path: Path, suffix: str) -> Path:
    """The hidden name that work on a file or folder goes by."""
    return path.with_name(f".{path.name}.{suffix}")
