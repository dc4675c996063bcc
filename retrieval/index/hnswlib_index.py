"""Approximate nearest neighbours with hnswlib, as a cache that may vanish.

HNSW (Malkov & Yashunin, arXiv:1603.09320) answers in about log n steps over a layered neighbour graph. Its
file is no safe store: hnswlib writes it in place without fsync, magic number or checksum, says nothing when
the disk is full, loads a file of another dimension or metric as if it were right, and crashes on a flipped
bit. So:

    index-<16 hex>.hnsw    the graph and the unit vectors; published by rename, then
    manifest.json          sha256, bytes, count, last_id, dim, M, ef_construction, library version; then
    meta.index_sha256      in the database: the one file that this database trusts.

`load_index` runs only on a file whose SHA-256 is the one in the manifest *and* in the database, so a torn,
flipped, foreign or outdated file (also one that is newer than a database restored from a copy) is never
parsed. Any doubt raises UnusableIndexError and the caller builds again, or searches exactly.

Other traps, and what keeps clear of them: a query of the wrong dimension reads out of bounds (the caller
checks it); asking for more results than can be found raises and leaks (k is capped at the live count);
deleted points are marked in memory only and the file never holds a marked one; slots are never reused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import hnswlib
import numpy as np

from ..errors import StoreError
from ..sqlite.files import publish, sha256_of
from .exact import Float32, Int64

MANIFEST = "manifest.json"

# Results beyond k that are fetched and scored exactly, so that float32 near-ties at the border are ranked
# rightly.
_MARGIN = 16


class UnusableIndexError(StoreError):
    """The index file, or an answer from it, cannot be trusted; the message says why."""


@dataclass(frozen=True)
class HnswConfig:
    """What HNSW trades.

    M:               links per node, 2...128; more is better recall, and about 8 M bytes more per vector.
    ef_construction: candidates per insertion; more is a slower build of a better graph.
    ef:              candidates per search; more is better recall, time about proportional. At least k + 16.
    """

    M: int = 16
    ef_construction: int = 200
    ef: int = 128

    def __post_init__(self) -> None:
        if not 2 <= self.M <= 128 or self.ef_construction < self.M or self.ef < 1:
            raise StoreError(
                f"M={self.M}, ef_construction={self.ef_construction}, ef={self.ef}: "
                "give M in 2...128, ef_construction >= M, ef >= 1"
            )


class HnswIndex:
    """An hnswlib index over unit vectors, labelled by chunk id."""

    def __init__(self, index: hnswlib.Index, config: HnswConfig) -> None:
        self._index = index
        self._config = config
        self.ids: Int64 = np.sort(np.array(index.get_ids_list(), dtype=np.int64))
        self._dead: Int64 = np.empty(0, np.int64)

    @classmethod
    def build(cls, batches: Iterable[tuple[Int64, Float32]], *, count: int, dim: int, config: HnswConfig) -> HnswIndex:
        """Insert `count` >= 1 unit vectors, on all cores: with several, no two graphs are the same."""
        # Of unit vectors the inner product is the cosine, and "ip" keeps the vectors as they are.
        index = hnswlib.Index(space="ip", dim=dim)
        index.init_index(max_elements=count, M=config.M, ef_construction=config.ef_construction, random_seed=100)
        for ids, rows in batches:
            index.add_items(rows, ids)
        return cls(index, config)

    @property
    def last_id(self) -> int:
        """The largest chunk id when it was built: larger ones are not in it."""
        return int(self.ids[-1])

    @property
    def live(self) -> int:
        """How many of its chunks still exist."""
        return self.ids.size - self._dead.size

    @property
    def dead(self) -> int:
        """How many of its chunks were deleted since it was built."""
        return self._dead.size

    def keep_only(self, ids: Int64) -> None:
        """Mark what is not among `ids` as deleted. `ids` only ever shrinks."""
        dead = np.setdiff1d(self.ids, ids, assume_unique=True)
        for label in np.setdiff1d(dead, self._dead, assume_unique=True):  # marking twice raises
            self._index.mark_deleted(int(label))
        self._dead = dead

    def candidates(self, query: Float32, k: int) -> Int64:
        """Ids of about the k + 16 nearest live chunks. query: unit float32 [D].

        Raises UnusableIndexError: the graph has lost touch with some live points.
        """
        fetch = min(self.live, k + _MARGIN)
        if fetch == 0:
            return self.ids[:0]
        self._index.set_ef(max(self._config.ef, fetch))
        try:
            labels, _ = self._index.knn_query(query[None, :], k=fetch, num_threads=1)
        except RuntimeError as error:
            raise UnusableIndexError(f"hnswlib: {error}") from error
        return np.asarray(labels[0], dtype=np.int64)

    def save(self, folder: Path) -> str:
        """Publish the file and its manifest; the SHA-256 returned is for the database to remember.

        Raises UnusableIndexError: the file did not reach the disk whole.
        """
        temporary = folder / "index.tmp"
        try:
            self._index.save_index(str(temporary))
            wanted, size = self._index.index_file_size(), temporary.stat().st_size
            if size != wanted:  # hnswlib itself does not notice a full disk
                raise UnusableIndexError(f"{temporary}: {size} bytes written of {wanted}: is the disk full?")
            digest = sha256_of(temporary)
            publish(temporary, folder / _file_name(digest))
            manifest = {
                "file": _file_name(digest),
                "sha256": digest,
                "bytes": size,
                "count": int(self.ids.size),
                "last_id": self.last_id,
                **_fixed(self._index.dim, self._config),
            }
            temporary.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
            publish(temporary, folder / MANIFEST)
        except (OSError, RuntimeError) as error:
            raise UnusableIndexError(f"{temporary}: {error}") from error
        finally:
            temporary.unlink(missing_ok=True)
        return digest


def load_index(folder: Path, *, trusted_sha256: str, dim: int, config: HnswConfig) -> HnswIndex:
    """The published index, if it is byte for byte the one the database names.

    Raises UnusableIndexError: none was published, or anything about it is not as it should be.
    """
    if not trusted_sha256:
        raise UnusableIndexError("none was built yet")
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnusableIndexError(f"{MANIFEST}: {error}") from error
    wanted = {"sha256": trusted_sha256, "file": _file_name(trusted_sha256), **_fixed(dim, config)}
    for key, value in wanted.items():
        got = manifest.get(key) if isinstance(manifest, dict) else None
        if got != value:
            raise UnusableIndexError(f"{MANIFEST}: {key}={got!r}, wanted {value!r}")
    path = folder / _file_name(trusted_sha256)
    try:
        if sha256_of(path) != trusted_sha256:
            raise UnusableIndexError(f"{path.name}: its bytes are not those that were published")
        index = hnswlib.Index(space="ip", dim=dim)
        index.load_index(str(path))
        loaded = HnswIndex(index, config)
    except (OSError, RuntimeError) as error:
        raise UnusableIndexError(f"{path.name}: {error}") from error
    if loaded.ids.size == 0 or (loaded.ids.size, loaded.last_id) != (
        manifest.get("count"),
        manifest.get("last_id"),
    ):
        raise UnusableIndexError(f"{path.name}: holds {loaded.ids.size} vectors, not what {MANIFEST} says")
    return loaded


def remove_other_indexes(folder: Path, *, keep: str) -> None:
    """Delete index files other than that of SHA-256 `keep`. A reader that has one open has read it
    already.
    """
    for path in folder.glob("index-*.hnsw"):
        if path.name != _file_name(keep):
            os.unlink(path)


def _file_name(sha256: str) -> str:
    return f"index-{sha256[:16]}.hnsw"


def _fixed(dim: int, config: HnswConfig) -> dict[str, object]:
    """What must be equal for a file to fit: hnswlib records none of it."""
    return {
        "metric": "cosine",
        "dim": dim,
        "M": config.M,
        "ef_construction": config.ef_construction,
        "hnswlib": version("hnswlib"),
    }
