"""A training example as text, with its labelled tokens marked: what to look at before a run.

console.print(show_mask(example, tok))

<|im_start|>user
Hi<|im_end|>
<|im_start|>assistant
⟦Hello<|im_end|>⟧
"""

from __future__ import annotations

from itertools import groupby

from rich.text import Text

from ...models.text.tokenizer import Tokenizer
from .examples import Example

OPEN, CLOSE = "⟦", "⟧"


def show_mask(example: Example, tok: Tokenizer) -> Text:
    """The example's text for a rich console, special tokens included: labelled tokens in green ⟦brackets⟧, the
    rest dim.

    The brackets stay where there are no colours; `show_mask(...).plain` is the text alone.
    """
    shown = Text()
    for text, labelled in mask_runs(example, tok):
        shown.append(f"{OPEN}{text}{CLOSE}" if labelled else text, style="bold green" if labelled else "dim")
    return shown


def mask_runs(example: Example, tok: Tokenizer) -> list[tuple[str, bool]]:
    """The text as runs of tokens that are labelled (True) and that are not.

    A character whose bytes are spread over two runs shows as U+FFFD in both. Control characters are escaped:
    they come from a file, and would act on the terminal.
    """
    runs = []
    for labelled, pairs in groupby(zip(example.ids, example.mask, strict=True), key=lambda pair: pair[1]):
        text = tok.decode([i for i, _ in pairs], skip_special=False)
        runs.append(("".join(c if c.isprintable() or c == "\n" else _escaped(c) for c in text), labelled))
    return runs


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
