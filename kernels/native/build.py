"""Compile a C file on first use, cache the library, load it. Some seconds once, then a few milliseconds.

The file name in the cache is `<stem>-<key>-<compiler>-<content>.so`. The key is a SHA-256 of what a library is
made from: all C files in the folder of the source (it may include the others), the flags, the machine. The
compiler part is one of the compiler's command and version text: another compiler gets an entry of its own. Where
none is installed, or it fails, a library of the same key serves, whatever compiler made it. The content part is a
SHA-256 of the library itself, so an entry that is truncated or changed does not match its name and is built again.
A library gets its name by one rename: two processes that compile at once both succeed, and either file is good.

Two decisions about OpenMP. The object is compiled with `-fopenmp` but linked without it: its symbols then
resolve to the runtime that torch has already loaded, which is why torch is imported first. With a second
runtime beside torch's, both thread pools spin and every call costs about 8 ms. Where the compiler's OpenMP
does not match torch's runtime (clang beside libgomp), the library is built without OpenMP and runs on one
thread; `Library.openmp` is then False.

`-march=native` is never used: the source has one function per instruction set and chooses at run time, so a
cache on a shared home folder is right for every machine. `-ffp-contract=off`, because a fused multiply-add
rounds differently.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import NamedTuple

import torch  # loads the OpenMP runtime that the libraries below resolve to

log = logging.getLogger(__name__)

FLAGS = ("-std=c11", "-O3", "-fPIC", "-ffp-contract=off", "-fno-math-errno")
COMPILE_TIMEOUT = 120  # seconds; that of kernels/nf4 takes 2 to 5


class NativeBuildError(RuntimeError):
    """There is no library: no compiler, a compiler that fails, or a library that does not load."""


class Library(NamedTuple):
    """A loaded library, and whether its loops run on several threads."""

    handle: ctypes.CDLL
    openmp: bool


_lock = threading.Lock()
_loaded: dict[Path, Library | str] = {}  # or why there is none: an error itself would keep its callers' frames alive


def load(source: Path) -> Library:
    """Return the library compiled from `source`, building it if no good copy is cached.

    The result, a library or an error, is cached for the process; a failure logs one line the first time.
    Raises NativeBuildError.
    """
    with _lock:
        if source not in _loaded:
            try:
                _loaded[source] = _load(source)
            except NativeBuildError as error:
                _loaded[source] = str(error)
                log.warning("%s: %s; using the slower torch reference", source.name, str(error))
        answer = _loaded[source]
    if isinstance(answer, str):
        raise NativeBuildError(answer)
    return answer


def _load(source: Path) -> Library:
    recipes: list[tuple[tuple[str, ...], bool]] = [(FLAGS, False)]  # flags, and whether they are with OpenMP
    if torch.backends.openmp.is_available():  # type: ignore[no-untyped-call]
        recipes.insert(0, ((*FLAGS, "-fopenmp"), True))
    try:
        return _compiled(source, recipes)
    except NativeBuildError as error:
        for flags, openmp in recipes:
            cached = _open_cached(f"{_stem(source, flags)}-*")
            if cached is not None:
                log.info("%s: another compiler's library from the cache, because: %s", source.name, error)
                return Library(cached, openmp=openmp)
        raise


def _compiled(source: Path, recipes: list[tuple[tuple[str, ...], bool]]) -> Library:
    """The library of this compiler, from the cache or built: by the first of the recipes that works."""
    compiler = _compiler()
    version = _compiler_version(compiler)
    *others, (last, openmp) = recipes
    for flags, with_openmp in others:
        try:
            return Library(_build_or_open(source, compiler, version, flags), openmp=with_openmp)
        except NativeBuildError as error:
            log.info("%s: without OpenMP, because: %s", source.name, error)
    return Library(_build_or_open(source, compiler, version, last), openmp=openmp)


def _compiler() -> list[str]:
    """The command in CC, or cc. Raises NativeBuildError: CC cannot be split into words."""
    command = os.environ.get("CC", "")
    try:
        return shlex.split(command) or ["cc"]
    except ValueError as error:
        raise NativeBuildError(f"CC={command!r} is not a command ({error}): correct it, or unset it") from error


def _compiler_version(compiler: list[str]) -> str:
    if shutil.which(compiler[0]) is None:
        raise NativeBuildError(f"no C compiler: {compiler[0]!r} is not on PATH (install gcc or clang, or set CC)")
    done = _run([*compiler, "--version"])
    return done.stdout


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=COMPILE_TIMEOUT)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeBuildError(f"{command[0]} did not run: {error}") from error
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if "error" in line.lower()] or done.stderr.splitlines()
        raise NativeBuildError(f"{command[0]} failed with exit code {done.returncode}: {(lines or ['no message'])[0]}")
    return done


def _build_or_open(source: Path, compiler: list[str], version: str, flags: tuple[str, ...]) -> ctypes.CDLL:
    stem = f"{_stem(source, flags)}-{_digest(chr(0).join([*compiler, version]).encode())}"
    try:
        cached = _open_cached(stem)
        if cached is not None:
            return cached
        with tempfile.TemporaryDirectory(prefix="qlorag-build-") as scratch:
            built = _compile(source, compiler, flags, Path(scratch))
            try:
                return ctypes.CDLL(str(_place(built, stem)))
            except OSError as error:
                log.info("%s: the library is not cached: %s", _cache_folder(), error)
            return ctypes.CDLL(str(built))  # once mapped, it outlives its temporary folder
    except OSError as error:
        raise NativeBuildError(f"the compiled library does not load: {error}") from error


def _stem(source: Path, flags: tuple[str, ...]) -> str:
    """The name of a library as far as it does not depend on the compiler."""
    recipe = chr(0).join([*flags, platform.system(), platform.machine()])
    text = b"".join(part.read_bytes() for part in sorted(source.parent.glob("*.c")))  # it may include the others
    return f"{source.parent.name}-{source.stem}-{_digest(text + recipe.encode())}"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _open_cached(stem: str) -> ctypes.CDLL | None:
    for entry in sorted(_cache_folder().glob(f"{stem}-*.so")):
        try:
            if _is_intact(entry):
                return ctypes.CDLL(str(entry))
            entry.unlink()
        except OSError as error:  # unreadable, gone meanwhile, not ours to remove: build a fresh one
            log.info("%s: not used: %s", entry, error)
    return None


def _compile(source: Path, compiler: list[str], flags: tuple[str, ...], scratch: Path) -> Path:
    compiled, linked = scratch / "kernel.o", scratch / "kernel.so"
    _run([*compiler, *flags, "-c", str(source), "-o", str(compiled)])
    undefined = ["-undefined", "dynamic_lookup"] if platform.system() == "Darwin" else []
    _run([*compiler, "-shared", *undefined, str(compiled), "-o", str(linked), "-lm"])
    return linked


def _place(built: Path, stem: str) -> Path:
    """Copy `built` into the cache by one rename. Raises OSError: the folder is read-only, or full."""
    content = built.read_bytes()
    folder = _cache_folder()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor, name = tempfile.mkstemp(dir=folder, prefix=".building-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o700)
        entry = folder / f"{stem}-{_digest(content)}.so"
        os.replace(name, entry)
    except OSError:
        Path(name).unlink(missing_ok=True)
        raise
    return entry


def _is_intact(entry: Path) -> bool:
    """Whether the content matches the name, and no other user could have written it (it is code that will run)."""
    status = entry.stat()
    if hasattr(os, "getuid") and (status.st_uid not in (0, os.getuid()) or status.st_mode & 0o022):
        return False
    return _digest(entry.read_bytes()) == entry.stem.rsplit("-", 1)[1]


def _cache_folder() -> Path:
    """$QLORAG_HOME/kernels, else qlorag/kernels in the user's cache folder."""
    home = os.environ.get("QLORAG_HOME")
    if home:
        return Path(home) / "kernels"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qlorag" / "kernels"
