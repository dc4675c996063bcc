"""Retrieval-augmented generation: question -> passages -> prompt with numbered sources -> answer that names them.

The passages stand in the user's turn, numbered, as data. They reach the tokenizer as plain
text, so that nothing written in a document can open or close a turn (RELIABILITY: prompt injection). That reduces what
a hostile document can do; it does not make a model immune to what the text *says*.

A small model seldom cites on its own, and may repeat an example's [1]. An [n] that it writes is kept if source n holds
enough of the words it stands behind; an answer without such gets the numbers of the sources that hold its words, and
the result says that they were added by comparison. Words are compared, not meanings: a true paraphrase may be refused,
and an answer that denies its source is not noticed.

Nothing above the threshold means that the model is not asked at all: `NOT_FOUND` is the answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ...retrieval import Hit
from ..errors import UsageError

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
# Less for a number that the model wrote: it paraphrases, and its own claim is evidence, too. An echoed example shares a
# word or two at most with a source of another matter.
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


def prompt_messages(question: str, hits: Sequence[Hit], *, system: str | None = None) -> list[dict[str, str]]:
    """The conversation that asks `question` about `hits`; `system` replaces the instruction SYSTEM."""
    messages = [{"role": "system", "content": SYSTEM if system is None else system}]
    sources = "\n\n".join(f"[{n}] {hit.text.strip()}" for n, hit in reversed(list(enumerate(hits, 1))))
    for shown, asked, answer in EXAMPLES:
        messages += [_turn(shown, asked), {"role": "assistant", "content": answer}]
    return [*messages, _turn(sources, question)]


def _turn(sources: str, question: str) -> dict[str, str]:
    return {"role": "user", "content": f"Sources:\n\n{sources}\n\nQuestion: {question}"}


def fitting(
    question: str,
    hits: Sequence[Hit],
    *,
    count_tokens: Callable[[list[dict[str, str]]], int],
    most: int,
    system: str | None = None,
) -> tuple[list[Hit], list[dict[str, str]]]:
    """As many of `hits`, best first, as make a conversation of at most `most` tokens; and that conversation.

    Raises UsageError: not even the first fits.
    """
    for n in range(len(hits), 0, -1):
        messages = prompt_messages(question, hits[:n], system=system)
        if (tokens := count_tokens(messages)) <= most:
            return list(hits[:n]), messages
    raise UsageError(
        f"the question with the best passage alone has {tokens} tokens, and the model reads {most} beside its answer: "
        "shorten the question, or index the documents with a smaller --chunk-size"
    )


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
        claim = text[end : found.start()].strip() or claim  # [1][2]: both stand behind the same words
        n, end = int(found[1]), found.end()
        if n <= len(hits):
            source = hits[n - 1].text
            if max(_support(claim, source), _support(text, source)) >= WRITTEN_SUPPORT:
                good.add(n)
    return sorted(good)


def _support(answer: str, source: str) -> float:
    """The share of the answer's content words, its [n] left out, that stand in the source."""
    words = _content_words(_CITATION.sub("", answer))
    return len(words & _content_words(source)) / len(words) if words else 0.0


def _content_words(text: str) -> set[str]:
    return {w for w in re.findall(r"\w+", text.casefold()) if len(w) > 3 or w.isdigit()}
