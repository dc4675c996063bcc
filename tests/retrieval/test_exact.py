"""Exact search: the answer does not depend on how a float32 product is rounded; and which vectors are refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
from qlorag.retrieval import Document, Store

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
