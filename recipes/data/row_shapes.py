"""The shapes of a training row: from a line's JSON object to the fields of `rows.Row`.

Each function takes a value and where it stands in the row ("messages[2].content"), and raises `Fault` with
what was found there and what is wanted. `rows` adds file and line.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal, NoReturn

Kind = Literal["chat", "completion", "text"]

# Names of speakers in the accepted shapes -> roles of chat templates.
ROLES = {
    **{role: role for role in ("system", "developer", "user", "assistant", "tool")},
    "human": "user",
    "chatbot": "assistant",
    "gpt": "assistant",
}
SHAPES = '{"messages": [...]}, {"prompt": ..., "completion": ...} or {"text": ...}'


class Fault(Exception):
    """What is wrong with a row, and what to do."""


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """json.loads' object_pairs_hook: an object whose keys differ."""
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise Fault(f'key "{key}" stands twice in one object: keep one')
        values[key] = value
    return values


def refuse_constant(name: str) -> NoReturn:
    """json.loads' parse_constant: NaN and the infinities."""
    raise Fault(f"{name} is not JSON: write a number, null or a string")


def fields_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `Row` for a row of any accepted shape."""
    shapes = [key for key in ("messages", "conversations", "text") if key in row]
    if "prompt" in row or "completion" in row:
        shapes.append("prompt/completion")
    if not shapes:
        raise Fault(f"its keys are {', '.join(map(repr, row)) or 'none'}, wanted {SHAPES}")
    if len(shapes) > 1:
        raise Fault(f"it has {' and '.join(shapes)}, which are different shapes of a row: keep one")
    if shapes[0] == "text":
        return {"kind": "text", "text": _string(row["text"], "text", empty=False)}
    if shapes[0] == "prompt/completion":
        for key in ("prompt", "completion"):
            if key not in row:
                raise Fault(f'"{key}" is missing, its keys are {", ".join(map(repr, row))}: add it')
        if isinstance(row["prompt"], str):
            texts = [_string(row[key], key) for key in ("prompt", "completion")]
            messages = tuple({"role": r, "content": t} for r, t in zip(("user", "assistant"), texts, strict=True))
            return {"kind": "completion", "messages": messages}
        chat = (*_messages(row["prompt"], "prompt"), *_messages(row["completion"], "completion"))
    else:
        chat = _messages(row[shapes[0]], shapes[0])
    tools = row.get("tools")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise Fault(f"tools is {kind_of(tools)}, wanted a list of objects")
    return {"kind": "chat", "messages": chat, "tools": tools or None}


def _messages(value: Any, key: str) -> tuple[dict[str, Any], ...]:
    if not isinstance(value, list) or not value:
        raise Fault(f"{key} is {kind_of(value)}, wanted a list of at least one message")
    return tuple(_message(item, f"{key}[{i}]") for i, item in enumerate(value))


def _message(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Fault(f'{where} is {kind_of(value)}, wanted {{"role": ..., "content": ...}}')
    speaker, content = _one_of(value, ("role", "from"), where), _one_of(value, ("content", "value"), where)
    role = ROLES.get(value[speaker]) if isinstance(value[speaker], str) else None
    if role is None:
        raise Fault(f"{where}.{speaker} is {value[speaker]!r:.60}, wanted one of {', '.join(ROLES)}")
    others = {k: v for k, v in value.items() if k not in (speaker, content) and v is not None}
    message = {"role": role, "content": value.get(content), **others}
    if others.get("tool_calls"):
        message["tool_calls"] = _tool_calls(others["tool_calls"], f"{where}.tool_calls")
        if message["content"] is None:  # OpenAI writes null beside a call; templates want a string
            message["content"] = ""
    if isinstance(message["content"], list):
        message["content"] = "".join(_part(part, f"{where}.{content}") for part in message["content"])
    _string(message["content"], f"{where}.{content}")
    if "weight" in message and message["weight"] not in (0, 1):
        raise Fault(f"{where}.weight is {message['weight']!r:.60}, wanted 0 (do not learn this message) or 1")
    return message


def _one_of(message: Mapping[str, Any], keys: tuple[str, str], where: str) -> str:
    present = [key for key in keys if key in message]
    if len(present) == 1:
        return present[0]
    if not present and keys[0] == "content" and message.get("tool_calls"):
        return "content"
    got = "both" if present else f"neither, but {', '.join(map(repr, message)) or 'no keys'}"
    raise Fault(f"{where} has {got} of {keys[0]!r} and {keys[1]!r}: give one of them")


def _part(part: Any, where: str) -> str:
    if not isinstance(part, dict) or part.get("type") != "text":
        kind = part.get("type") if isinstance(part, dict) else kind_of(part)
        raise Fault(f'{where} has a part of type {kind!r:.60}, wanted text: {{"type": "text", "text": ...}}')
    return _string(part.get("text"), f"{where}.text")


def _tool_calls(value: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(call, dict) for call in value):
        raise Fault(f"{where} is {kind_of(value)}, wanted a list of objects")
    calls = []
    for i, call in enumerate(value):
        function = call.get("function")
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            try:
                arguments = json.loads(
                    function["arguments"], object_pairs_hook=unique_keys, parse_constant=refuse_constant
                )
            except (ValueError, RecursionError) as error:
                raise Fault(f"{where}[{i}].function.arguments is not JSON ({error}): give a JSON object") from error
            call = {**call, "function": {**function, "arguments": arguments}}
        calls.append(call)
    return calls


def _string(value: Any, where: str, *, empty: bool = True) -> str:
    if not isinstance(value, str):
        raise Fault(f"{where} is {kind_of(value)}, wanted a string")
    if not value and not empty:
        raise Fault(f"{where} is empty: remove the row")
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise Fault(rf"{where} holds half of a surrogate pair (\ud800 ... \udfff), which is not Unicode text: mend it")
    return value


def kind_of(value: Any) -> str:
    """A JSON value's type in words."""
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    if value == []:
        return "an empty list"
    return kinds.get(type(value), "a number")
