"""The container of llama.cpp: a table of typed metadata, a table of tensors, then their data.

    "GGUF"  u32 version  u64 n_tensors  u64 n_metadata
    n_metadata x   string key, u32 type, value          string = u64 length, UTF-8 bytes
    n_tensors  x   string name, u32 n_dims, u64 dims[], u32 type, u64 offset
    padding to `general.alignment` (32), then the data; offsets count from here

Everything is little-endian, and dims are stored fastest first, so a [N, K] weight says (K, N).

**Every count is checked against the bytes that remain before anything is allocated for it**, in integers that
cannot overflow. The advisories against GGUF readers (CVE-2025-53630, CVE-2026-27940, CVE-2026-33298) are
about counts and products of dims that were believed. This is why the header is read here, and the `gguf`
library is asked only for what it knows best: the block layouts, and decoding a slice of a tensor.

What the metadata and the tensors mean is `gguf_convert`'s subject. Left out: arrays of arrays, big-endian
files, models split over several files. The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from ..errors import ConfigError, ModelError, TokenizerError, WeightsError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_U32, _STRING, _ARRAY, _U64 = 4, 8, 9, 10  # value types of the metadata; the others are in _SCALARS
_SLICE_ELEMENTS = 1 << 22  # decoded at a time: 16 MB of float32


@dataclass(frozen=True)
class GGUFTensor:
    """Where one tensor lies: `shape` as in torch ([N, K]), `offset` in bytes from the start of the file."""

    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GGUFFile:
    """An open file whose header was checked: every tensor lies inside `data`."""

    path: Path
    data: mmap.mmap
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """Metadata `key`, which must be of type `kind` and, without a default, must be there."""
        value = self.metadata.get(key, default)
        if value is None:
            raise ConfigError(f"{self.path}: {key} is missing: convert the original model to GGUF again")
        if type(value) is not kind:
            raise ConfigError(f"{self.path}: {key} is {value!r:.40}, expected {kind.__name__}: damaged file")
        return value

    def positive(self, key: str, kind: type, default: Any = None) -> Any:
        """A finite number above zero; a float32 comes back as the decimal it was written as."""
        value = self.get(key, kind, default)
        if kind is float:
            with np.errstate(over="ignore", under="ignore"):
                value = float(str(np.float32(value)))  # 9.999999747378752e-06 -> 1e-05
        if not 0 < value < math.inf:
            raise ConfigError(f"{self.path}: {key}={value}, expected a number above 0: damaged file")
        return value

    def strings(self, key: str) -> list[str]:
        """A list of strings that must be there."""
        values: list[str] = self.get(key, list)
        if not all(type(value) is str for value in values):
            raise ConfigError(f"{self.path}: {key} does not hold strings: damaged file")
        return values

    def token_id(self, name: str) -> int | None:
        """`tokenizer.ggml.{name}_token_id`; None when the file does not state it."""
        key = f"tokenizer.ggml.{name}_token_id"
        if key not in self.metadata:
            return None
        token, vocab = int(self.get(key, int)), len(self.get("tokenizer.ggml.tokens", list))
        if not 0 <= token < vocab:
            raise TokenizerError(f"{self.path}: {key}={token}, but there are {vocab} tokens: damaged file")
        return token

    def tensor(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """Decode one tensor, a slice of rows at a time, so that little more than the result is held."""
        info = self.tensors[name]
        rows, width = math.prod(info.shape[:-1]), info.shape[-1]
        raw = np.frombuffer(self.data, np.uint8, info.nbytes, info.offset).reshape(rows, -1)
        out = torch.empty(rows, width, dtype=dtype)
        step = max(1, _SLICE_ELEMENTS // width)
        for start in range(0, rows, step):
            try:
                with np.errstate(all="ignore"):  # a damaged scale is reported below
                    values = gguf.quants.dequantize(raw[start : start + step], info.kind)  # float32 [step, K]
            except NotImplementedError:
                raise WeightsError(
                    f"{self.path}: tensor {name} has type {info.kind.name}, which gguf cannot decode"
                ) from None
            if not np.isfinite(values).all():
                raise WeightsError(f"{self.path}: tensor {name} holds NaN or inf: damaged file")
            out[start : start + step] = torch.from_numpy(np.array(values))  # a copy: the map is read-only
        return out.reshape(info.shape)


def read_gguf(path: str | Path) -> GGUFFile:
    """Map a GGUF file and read its header.

    Raises ModelError: cannot be read, not GGUF, cut short, or a count that does not fit in the file.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ModelError(f"{path}: does not begin with 'GGUF': not a GGUF file")
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
    return _Header(path, data).read()


class _Header:
    """A cursor over the header. `claim` is called before each read and each allocation."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at, self.what = path, data, 4, "header"

    def read(self) -> GGUFFile:
        version = self.scalar(_U32)
        if version not in (2, 3):
            raise ModelError(f"{self.path}: GGUF version {version}: expected 2 or 3, little-endian")
        n_tensors, n_metadata = self.scalar(_U64), self.scalar(_U64)
        self.claim(n_metadata, 13, "metadata entries")  # the smallest: empty key, type, one byte
        self.claim(n_tensors, 24, "tensors")  # the smallest: empty name, no dims, type, offset
        metadata: dict[str, Any] = {}
        for index in range(n_metadata):
            self.what = f"metadata entry {index}"
            self.what = key = self.name()
            if key in metadata:
                raise ModelError(f"{self.path}: {key} appears twice: damaged file")
            metadata[key] = self.value()
        align = metadata.get("general.alignment", 32)
        if type(align) is not int or align < 1 or align & (align - 1):
            raise ModelError(f"{self.path}: general.alignment={align!r}, expected a power of two")
        entries = dict(self.tensor_entry(index) for index in range(n_tensors))
        if len(entries) != n_tensors:
            raise WeightsError(f"{self.path}: {n_tensors - len(entries)} tensor names appear twice: damaged file")
        base = -(-self.at // align) * align
        tensors = {name: self.place(name, base, *entry) for name, entry in entries.items()}
        return GGUFFile(self.path, self.data, metadata, tensors)

    def tensor_entry(self, index: int) -> tuple[str, tuple[tuple[int, ...], int, int]]:
        self.what = f"tensor entry {index}"
        self.what = name = self.name()
        n_dims = self.scalar(_U32)
        if not 1 <= n_dims <= 4:
            raise WeightsError(f"{self.path}: tensor {name} has {n_dims} dims, expected 1 to 4: damaged file")
        dims = self.take(_SCALARS[_U64], n_dims)
        return name, (dims[::-1], self.scalar(_U32), self.scalar(_U64))

    def place(self, name: str, base: int, shape: tuple[int, ...], number: int, offset: int) -> GGUFTensor:
        try:
            kind = gguf.GGMLQuantizationType(number)
            block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError):
            raise WeightsError(f"{self.path}: tensor {name} has type {number}, unknown to gguf") from None
        if 0 in shape or shape[-1] % block:
            raise WeightsError(f"{self.path}: tensor {name} {list(shape)} is not whole blocks of {block}")
        nbytes = math.prod(shape) // block * block_bytes  # Python integers: cannot overflow
        if (end := base + offset + nbytes) > len(self.data):
            raise WeightsError(
                f"{self.path}: tensor {name} ends at byte {end}, the file at {len(self.data)}: "
                "cut short or damaged, download it again"
            )
        return GGUFTensor(shape, kind, base + offset, nbytes)

    def claim(self, count: int, size: int, of: str) -> None:
        if count * size > len(self.data) - self.at:
            raise ModelError(
                f"{self.path}: {self.what} claims {count} {of} at byte {self.at} of {len(self.data)}: "
                "cut short or damaged, download it again"
            )

    def take(self, code: str, count: int) -> tuple[Any, ...]:
        size = struct.calcsize(f"<{code}")
        self.claim(count, size, "values")
        start, self.at = self.at, self.at + count * size
        return struct.unpack_from(f"<{count}{code}", self.data, start)

    def scalar(self, kind: int) -> Any:
        return self.take(_SCALARS[kind], 1)[0]

    def string(self) -> str:
        length = self.scalar(_U64)
        self.claim(length, 1, "bytes of text")
        start, self.at = self.at, self.at + length
        try:
            return self.data[start : self.at].decode()
        except UnicodeDecodeError:
            raise ModelError(f"{self.path}: {self.what} at byte {start} is not UTF-8: damaged file") from None

    def name(self) -> str:
        """A string that later messages may show: one line of printable text."""
        name = self.string()
        if not name.isprintable():
            raise ModelError(f"{self.path}: {self.what} is called {name[:40]!r}, which is not printable: damaged file")
        return name

    def value(self) -> Any:
        kind = self.scalar(_U32)
        if kind in _SCALARS:
            return self.scalar(kind)
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            kind, count = self.scalar(_U32), self.scalar(_U64)
            if kind in _SCALARS:
                return list(self.take(_SCALARS[kind], count))
            if kind == _STRING:
                self.claim(count, 8, "strings")
                return [self.string() for _ in range(count)]
        raise ModelError(f"{self.path}: {self.what} has value type {kind}, unknown to this reader")
