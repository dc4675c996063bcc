"""Exact search: the answer does not depend on how a float32 product is rounded; and which vectors are refused."""

from __future__ import annotations

import math
import sqlite3
import warnings

import numpy as np
import pytest
from qlorag.retrieval import CorruptStoreError, Document, EmbedderError, Store
from qlorag.retrieval.index import exact
from qlorag.retrieval.sqlite.checksums import checksum

D = 384


def near_ties(n: int) -> tuple[np.ndarray, np.ndarray]:
    """A query and n vectors whose cosines with it differ by some 1e-9, where a float32 product is off by 1e-7."""
    random = np.random.default_rng(0)
    query, other = random.normal(size=(2, D))
    rows = query + other + 2e-7 * random.normal(size=(n, D))
    return query.astype(np.float32), rows.astype(np.float32)


def test_near_ties_are_ranked_by_their_exact_scores(tmp_path):
    """The authority is math.fsum, which rounds once, over the products of the unit vectors that the store keeps in
    memory. Without the margin a row whose float32 score comes out below the k-th's is lost, better or not."""
    query, rows = near_ties(400)
    with Store.open(tmp_path / "store", embedder=lambda texts: rows[[int(t) for t in texts]], embedder_id="rows",
                    exact_below=10**9, chunk_size=1, chunk_overlap=0) as store:  # fmt: skip
        store.add([Document("u", " ".join(map(str, range(len(rows)))))])
        found = {k: store.search_vector(query, k=k) for k in (1, 10, 100, 400)}
    units = [(r / math.sqrt(math.fsum(r**2))).astype(np.float32) for r in rows.astype(np.float64)]
    direction = query.astype(np.float64) / math.sqrt(math.fsum(query.astype(np.float64) ** 2))
    scores = [math.fsum(u * direction) for u in units]  # float32 times float64: the products are rounded once
    order = sorted(range(len(rows)), key=lambda i: -scores[i])
    assert max(scores) - min(scores) < 1e-6  # ties, to float32
    for k, hits in found.items():
        assert [int(h.text) for h in hits] == order[:k], k
        assert [h.score for h in hits] == pytest.approx([scores[i] for i in order[:k]], abs=1e-14)


def stored(*rows: tuple[int, object]) -> sqlite3.Connection:
    """The two tables that exact search reads, with these vectors (float32 lists, or any value as it is)."""
    db = sqlite3.connect(":memory:")
    db.execute("CREATE TABLE chunks (id INTEGER PRIMARY KEY)")
    db.execute("CREATE TABLE vectors (chunk_id INTEGER PRIMARY KEY, vector, checksum)")
    for chunk_id, vector in rows:
        blob = np.array(vector, "<f4").tobytes() if isinstance(vector, list) else vector
        db.execute("INSERT INTO chunks VALUES (?)", (chunk_id,))
        check = checksum(chunk_id, blob) if isinstance(blob, bytes) else 0
        db.execute("INSERT INTO vectors VALUES (?, ?, ?)", (chunk_id, blob, check))
    return db


def test_what_an_embedder_returned_becomes_float32():
    for given in ([[3, 4]], [[3.0, 4.0]], np.array([[3, 4]], np.uint8), np.array([[3, 9], [4, 9]], np.float16).T[:1]):
        got = exact.check_vectors(given, count=1, dim=2, what="x")
        assert got.dtype == np.float32 and got.flags.c_contiguous and got.tolist() == [[3.0, 4.0]]
    assert exact.check_vectors(np.empty((0, 3)), count=0, dim=None, what="x").shape == (0, 3)


@pytest.mark.parametrize(
    ("given", "count", "dim", "message"),
    [
        ([[1.0], [1.0, 2.0]], 2, None, "doc: the embedder returned no rectangular array (setting an array element"),
        ([1.0, 2.0], 2, None, "doc: the embedder returned float64 [2], wanted float32 [2, D]"),
        ([[[1.0]]], 1, None, "doc: the embedder returned float64 [1, 1, 1], wanted float32 [1, D]"),
        ([[1.0]], 2, None, "doc: the embedder returned float64 [1, 1], wanted float32 [2, D]"),
        ([[], []], 2, None, "doc: the embedder returned float64 [2, 0], wanted float32 [2, D]"),
        ([[True]], 1, None, "doc: the embedder returned bool [1, 1], wanted float32 [1, D]"),
        ([[1j]], 1, None, "doc: the embedder returned complex128 [1, 1], wanted float32 [1, D]"),
        ([["1"]], 1, None, "doc: the embedder returned <U1 [1, 1], wanted float32 [1, D]"),
        ([[1.0, 2.0]], 1, 3, "doc: the embedder returned D=2, the store holds D=3: use the embedder the store was "
                             "made with, or index into another folder"),
        ([[1.0], [0.0]], 2, 1, "doc: the embedder's vector 1 of 2 is all zeros: nothing was stored"),
        ([[math.nan], [0.0]], 2, 1, "doc: the embedder's vector 0 of 2 is NaN or inf: nothing was stored"),
        ([[1.0], [math.inf]], 2, 1, "doc: the embedder's vector 1 of 2 is NaN or inf: nothing was stored"),
        ([[1e300]], 1, 1, "doc: the embedder's vector 0 of 1 is NaN or inf: nothing was stored"),  # beyond float32
    ],
)  # fmt: skip
def test_what_no_cosine_is_defined_for_is_refused(given, count, dim, message):
    with warnings.catch_warnings(), pytest.raises(EmbedderError) as error:
        warnings.simplefilter("error")
        exact.check_vectors(given, count=count, dim=dim, what="doc")
    assert str(error.value).startswith(message)


def test_lengths_are_taken_in_float64():
    """The squares of 3e30 and 4e30 are beyond float32, those of 3e-30 and 4e-30 below it."""
    vectors = np.array([[3, 4], [3e30, 4e30], [3e-30, 4e-30]], np.float32)
    unit = exact.unit(vectors)
    assert unit.dtype == np.float32
    np.testing.assert_allclose(unit, [[0.6, 0.8]] * 3, rtol=1e-7)
    assert exact.check_vectors(vectors, count=3, dim=2, what="x").shape == (3, 2)


def test_vectors_are_read_in_batches_after_an_id():
    count = 4096 + 3
    db = stored(*((i, [3.0, 4.0 if i < 4099 else -4.0]) for i in range(count, 0, -1)))
    batches = list(exact.read_vectors(db, after=1, dim=2))
    assert [len(ids) for ids, _ in batches] == [4096, 2]
    assert np.concatenate([ids for ids, _ in batches]).tolist() == list(range(2, count + 1))
    assert all(ids.dtype == np.int64 and rows.dtype == np.float32 for ids, rows in batches)
    np.testing.assert_allclose(batches[-1][1], [[0.6, 0.8], [0.6, -0.8]], rtol=1e-7)
    assert list(exact.read_vectors(db, after=count, dim=2)) == []


def test_chosen_vectors_are_read_in_any_number():
    """999 parameters are the most that an old SQLite takes, so they go in groups."""
    db = stored(*((i, [float(i), 0.0]) for i in range(1, 1200)))
    wanted = np.arange(1000, 0, -1)
    ids, rows = exact.read_chosen(db, np.concatenate([wanted, [5000]]), dim=2)
    assert sorted(ids.tolist()) == list(range(1, 1001)) and rows.tolist() == [[1.0, 0.0]] * 1000
    ids, rows = exact.read_chosen(db, np.array([7000]), dim=2)
    assert (ids.shape, ids.dtype, rows.shape, rows.dtype) == ((0,), np.int64, (0, 2), np.float32)


@pytest.mark.parametrize(
    ("vector", "message"),
    [
        (b"123", "vectors: chunk 2 has not 8 bytes: index its document again"),
        (b"123456789abc", "vectors: chunk 2 has not 8 bytes: index its document again"),
        ("12345678", "vectors: chunk 2 has not 8 bytes: index its document again"),
        (None, "vectors: chunk 2 has not 8 bytes: index its document again"),
        ([0.0, 0.0], "vectors: chunk 2 is NaN, inf or zeros: index its document again"),
        ([math.nan, 1.0], "vectors: chunk 2 is NaN, inf or zeros: index its document again"),
        ([math.inf, 1.0], "vectors: chunk 2 is NaN, inf or zeros: index its document again"),
    ],
)
def test_a_damaged_vector_is_named(vector, message):
    db = stored((1, [1.0, 0.0]), (2, vector))
    for read in (lambda: list(exact.read_vectors(db, after=0, dim=2)),
                 lambda: exact.read_chosen(db, np.array([1, 2]), dim=2)):  # fmt: skip
        with pytest.raises(CorruptStoreError) as error:
            read()
        assert str(error.value) == message


def test_one_changed_bit_of_a_vector_is_named():
    db = stored((1, [1.0, 0.0]), (2, [1.0, 1.0]))
    db.execute("UPDATE vectors SET vector = ? WHERE chunk_id = 2", (np.array([1, 1.0000001], "<f4").tobytes(),))
    for read in (lambda: list(exact.read_vectors(db, after=0, dim=2)),
                 lambda: exact.read_chosen(db, np.array([1, 2]), dim=2)):  # fmt: skip
        with pytest.raises(CorruptStoreError, match=r"^the vector of chunk 2: damaged on the disk"):
            read()


def test_after_a_deletion_no_vector_is_read_again():
    db = stored(*((i, [float(i), 1.0]) for i in range(1, 9)))
    index = exact.ExactIndex(2)
    index.refresh(db)
    db.execute("DELETE FROM chunks WHERE id IN (1, 4)")
    db.execute("DELETE FROM vectors WHERE chunk_id IN (1, 4)")
    db.execute("UPDATE vectors SET vector = 'unread' WHERE chunk_id < 8")
    index.refresh(db)
    assert index.ids.tolist() == [2, 3, 5, 6, 7, 8]
    np.testing.assert_allclose(index.rows[:, 0] / index.rows[:, 1], index.ids, rtol=1e-6)


def test_the_index_follows_the_database():
    db = stored((3, [1.0, 0.0]), (5, [0.0, 1.0]))
    whole, tail = exact.ExactIndex(2), exact.ExactIndex(2, after=3)
    assert (whole.ids.tolist(), whole.rows.shape, whole.after, tail.after) == ([], (0, 2), 0, 3)

    def both() -> list[list[int]]:
        for index in (whole, tail):
            assert (index.ids.dtype, index.rows.dtype) == (np.int64, np.float32)
            index.refresh(db)
            assert (index.ids.dtype, index.rows.dtype) == (np.int64, np.float32)
            assert index.rows.shape == (index.ids.size, 2)
        return [whole.ids.tolist(), tail.ids.tolist()]

    assert both() == both() == [[3, 5], [5]]
    first = whole.rows
    db.execute("INSERT INTO chunks VALUES (6)")
    blob = np.array([2, 0], "<f4").tobytes()
    db.execute("INSERT INTO vectors VALUES (6, ?, ?)", (blob, checksum(6, blob)))
    assert both() == [[3, 5, 6], [5, 6]]
    assert whole.rows.tolist() == [[1, 0], [0, 1], [1, 0]] and first.shape == (2, 2)  # appended to a copy
    db.execute("DELETE FROM chunks WHERE id = 3")
    db.execute("DELETE FROM vectors WHERE chunk_id = 3")
    assert both() == [[5, 6], [5, 6]]
    db.execute("DELETE FROM chunks WHERE id > 3")
    db.execute("DELETE FROM vectors WHERE chunk_id > 3")
    assert both() == [[], []]


def test_what_is_in_memory_is_not_read_again():
    """Only a count is asked for while nothing has changed: a changed vector under the same id is not seen."""
    db = stored((1, [1.0, 0.0]))
    index = exact.ExactIndex(2)
    index.refresh(db)
    db.execute("UPDATE vectors SET vector = ?", (np.array([0, 1], "<f4").tobytes(),))
    index.refresh(db)
    assert index.rows.tolist() == [[1, 0]]


def test_candidates_are_the_k_nearest_and_those_within_the_margin():
    """The margin for D = 2 is 2 · 2^-23 below the k-th score."""
    below = np.float32(1) - np.float32(2**-23)  # the largest score within it, and the first outside
    outside = np.float32(1) - np.float32(3 * 2**-23)
    index = exact.ExactIndex(2)
    index.ids = np.array([10, 11, 12, 13, 14])
    index.rows = np.array([[0, 1], [1, 0], [below, 0], [outside, 0], [-1, 0]], np.float32)
    query = np.array([1, 0], np.float32)
    for k, wanted in ((1, [11, 12]), (2, [11, 12, 13]), (3, [11, 12, 13]), (4, [10, 11, 12, 13]), (5, None), (9, None)):
        ids, rows = index.candidates(query, k)
        assert ids.tolist() == (wanted or [10, 11, 12, 13, 14])
        assert rows.tolist() == index.rows[ids - 10].tolist()


def test_ranking_by_hand():
    rows = np.array([[0.6, 0.8], [1, 0], [0.6, 0.8], [-1, 0]], np.float32)
    found = exact.rank(np.array([4, 9, 2, 1]), rows, np.array([1.0, 0.0]), 3)
    assert found == [(9, 1.0), (2, float(np.float32(0.6))), (4, float(np.float32(0.6)))]  # equal scores by id
    assert all(type(i) is int and type(score) is float for i, score in found)
    longer = np.array([[np.nextafter(np.float32(1), np.float32(2)), 0], [-2, 0]], np.float32)
    assert exact.rank(np.array([1, 2]), longer, np.array([1.0, 0.0]), 9) == [(1, 1.0), (2, -1.0)]  # a cosine stays one
