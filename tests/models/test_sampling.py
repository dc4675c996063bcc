"""Sampling: what is a setting, what each filter does alone, and where the filters begin and end to act."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from qlorag.models import ModelError
from qlorag.models.decoder.sampling import Sampler, Sampling, keep_min_p, keep_top_p, penalize

LOGITS = torch.log(torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05]))


@pytest.mark.parametrize(
    ("name", "good", "bad", "wanted"),
    [
        ("temperature", [0, 1e-3, 9.0], [-0.1, math.nan], "at least 0"),
        ("top_k", [0, 1], [-1], "at least 0"),
        ("top_p", [1e-6, 1.0], [0, 1.01], "in (0, 1]"),
        ("min_p", [0, 1.0], [-0.01, 1.01], "in [0, 1]"),
        ("repetition_penalty", [0.1, 2], [0, -1], "above 0"),
        ("seed", [None, 0, 1, 2**63 - 1], [-1, 2**63], "from 0 to 2^63 - 1"),
    ],
)
def test_each_setting_has_its_range(name: str, good: list[Any], bad: list[Any], wanted: str) -> None:
    for value in good:
        assert getattr(Sampling(**{name: value}), name) == value
    for value in bad:
        with pytest.raises(ValueError) as error:
            Sampling(**{name: value})
        assert str(error.value) == f"{name}={value}, wanted {wanted}"


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, [0.5, 0.2, 0.15, 0.1, 0.05]),
        ({"top_k": 1}, [1, 0, 0, 0, 0]),
        ({"top_k": 2}, [5 / 7, 2 / 7, 0, 0, 0]),
        ({"top_k": 5}, [0.5, 0.2, 0.15, 0.1, 0.05]),
        ({"top_k": 9}, [0.5, 0.2, 0.15, 0.1, 0.05]),
        ({"top_p": 0.6}, [5 / 7, 2 / 7, 0, 0, 0]),
        ({"min_p": 0.35}, [5 / 7, 2 / 7, 0, 0, 0]),  # 0.2 is 0.4 of the likeliest, 0.15 is 0.3 of it
        ({"temperature": 0.5}, [x / 0.325 for x in (0.25, 0.04, 0.0225, 0.01, 0.0025)]),  # squares, over their sum
        # each acts on what the ones before it left: at temperature 0.5 the first has 0.77, the first two 0.89
        ({"temperature": 0.5, "top_p": 0.8}, [25 / 29, 4 / 29, 0, 0, 0]),
        ({"top_k": 2, "top_p": 0.7}, [1, 0, 0, 0, 0]),  # 0.5 of 0.7 is 0.71
    ],
)
def test_each_filter_alone_by_hand(settings: dict[str, Any], wanted: list[float]) -> None:
    sampler = Sampler(Sampling(**{"temperature": 1.0, **settings}))
    assert sampler.distribution(LOGITS).tolist() == pytest.approx(wanted, abs=1e-6)


def test_what_is_off_changes_no_bit() -> None:
    """Sums of many probabilities are rounded, so top-p at 1 would drop some of 50,000 tokens if it ran."""
    logits = torch.randn(50_000, generator=torch.Generator().manual_seed(0)) * 5
    assert torch.equal(Sampler(Sampling(temperature=1.0)).distribution(logits), logits.softmax(-1))
    tied = torch.zeros(4)
    assert Sampler(Sampling(temperature=1.0, top_k=1)).distribution(tied).tolist() == [0.25] * 4  # ties stay


def test_where_a_filter_is_met_exactly() -> None:
    """Four equally likely tokens: two of them reach 0.5, and each is as likely as the likeliest."""
    tied = torch.zeros(4)
    assert int(keep_top_p(tied, 0.5).isfinite().sum()) == 2
    assert keep_min_p(tied, 1.0).tolist() == [0.0] * 4


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(ModelError) as error:
        Sampler(Sampling())(torch.tensor([0.0, bad, -math.inf]), [])
    assert str(error.value) == (
        "the model's logits are NaN or infinite: its weights or its adapter are damaged (a training that diverged), or "
        "they overflow the dtype: try float32 or bfloat16"
    )
    assert Sampler(Sampling())(torch.tensor([0.0, 1.0, -math.inf]), []) == 1  # a token may be impossible


def test_the_penalty_by_hand() -> None:
    logits = torch.tensor([4.0, 0.5, -2.0, 0.0, 3.0])
    assert penalize(logits, [1, 2, 3, 0, 0], penalty=2.0).tolist() == [2.0, 0.25, -4.0, 0.0, 3.0]
    assert penalize(logits, [], penalty=2.0) is logits and penalize(logits, [1], penalty=1.0) is logits
    assert logits.tolist() == [4.0, 0.5, -2.0, 0.0, 3.0]


def test_the_sampler_penalizes_what_it_is_told_was_seen() -> None:
    greedy = Sampler(Sampling(repetition_penalty=2.0))
    logits = torch.tensor([4.0, 3.0, 1.0], dtype=torch.bfloat16)
    assert [greedy(logits, seen) for seen in ([], [0], [0, 1])] == [0, 1, 0]
    drawn = Sampler(Sampling(temperature=1e-3, repetition_penalty=2.0, seed=0))
    assert [drawn(logits, seen) for seen in ([], [0])] == [0, 1]  # so cold that only the largest is ever drawn


def test_without_a_seed_two_samplers_differ() -> None:
    """64 draws of two equally likely tokens: alike by chance once in 2^64."""
    free = [Sampler(Sampling(temperature=1.0)) for _ in range(2)]
    assert len({tuple(s(torch.zeros(2), []) for _ in range(64)) for s in free}) == 2
    seeded = [Sampler(Sampling(temperature=1.0, seed=seed)) for seed in (0, 1, 0)]
    first, second, again = (tuple(s(torch.zeros(2), []) for _ in range(64)) for s in seeded)
    assert first == again != second
