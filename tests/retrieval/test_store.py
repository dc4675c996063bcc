from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from qlorag.retrieval import (
    CorruptStoreError,
    Document,
    DocumentError,
    EmbedderError,
    EmbedderMismatchError,
    FormatVersionError,
    LockedError,
    QueryError,
    ReadOnlyError,
    SplitError,
    Store,
    StoreError,
    StoreNotFoundError,
    count_words,
)

CATS = Document("cats.md", "Cats sleep all day.\n\nCats hunt mice at night.", metadata={"by": "me", "n": [1, None]})
PARIS = Document("paris.md", "Paris is the capital of France.")
CYPRUS = Document("cyprus.md", "Patroclos is a software developer. He comes from Cyprus, an island.")
DOCUMENTS = [CATS, PARIS, CYPRUS]


def test_a_hit_names_its_source_exactly(open_store):
    with open_store(chunk_size=8, chunk_overlap=0) as store:
        report = store.add(DOCUMENTS)
        assert (report.added, report.replaced, report.unchanged, report.chunks) == (3, 0, 0, 5)
        (hit,) = store.search("Which cats hunt mice?", k=1)
    assert hit.text == "Cats hunt mice at night." == CATS.text[hit.start : hit.end]
    assert (hit.uri, hit.sha256, hit.metadata) == (CATS.uri, CATS.sha256, CATS.metadata)
    assert hit.chunk_id == 2


def test_scores_are_cosines_in_order(open_store, embedder):
    with open_store(chunk_size=8, chunk_overlap=0) as store:
        store.add(DOCUMENTS)
        hits = store.search("cats in Cyprus", k=5)
    query = embedder(["cats in Cyprus"])[0].astype(np.float64)
    for hit in hits:
        vector = embedder([hit.text])[0].astype(np.float64)
        cosine = query @ vector / np.linalg.norm(query) / np.linalg.norm(vector)
        assert hit.score == pytest.approx(cosine, abs=1e-6)  # unit rows are float32: 2^-24 each
    assert [h.score for h in hits] == sorted((h.score for h in hits), reverse=True)


def test_everything_is_there_after_reopening(open_store):
    with open_store() as store:
        store.add(DOCUMENTS)
        before = store.search("capital of France", k=3)
    for read_only in (False, True):
        with open_store(read_only=read_only) as store:
            assert store.search("capital of France", k=3) == before
            assert (len(store), store.uris()) == (3, ["cats.md", "cyprus.md", "paris.md"])
            assert store.get("cats.md") == CATS and store.get("dogs.md") is None


def test_a_closed_store_is_one_file_of_truth(open_store, tmp_path):
    with open_store() as store:
        store.add(DOCUMENTS)
        before = store.search("mice", k=2)
    assert sorted(os.listdir(tmp_path / "store")) == ["store.lock", "store.sqlite3"]
    (tmp_path / "copy").mkdir()
    shutil.copy(tmp_path / "store" / "store.sqlite3", tmp_path / "copy")
    with open_store(tmp_path / "copy") as store:
        assert store.search("mice", k=2) == before


def test_unchanged_documents_are_not_embedded_again(open_store, embedder):
    with open_store(chunk_size=8, chunk_overlap=0) as store:
        store.add(DOCUMENTS)
        embedder.calls = embedder.texts = 0
        report = store.add(DOCUMENTS)
        assert (embedder.calls, report.unchanged, report.chunks) == (0, 3, 0)
        changed = Document(PARIS.uri, "Paris was a Trojan prince.")
        report = store.add([CATS, changed, CYPRUS])
        assert (embedder.texts, report.replaced, report.unchanged) == (1, 1, 2)
        assert len(store) == 3 and store.stats().chunks == 5
        assert [h.text for h in store.search("Paris", k=9) if h.uri == PARIS.uri] == ["Paris was a Trojan prince."]


def test_new_metadata_needs_no_embedding(open_store, embedder):
    with open_store() as store:
        store.add([CATS])
        embedder.calls = 0
        assert store.add([Document(CATS.uri, CATS.text, metadata={"by": "you"})]).unchanged == 1
        assert embedder.calls == 0
        assert store.search("cats")[0].metadata == {"by": "you"}


def test_the_same_uri_twice_in_one_call_ends_as_the_last(open_store):
    with open_store() as store:
        store.add([Document("u", "old")])
        report = store.add([Document("u", "new"), Document("u", "old")])
        assert (report.replaced, report.unchanged) == (2, 0)
        assert store.get("u").text == "old"


def test_delete(open_store):
    with open_store() as store:
        store.add(DOCUMENTS)
        assert store.delete(PARIS.uri) and not store.delete(PARIS.uri)
        assert store.uris() == [CATS.uri, CYPRUS.uri]
        assert all(hit.uri != PARIS.uri for hit in store.search("Paris France", k=9))
        store.delete(CATS.uri)
        store.delete(CYPRUS.uri)
        assert store.search("Paris") == [] and store.stats().chunks == 0
        store.add([PARIS])
        (hit,) = store.search("Paris")
        assert hit.chunk_id > 3  # ids are never used again


def test_small_documents_share_embedding_batches(open_store, embedder):
    with open_store() as store:
        seen = []
        store.add([Document(f"u{i}", f"text {i}") for i in range(600)], progress=lambda *p: seen.append(p))
    assert embedder.calls == 3  # of 256, 256 and 88
    assert seen == [(i + 1, 600) for i in range(600)]


def test_progress_of_a_generator_has_no_total(open_store):
    seen = []
    with open_store() as store:
        store.add((d for d in DOCUMENTS), progress=lambda *p: seen.append(p))
    assert seen == [(1, None), (2, None), (3, None)]


def test_what_progress_counted_is_on_the_disk(open_store, tmp_path):
    def look(done: int, total: int | None) -> None:
        with open_store(read_only=True) as reader:  # another connection sees it already
            assert len(reader) == done

    with open_store() as store:
        store.add(DOCUMENTS, progress=look)


def test_odd_texts_survive(open_store):
    texts = ["\0 nul \0", "Ω" * 5000, "a\r\nb", "🙂🙂 family 👨‍👩‍👧", "'; DROP TABLE chunks; --", "   \n"]
    with open_store(chunk_size=4, chunk_overlap=1) as store:
        store.add([Document(f"u{i}", text) for i, text in enumerate(texts)])
        for i, text in enumerate(texts):
            assert store.get(f"u{i}").text == text
        for hit in store.search("family", k=500):
            assert store.get(hit.uri).text[hit.start : hit.end] == hit.text


# ---- search: limits


def test_k_threshold_and_empty_answers(open_store):
    with open_store() as store:
        assert store.search("anything") == []
        store.add(DOCUMENTS)
        assert len(store.search("Paris", k=1000)) == 3
        assert len(store.search("Paris France", k=3, score_threshold=0.5)) == 1
        assert store.search("Paris France", score_threshold=1.0) == []


@pytest.mark.parametrize("k", [0, -1, True, 2.0])
def test_k_below_one_or_no_integer(open_store, k):
    with open_store() as store, pytest.raises(QueryError, match=rf"k={k}: ask for at least one hit"):
        store.search("q", k=k)


def test_queries_that_cannot_be_answered(open_store):
    with open_store() as store:
        store.add([PARIS])
        with pytest.raises(QueryError, match="empty query"):
            store.search(" \n")
        with pytest.raises(QueryError, match="score_threshold=nan"):
            store.search("q", score_threshold=float("nan"))
        with pytest.raises(EmbedderError, match=r"query: .* D=3, the store holds D=64"):
            store.search_vector([1.0, 2.0, 3.0])
        with pytest.raises(EmbedderError, match=r"query: .* all zeros"):
            store.search_vector(np.zeros(64, np.float32))


@pytest.mark.parametrize("exact_below", [10**9, 0])
def test_equal_scores_come_in_id_order(open_store, exact_below):
    with open_store(exact_below=exact_below) as store:
        store.add([Document(f"u{i:02}", ("the same", "the other same")[i % 2]) for i in range(100)])
        hits = store.search("the same", k=100)
        assert [h.chunk_id for h in hits] == [*range(1, 101, 2), *range(2, 101, 2)]
        assert len({h.score for h in hits}) == 2
        if exact_below:  # which of many equal vectors HNSW reaches first is not defined
            assert [h.chunk_id for h in store.search("the same", k=3)] == [1, 3, 5]


# ---- the embedder


BAD_VECTORS = {
    "NaN or inf": lambda n: np.full((n, 64), np.nan, np.float32),
    "vector 0 of 2 is NaN or inf": lambda n: np.full((n, 64), 1e300),  # overflows float32
    "all zeros": lambda n: np.zeros((n, 64), np.float32),
    r"\[2, D\]": lambda n: np.ones((n + 1, 64), np.float32),
    r"float64 \[64\]": lambda n: np.ones(64),
    "D=32, the store holds D=64": lambda n: np.ones((n, 32), np.float32),
    "no rectangular array": lambda n: [[1.0], [1.0, 2.0]],
    "<U1": lambda n: np.full((n, 64), "x"),
}


@pytest.mark.parametrize("message", BAD_VECTORS)
def test_vectors_without_a_cosine_are_refused_before_anything_is_written(open_store, message):
    with open_store() as store:
        store.add([PARIS])
    with open_store(embedder=lambda texts: BAD_VECTORS[message](len(texts))) as store:
        with pytest.raises(EmbedderError, match=message) as error:
            store.add([CATS, CYPRUS])
        assert "cats.md ... cyprus.md" in str(error.value)
        assert store.uris() == [PARIS.uri] and store.stats().chunks == 1


def test_an_embedder_that_changes_its_dimension_between_batches(open_store, embedder):
    def shrinking(texts: list[str]) -> np.ndarray:
        return np.ones((len(texts), 64 if len(texts) == 256 else 32), np.float32)

    with open_store(embedder=shrinking, chunk_size=1, chunk_overlap=0) as store:
        with pytest.raises(EmbedderError, match="D=32, the store holds D=64"):
            store.add([Document("long", "word " * 300)])
        assert len(store) == 0 and store.stats().dim is None


def test_an_embedder_that_fails_leaves_what_was_done(open_store, embedder):
    def failing(texts: list[str]) -> np.ndarray:
        if any("poison" in text for text in texts):
            raise RuntimeError("out of memory")
        return embedder(texts)

    with open_store(embedder=failing) as store:
        store.add([PARIS])
        with pytest.raises(RuntimeError, match="out of memory"):
            store.add([CATS, Document("bad", "poison")])
        assert store.uris() == [PARIS.uri]
        store.add([CATS])  # and the store goes on


def test_another_embedder_is_refused_by_both_names(open_store):
    with open_store() as store:
        store.add([PARIS])
    with pytest.raises(EmbedderMismatchError, match=r"embedder_id=bag-of-words in the store, minilm given"):
        open_store(embedder_id="minilm")
    with pytest.raises(EmbedderMismatchError, match=r"dim=64 in the store, 384 given"):
        open_store(dim=384)
    with pytest.raises(EmbedderMismatchError, match=r"chunk_size=256 in the store, 100 given"):
        open_store(chunk_size=100)
    with open_store(dim=64, chunk_size=256, chunk_overlap=20) as store:  # the refusals let go of the lock
        assert len(store) == 1


def test_without_an_embedder_all_but_embedding_works(open_store):
    with open_store() as store:
        store.add(DOCUMENTS)
    with open_store(embedder=None, embedder_id=None) as store:
        assert store.stats().embedder_id == "bag-of-words" and store.delete(PARIS.uri)
        with pytest.raises(EmbedderError, match="opened without an embedder"):
            store.search("q")
        with pytest.raises(EmbedderError, match="opened without an embedder"):
            store.add([PARIS])
    with pytest.raises(EmbedderError, match="embedder_id is missing"):
        open_store(embedder_id=None)


def test_impossible_settings_make_no_store(open_store, tmp_path):
    with pytest.raises(SplitError, match="size=0"):
        open_store(chunk_size=0)
    with pytest.raises(EmbedderError, match="new store needs an embedder_id"):
        open_store(embedder=None, embedder_id=None)
    assert not (tmp_path / "store" / "store.sqlite3").exists()


def test_metadata_that_json_cannot_hold(open_store):
    with open_store() as store:
        with pytest.raises(DocumentError, match=r"u: metadata: .*set"):
            store.add([Document("u", "text", metadata={"tags": {1, 2}})])
        assert len(store) == 0


# ---- reading, writing, locking


def test_reading_only(open_store, tmp_path):
    with pytest.raises(StoreNotFoundError, match=r"store\.sqlite3: no store here"):
        open_store(read_only=True)
    assert not (tmp_path / "store").exists()
    with open_store() as store:
        store.add([PARIS])
    with open_store(read_only=True) as store:
        for write in (lambda: store.add([CATS]), lambda: store.delete("x"), store.build_index):
            with pytest.raises(ReadOnlyError, match="open for reading"):
                write()


def test_a_closed_store_says_so(open_store):
    store = open_store()
    store.close()
    store.close()
    for use in (
        lambda: store.search("q"),
        lambda: len(store),
        lambda: store.add([CATS]),
        lambda: store.delete("u"),
    ):
        with pytest.raises(StoreError, match="is closed"):
            use()


def test_readers_follow_the_writer_and_keep_their_snapshot(open_store):
    with open_store() as writer, open_store(read_only=True) as reader:
        assert reader.search("Paris") == []
        writer.add(DOCUMENTS)
        assert reader.search("Paris", k=1)[0].uri == PARIS.uri
        writer.delete(PARIS.uri)
        assert all(hit.uri != PARIS.uri for hit in reader.search("Paris", k=9))
        writer.add([PARIS])
        assert reader.search("Paris", k=1)[0].uri == PARIS.uri
        assert len(reader) == 3


def test_a_second_writer_is_told_who_writes(open_store, tmp_path):
    with open_store() as store:
        store.add([PARIS])
        with pytest.raises(LockedError, match=rf"store\.lock: process {os.getpid()} is writing .*read_only=True"):
            open_store()
        code = (
            "import sys; from qlorag.retrieval import Store, LockedError\n"
            "try: Store.open(sys.argv[1])\n"
            "except LockedError as error: print(error)"
        )
        child = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "store")],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        assert f"process {os.getpid()} is writing" in child.stdout
    with open_store() as store:
        assert len(store) == 1


def test_a_path_that_is_a_file(open_store, tmp_path):
    (tmp_path / "store").write_text("I am a file")
    with pytest.raises(StoreError, match="store"):
        open_store()
    with pytest.raises(StoreError, match="store"):
        open_store(read_only=True)
    assert (tmp_path / "store").read_text() == "I am a file"


READ_IN_UNWRITABLE_FOLDER = """
import os, sys
from qlorag.retrieval import ReadOnlyError, Store
path = sys.argv[1]
if os.getuid() == 0:
    os.setuid(65534)  # permissions do not bind root
with Store.open(path, read_only=True) as store:
    print(len(store), store.search_vector([1.0] * 64, k=1)[0].uri)
    print("ready", flush=True)
    sys.stdin.readline()
    print(len(store), flush=True)
try:
    Store.open(path)
except ReadOnlyError as error:
    print(error)
"""


@pytest.fixture
def open_folder():
    """A folder that other users can enter, which tmp_path is not."""
    folder = Path(tempfile.mkdtemp())
    os.chmod(folder, 0o755)
    yield folder
    shutil.rmtree(folder)


def test_a_folder_that_cannot_be_written_is_read(open_store, open_folder):
    folder = open_folder / "store"
    with open_store(folder) as store:
        store.add([PARIS])
    os.chmod(folder, 0o555)
    child = subprocess.Popen(
        [sys.executable, "-c", READ_IN_UNWRITABLE_FOLDER, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None and child.stdin is not None
    assert child.stdout.readline() == "1 paris.md\n"
    assert child.stdout.readline() == "ready\n"
    if os.getuid() == 0:  # its owner can still write; the reader notices
        with open_store(folder) as store:
            store.add([CATS])
    out, _ = child.communicate("\n", timeout=60)
    os.chmod(folder, 0o755)
    assert out.splitlines()[0] == ("2" if os.getuid() == 0 else "1")
    assert "store.lock: Permission denied" in out and "read_only=True" in out


# ---- damage


def damage(open_store, path, change) -> bytes:
    """Make a store, let `change` edit the bytes of its database, and return what they are then."""
    with open_store() as store:
        store.add(DOCUMENTS)
    with open_store(read_only=True) as store:
        assert len(store) == 3  # a reader leaves an empty -wal behind
    data = change(path.read_bytes())
    path.write_bytes(data)
    return data


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: b"", "0 bytes, wanted a SQLite database"),
        (lambda data: b"garbage" * 1000, "not a SQLite database"),
        (lambda data: data[:50], "not a SQLite database"),
        (lambda data: data[: len(data) // 2], "cut short, [0-9]+ bytes of [0-9]+"),
        (lambda data: data[:-1], "cut short"),
        (lambda data: data[:100] + b"\xff" * 4000 + data[4100:], "damaged"),
    ],
)
@pytest.mark.parametrize("read_only", [False, True])
def test_a_damaged_database_is_refused_and_left_alone(open_store, tmp_path, change, message, read_only):
    path = tmp_path / "store" / "store.sqlite3"
    data = damage(open_store, path, change)
    with pytest.raises(CorruptStoreError, match=message) as error:
        open_store(read_only=read_only)
    assert str(path) in str(error.value) and "restore it" in str(error.value) and "\n" not in str(error.value)
    assert path.read_bytes() == data


def test_damage_in_any_page_is_an_error_or_harmless(open_store, tmp_path):
    """Overwrite one page after the other: what comes back is right, or a StoreError; nothing else."""
    path = tmp_path / "store" / "store.sqlite3"
    with open_store() as store:
        store.add(DOCUMENTS)
        wanted = store.search("Paris", k=3)
    data = path.read_bytes()
    refused = 0
    for page in range(len(data) // 4096):
        path.write_bytes(data[: page * 4096] + b"\xa5" * 4096 + data[(page + 1) * 4096 :])
        try:
            with open_store() as store:
                hits = store.search("Paris", k=3)
                store.add([Document("more", "text")])
        except StoreError:
            refused += 1
        else:
            assert hits == wanted
    assert refused >= 5  # meta, documents, chunks, vectors, their indexes


@pytest.mark.parametrize("leftover", ["manifest.json", "store.sqlite3-wal"])
def test_a_lost_database_is_not_replaced_by_an_empty_one(open_store, tmp_path, leftover):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / leftover).write_text("x")
    with pytest.raises(CorruptStoreError, match=rf"store\.sqlite3: missing, but {leftover} is there"):
        open_store()
    assert not (tmp_path / "store" / "store.sqlite3").exists()


def test_a_stale_half_made_database_is_no_obstacle(open_store, tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "store.sqlite3.tmp").write_bytes(b"half")
    with open_store() as store:
        store.add([PARIS])
    assert sorted(os.listdir(tmp_path / "store")) == ["store.lock", "store.sqlite3"]


def edit(path, statement: str) -> None:
    connection = sqlite3.connect(path)
    connection.execute(statement)
    connection.commit()
    connection.close()


@pytest.mark.parametrize(
    ("statement", "kind", "message"),
    [
        (
            "UPDATE meta SET value = '3' WHERE key = 'format_version'",
            FormatVersionError,
            "format_version=3, .* reads 2",
        ),
        ("DELETE FROM meta WHERE key = 'embedder_id'", CorruptStoreError, "embedder_id missing"),
        ("UPDATE meta SET value = 'many' WHERE key = 'chunk_size'", CorruptStoreError, "chunk_size='many'"),
        ("DROP TABLE vectors", CorruptStoreError, "vectors missing"),
        ("PRAGMA application_id = 7", CorruptStoreError, "not a store of this library"),
    ],
)
def test_databases_of_another_kind(open_store, tmp_path, statement, kind, message):
    with open_store() as store:
        store.add([PARIS])
    edit(tmp_path / "store" / "store.sqlite3", statement)
    with pytest.raises(kind, match=message):
        open_store()


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("UPDATE vectors SET vector = x'00'", "chunk 1 has not 256 bytes"),
        ("UPDATE vectors SET vector = zeroblob(256)", "the vector of chunk 1: damaged"),
        ("UPDATE chunks SET end_char = 10000", "chunk 1: damaged"),
        ("UPDATE texts SET text = 'x'", "the text of document 'paris.md': damaged"),
        ("DELETE FROM chunks", "0 rows of chunks, wanted 1"),
        ("DELETE FROM documents", "0 rows of documents, wanted 1"),
    ],
)
def test_rows_that_contradict_each_other(open_store, tmp_path, statement, message):
    with open_store() as store:
        store.add([PARIS])
    edit(tmp_path / "store" / "store.sqlite3", statement)  # this connection enforces no foreign keys
    with pytest.raises(CorruptStoreError, match=message), open_store() as store:
        store.search("Paris")


def test_disk_full_keeps_what_was_there(open_store, tmp_path):
    with open_store() as store:
        store.add([PARIS])
        store._open_file.db.execute("PRAGMA max_page_count = 20")  # SQLite answers as it does on a full disk
        with pytest.raises(StoreError, match=r"store\.sqlite3: database or disk is full: free some space"):
            store.add([Document("big", "word " * 50_000)])
        assert store.uris() == [PARIS.uri] and store.search("Paris")[0].uri == PARIS.uri


def test_stats_and_schema_are_what_they_say(open_store, tmp_path):
    with open_store(chunk_size=8, chunk_overlap=2) as store:
        assert store.stats().dim is None
        store.add(DOCUMENTS)
        stats = store.stats()
    assert (stats.documents, stats.dim, stats.metric, stats.chunk_size, stats.chunk_overlap) == (
        3,
        64,
        "cosine",
        8,
        2,
    )
    assert stats.format_version == 2 and stats.bytes > 0
    connection = sqlite3.connect(tmp_path / "store" / "store.sqlite3")
    (synchronous_mode,) = connection.execute("PRAGMA journal_mode").fetchone()
    ((blob,),) = connection.execute("SELECT vector FROM vectors WHERE chunk_id = 1").fetchall()
    metadata = connection.execute("SELECT metadata FROM documents WHERE uri = 'cats.md'").fetchone()[0]
    connection.close()
    assert synchronous_mode == "wal" and len(blob) == 256 and json.loads(metadata) == CATS.metadata


def test_commits_are_durable(open_store):
    """synchronous = FULL (2): a commit is on the disk, not only in the kernel, when it returns."""
    with open_store() as store:
        assert store._open_file.db.execute("PRAGMA synchronous").fetchone() == (2,)
        assert isinstance(store, Store)


class Reader:
    """An embedder that counts characters as tokens and reads 20 of them."""

    window = 20

    def count_tokens(self, texts):
        return [len(text) for text in texts]

    def encode(self, texts):
        assert max(len(text) for text in texts) <= self.window
        return np.array([[len(text), text.count("a") + 1.0] for text in texts], np.float32)


def test_an_embedder_brings_its_own_counter_and_window(tmp_path):
    text = "A sentence of words. And another one here. " * 5
    with Store.open(tmp_path / "s", embedder=Reader().encode, embedder_id="r") as store:
        store.add([Document("a", text)])
        stats = store.stats()
        assert (stats.chunk_size, stats.counter) == (20, "Reader")
        assert max(len(hit.text) for hit in store.search("words", k=99)) <= 20
    with pytest.raises(EmbedderMismatchError, match="counter=Reader in the store, words given"):
        Store.open(tmp_path / "s", embedder=Reader().encode, embedder_id="r", count_tokens=count_words)
    with Store.open(
        tmp_path / "s", embedder=lambda texts: Reader().encode(texts), embedder_id="r", read_only=True
    ) as store:
        assert store.search("words", k=1)  # a reader splits nothing


def test_a_chunk_longer_than_the_window_is_impossible(tmp_path):
    with pytest.raises(EmbedderError, match="chunk_size=21: the embedder reads 20 tokens"):
        Store.open(tmp_path / "s", embedder=Reader().encode, embedder_id="r", chunk_size=21)
    assert not (tmp_path / "s" / "store.sqlite3").exists()
    narrow = Reader()
    narrow.window = 10
    Store.open(tmp_path / "s", embedder=Reader().encode, embedder_id="r").close()
    with pytest.raises(EmbedderError, match="chunk_size=20: the embedder reads 10 tokens"):
        Store.open(tmp_path / "s", embedder=narrow.encode, embedder_id="r")


@pytest.mark.model
def test_an_encoder_as_an_embedder_reads_every_chunk_whole(tmp_path, minilm_dir):
    from qlorag.models import load_encoder

    encoder = load_encoder(minilm_dir)
    with Store.open(tmp_path / "s", embedder=encoder.encode, embedder_id=encoder.fingerprint) as store:
        store.add([Document("a", "Unbelievably counterintuitive antidisestablishmentarianism. " * 60)])
        stats = store.stats()
        assert (stats.chunk_size, stats.counter) == (encoder.window, "Encoder") == (254, "Encoder")
        longest = max(encoder.count_tokens([hit.text for hit in store.search("long", k=99)]))
    assert 200 < longest <= 254


def test_a_database_that_is_removed_while_open_acknowledges_nothing(open_store, tmp_path):
    with open_store() as store:
        store.add([PARIS])
        for path in (tmp_path / "store").glob("store.sqlite3*"):
            path.unlink()
        for call in (lambda: store.add([CATS]), lambda: store.search("Paris"), lambda: store.delete(PARIS.uri)):
            with pytest.raises(StoreError, match=r"store\.sqlite3: removed while this store had it open"):
                call()


def test_a_database_that_is_replaced_while_open(open_store, tmp_path):
    with open_store() as store:
        store.add([PARIS])
    reader = open_store(read_only=True)
    assert reader.search("Paris", k=1)[0].uri == PARIS.uri
    writer = open_store()
    shutil.rmtree(tmp_path / "store")
    with open_store() as anew:
        anew.add([CATS])
        with pytest.raises(StoreError, match="replaced by another file"):
            writer.add([CYPRUS])
        assert anew.uris() == [CATS.uri]
    assert reader.search("Paris", k=1)[0].uri == CATS.uri  # the file that is there now
    reader.close()
    writer.close()


def test_a_replaced_database_of_another_embedder_is_refused(open_store, tmp_path):
    with open_store() as store:
        store.add([PARIS])
    with open_store(read_only=True) as reader:
        shutil.rmtree(tmp_path / "store")
        Store.open(tmp_path / "store", embedder=Reader().encode, embedder_id="another").close()
        with pytest.raises(EmbedderMismatchError):
            reader.search("Paris")


def test_bytes_are_those_of_all_files(open_store, tmp_path):
    with open_store() as store:
        store.add([Document(f"d{i}", "word " * 2000) for i in range(20)])
        there = sum(path.stat().st_size for path in (tmp_path / "store").iterdir())
        assert store.stats().bytes == there > (tmp_path / "store" / "store.sqlite3").stat().st_size
