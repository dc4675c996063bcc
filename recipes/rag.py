"""Retrieval-augmented generation: question -> passages -> prompt with numbered sources -> answer that names them.

The passages stand in the user's turn, numbered, as data. They reach the tokenizer as plain
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
SYSTEM = "Answer with the sentence of the sources that answers the question, and its number."
# Two turns that show how: without them a model of 135M parameters does not copy from its sources but invents
# beside them, in every wording of the instruction that was tried (NOTES.md). The best source stands last,
# next to the question.
EXAMPLES = (
    (
        "[2] Tomatoes came to Europe from the Americas.\n\n"
        "[1] Vienna is the capital of Austria and lies on the Danube. It has two million people.",
        "Vienna and Danube relation",
        "Vienna is the capital of Austria and lies on the Danube. [1]",
    ),
    (
        "[2] Leeds is a city in the north of England.\n\n"
        "[1] Ada Palmer is a baker. She was born in Leeds and sells bread there.",
        "Who is Ada Palmer?",
        "Ada Palmer is a baker. She was born in Leeds and sells bread there. [1]",
    ),
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
    messages = [{"role": "system", "content": SYSTEM}]
    sources = "\n\n".join(f"[{n}] {hit.text.strip()}" for n, hit in reversed(list(enumerate(hits, 1))))
    for shown, asked, answer in EXAMPLES:
        messages += [_turn(shown, asked), {"role": "assistant", "content": answer}]
    return [*messages, _turn(sources, question)]


def _turn(sources: str, question: str) -> dict[str, str]:
    return {"role": "user", "content": f"Sources:\n\n{sources}\n\nQuestion: {question}"}


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
