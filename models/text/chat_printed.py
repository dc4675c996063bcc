"""Whether a chat template prints what the messages say.

A template prints what it was written for and drops the rest without a word: SmolLM2's knows neither tools nor tool
calls, and a row with them would teach an empty answer. Qwen3's drops what stands before "<think>". So the chat is
rendered once more with a private-use character in each word of each string that a message says; the field whose
characters do not come out again is refused by name. Nothing of that rendering is encoded. Tags ("<think>") stay as
they are and are not counted, since templates look for them and put them elsewhere.

What counts as said: content, reasoning, who speaks ("name"), the name and the arguments of tool calls, the names of
tools. Ids and the name of a tool's answer are bookkeeping, which many templates leave out.

The assistant's fields have to come out of the chat that ends with them, the others of what is rendered for the next
answer: later on a template may drop them (Qwen3 drops earlier reasoning), and then each turn is an example of its own.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from ..errors import TemplateError
from .chat import ChatEncoder, Message, strings_in, unused_characters
from .chat_template import ChatTemplate
from .chat_turns import REASONING_KEYS


def check_printed(
    encoder: ChatEncoder,
    template: ChatTemplate,
    messages: Sequence[Message],
    variables: Mapping[str, Any],
    *,
    rebuilt: Collection[int] = (),
) -> None:
    """Raise TemplateError if the template drops something that a message says.

    rebuilt: the assistant turns (counted among themselves) whose text was put together without the template.
    """
    fields = _Fields(strings_in([list(messages), dict(variables), template.source]))
    marked = [fields.mark_message(i, message) for i, message in enumerate(messages)]
    tools = variables.get("tools")
    marked_tools = [fields.mark_tool(i, tool) for i, tool in enumerate(tools)] if tools else None
    at = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    # Few templates render no messages: what is said before an assistant that speaks first is looked for in its turn.
    cuts = [cut for i in at for cut in ((i or 1, i > 0), (i + 1, False))] or [(len(messages), False)]
    try:
        # Its own marks around special-token text are not needed: what this renders is only looked through.
        texts = encoder.render(template, marked, {**variables, "tools": marked_tools}, cuts=cuts, protect=False).texts
    except TemplateError:
        return  # it does not take the characters (a check of an argument's form, say); the chat itself rendered
    done = 0
    for turn, i in enumerate(at):
        before, after = texts[2 * turn], texts[2 * turn + 1]
        said = fields.of(range(done, i)) if turn else fields.of([-1, *range(done, i)])
        lost = [field for field in said if not field.is_in(before)]
        if turn not in rebuilt:
            lost += [field for field in fields.of([i]) if not field.is_in(after)]
        if lost:
            names = ", ".join(dict.fromkeys(field.name for field in lost))
            raise TemplateError(
                f"{template.origin}: it does not print {names}, which would be lost without a word: leave that out, or "
                "use a model whose template prints it"
            )
        done = i + 1


def check_read(template: ChatTemplate, variables: Mapping[str, Any]) -> None:
    """Raise TemplateError if a variable holds something to print and the template never mentions its name."""
    for name, value in variables.items():
        if value and isinstance(value, (str, list, dict)) and not re.search(rf"\b{re.escape(name)}\b", template.source):
            raise TemplateError(
                f"{template.origin}: it does not read {name}, which would be lost without a word: leave that out, or "
                "use a model whose template prints it"
            )


def printable_arguments(
    encoder: ChatEncoder, template: ChatTemplate, messages: Sequence[Message], variables: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The messages with tool calls' arguments as the template prints them: as the strings they are, or as objects.

    OpenAI's rows hold arguments as a string of JSON. Qwen's template prints such a string as it stands; Llama 3.1's
    would print it as JSON once more, quoted and escaped, and is given the object instead.
    """
    given = [dict(message) for message in messages]
    calls = [call for message in given for call in _functions(message) if isinstance(call.get("arguments"), str)]
    if not calls:
        return given
    objects = [_with_objects(message) for message in given]
    for candidate in (given, objects):
        try:
            text = encoder.render(template, candidate, variables, cuts=[(len(given), False)], protect=False).texts[0]
        except TemplateError:
            continue  # it wants the other, or refuses both and will say why
        if candidate is objects or all(call["arguments"] in text for call in calls):
            return candidate
    return given


def _with_objects(message: dict[str, Any]) -> dict[str, Any]:
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        inner = call.get("function", call)
        if isinstance(inner, Mapping) and isinstance(inner.get("arguments"), str):
            with contextlib.suppress(ValueError, RecursionError):  # not JSON: it stays the string it is
                inner = {**inner, "arguments": json.loads(inner["arguments"])}
            call = {**call, "function": inner} if "function" in call else inner
        calls.append(call)
    return {**message, "tool_calls": calls}


def _functions(message: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for call in message.get("tool_calls") or ():
        inner = call.get("function", call) if isinstance(call, Mapping) else None
        if isinstance(inner, Mapping):
            yield inner


_WORD = re.compile(r"(?P<tag></?\w+>)|(?:(?!</?\w+>)\S)+")


class _Field:
    """One string that a message says, and the character that marks it."""

    def __init__(self, name: str, mark: str) -> None:
        self.name, self.mark, self.count = name, mark, 0

    def marked(self, text: str) -> str:
        """`text` with the mark before the last character of each word."""

        def mark(match: re.Match[str]) -> str:
            word = match[0]
            if match["tag"]:
                return word
            self.count += 1
            return word[:-1] + self.mark + word[-1]

        return _WORD.sub(mark, text)

    def is_in(self, text: str) -> bool:
        """Whether every mark came out, written as it is or escaped as JSON."""
        return text.count(self.mark) + text.count(json.dumps(self.mark)[1:-1]) >= self.count


class _Fields:
    """Marks the fields of messages and tools. Tools belong to the message -1."""

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = strings
        self._free: list[str] = []
        self._fields: dict[int, list[_Field]] = {}

    def of(self, indices: Collection[int]) -> list[_Field]:
        return [field for i in indices for field in self._fields.get(i, ())]

    def mark_message(self, i: int, message: Message) -> dict[str, Any]:
        changed = dict(message)
        speaker = () if message["role"] == "tool" else ("name",)
        for key in ("content", *REASONING_KEYS, *speaker):
            if isinstance(message.get(key), str):
                changed[key] = self._new(i, f"messages[{i}].{key}").marked(message[key])
        if message.get("tool_calls"):
            field = self._new(i, f"messages[{i}].tool_calls")
            changed["tool_calls"] = [self._mark_call(field, call) for call in message["tool_calls"]]
        return changed

    def mark_tool(self, i: int, tool: Mapping[str, Any]) -> dict[str, Any]:
        inner = tool.get("function", tool)
        if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
            return dict(tool)
        inner = {**inner, "name": self._new(-1, f"tools[{i}]").marked(inner["name"])}
        return {**tool, "function": inner} if "function" in tool else inner

    def _mark_call(self, field: _Field, call: Any) -> Any:
        inner = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(inner, Mapping):
            return call
        marked = dict(inner)
        for key in ("name", "arguments"):
            if key in inner:
                marked[key] = _map_strings(inner[key], field.marked)
        return {**call, "function": marked} if "function" in call else marked

    def _new(self, i: int, name: str) -> _Field:
        if not self._free:
            used = [field.mark for fields in self._fields.values() for field in fields]
            self._free = list(unused_characters([*self._strings, *used], 64))
        field = _Field(name, self._free.pop(0))
        self._fields.setdefault(i, []).append(field)
        return field


def _map_strings(value: Any, change: Any) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _map_strings(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_map_strings(item, change) for item in value]
    return value
