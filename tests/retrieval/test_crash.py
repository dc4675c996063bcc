"""kill -9 at random moments: what was acknowledged is there, and every document is there whole."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
from qlorag.retrieval import Store

pytestmark = pytest.mark.slow

CHILD = """
import sys, zlib
import numpy as np
from qlorag.retrieval import Document, HnswConfig, Store

def embed(texts):
    rows = [np.random.default_rng(zlib.crc32(t.encode())).normal(size=8) for t in texts]
    return np.stack(rows).astype(np.float32)

def text(i, version):
    return " ".join(f"word{i}v{version}n{j}." for j in range(40 * (1 + i % 3)))

mode = sys.argv[2]
options = {"chunk_size": 5, "chunk_overlap": 0, "exact_below": 1}
hnsw = HnswConfig(M=4, ef_construction=8)
with Store.open(sys.argv[1], embedder=embed, embedder_id="crc", hnsw=hnsw, **options) as store:
    print("open", flush=True)
    start = len(store)
    for i in range(start, start + 100000):
        if mode == "add":
            store.add([Document(f"u{i}", text(i, 0))])
        elif mode == "replace":
            i = i % 7
            version = int(store.get(f"u{i}").metadata["v"]) + 1 if store.get(f"u{i}") else 0
            store.add([Document(f"u{i}", text(i, version), metadata={"v": version})])
            print(f"u{i} {version}", flush=True)
            continue
        else:
            store.add([Document(f"u{i}", text(i, 0))])
            store.build_index()
        print(f"u{i}", flush=True)
"""


def embed(texts: list[str]) -> np.ndarray:
    rows = [np.random.default_rng(zlib.crc32(t.encode())).normal(size=8) for t in texts]
    return np.stack(rows).astype(np.float32)


def text(i: int, version: int) -> str:
    return " ".join(f"word{i}v{version}n{j}." for j in range(40 * (1 + i % 3)))


def run_and_kill(path, mode: str, seconds: float) -> list[str]:
    """What the child acknowledged until it was killed."""
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(path), mode],
        stdout=subprocess.PIPE,
        text=True,
        stderr=subprocess.PIPE,
    )
    assert child.stdout is not None and child.stderr is not None
    first = child.stdout.readline()
    assert first == "open\n", child.stderr.read()
    time.sleep(seconds)
    child.send_signal(signal.SIGKILL)
    out = child.stdout.read()  # communicate() would lose the lines that readline() has read ahead
    child.wait(timeout=60)
    # The last line may be cut: it was not acknowledged.
    return [line for line in out.split("\n")[:-1] if line]


def open_(path, **options) -> Store:
    return Store.open(path, **({"embedder": embed, "embedder_id": "crc", "exact_below": 10**9} | options))


def check_whole(store: Store) -> None:
    """Every document has all its chunks, each chunk its vector, and finds itself."""
    db = store._open_file.db
    assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert db.execute("PRAGMA foreign_key_check").fetchall() == []
    assert db.execute(
        "SELECT count(*) FROM chunks LEFT JOIN vectors ON chunk_id = chunks.id WHERE chunk_id IS NULL"
    ).fetchone() == (0,)
    for document_id, uri in db.execute("SELECT id, uri FROM documents").fetchall():
        stored = store.get(uri).text
        i, version = int(uri[1:]), int(stored.split("v")[1].split("n")[0])
        assert stored == text(i, version)
        spans = db.execute(
            "SELECT start_char, end_char FROM chunks WHERE document_id = ? ORDER BY ordinal", (document_id,)
        ).fetchall()
        assert " ".join(stored[a:b] for a, b in spans) == stored  # all of its chunks, none twice


@pytest.mark.parametrize("mode", ["add", "replace", "index"])
def test_kill_9_at_random_moments(tmp_path, mode):
    moments = random.Random(mode)
    path = tmp_path / "store"
    acknowledged: dict[str, int] = {}
    for _ in range(8):
        for line in run_and_kill(path, mode, moments.uniform(0.0, 0.4)):
            uri, _, version = line.partition(" ")
            acknowledged[uri] = int(version or 0)
        # A reader right after the crash recovers the log; it needs no writer to have been there first.
        with open_(path, read_only=True) as store:
            there = set(store.uris())
        assert acknowledged.keys() <= there
        assert len(there - acknowledged.keys()) <= 1  # the one that was committed but not yet reported
        with open_(path, exact_below=1) as store:  # the writer's lock is free again
            check_whole(store)
            acknowledged |= dict.fromkeys(there - acknowledged.keys(), 0)
            for uri, version in list(acknowledged.items())[-5:]:
                document = store.get(uri)
                assert document is not None
                stored = int(str(document.metadata.get("v", 0)))
                assert stored - version in (0, 1)
                acknowledged[uri] = stored
                hits = store.search(document.text.split()[0], k=store.stats().chunks)
                assert uri in {hit.uri for hit in hits}
    assert len(acknowledged) >= 7


def test_kill_9_while_the_store_is_made(tmp_path):
    """At any moment of the first opening: afterwards there is no store, or a sound one."""
    moments = random.Random(0)
    for attempt in range(6):
        path = tmp_path / f"store{attempt}"
        child = subprocess.Popen([sys.executable, "-c", CHILD, str(path), "add"], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 30
        while not path.exists() and time.monotonic() < deadline:  # it has begun
            time.sleep(0.0005)
        time.sleep(moments.uniform(0, 0.02))
        child.send_signal(signal.SIGKILL)
        child.wait(timeout=60)
        with open_(path, chunk_size=None) as store:
            check_whole(store)


def test_a_writer_that_died_leaves_no_lock(tmp_path):
    run_and_kill(tmp_path / "store", "add", 0.1)
    with open_(tmp_path / "store") as store:
        assert (tmp_path / "store" / "store.lock").read_text() == f"{os.getpid()}\n"
        assert len(store) >= 0


def test_readers_beside_a_writer_see_whole_documents(tmp_path):
    path = tmp_path / "store"
    with open_(path, chunk_size=5, chunk_overlap=0):
        pass
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(path), "replace"], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "open\n"
        for _ in range(3):
            assert child.stdout.readline()  # it has begun to write
        for _ in range(30):
            with open_(path, read_only=True) as reader:
                hits = reader.search("word0v0n0.", k=10_000)
                by_uri: dict[str, list] = {}
                for hit in hits:
                    by_uri.setdefault(hit.uri, []).append(hit)
                for uri, of_one in by_uri.items():
                    assert len({hit.sha256 for hit in of_one}) == 1
                    assert len(of_one) == 8 * (1 + int(uri[1:]) % 3)
    finally:
        child.kill()
        child.communicate(timeout=60)
    shutil.rmtree(path)
