"""Rows to training examples: token ids with a label mask, and the order in which a run sees them.

    rows, _ = read_rows("train.jsonl")
    examples, report = tokenize_rows(rows, tok, max_tokens=1024)
    batch = [examples[i] for i in batch_indices(len(examples), batch_size=4, seed=0, step=17)]

Which tokens are labelled:
- a chat: every assistant turn, end-of-turn token included (`Tokenizer.chat_examples`), so not the question,
  not the system message, not the newline after a turn. A chat that the template renders differently as it goes on
  becomes one example per turn;
- prompt and completion: the same, as a chat of one user and one assistant turn, when the tokenizer has a chat
  template (mlx-lm does so). A base model has none: then the prompt's tokens are followed by the completion's
  and the end token, and the completion and the end token are labelled. Each side is encoded alone, as the
  prompt will be at generation;
- a text: all of it and the end token, with what the tokenizer puts before any text ("<s>"). Special tokens
  written in it are parsed, for such rows are often chats that were formatted already. Message
  contents are never parsed.

Token t is predicted from those before it, so a label on the first token teaches nothing. A row without any
other label (its prompt fills max_tokens, it has no assistant turn) is dropped and counted: its mean loss
would be 0/0.

Order. The stream of examples is epoch after epoch, each a permutation of all rows, and step s takes the
places s*B ... s*B + B-1 of it. So every row is seen once per epoch, whatever B: a last batch that an epoch
cannot fill goes on with the next (with fewer rows than B, a row appears in a batch more than once). The
permutation of epoch e sorts the rows by the numbers of Philox4x64 (Salmon et al. 2011), a counter-based
generator, with key (seed, e). Nothing is carried from step to step, so a run resumed at any step sees what it
would have seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ...models.errors import ModelError, TemplateError
from ...models.text.chat_labels import LabelledChat
from ...models.text.tokenizer import Tokenizer
from ..errors import DataError
from .rows import Row, read_rows

__all__ = [
    "Example",
    "Row",
    "TokenizeReport",
    "batch_indices",
    "read_rows",
    "tokenize_rows",
]


@dataclass(frozen=True)
class Example:
    """One tokenized row.

    ids:  token ids [T].  mask: [T], True where the token is labelled: predicted from those before it.
    file, line: the row it comes from.
    """

    ids: list[int]
    mask: list[bool]
    line: int
    file: str = ""

    @property
    def labels(self) -> int:
        """How many labelled tokens it has, without a first one: no token before it predicts it."""
        return sum(self.mask[1:])


@dataclass
class TokenizeReport:
    """What became of the rows.

    tokens, labels: of the examples; a label on a first token is not counted.
    truncated:  places ("file:line") of the rows that were cut at max_tokens.
    too_long:   of those dropped because they are longer.
    unlabelled: of those dropped because no token in them is labelled.
    unanswered: of those dropped because they hold no answer at all: no turn of the assistant, or all of weight 0.
    invalid:    of those left out under skip_invalid.
    split:      how many rows became several examples, one per assistant turn.
    joined_plain: prompt and completion were joined without a chat template.
    ends:       ids of the labelled tokens that end a turn: generation has to stop at each.
    appended:   the template closes no turn, so an end token was written after each.
    unopened:   what generation begins an answer with and some row's answer does not ("<think>"), or "".
    """

    rows: int = 0
    kept: int = 0
    tokens: int = 0
    labels: int = 0
    truncated: list[str] = field(default_factory=list)
    too_long: list[str] = field(default_factory=list)
    unlabelled: list[str] = field(default_factory=list)
    unanswered: list[str] = field(default_factory=list)
    invalid: list[str] = field(default_factory=list)
    split: int = 0
    joined_plain: bool = False
    ends: frozenset[int] = frozenset()
    appended: bool = False
    unopened: str = ""

    @property
    def dropped(self) -> int:
        """How many rows are not trained on."""
        return self.rows - self.kept

    @property
    def remarkable(self) -> bool:
        """Whether there is anything to say but how many rows and tokens there are."""
        odd = self.truncated, self.split, self.joined_plain, self.appended, self.unopened
        return bool(self.dropped) or any(odd)

    def summary(self) -> str:
        """One line for the user, naming the first row of each kind."""
        parts = [f"{self.kept} of {self.rows} rows, {self.tokens} tokens, {self.labels} of them labelled"]
        for places, what in (
            (self.truncated, "cut at the token limit"),
            (self.too_long, "dropped: longer than the token limit"),
            (self.unlabelled, "dropped: nothing to learn within the token limit"),
            (self.unanswered, "dropped: no turn of the assistant to learn"),
            (self.invalid, "left out as invalid"),
        ):
            if places:
                parts.append(f"{len(places)} {what} (first {places[0]})")
        if self.split:
            parts.append(f"{self.split} of several turns, which the template renders one example a turn")
        if self.appended:
            parts.append("the template closes no turn: the end token is written after each and labelled")
        if self.unopened:
            parts.append(
                f"generation begins an answer with {self.unopened!r}, which answers without reasoning lack: the tuned "
                "model is not asked as it was trained"
            )
        if self.joined_plain:
            parts.append("no chat template: prompt and completion are joined as plain text")
        return "; ".join(parts)


def tokenize_rows(
    rows: Sequence[Row],
    tok: Tokenizer,
    *,
    max_tokens: int,
    too_long: Literal["truncate", "drop"] = "truncate",
    skip_invalid: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> tuple[list[Example], TokenizeReport]:
    """The examples of `rows`, in order, and what became of each row.

    max_tokens:   most tokens in an example.  too_long: cut longer rows at their end, as mlx-lm does, or drop
                  them.
    skip_invalid: leave out rows that the chat template refuses, instead of raising.
    variables:    for the chat template, such as the date that a run keeps; a row's own win.
    Raises DataError: the template refuses a row (file, line and the template's words), or no row is left.
    """
    if max_tokens < 2:
        raise DataError(f"max_tokens={max_tokens}: nothing can be predicted within it: give at least 2")
    report = TokenizeReport(rows=len(rows))
    examples: list[Example] = []
    for row in rows:
        place = f"{row.file}:{row.line}"
        try:
            made = _tokenize(row, tok, variables or {})
        except ModelError as error:
            if not skip_invalid:
                raise DataError(f"{place}: {error}") from error
            report.invalid.append(place)
            continue
        if row.kind == "completion" and not tok.has_chat_template:
            report.joined_plain = True
        kept = [_cut(labelled, row, max_tokens, too_long, report) for labelled in made]
        report.kept += any(kept)
        report.split += len(made) > 1
        for labelled, example in zip(made, kept, strict=True):
            if example is not None:
                examples.append(example)
                report.tokens += len(example.ids)
                report.labels += example.labels
                report.ends |= labelled.ends
                report.appended |= labelled.appended
                report.unopened = report.unopened or labelled.unopened
    if not examples:
        where = rows[0].file if rows else "data"
        advice = "raise --max-seq-length" if report.unlabelled or report.too_long else "mend the rows"
        raise DataError(f"{where}: no row can be trained on ({report.summary()}): {advice}")
    return examples, report


def _cut(
    labelled: LabelledChat, row: Row, max_tokens: int, too_long: Literal["truncate", "drop"], report: TokenizeReport
) -> Example | None:
    """The example within `max_tokens`; None if it is dropped. The report says what became of it."""
    place = f"{row.file}:{row.line}"
    cut = len(labelled.ids) > max_tokens
    if cut and too_long == "drop":
        report.too_long.append(place)
        return None
    ids, mask = labelled.ids[:max_tokens], labelled.mask[:max_tokens]
    if not any(mask[1:]):
        (report.unlabelled if any(labelled.mask) else report.unanswered).append(place)
        return None
    if cut:
        report.truncated.append(place)
    return Example(ids, mask, row.line, row.file)


def _tokenize(row: Row, tok: Tokenizer, variables: Mapping[str, Any]) -> list[LabelledChat]:
    if row.kind == "text":
        # The writer of a formatted chat may have begun it with "<s>" already.
        bos = tok.special_tokens.get("bos_token")
        formatted = bos is not None and row.text.startswith(bos)
        ids = tok.encode(row.text, parse_special=True, add_special=not formatted)
        ids += [] if ids[-1:] == [_end(tok)] else [_end(tok)]
        return [LabelledChat(ids, [True] * len(ids), frozenset({_end(tok)}))]
    if row.kind == "completion" and not tok.has_chat_template:
        if len(row.messages) > 2 or row.tools or row.variables:
            raise TemplateError(
                "system, tools or chat_template_kwargs beside prompt and completion, and the model has no chat "
                "template that could write them: leave them out, or write the system message into the prompt"
            )
        prompt, completion = (message["content"] for message in row.messages)
        before = tok.encode(prompt, add_special=True)
        after = [*tok.encode(completion), _end(tok)]
        return [LabelledChat(before + after, [False] * len(before) + [True] * len(after), frozenset({_end(tok)}))]
    return tok.chat_examples(row.messages, tools=row.tools, **{**variables, **row.variables})


def _end(tok: Tokenizer) -> int:
    if tok.eos_id is None:
        raise DataError(
            "tokenizer: no end token is known, so a text would never end: name it as eos_token in "
            "tokenizer_config.json or eos_token_id in generation_config.json"
        )
    return tok.eos_id


def batch_indices(n: int, *, batch_size: int, seed: int, step: int) -> list[int]:
    """Which of `n` examples step `step` (from 0) trains on: a pure function of its arguments, see the file's
    head.

    Raises DataError: n or batch_size is not positive, seed or step is negative.
    """
    for name, value, least in (
        ("n", n, 1),
        ("batch_size", batch_size, 1),
        ("seed", seed, 0),
        ("step", step, 0),
    ):
        if value < least:
            raise DataError(f"{name}={value}: wanted at least {least}")
    places = range(step * batch_size, (step + 1) * batch_size)
    return [int(_permutation(n, seed, place // n)[place % n]) for place in places]


@lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    # Raw generator output, because numpy promises its stream for ever; Generator.permutation may change.
    key = np.array([seed % 2**64, epoch], dtype=np.uint64)
    order: npt.NDArray[np.int64] = np.argsort(np.random.Philox(key=key).random_raw(n), kind="stable")
    return order
