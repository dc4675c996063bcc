"""Which sources an answer rests on, found by comparing words.

A small model seldom cites on its own, and may repeat an example's [1]. An [n] that it writes is kept if source n holds
enough of the words before it; an answer without such an [n] gets the numbers of the sources that hold its words, and
the result says that they were added by comparison. Words are compared, not meanings: a true paraphrase may be refused,
and an answer that denies its source is not noticed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from ...retrieval import Hit

SUPPORT = 0.5  # of an answer's content words must be in a source for it to be named
# Less for a number that the model wrote: it paraphrases, and its own claim is evidence, too. A repeated example shares
# a word or two at most with a source about something else.
WRITTEN_SUPPORT = 0.3
_CITATION = re.compile(r"\s*\[([1-9]\d{0,2})\]")


@dataclass(frozen=True)
class Answer:
    """An answer with the numbers of the sources it rests on, counted from 1 in the order of `sources`.

    text:     as the model wrote it, with whatever numbers it put in.
    cited_by: "model" if the model wrote them, "overlap" if they were found by comparing words, "none".
    """

    question: str
    text: str
    sources: list[Hit] = field(default_factory=list)
    citations: list[int] = field(default_factory=list)
    cited_by: str = "none"

    def cited_text(self) -> str:
        """The answer with its citations and no other numbers: inside where the model wrote them, else at the end."""
        written = self.citations if self.cited_by == "model" else []
        text = _CITATION.sub(lambda found: found[0] if int(found[1]) in written else "", self.text)
        return text if self.cited_by != "overlap" else f"{text} " + "".join(f"[{n}]" for n in self.citations)


def cite(question: str, text: str, hits: Sequence[Hit]) -> Answer:
    """Finds which sources an answer rests on."""
    text = text.strip()
    written = _written(text, hits)
    if written:
        return Answer(question, text, list(hits), written, "model")
    support = {n: _support(text, hit.text) for n, hit in enumerate(hits, 1)}
    best = max(support.values(), default=0.0)
    if best < SUPPORT:
        return Answer(question, text, list(hits))
    return Answer(question, text, list(hits), [n for n, s in support.items() if s == best], "overlap")


def _written(text: str, hits: Sequence[Hit]) -> list[int]:
    """The numbers in the text whose source supports the words since the number before, or the text as a whole."""
    good, claim, end = set(), "", 0
    for found in _CITATION.finditer(text):
        claim = text[end : found.start()].strip() or claim  # [1][2]: both follow the same words
        n, end = int(found[1]), found.end()
        if n <= len(hits):
            source = hits[n - 1].text
            if max(_support(claim, source), _support(text, source)) >= WRITTEN_SUPPORT:
                good.add(n)
    return sorted(good)


def _support(answer: str, source: str) -> float:
    """The share of the answer's content words, its [n] left out, that are in the source."""
    words = _content_words(_CITATION.sub("", answer))
    return len(words & _content_words(source)) / len(words) if words else 0.0


def _content_words(text: str) -> set[str]:
    return {w for w in re.findall(r"\w+", text.casefold()) if len(w) > 3 or w.isdigit()}
