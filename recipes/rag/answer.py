"""Retrieval-augmented generation: question -> passages -> prompt with numbered sources -> answer that names them.

    run = answer(store, model, tok, "What do bees make?")
    for piece in run:
        print(piece, end="", flush=True)
    print(run.answer.cited_text())

If nothing is above the threshold, the model is not asked at all: `NOT_FOUND` is the answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ...models import Decoder, Generation, Tokenizer, generate
from ...retrieval import Hit, Store
from .citations import Answer, cite
from .prompt import fitting

NOT_FOUND = "I could not find this in the documents."


class Answering:
    """An iterator over the pieces of an answer's text.

    found:   the passages found.
    sources: those of them that fit into the model's context, best first; they are numbered from 1.
    context: how many tokens the model reads.
    """

    def __init__(
        self, question: str, found: Sequence[Hit], sources: Sequence[Hit], run: Generation | None, *, context: int
    ) -> None:
        self.question, self.found, self.sources, self.context = question, list(found), list(sources), context
        self._run = run

    def __iter__(self) -> Iterator[str]:
        return iter([NOT_FOUND]) if self._run is None else self._run

    @property
    def answer(self) -> Answer:
        """The text so far, with the sources that it rests on."""
        if self._run is None:
            return Answer(self.question, NOT_FOUND, marked=NOT_FOUND)
        return cite(self.question, self._run.text, self.sources)


def answer(
    store: Store,
    model: Decoder,
    tok: Tokenizer,
    question: str,
    *,
    k: int = 3,
    score_threshold: float | None = 0.4,
    system: str | None = None,
    max_tokens: int = 256,
    **sampling: Any,
) -> Answering:
    """Answers a question from the passages of a store.

    k, score_threshold: at most so many passages, of at least this cosine.  The rest is as in `answer_from`.
    """
    hits = store.search(question, k=k, score_threshold=score_threshold)
    return answer_from(hits, model, tok, question, system=system, max_tokens=max_tokens, **sampling)


def answer_from(
    hits: Sequence[Hit],
    model: Decoder,
    tok: Tokenizer,
    question: str,
    *,
    system: str | None = None,
    max_tokens: int = 256,
    **sampling: Any,
) -> Answering:
    """Answers a question from passages that were found already.

    system:   replaces the instruction (prompt.SYSTEM).
    sampling: temperature, top_k, ..., stop, see `qlorag.models.generate`.
    Raises UsageError: not even the best passage fits into the model's context.
    """
    context = model.config.max_positions
    if not hits:
        return Answering(question, hits, hits, None, context=context)
    sources, messages = fitting(
        question,
        hits,
        system=system,
        count_tokens=lambda messages: len(tok.chat(messages)),
        # The answer needs tokens as well, but a large max_tokens must not cost every passage.
        most=context - min(max_tokens, context // 4),
    )
    run = generate(model, tok, messages, max_tokens=max_tokens, **sampling)
    return Answering(question, hits, sources, run, context=context)
