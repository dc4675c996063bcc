"""From messages to token ids.

A chat template turns messages into one text, in which `<|im_end|>` written by the template and `<|im_end|>`
written by a user look the same. Two things are therefore kept apart by marks, private-use characters that
occur nowhere in the messages or the template, and that are taken out again before anything is encoded:

- *protected text*: special-token text inside a message, a tool or a document is put between marks before
  rendering. Afterwards the text is cut at the special tokens outside of marks, each of which becomes its id,
  and the rest is encoded as plain text. Without any such text, the rendering is encoded in one call, as
  transformers does it.
- *generation blocks*: what `{% generation %}` encloses, for `chat_labels`.

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
from itertools import islice
from typing import Any

from tokenizers import Tokenizer as RawTokenizer

from ..errors import TemplateError, TokenizerError
from .chat_template import ChatTemplate
from .unicode import lone_surrogate

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

    raw:   parses special tokens.  plain: treats them as any text.
    """

    def __init__(self, raw: RawTokenizer, plain: RawTokenizer) -> None:
        self._raw = raw
        self._plain = plain
        added = [(i, t) for i, t in raw.get_added_tokens_decoder().items() if t.special and t.content]
        added.sort(key=lambda pair: -len(pair[1].content))  # the longest match wins, as in `tokenizers`
        self._ids: dict[str, int] = {token.content: i for i, token in added}
        self._beginnings = {text[:n] for text in self._ids for n in range(1, len(text))}
        self._longest = max(map(len, self._ids), default=0)
        exact = [re.escape(token.content) for _, token in added]
        self._exact = re.compile("|".join(exact) or "(?!)")
        # Tokens with lstrip or rstrip swallow the spaces beside them.
        spaces = [(r"\s*" * token.lstrip, r"\s*" * token.rstrip) for _, token in added]
        patterns = (left + text + right for text, (left, right) in zip(exact, spaces, strict=True))
        self.special = re.compile("|".join(patterns) or "(?!)")

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
        check_messages(messages)
        inputs: dict[str, Any] = {
            "tools": None,
            "documents": None,
            **variables,
            "messages": [{key: value for key, value in m.items() if value is not None} for m in messages],
        }
        marks = unused_characters(strings_in([inputs, template.source]), 4)
        protected = False
        if protect:
            for name in ("messages", "tools", "documents"):
                inputs[name], found = self.protect(inputs[name], marks)
                protected = protected or found
        pair = (marks[2], marks[3]) if generation else ("", "")
        texts = template.render_cuts(inputs, cuts, generation=pair)
        for text in texts if protected else ():
            if json.dumps(marks[0])[1:-1] in text:
                raise TemplateError(
                    f"{template.origin}: it escapes non-ASCII characters, so special-token text in a message "
                    "cannot be told from its own: remove that text, or pass parse_special=True"
                )
        return Rendering(texts, marks, protected)

    def encode(self, rendering: Rendering, text: str) -> Encoded:
        """Encode one text of a rendering: the template's special tokens parsed, protected text plain.

        Raises TokenizerError: the text holds a lone surrogate.
        """
        opening, closing = rendering.marks[0], rendering.marks[1]
        text = unmarked(text, rendering.marks[2:])
        if fault := lone_surrogate(text):
            raise TokenizerError(f"messages: in the rendered chat, {fault}: decode them properly")
        if not rendering.protected:
            encoding = self._raw.encode(text, add_special_tokens=False)
            return Encoded(encoding.ids, encoding.offsets)
        ids: list[int] = []
        offsets: list[Span] = []
        done, position = 0, 0  # in the marked and the unmarked text
        protected = f"{opening}[^{closing}]*{closing}"
        for match in [*re.finditer(f"{protected}|{self.special.pattern}", text), None]:
            if match and match.group().startswith(opening):
                continue
            plain = unmarked(text[done : match.start() if match else len(text)], rendering.marks)
            if plain:
                encoding = (self._inner if position else self._plain).encode(plain, add_special_tokens=False)
                ids += encoding.ids
                offsets += [(position + start, position + end) for start, end in encoding.offsets]
            position += len(plain)
            if match:
                ids.append(self.special_id(match.group()))
                offsets.append((position, position + len(match.group())))
                position, done = position + len(match.group()), match.end()
        return Encoded(ids, offsets)

    def special_id(self, matched: str) -> int:
        """The id of the special token that `special` matched."""
        token = self._exact.search(matched)  # without the spaces it swallowed
        assert token
        return self._ids[token.group()]

    @cached_property
    def _inner(self) -> RawTokenizer:
        """`plain` for text inside a chat: a scheme that puts a space before the "first" word does not
        apply.
        """
        data = json.loads(self._plain.to_str())
        changed = _replace(data, "prepend_scheme", "first", "never")
        if changed == data:
            return self._plain
        inner = RawTokenizer.from_str(json.dumps(changed))
        inner.encode_special_tokens = True
        return inner

    def protect(self, value: Any, marks: str) -> tuple[Any, bool]:
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
            pairs = {key: self.protect(item, marks) for key, item in value.items()}
            return {key: item for key, (item, _) in pairs.items()}, any(found for _, found in pairs.values())
        if isinstance(value, (list, tuple)):
            items = [self.protect(item, marks) for item in value]
            return [item for item, _ in items], any(found for _, found in items)
        return value, False


def check_messages(messages: Sequence[Message]) -> None:
    """Raise TemplateError unless `messages` is a non-empty list of objects with a role."""
    if isinstance(messages, (str, Mapping)) or not messages:
        raise TemplateError(f"messages: got {messages!r:.60}, wanted a non-empty list of messages")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise TemplateError(f'messages[{i}]: got {message!r:.60}, wanted {{"role": ..., "content": ...}}')


def unmarked(text: str, marks: str) -> str:
    """The text without its marks."""
    return text.translate({ord(mark): None for mark in marks})


def marked_spans(text: str, marks: str, spans: Sequence[Span]) -> list[Span]:
    """Spans of a marked text as spans of the text without its marks."""
    at = [match.start() for match in re.finditer(f"[{marks}]", text)]
    return [(start - bisect_left(at, start), end - bisect_left(at, end)) for start, end in spans]


def unused_characters(strings: Sequence[str], count: int) -> str:
    """The first private-use characters that none of the strings contains."""
    used = {character for text in strings for character in re.findall("[\U000f0000-\U000ffffd]", text)}
    free = (chr(code) for code in range(0xF0000, 0xFFFFE) if chr(code) not in used)
    found = "".join(islice(free, count))
    if len(found) < count:
        raise TemplateError("messages: they use nearly every private-use character: leave some out")
    return found


def strings_in(value: Any) -> list[str]:
    """Every string in JSON data, keys included."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    if isinstance(value, (list, tuple)):
        return [text for item in value for text in strings_in(item)]
    return []


def _replace(value: Any, key: str, old: str, new: str) -> Any:
    """A copy of JSON data in which every member `key` that is `old` is `new`."""
    if isinstance(value, Mapping):
        return {k: new if k == key and v == old else _replace(v, key, old, new) for k, v in value.items()}
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        return [_replace(item, key, old, new) for item in value]
    return value  # numbers, strings, and the long lists of merges
