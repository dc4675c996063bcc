"""Reading safetensors: one file, or a folder of shards behind an index, each tensor into memory of its own.

Layout (https://huggingface.co/docs/safetensors):

    u64 little-endian N | N bytes of JSON, padded with spaces | data
    {"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [begin, end]}, ..., "__metadata__": {"k": "v"}}

The header is untrusted input. Everything it claims is checked against the size of the file before anything is
allocated: tensors in offset order, no hole, no overlap, no byte left over, shape times item size equal to the span.
The rules are those of the official Rust reader, and a test mutates files and compares the two verdicts.

Tensors are read with `pread` and not mapped. If a mapped file is truncated, the process is killed with SIGBUS; and
mapped pages count as resident, so that a model quantized while it loads would seem (and under a memory limit: would
be) twice as large. What this costs: a tensor is copied once, at the speed of the page cache, and there is no lazy
slicing.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import WeightsError
from ..text.unicode import lone_surrogate

MAX_HEADER_BYTES = 100_000_000  # the official reader's cap
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# Bits, because the format also knows dtypes of 4 and 6 bits; only whole-byte ones can be read into torch here.
DTYPE_BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32,
    "F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
TORCH_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: dtype name, shape, and its byte span counted from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsFile:
    """One .safetensors file, its header checked on opening, its tensors read on demand.

    path: the file.
    Attributes: `entries` {name: Entry} in offset order, `metadata` {str: str}.
    Raises WeightsError: the file is missing, or its header is not valid.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            with self.path.open("rb") as f:
                size = os.fstat(f.fileno()).st_size
                self.entries, self.metadata = _parse_header(f.read(8), f.read, size)
        except _HeaderError as fault:
            raise WeightsError(
                f"{self.path}: not a valid safetensors file: {fault}: download or save it again"
            ) from None
        except OSError as fault:
            raise WeightsError(f"{self.path}: cannot be read ({fault.strerror}): check the path") from None

    def read(self, name: str, *, scratch: torch.Tensor | None = None) -> torch.Tensor:
        """The tensor `name` in the file's own dtype and shape.

        scratch: uint8 [at least its bytes] to read into, for a tensor that is used up before the next is read; the
                 result shares its memory. None allocates.
        Raises WeightsError: the name or its dtype is unknown, or the file has shrunk since it was opened.
        """
        entry = self.entries.get(name)
        if entry is None:
            raise WeightsError(f"{self.path}: no tensor {name!r}: it holds {len(self.entries)} others")
        dtype = TORCH_DTYPES.get(entry.dtype)
        if dtype is None:
            raise WeightsError(
                f"{self.path}: {name}: dtype {entry.dtype} cannot be read here, only {', '.join(TORCH_DTYPES)}"
            )
        size = entry.end - entry.begin
        raw = torch.empty(size, dtype=torch.uint8) if scratch is None else scratch[:size]
        if size:
            self._pread_into(raw.numpy().data, entry.begin, name)
        return raw.view(dtype).view(entry.shape)

    def _pread_into(self, buffer: memoryview, offset: int, name: str) -> None:
        with self.path.open("rb", buffering=0) as f:
            f.seek(offset)
            done = 0
            while done < len(buffer):  # one read returns at most 2 GiB
                got = f.readinto(buffer[done:])
                if not got:
                    raise WeightsError(
                        f"{self.path}: {name}: the file ends {len(buffer) - done} bytes early: it was cut short "
                        "while open; download or save it again"
                    )
                done += got


class _HeaderError(ValueError):
    """What is wrong with a header; the caller adds which file."""


def _parse_header(
    prefix: bytes, read: Callable[[int], bytes], file_size: int
) -> tuple[dict[str, Entry], dict[str, str]]:
    if len(prefix) < 8:
        raise _HeaderError(f"{file_size} bytes long, wanted at least 8 for the header's length")
    n = int.from_bytes(prefix, "little")
    if n > MAX_HEADER_BYTES:
        raise _HeaderError(f"header of {n} bytes, the format allows {MAX_HEADER_BYTES}")
    if 8 + n > file_size:
        raise _HeaderError(f"header of {n} bytes in a file of {file_size}")
    raw = read(n)
    if len(raw) != n:
        raise _HeaderError(f"header of {n} bytes, only {len(raw)} could be read")
    try:
        # ValueError: bad UTF-8 or JSON; RecursionError: nesting far deeper than any header.
        header = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_int=_natural
        )
    except _HeaderError:
        raise
    except (ValueError, RecursionError) as fault:
        raise _HeaderError(f"header is not JSON ({fault})") from None
    if not isinstance(header, dict):
        raise _HeaderError(f"header is a JSON {type(header).__name__}, wanted an object")
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata  # null is as good as absent; [], 0, "" and false are not
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _HeaderError("__metadata__ must map strings to strings")
    entries = {name: _entry(name, info) for name, info in header.items()}
    return _laid_out(entries, data_start=8 + n, file_size=file_size), metadata


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise _HeaderError("a key appears twice")
    for key in out:
        if fault := lone_surrogate(key):
            raise _HeaderError(f"key {key!r}: {fault}")
    return out


def _refuse_constant(name: str) -> Any:
    raise _HeaderError(f"{name} is not JSON")


def _natural(digits: str) -> int:
    if digits.startswith("-") or len(digits) > 20 or int(digits) >= 2**64:
        raise _HeaderError(f"number {digits[:24]} is not a 64-bit size")
    return int(digits)


def _entry(name: str, info: Any) -> Entry:
    if not isinstance(info, dict) or not {"dtype", "shape", "data_offsets"} <= info.keys():
        raise _HeaderError(f"{name}: wanted an object with dtype, shape and data_offsets")
    dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _HeaderError(f"{name}: dtype {dtype!r} is unknown")
    if not isinstance(shape, list) or not all(type(s) is int for s in shape):
        raise _HeaderError(f"{name}: shape must be a list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(o) is int for o in offsets):
        raise _HeaderError(f"{name}: data_offsets must be two numbers")
    return Entry(dtype, tuple(shape), offsets[0], offsets[1])


def _laid_out(entries: dict[str, Entry], *, data_start: int, file_size: int) -> dict[str, Entry]:
    """The entries in offset order with file offsets, once they are seen to tile the data exactly."""
    out: dict[str, Entry] = {}
    position = 0
    for name, e in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if e.begin != position or e.end < e.begin:
            raise _HeaderError(f"{name}: data_offsets [{e.begin}, {e.end}] leave a hole or overlap at {position}")
        numel = math.prod(e.shape)
        bits = numel * DTYPE_BITS[e.dtype]
        if numel >= 2**64 or bits >= 2**64 or bits % 8 or bits // 8 != e.end - e.begin:
            raise _HeaderError(f"{name}: {e.dtype} {list(e.shape)} does not fill data_offsets [{e.begin}, {e.end}]")
        position = e.end
        out[name] = Entry(e.dtype, e.shape, data_start + e.begin, data_start + e.end)
    if data_start + position != file_size:
        raise _HeaderError(f"tensors end at byte {data_start + position} of {file_size}")
    return out


class Checkpoint:
    """The tensors of a model folder, whether in `model.safetensors` or in shards behind an index.

    folder: holds one of the two.
    Raises WeightsError: neither is there, a shard is missing or outside the folder, or lacks what the index says.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        if (self.folder / SINGLE).is_file():
            file = SafetensorsFile(self.folder / SINGLE)
            self._where = {name: (file, name) for name in file.entries}
        elif (self.folder / INDEX).is_file():
            self._where = _open_shards(self.folder)
        else:
            pickles = sorted(p.name for p in self.folder.glob("*.bin")) if self.folder.is_dir() else []
            hint = (
                f"it holds {pickles[0]}, a pickle, which is never opened here: convert it to safetensors"
                if pickles
                else "give the folder of a model"
            )
            raise WeightsError(f"{self.folder}: no {SINGLE} and no {INDEX}: {hint}")

    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self._where)

    def rename(self, new: Mapping[str, str]) -> None:
        """Calls tensors by other names than the file does. new: {present name: new name}, no two of them alike."""
        renamed = {new.get(name, name): place for name, place in self._where.items()}
        assert len(renamed) == len(self._where)
        self._where = renamed

    def drop(self, names: Collection[str]) -> None:
        """Leaves tensors out, as if the folder did not hold them."""
        self._where = {name: place for name, place in self._where.items() if name not in names}

    def __contains__(self, name: object) -> bool:
        return name in self._where

    def entry(self, name: str) -> Entry:
        """Dtype, shape and span of one tensor. Raises WeightsError: there is no such tensor."""
        file, stored = self._place(name)
        return file.entries[stored]

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape."""
        return self.entry(name).shape

    def dtype(self, name: str) -> str:
        """The tensor's dtype as the file spells it, e.g. "BF16"."""
        return self.entry(name).dtype

    def nbytes(self, name: str) -> int:
        """The tensor's size in the file, in bytes."""
        entry = self.entry(name)
        return entry.end - entry.begin

    def file(self, name: str) -> Path:
        """The file that holds the tensor."""
        return self._place(name)[0].path

    def read(self, name: str, *, scratch: torch.Tensor | None = None) -> torch.Tensor:
        """The tensor in the file's dtype, freshly allocated or in `scratch`, see `SafetensorsFile.read`."""
        file, stored = self._place(name)
        return file.read(stored, scratch=scratch)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every (name, tensor), read one at a time."""
        for name in self.names():
            yield name, self.read(name)

    def fingerprint(self) -> str:
        """SHA-256 over every tensor's name, dtype and shape and up to 64 KiB of its bytes, spread evenly.

        Two models of the same shapes differ in it unless their weights agree at all sampled places; it costs the
        reading of 64 KiB a tensor instead of gigabytes, so an adapter can be checked against its base on every load.
        It does not depend on how the tensors are spread over files.
        """
        digest = hashlib.sha256()
        for name in self.names():
            entry = self.entry(name)
            digest.update(f"{name}\0{entry.dtype}\0{list(entry.shape)}\0".encode())
            with self.file(name).open("rb") as f:
                for begin, length in _sample_spans(entry.end - entry.begin):
                    f.seek(entry.begin + begin)
                    digest.update(f.read(length))
        return digest.hexdigest()

    def _place(self, name: str) -> tuple[SafetensorsFile, str]:
        """The file of a tensor, and what it is called there."""
        place = self._where.get(name)
        if place is None:
            raise WeightsError(f"{self.folder}: no tensor {name!r} among its {len(self._where)}")
        return place


def _sample_spans(size: int, *, pieces: int = 16, piece: int = 4096) -> list[tuple[int, int]]:
    if size <= pieces * piece:
        return [(0, size)]
    step = (size - piece) // (pieces - 1)
    return [(i * step, piece) for i in range(pieces)]


def _open_shards(folder: Path) -> dict[str, tuple[SafetensorsFile, str]]:
    index = folder / INDEX
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as fault:
        raise WeightsError(f"{index}: not a shard index ({fault}): wanted a JSON object with weight_map") from None
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"{index}: weight_map must be a non-empty object of tensor name to file name")
    for name, shard in weight_map.items():
        plain = shard.removeprefix("./") if isinstance(shard, str) else ""
        if Path(plain).name != plain or plain in ("", ".", ".."):
            raise WeightsError(
                f"{index}: {name}: shard {shard!r} is not a plain file name: refused, it may leave the folder"
            )
        weight_map[name] = plain
    shards = sorted(set(weight_map.values()))
    missing = [s for s in shards if not (folder / s).is_file()]
    if missing:
        raise WeightsError(
            f"{index}: {len(missing)} of {len(shards)} shards are missing: {', '.join(missing[:5])}: download them"
        )
    files = {s: SafetensorsFile(folder / s) for s in shards}
    for name, shard in weight_map.items():
        if name not in files[shard].entries:
            raise WeightsError(f"{index}: {name} is said to be in {shard}, which does not hold it")
    stray = sorted(n for s, f in files.items() for n in f.entries if weight_map.get(n) != s)
    if stray:
        warnings.warn(
            f"{index}: it does not list {stray[0]} ({len(stray)} such), which the shards hold: left out", stacklevel=4
        )
    return {name: (files[shard], name) for name, shard in weight_map.items()}
