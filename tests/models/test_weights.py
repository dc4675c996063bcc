"""The safetensors reader against the official one: files that are right, wrong in every known way, and mutated."""

from __future__ import annotations

import json
import random
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from qlorag.models.errors import WeightsError
from qlorag.models.files.weights import TORCH_DTYPES, Checkpoint, SafetensorsFile
from safetensors import SafetensorError, deserialize, safe_open
from safetensors.torch import save_file


def container(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def tensor(dtype: str = "F32", shape: Any = (2,), begin: Any = 0, end: Any = 8) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


GOOD = {"a": tensor()}
FAULTS: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "0 bytes long"),
    "seven bytes": (b"\0" * 7, "7 bytes long"),
    "header of length 0": (container(b""), "not JSON"),
    "header longer than the file": (
        container(GOOD, b"\0" * 8, length=1000),
        "header of 1000 bytes in a file of",
    ),
    "header above the cap": (container(GOOD, b"\0" * 8, length=100_000_001), "the format allows 100000000"),
    "header of 2^63 bytes": (container(GOOD, length=2**63), "the format allows"),
    "not UTF-8": (container(b'{"\xff": 1}'), "not JSON"),
    "not JSON": (container(b"{]"), "not JSON"),
    "an array": (container([]), "JSON list, wanted an object"),
    "NaN": (container(b'{"a": NaN}'), "NaN is not JSON"),
    "deep nesting": (container(b"[" * 100_000), "not JSON"),
    "key twice": (
        container(b'{"a":%b,"a":%b}' % (json.dumps(tensor()).encode(), json.dumps(tensor()).encode()), b"\0" * 8),
        "a key appears twice",
    ),
    "trailing byte": (container(GOOD, b"\0" * 9), "tensors end at byte"),
    "data cut short": (container(GOOD, b"\0" * 7), "tensors end at byte"),
    "hole at the start": (container({"a": tensor(begin=4, end=12)}, b"\0" * 12), "hole or overlap at 0"),
    "hole": (
        container({"a": tensor(), "b": tensor(begin=12, end=20)}, b"\0" * 20),
        "b: data_offsets [12, 20]",
    ),
    "overlap": (
        container({"a": tensor(), "b": tensor(begin=4, end=12)}, b"\0" * 12),
        "b: data_offsets [4, 12]",
    ),
    "end before begin": (container({"a": tensor(begin=8, end=0)}, b"\0" * 8), "a: data_offsets [8, 0]"),
    "shape too small": (container({"a": tensor(shape=(1,))}, b"\0" * 8), "a: F32 [1] does not fill"),
    "shape overflows": (container({"a": tensor(shape=(2**33, 2**33))}, b"\0" * 8), "does not fill"),
    "negative size": (container({"a": tensor(shape=(-2,))}, b"\0" * 8), "number -2 is not a 64-bit size"),
    "size of 30 digits": (container({"a": tensor(shape=(10**30,))}, b"\0" * 8), "not a 64-bit size"),
    "fractional size": (container({"a": tensor(shape=(2.0,))}, b"\0" * 8), "shape must be a list of sizes"),
    "boolean size": (
        container({"a": tensor(shape=(True,), end=4)}, b"\0" * 4),
        "shape must be a list of sizes",
    ),
    "shape is null": (container({"a": {**tensor(), "shape": None}}, b"\0" * 8), "shape must be a list"),
    "three offsets": (container({"a": {**tensor(), "data_offsets": [0, 8, 8]}}, b"\0" * 8), "two numbers"),
    "unknown dtype": (container({"a": tensor("F33")}, b"\0" * 8), "dtype 'F33' is unknown"),
    "no dtype": (
        container({"a": {"shape": [2], "data_offsets": [0, 8]}}, b"\0" * 8),
        "wanted an object with dtype",
    ),
    "entry is a number": (container({"a": 3}, b"\0" * 8), "a: wanted an object"),
    "metadata holds a number": (container({"__metadata__": {"k": 1}}), "__metadata__ must map strings"),
    "metadata is a list": (container({"__metadata__": []}), "__metadata__ must map strings"),
    "metadata is 0": (container({"__metadata__": 0}), "__metadata__ must map strings"),
    "metadata is an empty string": (container({"__metadata__": ""}), "__metadata__ must map strings"),
    "metadata is false": (container({"__metadata__": False}), "__metadata__ must map strings"),
    "half a byte": (container({"a": tensor("F4", (3,), 0, 1)}, b"\0"), "does not fill"),
}


def verdict(path: Path) -> str | None:
    """The official reader's complaint, None if it accepts the file."""
    try:
        with safe_open(path, framework="pt") as f:
            f.keys()
    except (SafetensorError, OSError) as fault:
        return str(fault) or type(fault).__name__
    return None


@pytest.mark.parametrize("fault", FAULTS)
def test_damaged_files_are_refused(fault: str, tmp_path: Path) -> None:
    raw, message = FAULTS[fault]
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw)
    with pytest.raises(WeightsError) as error:
        SafetensorsFile(path)
    assert message in str(error.value)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    # The format forbids a repeated key and the official reader takes the last one: here the format is followed.
    assert (verdict(path) is None) == (fault == "key twice")


def test_mutated_files_get_the_official_verdict(tmp_path: Path) -> None:
    """10,000 files with a few header bytes changed: refused or accepted exactly as the official reader does."""
    rng = random.Random(5)
    path = tmp_path / "m.safetensors"
    header = {
        "__metadata__": {"format": "pt"},
        "w": tensor("BF16", (3, 2), 0, 12),
        "b": tensor("F32", (1,), 12, 16),
    }
    good = container(json.dumps(header).encode().ljust(240), bytes(range(16)))
    alphabet = b'0123456789[]{},:"-. \x00\xffeEabFU\\n'
    accepted = 0
    for _ in range(10_000):
        raw = bytearray(good)
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            at = rng.randrange(len(raw))
            kind = rng.random()
            if kind < 0.6:
                raw[at] = rng.choice(alphabet)
            elif kind < 0.8:
                del raw[at]
            else:
                raw.insert(at, rng.choice(alphabet))
        path.write_bytes(raw)
        try:
            official, names = None, {name for name, _ in deserialize(bytes(raw))}
        except SafetensorError as fault:
            official = str(fault)
        try:
            ours = SafetensorsFile(path)
        except WeightsError as fault:
            assert official is not None or "a key appears twice" in str(fault), (bytes(raw), str(fault))
            continue
        assert official is None, (bytes(raw), official)
        accepted += 1
        assert names == set(ours.entries)
    assert 200 < accepted < 9_800  # both verdicts were really compared


@pytest.mark.parametrize("dtype", list(TORCH_DTYPES.values()), ids=str)
def test_tensors_are_read_to_the_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (7 * 5 * dtype.itemsize,), dtype=torch.uint8)
    tensors = {
        "x": raw.view(dtype).view(7, 5),
        "empty": torch.empty(0, 4, dtype=dtype),
        "scalar": raw.view(dtype)[0].clone(),
    }
    save_file(tensors, tmp_path / "t.safetensors", metadata={"who": "me"})
    file = SafetensorsFile(tmp_path / "t.safetensors")
    assert file.metadata == {"who": "me"}
    for name, wanted in tensors.items():
        got = file.read(name)
        assert got.dtype == dtype and got.shape == wanted.shape
        assert torch.equal(got.reshape(-1).view(torch.uint8), wanted.contiguous().reshape(-1).view(torch.uint8))


def test_a_file_that_shrinks_while_open_is_an_error_and_not_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    save_file({"a": torch.ones(1000), "b": torch.ones(1000)}, path)
    file = SafetensorsFile(path)
    with path.open("r+b") as f:
        f.truncate(path.stat().st_size - 400)
    assert file.read("a").sum() == 1000
    with pytest.raises(WeightsError, match="b: the file ends 400 bytes early"):
        file.read("b")


def test_unknown_names_and_unreadable_dtypes(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    path.write_bytes(container({"a": tensor("U64", (1,))}, b"\0" * 8))
    file = SafetensorsFile(path)
    with pytest.raises(WeightsError, match="no tensor 'z'"):
        file.read("z")
    with pytest.raises(WeightsError, match="a: dtype U64 cannot be read"):
        file.read("a")


def shards(folder: Path) -> dict[str, Any]:
    save_file({"a": torch.ones(2)}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": torch.zeros(3)}, folder / "model-00002-of-00002.safetensors")
    index = {
        "metadata": {"total_size": 20},
        "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


def test_shards_read_as_one(tmp_path: Path) -> None:
    shards(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.names() == ["a", "b"] and checkpoint.shape("b") == (3,) and checkpoint.dtype("b") == "F32"
    assert checkpoint.read("a").tolist() == [1, 1]
    single = tmp_path / "single"
    single.mkdir()
    save_file({"b": torch.zeros(3), "a": torch.ones(2)}, single / "model.safetensors")
    assert checkpoint.fingerprint() == Checkpoint(single).fingerprint()
    save_file({"b": torch.zeros(3), "a": torch.full((2,), 2.0)}, single / "model.safetensors")
    assert checkpoint.fingerprint() != Checkpoint(single).fingerprint()


@pytest.mark.parametrize("shard", ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", 3])
def test_a_shard_outside_the_folder_is_refused(shard: object, tmp_path: Path) -> None:
    index = shards(tmp_path)
    index["weight_map"]["a"] = shard
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match="is not a plain file name"):
        Checkpoint(tmp_path)


def test_index_and_shards_that_disagree(tmp_path: Path) -> None:
    index = shards(tmp_path)
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {**index["weight_map"], "c": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(WeightsError, match="c is said to be in model-00001"):
        Checkpoint(tmp_path)
    path.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    assert Checkpoint(tmp_path).names() == ["a"]  # a shard that the index does not name is never opened
    for text in ("{", "[]", '{"weight_map": {}}', '{"weight_map": 3}'):
        path.write_text(text)
        with pytest.raises(WeightsError, match=r"weight_map|shard index"):
            Checkpoint(tmp_path)
    path.write_text(json.dumps(index))
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(WeightsError, match="1 of 2 shards are missing: model-00002-of-00002"):
        Checkpoint(tmp_path)


def test_a_folder_with_a_pickle_only(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
    with pytest.raises(WeightsError, match=r"pytorch_model\.bin, a pickle, which is never opened.*convert it"):
        Checkpoint(tmp_path)
    with pytest.raises(WeightsError, match=r"no model\.safetensors"):
        Checkpoint(tmp_path / "nowhere")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads VmHWM")
def test_a_huge_claim_allocates_nothing(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    path.write_bytes(container({"a": tensor(shape=(2**40,), end=2**42)}, b"\0" * 8))
    code = (
        "import resource; from qlorag.models.files.weights import SafetensorsFile\n"
        "from qlorag.models.errors import WeightsError\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"try: SafetensorsFile({str(path)!r})\n"
        "except WeightsError: pass\n"
        "else: raise SystemExit('accepted')\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    grown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(grown) < 4096  # kB
