"""Which tokens of a chat the assistant wrote: the labels of training.

Each assistant turn is labelled as it would be generated. `chat_turns` renders the chat up to it and says where the
turn begins (where the generation prompt ends) and where it ends (after its end token). Then there are two cases:

- one example: the template renders the whole chat so that each of those beginnings is a beginning of it. All turns
  are labelled in that one text;
- one example per turn: the template renders earlier turns differently once later ones follow (Qwen3 drops their
  reasoning, Mistral moves the system message to the last question), or a turn has no end token and gets one. A text
  that holds all turns would then teach something that is never generated, so each turn is labelled in the chat up
  to it.

A token is labelled when it covers at least one character of a turn. Before anything is labelled, `chat_printed`
checks that the template prints what the messages say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import TemplateError
from .chat import ChatEncoder, Message, Rendering, Span, check_messages, marked_spans
from .chat_printed import check_printed, printable_arguments
from .chat_template import ChatTemplate
from .chat_turns import Turn, find_turns


@dataclass(frozen=True)
class EndTokens:
    """What may end a turn. ids: generation stops at these. append: written where the template closes no turn."""

    ids: frozenset[int]
    append: int | None


@dataclass(frozen=True)
class LabelledChat:
    """One training example made of a chat.

    ids: [T].  mask: [T], True for the tokens that the assistant wrote.
    ends: the ids that end its labelled turns; a generation has to stop at each.
    appended: whether the end is not the template's but was written after it.
    unopened: what generation would begin a labelled turn with and the chat does not ("<think>"), or "".
    """

    ids: list[int]
    mask: list[bool]
    ends: frozenset[int]
    appended: bool = False
    unopened: str = ""


def label_chat(
    encoder: ChatEncoder,
    template: ChatTemplate,
    messages: Sequence[Message],
    variables: Mapping[str, Any],
    *,
    protect: bool,
    end: EndTokens,
) -> list[LabelledChat]:
    """The examples of a finished chat: one, or one per labelled turn (see the file's head).

    A message with "weight": 0 is not labelled. A chat without a labelled turn is one example without labels.
    protect: see `chat`.
    Raises TemplateError: the template refuses the messages, does not print what one says, gives no way to tell the
        assistant's turns, or closes none and the tokenizer has no end token.
    """
    check_messages(messages)
    weights = [message.get("weight", 1) for message in messages if message["role"] == "assistant"]
    messages = [{key: value for key, value in m.items() if key != "weight"} for m in messages]
    messages = printable_arguments(encoder, template, messages, variables)
    chat, turns = find_turns(encoder, template, messages, variables, protect=protect, end_ids=end.ids)
    check_printed(encoder, template, messages, variables, rebuilt=[i for i, turn in enumerate(turns) if turn.rebuilt])
    wanted = [turn for turn, weight in zip(turns, weights, strict=True) if weight]
    if all(_is_a_beginning(chat.texts[0], turn) for turn in wanted):
        return [_example(encoder, chat, chat.texts[0], wanted, end=None)]
    unclosed = next((turn for turn in wanted if not turn.closed), None)
    if unclosed is not None and end.append is None:
        raise TemplateError(
            f"{template.origin}: no special token closes an assistant turn, and the tokenizer names no end token to "
            "write there, so the tuned model would never stop: name one as eos_token in tokenizer_config.json"
        )
    return [
        _example(encoder, chat, turn.text[: turn.end], [turn], end=None if turn.closed else end.append)
        for turn in wanted
    ]


def _is_a_beginning(whole: str, turn: Turn) -> bool:
    return turn.closed and whole.startswith(turn.text[: turn.end])


def _example(
    encoder: ChatEncoder, chat: Rendering, text: str, turns: Sequence[Turn], *, end: int | None
) -> LabelledChat:
    """`text` encoded with the spans of `turns` labelled, and with the token `end` after it."""
    encoded = encoder.encode(chat, text)
    spans = marked_spans(text, chat.marks, [(turn.start, turn.end) for turn in turns])
    mask = label_mask(encoded.offsets, spans)
    unopened = next((turn.unopened for turn in turns if turn.unopened), "")
    if end is not None:
        return LabelledChat([*encoded.ids, end], [*mask, True], frozenset({end}), appended=True, unopened=unopened)
    ends = frozenset(turn.end_id for turn in turns if turn.end_id is not None)
    return LabelledChat(encoded.ids, mask, ends, unopened=unopened)


def label_mask(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """For each token, whether it covers a character of a span.

    offsets: characters [start, end) of each token, in order.  spans: disjoint, in order.
    """
    mask = []
    reached = k = 0
    for start, end in offsets:
        # Byte-level offsets leave out a token's leading space: a token begins where the last one ended.
        start = min(start, reached)
        while k < len(spans) and spans[k][1] <= start:
            k += 1
        inside = k < len(spans) and start < spans[k][1]
        # An empty token (SentencePiece's space before a first word) belongs to the turn that it opens.
        mask.append(inside and (end > spans[k][0] or start == end == spans[k][0]))
        reached = max(reached, end)
    return mask
