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


def texts_of(text: str, **settings: object) -> list[str]:
    return [chunk.text for chunk in split_text(text, **settings)]


def test_the_overlap_is_as_many_whole_units_as_fit():
    assert texts_of("A. B. C. D. E. F. G.", size=4, overlap=2) == ["A. B. C. D.", "C. D. E. F.", "E. F. G."]
    assert texts_of("A. B. C c. D. E.", size=4, overlap=3) == ["A. B. C c.", "B. C c. D.", "C c. D. E."]
    # The unit that comes next needs 3 of 4 tokens, which leaves 1 of the 2 for the overlap.
    assert texts_of("A. B. C. D. E e e.", size=4, overlap=2) == ["A. B. C. D.", "D. E e e."]


def test_the_overlap_ends_within_the_chunk_before():
    """By sums four units fit, counted with the spaces between them two; so a chunk is shorter than overlap allows, and
    the next one still begins after it."""
    chunks = texts_of("A. B. C. D.", size=4, overlap=3, count_tokens=count_with_overhead)
    assert chunks == ["A. B.", "B. C.", "C. D."]


def test_a_chunk_that_is_too_long_loses_an_eighth_of_its_units_at_a_time():
    """n sentences of one word have 2 n - 1 tokens with the spaces between them, so 20 of 40 fit and 5 of 10."""
    checked: list[int] = []

    def count(texts: list[str]) -> list[int]:
        if len(texts) == 1:
            checked.append(len(texts[0].split()))
        return count_with_overhead(texts)

    chunks = texts_of("A. " * 80, size=40, overlap=0, count_tokens=count)
    assert [len(chunk.split()) for chunk in chunks] == [20, 20, 20, 20]
    assert checked == [*[40, 35, 31, 28, 25, 22, 20] * 3, 20]
    assert [len(c.split()) for c in texts_of("A. " * 10, size=10, overlap=0, count_tokens=count)] == [5, 5]


def test_a_chunk_keeps_one_new_unit_and_gives_up_its_overlap_for_it():
    """Z beside anything else is too long. The chunk of 15 A, Z and three Y loses two units at a time, but not Z, then
    the overlap one unit after another."""

    def count(texts: list[str]) -> list[int]:
        return [100 if "Z" in text and " " in text else len(text.split()) for text in texts]

    a, z, y = "A. " * 19, "Z. ", "Y. " * 5
    assert texts_of(a + z + y, size=19, overlap=15, count_tokens=count) == [a.strip(), z.strip(), y.strip()]


def test_each_chunk_begins_after_the_one_before():
    """Even where the overlap would hold all of it: of the first, 22 sentences are left, and 23 would have fitted."""
    chunks = split_text("A. " * 60, size=46, overlap=45, count_tokens=count_with_overhead)
    assert [(chunk.start, len(chunk.text.split())) for chunk in chunks[:2]] == [(0, 22), (3, 22)]


def test_the_usual_settings_are_1024_tokens_and_20_of_overlap():
    chunks = texts_of("A. " * 1025)
    assert [len(chunk.split()) for chunk in chunks] == [1024, 21]


def test_a_unit_is_counted_if_it_is_short_enough_for_the_size():
    """Up to 16 characters per token of the size, and up to 64 in any case; a longer one is cut into words unasked. The
    overlap shows which: one word of it can be repeated if the unit was cut, and none of a whole unit."""
    for size, length in ((2, 64), (5, 80)):
        words = [*"abcdefgh"[: size - 1], "x" * (length - 2 * size + 1) + "."]
        unit = " ".join(words)
        assert len(unit) == length
        assert texts_of(f"{unit} Then.", size=size, overlap=1) == [unit, "Then."]
        longer = unit.replace("x.", "xx.")
        assert texts_of(f"{longer} Then.", size=size, overlap=1) == [longer, f"{longer.split()[-1]} Then."]
    sentence = "One two three."  # the length counts, wherever in the text it stands
    assert texts_of(" ".join([sentence] * 30), size=4, overlap=0) == [sentence] * 30


def test_every_unit_is_counted_once_in_calls_of_at_most_1024_texts():
    calls: list[int] = []

    def count(texts: list[str]) -> list[int]:
        calls.append(len(texts))
        return count_words(texts)

    split_text("A. " * 3000, size=1000, overlap=0, count_tokens=count)
    assert calls == [1024, 1024, 952, 1, 1, 1]  # the units, then each of three chunks as a whole


def test_a_text_may_have_no_tokens():
    assert texts_of("A. B. C.", size=1, overlap=0, count_tokens=lambda texts: [0] * len(texts)) == ["A. B. C."]


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


@pytest.mark.parametrize(
    ("counts", "said"),
    [([], "0 counts for 1 texts, smallest 0"), ([1, 2], "2 counts for 1 texts, smallest 1"),
     ([-1], "1 counts for 1 texts, smallest -1")],
)  # fmt: skip
def test_a_counter_that_answers_nonsense(counts, said):
    with pytest.raises(StoreError) as error:
        split_text("One text.", size=5, overlap=0, count_tokens=lambda _: counts)
    assert str(error.value) == f"count_tokens returned {said}: it has to return one number >= 0 per text"
