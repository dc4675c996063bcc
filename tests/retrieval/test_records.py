"""The rows of a store: what is written, what is read back, and which contradictions are named."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from qlorag.retrieval import Chunk, CorruptStoreError, Document, DocumentError, Hit
from qlorag.retrieval.index.exact import read_vectors
from qlorag.retrieval.sqlite import records
from qlorag.retrieval.sqlite.database import create_database, open_database

CATS = Document("cats.md", "Cats sleep. Cats hunt.", metadata={"by": "me", "n": [1, None]})
CHUNKS = [Chunk("Cats sleep.", 0, 11), Chunk("Cats hunt.", 12, 22)]
DAMAGED = (
    "damaged on the disk, its checksum differs: restore the store from a copy, or index the documents again into "
    "another folder"
)
VECTORS = np.array([[1, 2, 3], [4, 5, 6]], np.float32)


@pytest.fixture
def db(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    create_database(tmp_path / "store.sqlite3", embedder_id="words", chunk_size=7, chunk_overlap=2, counter="words")
    connection, _, _ = open_database(tmp_path / "store.sqlite3", read_only=False)
    yield connection
    connection.close()


def write(db: sqlite3.Connection, document: Document = CATS, vectors: np.ndarray = VECTORS) -> bool:
    return records.write_document(db, document, records.encode_metadata(document), CHUNKS, vectors)


def rows(db: sqlite3.Connection, query: str) -> list[tuple[object, ...]]:
    return db.execute(query).fetchall()


def test_a_document_is_four_kinds_of_rows(db: sqlite3.Connection) -> None:
    assert write(db) is False
    assert rows(db, "SELECT id, uri, sha256, metadata, characters FROM documents") == [
        (1, "cats.md", CATS.sha256, '{"by": "me", "n": [1, null]}', 22)
    ]
    assert rows(db, "SELECT document_id, part, text FROM texts") == [(1, 0, CATS.text)]
    assert rows(db, "SELECT id, document_id, ordinal, start_char, end_char FROM chunks") == [
        (1, 1, 0, 0, 11),
        (2, 1, 1, 12, 22),
    ]
    # 1, 2, 3 as little-endian float32, whatever the byte order of the machine or of the array
    blob = bytes.fromhex("0000803f 00000040 00004040")
    assert rows(db, "SELECT chunk_id, vector FROM vectors")[0] == (1, blob)
    write(db, vectors=VECTORS.astype(">f4"))
    assert rows(db, "SELECT chunk_id, vector FROM vectors")[0] == (3, blob)  # an id is never used again


def test_a_document_of_the_same_name_is_replaced_whole(db: sqlite3.Connection) -> None:
    write(db)
    write(db, Document("dogs.md", CATS.text))
    assert write(db) is True
    assert rows(db, "SELECT document_id, count(*) FROM chunks GROUP BY 1") == [(2, 2), (3, 2)]
    assert rows(db, "SELECT chunk_id FROM vectors ORDER BY 1") == [(3,), (4,), (5,), (6,)]
    assert records.read_uris(db) == ["cats.md", "dogs.md"]


def test_vectors_are_read_back_by_the_index(db: sqlite3.Connection) -> None:
    """Whose reader checks each row's checksum: of its chunk's id and its bytes."""
    write(db)
    [(ids, vectors)] = read_vectors(db, after=0, dim=3)
    assert ids.tolist() == [1, 2]
    np.testing.assert_allclose(vectors, VECTORS / np.linalg.norm(VECTORS, axis=1, keepdims=True), rtol=1e-6)


def test_chunks_can_keep_the_ids_they_had(db: sqlite3.Connection) -> None:
    records.write_document(db, CATS, "{}", CHUNKS, VECTORS, ids=[20, 10])
    assert rows(db, "SELECT id, ordinal FROM chunks ORDER BY ordinal") == [(20, 0), (10, 1)]
    assert [hit.text for hit in records.load_hits(db, [(20, 0.5), (10, 0.5)])] == [c.text for c in CHUNKS]


def test_each_chunk_needs_a_vector(db: sqlite3.Connection) -> None:
    with pytest.raises(ValueError, match="zip"):
        write(db, vectors=VECTORS[:1])


def test_deleting_takes_chunks_and_vectors_along(db: sqlite3.Connection) -> None:
    write(db)
    assert records.delete_document(db, "dogs.md") is False
    assert records.delete_document(db, "cats.md") is True
    assert [rows(db, f"SELECT * FROM {table}") for table in ("texts", "chunks", "vectors")] == [[], [], []]
    assert rows(db, "SELECT value FROM meta WHERE key IN ('documents', 'chunks')") == [("0",), ("0",)]
    assert records.delete_document(db, "cats.md") is False


def test_documents_come_back_as_they_were(db: sqlite3.Connection) -> None:
    own = Document("own.md", "x", sha256="of the bytes")  # a file's bytes are not always the text's
    write(db)
    records.write_document(db, own, "{}", [], np.empty((0, 3), np.float32))
    assert records.load_document(db, "cats.md") == CATS and records.load_document(db, "own.md") == own
    assert records.load_document(db, "dogs.md") is None
    assert records.read_sha256(db, "own.md") == "of the bytes" and records.read_sha256(db, "dogs.md") is None
    assert records.read_uris(db) == ["cats.md", "own.md"]


def test_metadata_is_replaced_only_where_it_differs(db: sqlite3.Connection) -> None:
    write(db)
    write(db, Document("dogs.md", CATS.text))
    assert records.write_metadata(db, "cats.md", '{"by": "me", "n": [1, null]}') is False
    assert records.write_metadata(db, "cats.md", "{}") is True
    assert records.write_metadata(db, "birds.md", "{}") is False
    assert rows(db, "SELECT uri, metadata FROM documents") == [("cats.md", "{}"), ("dogs.md", "{}")]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1}, b"", object()])
def test_metadata_that_json_cannot_hold_is_refused(value: object) -> None:
    with pytest.raises(DocumentError, match=r"^cats\.md: metadata: .+: use what JSON can hold$"):
        records.encode_metadata(Document("cats.md", "x", metadata={"key": value}))
    loop: dict[str, object] = {}
    loop["self"] = loop
    with pytest.raises(DocumentError, match="metadata: Circular"):
        records.encode_metadata(Document("cats.md", "x", metadata=loop))


def test_hits_are_spans_of_their_documents_in_the_order_asked(db: sqlite3.Connection) -> None:
    write(db)
    write(db, Document("dogs.md", CATS.text))
    asked: list[str] = []
    db.set_trace_callback(asked.append)
    found = records.load_hits(db, [(2, 0.9), (3, 0.5), (1, 0.1)])
    db.set_trace_callback(None)
    assert found[0] == Hit("Cats hunt.", 0.9, "cats.md", 12, 22, CATS.sha256, CATS.metadata, 2)
    assert [(h.uri, h.text, h.score, h.chunk_id) for h in found] == [
        ("cats.md", "Cats hunt.", 0.9, 2),
        ("dogs.md", "Cats sleep.", 0.5, 3),
        ("cats.md", "Cats sleep.", 0.1, 1),
    ]
    assert sum("FROM documents" in statement for statement in asked) == 2  # each document is read once
    assert sum("FROM texts" in statement for statement in asked) == 2
    assert records.load_hits(db, []) == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("DELETE FROM chunks WHERE id = 2", "vectors: chunk 2 is in no document: index the documents again"),
        ("DELETE FROM documents", "chunks: chunk 2 has no document: index the documents again"),
        ("UPDATE texts SET text = 'Cats sleep. Cats hum'", f"the text of document 'cats.md': {DAMAGED}"),
        ("DELETE FROM texts", f"the text of document 'cats.md': {DAMAGED}"),
        ("UPDATE documents SET uri = 'bats.md'", f"document 'bats.md': {DAMAGED}"),
        ("UPDATE documents SET metadata = '{}'", f"document 'cats.md': {DAMAGED}"),
        ("UPDATE chunks SET end_char = 21 WHERE id = 2", f"chunk 2: {DAMAGED}"),
    ],
)  # fmt: skip
def test_rows_that_contradict_each_other_are_named(db: sqlite3.Connection, damage: str, message: str) -> None:
    write(db)
    db.execute("PRAGMA foreign_keys = OFF")
    db.execute(damage)
    with pytest.raises(CorruptStoreError) as error:
        records.load_hits(db, [(2, 0.9)])
    assert str(error.value) == message


def test_a_hit_reads_the_part_of_the_text_that_it_lies_in(db: sqlite3.Connection) -> None:
    text = "".join(chr(0x4E00 + i % 5000) for i in range(3 * records.PART + 5))
    ends = [(0, 3), (records.PART - 2, records.PART + 2), (3 * records.PART, 3 * records.PART + 5)]
    chunks = [Chunk(text[a:b], a, b) for a, b in ends]
    records.write_document(db, Document("long.md", text), "{}", chunks, np.ones((3, 3), np.float32))
    asked: list[str] = []
    db.set_trace_callback(asked.append)
    assert [hit.text for hit in records.load_hits(db, [(1, 0.9), (2, 0.8), (3, 0.7)])] == [c.text for c in chunks]
    db.set_trace_callback(None)
    assert [s.partition("part = ")[2] for s in asked if "FROM texts" in s] == ["0", "1", "3"]  # 0 was read already
    document = records.load_document(db, "long.md")
    assert document is not None and document.text == text
    db.execute("UPDATE texts SET text = 'x' WHERE part = 2")
    assert records.load_hits(db, [(3, 0.7)])[0].text == chunks[2].text  # damage elsewhere does not cost this hit
    with pytest.raises(CorruptStoreError, match=r"the text of document 'long\.md'"):
        records.load_document(db, "long.md")


def test_a_hit_may_end_where_a_part_does(db: sqlite3.Connection) -> None:
    """The last character before the border, the first after it, and a span within the second of three parts."""
    size = records.PART
    text = "".join(chr(0x4E00 + i % 5000) for i in range(2 * size + 5))
    spans = [(size - 3, size), (size - 3, size + 1), (size + 3, size + 8), (size, 2 * size)]
    chunks = [Chunk(text[a:b], a, b) for a, b in spans]
    records.write_document(db, Document("long.md", text), "{}", chunks, np.ones((4, 3), np.float32))
    for chunk_id, (chunk, read) in enumerate(zip(chunks, (["0"], ["0", "1"], ["1"], ["1"]), strict=True), 1):
        asked: list[str] = []
        db.set_trace_callback(asked.append)
        [hit] = records.load_hits(db, [(chunk_id, 0.5)])
        db.set_trace_callback(None)
        assert hit.text == chunk.text
        assert [s.partition("part = ")[2] for s in asked if "FROM texts" in s] == read


def test_a_span_outside_of_its_document_is_named(db: sqlite3.Connection) -> None:
    records.write_document(db, CATS, "{}", [Chunk("Cats hunt. ", 12, 23)], VECTORS[:1])
    with pytest.raises(CorruptStoreError) as error:
        records.load_hits(db, [(1, 0.5)])
    assert str(error.value) == "cats.md: chunk 1 ends at 23 of 22: index the document again"


def test_counts_and_settings(db: sqlite3.Connection) -> None:
    empty = records.read_stats(db, 10)
    assert (empty.documents, empty.chunks, empty.dim, records.read_dim(db)) == (0, 0, None, None)
    write(db)
    db.execute("UPDATE meta SET value = '3' WHERE key = 'dim'")
    assert records.read_dim(db) == 3
    assert records.read_stats(db, 4096) == records.Stats(
        documents=1,
        chunks=2,
        dim=3,
        metric="cosine",
        embedder_id="words",
        chunk_size=7,
        chunk_overlap=2,
        counter="words",
        format_version=2,
        bytes=4096,
    )
