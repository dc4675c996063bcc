"""A store of format 1 is brought to this one: the same hits, nothing embedded again, and whole at every moment."""

from __future__ import annotations

import json
import shutil
import sqlite3
from pathlib import Path

import numpy as np
import pytest
from qlorag.retrieval import Document, FormatVersionError, Store
from qlorag.retrieval.sqlite import upgrade as module

FORMAT_1 = """
PRAGMA application_id = 0x716C6F72;
CREATE TABLE meta (
    key   TEXT PRIMARY KEY,
    value TEXT NOT NULL
);
CREATE TABLE documents (
    id       INTEGER PRIMARY KEY,
    uri      TEXT NOT NULL UNIQUE,
    sha256   TEXT NOT NULL,
    text     TEXT NOT NULL,
    metadata TEXT NOT NULL
);
CREATE TABLE chunks (
    id          INTEGER PRIMARY KEY AUTOINCREMENT,
    document_id INTEGER NOT NULL REFERENCES documents (id) ON DELETE CASCADE,
    ordinal     INTEGER NOT NULL,
    start_char  INTEGER NOT NULL,
    end_char    INTEGER NOT NULL,
    UNIQUE (document_id, ordinal),
    CHECK (0 <= start_char AND start_char < end_char)
);
CREATE TABLE vectors (
    chunk_id INTEGER PRIMARY KEY REFERENCES chunks (id) ON DELETE CASCADE,
    vector   BLOB NOT NULL
);
"""
TEXTS = {"a.md": "First words. Second words.", "b.md": "Third words, ünïcode."}


def embed(texts: list[str]) -> np.ndarray:
    return np.array([[len(text), text.count("d"), 1.0] for text in texts], np.float32)


def store_of_format_1(folder: Path) -> Path:
    """Two documents; a third one, whose chunk had the largest id, was deleted again."""
    folder.mkdir()
    db = sqlite3.connect(folder / "store.sqlite3")
    db.executescript(FORMAT_1)
    meta = {"format_version": 1, "embedder_id": "e", "dim": 3, "metric": "cosine", "chunk_size": 9, "chunk_overlap": 0,
            "change_seq": 7, "index_sha256": ""}  # fmt: skip
    db.executemany("INSERT INTO meta VALUES (?, ?)", [(k, str(v)) for k, v in meta.items()])
    for i, (uri, text) in enumerate(TEXTS.items(), 1):
        row = (i, uri, Document(uri, text).sha256, text, json.dumps({"n": i}))
        db.execute("INSERT INTO documents VALUES (?, ?, ?, ?, ?)", row)
    for chunk_id, document, ordinal, start, end in (
        (2, 1, 0, 0, 12),
        (3, 1, 1, 13, 26),
        (5, 2, 0, 0, 21),
        (9, 2, 1, 0, 1),
    ):
        db.execute("INSERT INTO chunks VALUES (?, ?, ?, ?, ?)", (chunk_id, document, ordinal, start, end))
        blob = embed([list(TEXTS.values())[document - 1][start:end]])[0].tobytes()
        db.execute("INSERT INTO vectors VALUES (?, ?)", (chunk_id, blob))
    db.execute("PRAGMA foreign_keys = ON")
    db.execute("DELETE FROM chunks WHERE id = 9")
    db.execute("PRAGMA journal_mode = WAL")
    db.commit()
    shutil.copytree(folder, folder.with_name("copy"))  # with its WAL, as a killed process leaves it
    db.close()
    return folder.with_name("copy")


def test_a_store_of_format_1(tmp_path: Path) -> None:
    folder = store_of_format_1(tmp_path / "store")
    with pytest.raises(FormatVersionError, match="format_version=1, this code reads 2: open it for writing once"):
        Store.open(folder, embedder=embed, embedder_id="e", read_only=True)
    with Store.open(folder, embedder=embed, embedder_id="e") as store:
        stats = store.stats()
        assert (stats.documents, stats.chunks, stats.format_version, stats.counter) == (2, 3, 2, "unknown")
        assert (stats.chunk_size, stats.chunk_overlap, stats.dim) == (9, 0, 3)
        assert store.get("b.md") == Document("b.md", TEXTS["b.md"], metadata={"n": 2})
        assert store.search("Second words.", k=3)[0].chunk_id == 3
        assert store.add([Document("a.md", TEXTS["a.md"], metadata={"n": 1})]).unchanged == 1  # not embedded again
        store.add([Document("c.md", "New.")])
        assert store.search("New.", k=1)[0].chunk_id == 10  # 9 was used once
    with Store.open(folder, embedder=embed, embedder_id="e", read_only=True) as store:
        assert store.uris() == ["a.md", "b.md", "c.md"]
    assert not list(folder.glob("*.tmp*"))


def test_an_upgrade_that_stops_leaves_the_old_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = store_of_format_1(tmp_path / "store")

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_document", stop)
    with pytest.raises(KeyboardInterrupt):
        Store.open(folder, embedder=embed, embedder_id="e")
    monkeypatch.undo()
    with Store.open(folder, embedder=embed, embedder_id="e") as store:
        assert store.uris() == ["a.md", "b.md"]
