"""From messages to token ids, and which of them the assistant wrote.

A chat template turns messages into one text, in which `<|im_end|>` written by the template and `<|im_end|>`
written by a user look the same. Two things are therefore kept apart by marks, private-use characters that
occur nowhere in the messages or the template, and that are taken out again before anything is encoded:

- *protected text*: special-token text inside a message, a tool or a document is put between marks before
  rendering. Afterwards the text is cut at the special tokens outside of marks, each of which becomes its id,
  and the rest is encoded as plain text. Without any such text, the rendering is encoded in one call, as
  transformers does it.
- *generation blocks*: what `{% generation %}` encloses.

Labels. A template with generation blocks says itself what the assistant wrote. For any other, the assistant's
turn i is what its message adds to the chat:

    start = len(render(messages[:i], add_generation_prompt=True))
    end   = just after the last special token in render(messages[:i+1]), or its end when the turn has none

so the end-of-turn token is learned and the newline after it is not. Both renderings have to be beginnings of
the whole one, which is checked: a template that rewrites earlier turns (drops their reasoning, say) is
refused, because labels found by looking for the answer's text would be wrong without anyone noticing. A token
is the assistant's when it covers at least one character of a turn. The cost is two renderings for each
assistant turn.

What marks do not cover: a template that builds a special token from pieces ("<|" + role + "|>"), cuts a
message at a fixed length, or escapes non-ASCII characters (an error). Special tokens with `single_word` are
not told apart.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer as RawTokenizer

from .chat_template import ChatTemplate
from .errors import TemplateError, TokenizerError

Message = Mapping[str, Any]
Span = tuple[int, int]


@dataclass(frozen=True)
class Rendering:
    """Texts as the template produced them, marks included.

    marks: [open, close] around protected text, then [open, close] around generation blocks.
    protected: whether the first pair is in use.
    """

    texts: list[str]
    marks: str
    protected: bool


@dataclass(frozen=True)
class Encoded:
    """Token ids, and for each the characters [start, end) of the unmarked text that it covers."""

    ids: list[int]
    offsets: list[Span]


class ChatEncoder:
    """Renders and encodes chats for one tokenizer.

    raw:   parses special tokens.  plain: treats them as any text.  data: the content of tokenizer.json.
    """

    def __init__(self, raw: RawTokenizer, plain: RawTokenizer, data: Mapping[str, Any]) -> None:
        self._raw = raw
        self._plain = plain
        self._data = data
        tokens = [
            token for token in raw.get_added_tokens_decoder().values() if token.special and token.content
        ]
        tokens.sort(key=lambda token: -len(token.content))  # the longest match wins, as in `tokenizers`
        self._ids = {token.content: raw.token_to_id(token.content) for token in tokens}
        self._beginnings = {text[:n] for text in self._ids for n in range(1, len(text))}
        self._longest = max(map(len, self._ids), default=0)
        patterns = [
            r"\s*" * token.lstrip
            + re.escape(token.content)
            + r"\s*" * token.rstrip  # these swallow spaces beside them
            for token in tokens
        ]
        self._special = re.compile("|".join(patterns) or "(?!)")
        self._exact = re.compile("|".join(re.escape(token.content) for token in tokens) or "(?!)")

    def render(
        self,
        template: ChatTemplate,
        messages: Sequence[Message],
        variables: Mapping[str, Any],
        *,
        cuts: Sequence[tuple[int, bool]],
        protect: bool,
        generation: bool = False,
    ) -> Rendering:
        """Render the first n messages for each cut (n, add_generation_prompt).

        Raises TemplateError: the messages are not a non-empty list of objects with a role, or see
        `ChatTemplate`.
        """
        _check(messages)
        inputs: dict[str, Any] = {
            "tools": None,
            "documents": None,
            **variables,
            "messages": [{key: value for key, value in m.items() if value is not None} for m in messages],
        }
        marks = _unused_characters(_strings([inputs, template.source]), 4)
        protected = False
        if protect:
            for name in ("messages", "tools", "documents"):
                inputs[name], found = self._protect(inputs[name], marks)
                protected = protected or found
        pair = (marks[2], marks[3]) if generation else ("", "")
        texts = template.render_cuts(inputs, cuts, generation=pair)
        for text in texts if protected else ():
            if json.dumps(marks[0])[1:-1] in text:
                raise TemplateError(
                    f"{template.origin}: it escapes non-ASCII characters, so special-token text inside the "
                    f"messages "
                    "cannot be told from its own: remove that text, or pass parse_special=True"
                )
        return Rendering(texts, marks, protected)

    def encode(self, rendering: Rendering, text: str) -> Encoded:
        """Encode one text of a rendering: the template's special tokens parsed, protected text plain.

        Raises TokenizerError: the text holds a lone surrogate.
        """
        opening, closing = rendering.marks[0], rendering.marks[1]
        text = _unmarked(text, rendering.marks[2:])
        surrogate = re.search(r"[\ud800-\udfff]", text)
        if surrogate:
            raise TokenizerError(
                f"messages: they hold the lone surrogate U+{ord(surrogate.group()):04X}, which is not "
                f"Unicode text: "
                "decode them properly"
            )
        if not rendering.protected:
            encoding = self._raw.encode(text, add_special_tokens=False)
            return Encoded(encoding.ids, encoding.offsets)
        ids: list[int] = []
        offsets: list[Span] = []
        done, position = 0, 0  # in the marked and the unmarked text
        protected = f"{opening}[^{closing}]*{closing}"
        for match in [*re.finditer(f"{protected}|{self._special.pattern}", text), None]:
            if match and match.group().startswith(opening):
                continue
            plain = _unmarked(text[done : match.start() if match else len(text)], rendering.marks)
            encoding = (self._inner if position else self._plain).encode(plain, add_special_tokens=False)
            ids += encoding.ids
            offsets += [(position + start, position + end) for start, end in encoding.offsets]
            position += len(plain)
            if match:
                token = self._exact.search(match.group())
                assert token
                ids.append(self._ids[token.group()])
                offsets.append((position, position + len(match.group())))
                position, done = position + len(match.group()), match.end()
        return Encoded(ids, offsets)

    def with_mask(
        self,
        template: ChatTemplate,
        messages: Sequence[Message],
        variables: Mapping[str, Any],
        *,
        protect: bool,
    ) -> tuple[list[int], list[bool]]:
        """The ids of the whole chat, and which are the assistant's; see the head of this file."""
        _check(messages)
        weights = [message.get("weight", 1) for message in messages if message["role"] == "assistant"]
        messages = [{key: value for key, value in m.items() if key != "weight"} for m in messages]
        if re.search(r"\{%[-+]?\s*generation\b", template.source):
            cuts = [(len(messages), False)]
            chat = self.render(template, messages, variables, cuts=cuts, protect=protect, generation=True)
            spans = _blocks(chat)
            if len(spans) != len(weights) and not all(weights):
                raise TemplateError(
                    f"{template.origin}: {len(spans)} generation blocks for {len(weights)} assistant "
                    f'messages: "weight" '
                    "cannot be matched to them; leave it out or split the chat"
                )
        else:
            turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
            cuts = [(len(messages), False), *((n, n == i) for i in turns for n in (i, i + 1))]
            chat = self.render(template, messages, variables, cuts=cuts, protect=protect)
            spans = self._turns(template, chat, turns)
        if len(spans) == len(weights):
            spans = [span for span, weight in zip(spans, weights, strict=True) if weight]
        encoded = self.encode(chat, chat.texts[0])
        return encoded.ids, label_mask(encoded.offsets, [_unmarked_span(chat, span) for span in spans])

    def _turns(self, template: ChatTemplate, chat: Rendering, turns: Sequence[int]) -> list[Span]:
        """The spans, in the marked text, of the assistant's messages at the indices `turns`."""
        whole, *parts = chat.texts
        outside = re.compile(
            f"{chat.marks[0]}[^{chat.marks[1]}]*{chat.marks[1]}|(?P<special>{self._special.pattern})"
        )
        spans = []
        for i, before, after in zip(turns, parts[::2], parts[1::2], strict=True):
            for text, what in ((before, "what comes before it"), (after, "the chat up to it")):
                if not whole.startswith(text):
                    raise TemplateError(_not_a_beginning(template, chat, i, text, what))
            end = len(after)
            for match in outside.finditer(after, len(before)):
                if match["special"] is not None:
                    end = match.end()
            # Without a special token the turn ends where the next begins.
            spans.append((len(before), end if end > len(before) else len(after)))
        return spans

    @cached_property
    def _inner(self) -> RawTokenizer:
        """`plain` for text that does not begin the chat: a SentencePiece-like "first" word gets no space
        before it."""
        changed = _replace(self._data, "prepend_scheme", "first", "never")
        if changed == self._data:
            return self._plain
        inner = RawTokenizer.from_str(json.dumps(changed))
        inner.encode_special_tokens = True
        return inner

    def _protect(self, value: Any, marks: str) -> tuple[Any, bool]:
        """`value` with special-token text in all its strings marked, and whether there was any.

        The beginning of a special token at the end of a string counts: the next string may hold the rest.
        """
        if isinstance(value, str):
            marked = self._exact.sub(lambda match: marks[0] + match.group() + marks[1], value)
            for n in range(min(self._longest - 1, len(value)), 0, -1):
                if value[-n:] in self._beginnings:
                    if not marked.endswith(marks[1]):
                        marked = marked[:-n] + marks[0] + marked[-n:] + marks[1]
                    break
            return marked, marked != value
        if isinstance(value, Mapping):
            pairs = {key: self._protect(item, marks) for key, item in value.items()}
            return {key: item for key, (item, _) in pairs.items()}, any(found for _, found in pairs.values())
        if isinstance(value, (list, tuple)):
            items = [self._protect(item, marks) for item in value]
            return [item for item, _ in items], any(found for _, found in items)
        return value, False


def _check(messages: Sequence[Message]) -> None:
    if isinstance(messages, (str, Mapping)) or not messages:
        raise TemplateError(f"messages: got {messages!r:.60}, wanted a non-empty list of messages")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise TemplateError(f'messages[{i}]: got {message!r:.60}, wanted {{"role": ..., "content": ...}}')


def label_mask(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """For each token, whether it covers a character of a span.

    offsets: characters [start, end) of each token, in order.  spans: disjoint, in order.
    """
    mask = []
    reached = k = 0
    for start, end in offsets:
        # Byte-level offsets may leave out a token's leading space: a token begins where the one before it
        # ended.
        start = min(start, reached)
        while k < len(spans) and spans[k][1] <= start and (spans[k][1] < start or end > start):
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


def _unmarked_span(chat: Rendering, span: Span) -> Span:
    marks = [match.start() for match in re.finditer(f"[{chat.marks}]", chat.texts[0])]
    return span[0] - bisect_left(marks, span[0]), span[1] - bisect_left(marks, span[1])


def _unmarked(text: str, marks: str) -> str:
    return text.translate({ord(mark): None for mark in marks})


def _unused_characters(strings: Sequence[str], count: int) -> str:
    """The first private-use characters that none of the strings contains."""
    used = set().union(*({c for c in text if c >= "\U000f0000"} for text in strings))
    free = (chr(code) for code in range(0xF0000, 0xFFFFE) if chr(code) not in used)
    try:
        return "".join(next(free) for _ in range(count))
    except (
        RuntimeError
    ) as error:  # StopIteration inside the generator: 65,534 different private characters in one chat
        raise TemplateError("messages: they use every private-use character: leave some out") from error


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    if isinstance(value, (list, tuple)):
        return [text for item in value for text in _strings(item)]
    return []


def _replace(value: Any, key: str, old: str, new: str) -> Any:
    """A copy of JSON data in which every member `key` that is `old` is `new`."""
    if isinstance(value, Mapping):
        return {k: new if k == key and v == old else _replace(v, key, old, new) for k, v in value.items()}
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        return [_replace(item, key, old, new) for item in value]
    return value  # numbers, strings, and the long lists of merges


def _not_a_beginning(template: ChatTemplate, chat: Rendering, i: int, text: str, what: str) -> str:
    whole = chat.texts[0]
    at = next(
        (n for n, (a, b) in enumerate(zip(whole, text, strict=False)) if a != b), min(len(whole), len(text))
    )
    got, wanted = (_unmarked(t[at : at + 30], chat.marks) or "the end" for t in (text, whole))
    return (
        f"{template.origin}: it renders messages[{i}] (assistant) differently in the whole chat than {what} "
        f"alone: at "
        f"character {at} {got!r} against {wanted!r}, so its tokens cannot be told: put {{% generation %}} "
        f"around the "
        "assistant's text in the template, or train on chats that end with their only assistant turn"
    )
