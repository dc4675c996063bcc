"""From passages to a prompt: numbered sources, the question, and as many passages as the model can read.

The passages are data in the user's turn. They reach the tokenizer as plain text, so that nothing written in a document
can open or close a turn (RELIABILITY: prompt injection). That reduces what a hostile document can do; it does not make
a model immune to what the text *says*.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...retrieval import Hit
from ..errors import UsageError

SYSTEM = "Answer with the sentence of the sources that answers the question, and its number."
# Two turns that show how: without them a model of 135M parameters does not copy from its sources but invents text, in
# every wording of the instruction that was tried (recipes/NOTES.md). The best source is the last, next to the question.
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
