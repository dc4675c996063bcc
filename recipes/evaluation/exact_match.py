"""Whether a model says exactly what a test row wants, by asking it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...models import Decoder, Tokenizer, generate
from ..data.examples import Row


@dataclass(frozen=True)
class Match:
    """One asked row: its last user turn, the answer it wants, the one it got, and whether they are equal.

    Spaces around the two do not count.
    """

    prompt: str
    wanted: str
    got: str
    right: bool


def exact_match(
    model: Decoder,
    tok: Tokenizer,
    rows: Sequence[Row],
    *,
    max_tokens: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[Match]:
    """Asks, greedily, every row that ends in an assistant turn; the others (plain text) have no answer to match.

    progress: called with (rows asked, rows in all), before the first and after each.
    """
    asked = [r.messages for r in rows if r.messages and r.messages[-1]["role"] == "assistant"]
    matches: list[Match] = []
    for messages in asked:
        if progress is not None:
            progress(len(matches), len(asked))
        *before, last = messages
        wanted = str(last["content"]).strip()
        got = "".join(generate(model, tok, before, max_tokens=max_tokens)).strip()
        matches.append(Match(str(before[-1]["content"]) if before else "", wanted, got, got == wanted))
    if progress is not None:
        progress(len(matches), len(asked))
    return matches
