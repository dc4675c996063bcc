"""Which tokens of a chat the assistant wrote: the labels of training.

A template with `{% generation %}` blocks says itself what the assistant wrote. For any other, the assistant's
turn i is what its message adds to the chat:

    start = len(render(messages[:i], add_generation_prompt=True))
    end   = just after the last special token in render(messages[:i+1]), or its end when the turn has none

so the end-of-turn token is learned and the newline after it is not. Both renderings have to be beginnings of
the whole one, which is checked. A template that rewrites earlier turns (drops their reasoning, say) is
refused: labels found by searching for the answer's text would sometimes be wrong, and nobody would notice.

A token is the assistant's when it covers at least one character of a turn. The cost is two renderings per
turn.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import TemplateError
from .chat import ChatEncoder, Message, Rendering, Span, check_messages, unmarked
from .chat_template import ChatTemplate


def encode_with_mask(
    encoder: ChatEncoder,
    template: ChatTemplate,
    messages: Sequence[Message],
    variables: Mapping[str, Any],
    *,
    protect: bool,
) -> tuple[list[int], list[bool]]:
    """The ids of the whole chat, and for each whether the assistant wrote it.

    A message with "weight": 0 is left out of the mask. protect: see `chat`.
    Raises TemplateError: the template refuses the messages, or gives no way to tell the assistant's turns.
    """
    check_messages(messages)
    weights = [message.get("weight", 1) for message in messages if message["role"] == "assistant"]
    messages = [{key: value for key, value in m.items() if key != "weight"} for m in messages]
    if re.search(r"\{%[-+]?\s*generation\b", template.source):
        cuts = [(len(messages), False)]
        chat = encoder.render(template, messages, variables, cuts=cuts, protect=protect, generation=True)
        spans = _blocks(chat)
        if len(spans) != len(weights) and not all(weights):
            raise TemplateError(
                f"{template.origin}: {len(spans)} generation blocks for {len(weights)} assistant messages: "
                '"weight" cannot be matched to them: leave it out or split the chat'
            )
    else:
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        cuts = [(len(messages), False), *((n, n == i) for i in turns for n in (i, i + 1))]
        chat = encoder.render(template, messages, variables, cuts=cuts, protect=protect)
        spans = _turns(encoder, template, chat, turns)
    if len(spans) == len(weights):
        spans = [span for span, weight in zip(spans, weights, strict=True) if weight]
    encoded = encoder.encode(chat, chat.texts[0])
    return encoded.ids, label_mask(encoded.offsets, _unmarked_spans(chat, spans))


def _turns(encoder: ChatEncoder, template: ChatTemplate, chat: Rendering, turns: Sequence[int]) -> list[Span]:
    """The spans, in the marked text, of the assistant's messages at the indices `turns`."""
    whole, *parts = chat.texts
    outside = re.compile(f"{chat.marks[0]}[^{chat.marks[1]}]*{chat.marks[1]}|(?P<special>{encoder.special.pattern})")
    spans = []
    for i, before, after in zip(turns, parts[::2], parts[1::2], strict=True):
        for text, what in ((before, "what comes before it"), (after, "the chat up to it")):
            if not whole.startswith(text):
                raise TemplateError(_not_a_beginning(template, chat, i, text, what))
        end = len(after)  # without a special token the turn ends where the next begins
        for match in outside.finditer(after, len(before)):
            if match["special"] is not None:
                end = match.end()
        spans.append((len(before), end))
    return spans


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


def _blocks(chat: Rendering) -> list[Span]:
    """Spans between generation marks in the marked text, nested ones joined."""
    spans, depth, start = [], 0, 0
    for match in re.finditer(f"[{chat.marks[2:]}]", chat.texts[0]):
        if match.group() == chat.marks[2]:
            start = match.end() if depth == 0 else start
            depth += 1
        else:
            depth -= 1
            if depth == 0:
                spans.append((start, match.start()))
    return spans


def _unmarked_spans(chat: Rendering, spans: Sequence[Span]) -> list[Span]:
    """Spans of the marked text as spans of the text that is encoded."""
    marks = [match.start() for match in re.finditer(f"[{chat.marks}]", chat.texts[0])]
    return [(start - bisect_left(marks, start), end - bisect_left(marks, end)) for start, end in spans]


def _not_a_beginning(template: ChatTemplate, chat: Rendering, i: int, text: str, what: str) -> str:
    whole = chat.texts[0]
    at = next((n for n, (a, b) in enumerate(zip(whole, text, strict=False)) if a != b), min(len(whole), len(text)))
    got, wanted = (unmarked(t[at : at + 30], chat.marks) or "the end" for t in (text, whole))
    return (
        f"{template.origin}: messages[{i}] (assistant) cannot be told apart, because {what} renders "
        f"differently alone than in the whole chat, at character {at} {got!r} against {wanted!r}: put "
        "{% generation %} around the assistant's text in the template, or train on chats of one assistant turn"
    )
