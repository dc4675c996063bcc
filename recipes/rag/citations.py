"""Which sources an answer rests on, sentence by sentence, found by comparing words (`support`).

A small model seldom cites on its own, and may repeat an example's [1]. An [n] that it writes is kept where source n
supports the sentence that it stands in. If none is, each sentence gets the numbers of the sources that support it best,
and the result says that they were added by comparison.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ...retrieval import Hit
from .support import shares_words, support

SUPPORT = 0.5  # of a sentence's words must be in a source for its number to be added
# Less for a number that the model wrote: it paraphrases, and its own claim is evidence, too. A repeated example shares
# a word or two at most with a source about something else.
WRITTEN_SUPPORT = 0.3
_CITATION = re.compile(r"\s*\[([1-9]\d{0,2})\]")
# A sentence with what closes it, and with the numbers behind that.
_SENTENCE = re.compile(
    r"(?:[^.!?。！？\n]|[.!?](?=\w))+[.!?。！？\n]*[\"')\]”’]*(?:\s*\[\d{1,3}\][.,;]?)*\s*"  # 3.5 is no end
    r"|[.!?。！？\n]+\s*"
)


@dataclass(frozen=True)
class Answer:
    """An answer with the numbers of the sources it rests on, counted from 1 in the order of `sources`.

    text:     as the model wrote it, with whatever numbers it put in.
    cited_by: "model" if the model wrote them, "overlap" if they were found by comparing words, "none".
    marked:   the text with its citations and no other numbers.
    shares_words: whether any word of it is in any source.
    """

    question: str
    text: str
    sources: list[Hit] = field(default_factory=list)
    citations: list[int] = field(default_factory=list)
    cited_by: str = "none"
    marked: str = ""
    shares_words: bool = False

    def cited_text(self) -> str:
        """The answer with its citations and no other numbers."""
        return self.marked


class _Sentence(NamedTuple):
    text: str  # with its numbers
    plain: str  # without
    written: list[int]


def cite(question: str, text: str, hits: Sequence[Hit]) -> Answer:
    """Finds which sources an answer rests on."""
    text = text.strip()
    sentences = list(_sentences(text))
    kept = [_written(sentence, hits) for sentence in sentences]
    cited_by = "model"
    if not any(kept):
        kept = [_best(sentence, hits) for sentence in sentences]
        cited_by = "overlap" if any(kept) else "none"
    pairs = zip(sentences, kept, strict=True)
    marked = "".join(_marked(sentence, numbers, add=cited_by == "overlap") for sentence, numbers in pairs).strip()
    plain = _CITATION.sub("", text)
    return Answer(
        question=question,
        text=text,
        sources=list(hits),
        citations=sorted({n for numbers in kept for n in numbers}),
        cited_by=cited_by,
        marked=marked,
        shares_words=any(shares_words(plain, hit.text) for hit in hits),
    )


def _sentences(text: str) -> Iterator[_Sentence]:
    for match in _SENTENCE.finditer(text):
        part = match[0]
        yield _Sentence(part, _CITATION.sub("", part), [int(found[1]) for found in _CITATION.finditer(part)])


def _written(sentence: _Sentence, hits: Sequence[Hit]) -> list[int]:
    """The numbers in the sentence whose source supports it."""
    there = [n for n in sentence.written if n <= len(hits)]
    return [n for n in there if support(sentence.plain, hits[n - 1].text) >= WRITTEN_SUPPORT]


def _best(sentence: _Sentence, hits: Sequence[Hit]) -> list[int]:
    """The numbers of the sources that support the sentence best."""
    shares = {n: support(sentence.plain, hit.text) for n, hit in enumerate(hits, 1)}
    best = max(shares.values(), default=0.0)
    return [n for n, share in shares.items() if share == best] if best >= SUPPORT else []


def _marked(sentence: _Sentence, numbers: list[int], *, add: bool) -> str:
    if not add:
        return _CITATION.sub(lambda found: found[0] if int(found[1]) in numbers else "", sentence.text)
    bare = sentence.plain.rstrip()
    behind = sentence.plain[len(bare) :]
    return bare + "".join(f" [{n}]" if i == 0 else f"[{n}]" for i, n in enumerate(numbers)) + behind
