"""Which sentences a source supports, by hand: every name and every number counts, words only in number."""

from __future__ import annotations

import pytest
from qlorag.recipes.rag import cite
from qlorag.recipes.rag.support import shares_words, support, words_of
from qlorag.retrieval import Hit

LEE = "The CEO is Bob Lee. He lives in Rio, has 1,400 shares and nine dogs."


def hit(text: str, n: int = 0) -> Hit:
    return Hit(text=text, score=0.5, uri="a.txt", start=0, end=len(text), sha256="", metadata={}, chunk_id=n)


@pytest.mark.parametrize(
    ("sentence", "source", "share"),
    [
        ("Bob Lee lives in Rio.", LEE, 1.0),
        ("Rio", LEE, 1.0),  # short words count
        ("He has 1400 shares.", LEE, 1.0),
        ("Lee has 9 dogs.", LEE, 1.0),
        ("Lee has nine dogs.", LEE.replace("nine", "9"), 1.0),
        ("Bob Lee lives in Paris.", LEE, 0.0),  # a name that is invented
        ("Bob Lee has 1,500 shares.", LEE, 0.0),  # a number that is
        ("Bob Lee has ten dogs.", LEE, 0.0),
        ("Bob Lee does not live in Rio.", LEE, 0.0),  # a denial
        ("Nobody lives in Rio.", LEE, 0.0),
        ("Bob Lee isn't the CEO.", LEE, 0.0),
        ("He does not live in Rio.", "Bob Lee does not live in Rio.", 1.0),
        ("Lee’s dogs live in Rio.", LEE, 3 / 4),  # lee, dogs, rio of lee, dogs, live, rio
        ("It is so.", LEE, 0.0),  # nothing to compare
        ("", LEE, 0.0),
        ("Rio", "", 0.0),
        ("28%", "The price rose by 28% to $5.", 1.0),
        ("3.5", "It weighs 3.5 kg.", 1.0),
        ("3.5", "It weighs 35 kg.", 0.0),
        ("東京です", "東京は日本の首都です。", 1.0),
        ("大阪です", "東京は日本の首都です。", 0.0),
        ("首都は東京です", "東京は日本の首都です。人口は1400万人。", 1.0),
        ("人口は1500万人", "東京は日本の首都です。人口は1400万人。", 0.0),
        ("กรุงเทพ", "เมืองหลวงคือกรุงเทพ", 1.0),
        ("เชียงใหม่", "เมืองหลวงคือกรุงเทพ", 0.0),
        ("Από την Κύπρο", "Ο Πάτροκλος είναι από την Κύπρο.", 1.0),
        ("U\u0301beda", "El niño nació en Úbeda.", 1.0),  # composed and decomposed are one
    ],
)
def test_support_by_hand(sentence: str, source: str, share: float) -> None:
    assert support(sentence, source) == pytest.approx(share)


def test_what_a_text_says() -> None:
    words = words_of("The CEO isn’t Bob Lee; he has twelve of 1,400 shares in 東京.")
    assert words.names == {"ceo", "bob", "lee"} and words.numbers == {"12", "1400"} and words.runs == {"東京"}
    assert words.words == {"ceo", "bob", "lee", "shares"} and words.denies


def test_a_sentence_is_marked_where_it_is_supported_and_no_other() -> None:
    hits = [hit(LEE), hit("The moon pulls the sea.", 1)]
    answer = cite("?", "Bob Lee lives in Rio. Anna Kahn lives in Oslo. The moon pulls the sea.", hits)
    assert answer.cited_text() == "Bob Lee lives in Rio. [1] Anna Kahn lives in Oslo. The moon pulls the sea. [2]"
    assert (answer.citations, answer.cited_by) == ([1, 2], "overlap")


def test_a_number_is_kept_where_it_is_right_and_taken_out_where_it_is_not() -> None:
    answer = cite("?", "Bob Lee lives in Rio [1]. He has 77 dogs [1]. He has nine dogs. [1]", [hit(LEE)])
    assert answer.cited_text() == "Bob Lee lives in Rio [1]. He has 77 dogs. He has nine dogs. [1]"
    assert (answer.citations, answer.cited_by) == ([1], "model")


@pytest.mark.parametrize(
    ("text", "shares"), [("Bob Lee lives in Paris.", True), ("Zebras graze.", False), ("9", True), ("大阪", False)]
)
def test_that_no_word_is_in_a_source_is_said_only_if_it_is_true(text: str, shares: bool) -> None:
    answer = cite("?", text, [hit(LEE)])
    assert (answer.cited_by == "none" or text == "9") and answer.shares_words == shares
    assert shares_words(text, LEE) == shares
