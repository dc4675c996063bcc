from __future__ import annotations

import time
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qlorag.retrieval import Chunk, SplitError, StoreError, count_words, split_text


def count_characters(texts: list[str]) -> list[int]:
    return [len(text) for text in texts]


def count_bytes(texts: list[str]) -> list[int]:
    """More tokens than characters, as a byte-level tokenizer has for rare scripts."""
    return [len(text.encode("utf-8", "surrogatepass")) for text in texts]


def count_like_wordpiece(texts: list[str]) -> list[int]:
    """A word of over 100 characters is one unknown token; of others each 4 characters are one."""
    return [sum(1 if len(w) > 100 else -(-len(w) // 4) for w in text.split()) for text in texts]


def count_with_overhead(texts: list[str]) -> list[int]:
    """Not additive: two units together have more tokens than the sum of theirs."""
    return [len(text.split()) + sum(c.isspace() for c in text) for text in texts]


COUNTERS = [count_words, count_characters, count_bytes, count_like_wordpiece, count_with_overhead]

# Free-form text, and text made of what the splitter looks for.
texts = st.one_of(
    st.text(max_size=400),
    st.lists(
        st.sampled_from(["One two. ", "Who? ", "x", "\n", "\n \n", " ", "word ", "e.g. ", "。", "Ω", "a" * 70, "!)"])
    ).map("".join),
)


@given(texts, st.integers(1, 30), st.integers(0, 29), st.sampled_from(COUNTERS))
@settings(max_examples=400, deadline=None)
def test_what_holds_for_every_text(text, size, overlap, count):
    overlap %= size
    chunks = split_text(text, size=size, overlap=overlap, count_tokens=count)
    covered = set()
    for before, chunk in zip([None, *chunks], chunks, strict=False):
        assert text[chunk.start : chunk.end] == chunk.text
        assert chunk.text and chunk.text == chunk.text.strip()
        assert count([chunk.text])[0] <= size or len(chunk.text) == 1
        if before is not None:  # in order, each with something new at its end
            assert before.start < chunk.start or (before.start == chunk.start and overlap)
            assert before.end < chunk.end
        covered.update(range(chunk.start, chunk.end))
    assert all(i in covered for i, c in enumerate(text) if not c.isspace())


@given(texts, st.integers(1, 30), st.sampled_from(COUNTERS))
@settings(max_examples=100, deadline=None)
def test_without_overlap_chunks_are_disjoint(text, size, count):
    chunks = split_text(text, size=size, overlap=0, count_tokens=count)
    assert all(a.end <= b.start for a, b in pairwise(chunks))


def test_hand_worked_example():
    text = "One two. Three four. Five six."
    assert split_text(text, size=4, overlap=2) == [
        Chunk("One two. Three four.", 0, 20),
        Chunk("Three four. Five six.", 9, 30),
    ]
    assert [c.text for c in split_text(text, size=4, overlap=0)] == ["One two. Three four.", "Five six."]
    assert [c.text for c in split_text(text, size=100)] == [text]


def test_overlap_is_whole_sentences_within_its_budget():
    text = "A b c. D e. F g h. I j."
    # Two words of overlap: "D e." fits, "F g h." does not.
    assert [c.text for c in split_text(text, size=5, overlap=2)] == ["A b c. D e.", "D e. F g h.", "I j."]


@pytest.mark.parametrize(
    ("text", "size", "wanted"),
    [
        ("First part\n\nSecond part", 2, ["First part", "Second part"]),  # paragraphs
        ("no full stop here\nbut a line end", 4, ["no full stop here", "but a line end"]),  # lines
        ("a b c d e", 2, ["a b", "c d", "e"]),  # words
        ("He said e.g. this. Then left.", 4, ["He said e.g. this.", "Then left."]),  # not after "e.g."
        ('She said "Yes." He left.', 3, ['She said "Yes."', "He left."]),  # after the closing quote
        ("你好。再见。", 1, ["你好。", "再见。"]),  # no space needed
        ("", 5, []),
        (" \n\t ", 5, []),
    ],
)
def test_where_it_cuts(text, size, wanted):
    assert [c.text for c in split_text(text, size=size, overlap=0)] == wanted


def test_characters_are_the_last_resort():
    chunks = split_text("abcdefghij", size=3, overlap=0, count_tokens=count_characters)
    assert "".join(c.text for c in chunks) == "abcdefghij" and max(len(c.text) for c in chunks) <= 3
    # A single character of more bytes than the budget is given alone: there is nothing to cut.
    assert [c.text for c in split_text("🙂🙂", size=2, overlap=0, count_tokens=count_bytes)] == ["🙂", "🙂"]


def test_an_endless_word_is_not_swallowed_as_one_unknown_token():
    chunks = split_text("x" * 10_000, size=64, overlap=0, count_tokens=count_like_wordpiece)
    assert max(len(c.text) for c in chunks) <= 64 * 16


@pytest.mark.parametrize(
    "text", ["x" * 10**6, "." * 10**6, "\n" * 10**6, ". " * 500_000, "word " * 200_000, "\n \n" * 300_000]
)
def test_a_megabyte_takes_linear_time_and_counting(text):
    seen = 0

    def count(texts: list[str]) -> list[int]:
        nonlocal seen
        seen += sum(map(len, texts))
        return count_like_wordpiece(texts)

    began = time.process_time()
    split_text(text, size=256, overlap=20, count_tokens=count)
    assert time.process_time() - began < 20  # about 1 s here; quadratic would be hours
    assert seen <= 6 * len(text)  # levels of cutting, overlap, one check per chunk


@pytest.mark.parametrize(("size", "overlap"), [(0, 0), (-1, 0), (5, 5), (5, -1)])
def test_impossible_settings(size, overlap):
    with pytest.raises(SplitError, match=rf"size={size}, overlap={overlap}"):
        split_text("text", size=size, overlap=overlap)


@pytest.mark.parametrize("counts", [[], [1, 2], [-1]])
def test_a_counter_that_answers_nonsense(counts):
    with pytest.raises(StoreError, match="one number >= 0 per text"):
        split_text("One text.", size=5, overlap=0, count_tokens=lambda _: counts)
