"""Whether a model says exactly what a test row wants, by asking it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...models import Decoder, Tokenizer, generate
from ..cli.display import Display
from ..data.examples import Row


@dataclass(frozen=True)
class Match:
    """One asked row: its last user turn, the answer it wants, and the one it got; equal but for outer spaces?"""

    prompt: str
    wanted: str
    got: str
    right: bool


def exact_match(
    model: Decoder, tok: Tokenizer, rows: Sequence[Row], *, max_tokens: int, display: Display
) -> list[Match]:
    """Asks, greedily, every row that ends in an assistant turn; the others (plain text) have no answer to match."""
    asked = [r.messages for r in rows if r.messages and r.messages[-1]["role"] == "assistant"]
    matches = []
    with display.progress() as progress:
        for messages in progress.track(asked, description="asking"):
            *before, last = messages
            wanted = str(last["content"]).strip()
            run = generate(model, tok, before, max_tokens=max_tokens)
            got = "".join(run).strip()
            matches.append(Match(str(before[-1]["content"]) if before else "", wanted, got, got == wanted))
    return matches
