"""Retrieval-augmented generation: question -> passages -> prompt with numbered sources -> answer that names them.

The passages stand in the user's turn between marks, as data: "[1] (file) text". They reach the tokenizer as plain
text, so that nothing written in a document can open or close a turn (RELIABILITY: prompt injection). That reduces what
a hostile document can do; it does not make a model immune to what the text *says*.

A small model seldom cites on its own. Whatever [n] it writes is kept if there is such a source; an answer without any
gets the numbers of the sources that hold its words, and the result says that they were added by comparison.

Nothing above the threshold means that the model is not asked at all: `NOT_FOUND` is the answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..retrieval import Hit

NOT_FOUND = "I could not find this in the documents."
SYSTEM = (
    "Answer the question in one or two sentences, using only the numbered sources. "
    f'If they do not hold the answer, say: "{NOT_FOUND}"'
)
SUPPORT = 0.5  # of an answer's content words must stand in a source for it to be named


@dataclass(frozen=True)
class Answer:
    """An answer with the numbers of the sources it rests on, counted from 1 in the order of `sources`.

    cited_by: "model" if the model wrote them, "overlap" if they were found by comparing words, "none".
    """

    question: str
    text: str
    sources: list[Hit] = field(default_factory=list)
    citations: list[int] = field(default_factory=list)
    cited_by: str = "none"

    def cited_text(self) -> str:
        """The answer with its citations at the end, unless it has them inside."""
        if self.cited_by != "overlap":
            return self.text
        return f"{self.text} " + "".join(f"[{n}]" for n in self.citations)


def prompt_messages(question: str, hits: Sequence[Hit]) -> list[dict[str, str]]:
    """The conversation that asks `question` about `hits`."""
    sources = "\n\n".join(f"[{n}] ({hit.uri})\n{hit.text.strip()}" for n, hit in enumerate(hits, 1))
    return [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": f"Sources:\n\n{sources}\n\nQuestion: {question}"},
    ]


def cite(question: str, text: str, hits: Sequence[Hit]) -> Answer:
    """Finds which sources an answer rests on."""
    text = text.strip()
    written = sorted({int(n) for n in re.findall(r"\[(\d{1,3})\]", text)} & set(range(1, len(hits) + 1)))
    if written:
        return Answer(question, text, list(hits), written, "model")
    support = {n: _support(text, hit.text) for n, hit in enumerate(hits, 1)}
    best = max(support.values(), default=0.0)
    if best < SUPPORT:
        return Answer(question, text, list(hits))
    return Answer(question, text, list(hits), [n for n, s in support.items() if s == best], "overlap")


def _support(answer: str, source: str) -> float:
    """The share of the answer's content words that stand in the source."""
    words = _content_words(answer)
    return len(words & _content_words(source)) / len(words) if words else 0.0


def _content_words(text: str) -> set[str]:
    return {w for w in re.findall(r"\w+", text.casefold()) if len(w) > 3 or w.isdigit()}
