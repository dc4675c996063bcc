"""The shapes of a training row: from a line's JSON object to the fields of `rows.Row`.

A shape is a closed set of keys. A key that is none of them may change what the row means ("label": false says that a
completion is bad), so it is refused by name. What describes a row and changes nothing (HARMLESS), what is empty (null,
[], {}) and what the caller lists in `ignore` passes.

Each function takes a value and where it stands in the row ("messages[2].content"), and raises `Fault` with
what was found there and what is wanted. `rows` adds file and line.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from typing import Any, Literal, NoReturn

from ...models.text.unicode import lone_surrogate

Kind = Literal["chat", "completion", "text"]

# Names of speakers in the accepted shapes -> roles of chat templates.
ROLES = {
    **{role: role for role in ("system", "developer", "user", "assistant", "tool")},
    "human": "user",
    "chatbot": "assistant",
    "gpt": "assistant",
}
SHAPES = '{"messages": [...]}, {"prompt": ..., "completion": ...} or {"text": ...}'
KEYS = {
    "messages": ("messages", "tools", "system", "chat_template_kwargs"),
    "conversations": ("conversations", "tools", "system", "chat_template_kwargs"),
    "prompt/completion": ("prompt", "completion", "tools", "system", "chat_template_kwargs"),
    "text": ("text",),
}
# Where a row comes from and how it is counted: true of any meaning of it.
HARMLESS = frozenset((
    "id", "_id", "uid", "uuid", "guid", "row_id", "idx", "index", "conversation_id", "turn_id", "hash",
    "source", "dataset", "subset", "split", "url", "license", "author", "model", "title", "category", "topic", "tags",
    "language", "lang", "difficulty", "created", "created_at", "timestamp", "metadata", "meta", "info",
    "num_turns", "num_tokens", "token_count", "length", "parallel_tool_calls",
))  # fmt: skip
MESSAGE_KEYS = (
    "role", "from", "content", "value", "tool_calls", "tool_call_id", "name", "reasoning_content", "reasoning",
    "thinking", "weight", "train",
)  # fmt: skip
CALL_KEYS = ("id", "type", "index", "function", "name", "arguments")
FUNCTION_KEYS = ("name", "arguments")
# Template variables that say something else than the row does, and what says it.
RESERVED = {
    "messages": "the row's messages are its chat",
    "tools": "write them as the key tools, beside the messages",
    "self": "no template reads it",
    "parse_special": "special tokens written in a message stay text",
    "add_generation_prompt": "a training row is a finished chat",
    "continue_final_message": "a training row is a finished chat",
}
# Of an unknown key, what it means where it is known: what a user should do about it.
MEANINGS = {
    "label": "it says whether an answer is good (KTO) or which class a text has, and this objective learns neither",
    "chosen": "it belongs to a preference row; to learn it alone, write it as completion",
    "rejected": "it is the worse answer of a preference row, which this objective does not learn",
    "instruction": "it belongs to an Alpaca or Dolly row: write it, with its input or context, as prompt",
    "function_call": "it is OpenAI's old form: write tool_calls",
    "functions": "it is OpenAI's old form: write tools",
    "refusal": "it is an answer beside the content: write it as content",
    "preferred_output": "it belongs to a preference row",
    "images": "images are not read",
}
# Of speakers of other formats, which role says it here.
SPEAKERS = {
    "function_call": 'LLaMA-Factory\'s: write role "assistant" with tool_calls',
    "observation": 'LLaMA-Factory\'s: write "tool"',
    "function": 'OpenAI\'s old form: write "tool"',
    "model": 'Gemini\'s: write "assistant"',
    "bot": 'write "assistant"',
    "prompter": 'OpenAssistant\'s: write "user"',
}


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


def finite_number(text: str) -> float:
    """json.loads' parse_float: 1e999 would be read as infinity, and written as something that is not JSON."""
    number = float(text)
    if math.isinf(number):
        raise Fault(f"{text:.40} is larger than any float64: write a smaller number, or a string")
    return number


def fields_of(row: Mapping[str, Any], *, ignore: Collection[str] = ()) -> dict[str, Any]:
    """The fields of `Row` for a row of any accepted shape.

    ignore: keys that are left out, in the row and in its messages.
    """
    row = {key: value for key, value in row.items() if key not in ignore}
    shapes: list[str] = [key for key in ("messages", "conversations", "text") if key in row]
    if "prompt" in row or "completion" in row:
        shapes.append("prompt/completion")
    if not shapes:
        raise Fault(
            f"its keys are {', '.join(map(repr, row)) or 'none'}, wanted {SHAPES}: "
            + (_meanings(row) or "convert the rows; prompt is what is asked, completion is what is to be learned")
        )
    if len(shapes) > 1:
        other = next(key for key in ("prompt", "completion", "text", "conversations") if key in row)
        raise Fault(
            f"it has {' and '.join(shapes)}, which are different shapes of a row: keep one, as with "
            f"--ignore-keys {other}"
        )
    shape = shapes[0]
    if shape == "prompt/completion":
        for key in ("prompt", "completion"):
            if key not in row:
                keys = ", ".join(map(repr, row))
                raise Fault(f'"{key}" is missing, its keys are {keys}: {_meanings(row) or "add it"}')
    _refuse_unknown(row, KEYS[shape], "", shape)
    if shape == "text":
        return {"kind": "text", "text": _string(row["text"], "text", empty=False)}
    kind = "chat"
    if shape != "prompt/completion":
        chat = _messages(row[shape], shape, ignore)
    elif isinstance(row["prompt"], str):
        kind = "completion"
        texts = [_string(row[key], key) for key in ("prompt", "completion")]
        chat = tuple({"role": r, "content": t} for r, t in zip(("user", "assistant"), texts, strict=True))
    else:
        chat = (*_messages(row["prompt"], "prompt", ignore), *_messages(row["completion"], "completion", ignore))
    variables = row.get("chat_template_kwargs") or {}
    if not isinstance(variables, dict):
        raise Fault(f"chat_template_kwargs is {kind_of(variables)}, wanted an object of template variables")
    for name in RESERVED.keys() & variables:
        raise Fault(f"chat_template_kwargs.{name} is no template variable of a row: {RESERVED[name]}: leave it out")
    return {
        "kind": kind,
        "messages": _with_system(row.get("system"), chat),
        "tools": _tools(row.get("tools")),
        "variables": variables,
    }


def _refuse_unknown(value: Mapping[str, Any], known: Collection[str], where: str, shape: str) -> None:
    for key in value:
        if key in known or key in HARMLESS or _is_empty(value[key]):
            continue
        meaning = f": {MEANINGS[key]}" if key in MEANINGS else ""
        raise Fault(
            f'key "{where}{key}" is not known in {shape}{meaning}; known are {", ".join(known)}: '
            f"mend it, or name it in --ignore-keys"
        )


def _meanings(row: Mapping[str, Any]) -> str:
    """What the keys of a row of no accepted shape say about it."""
    return "; ".join(f'"{key}": {MEANINGS[key]}' for key in row if key in MEANINGS)


def _is_empty(value: Any) -> bool:
    return value is None or value == [] or value == {}


def _with_system(system: Any, chat: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
    """The chat behind the system message that stands beside it."""
    if system is None or system == "":
        return chat
    text = _string(system, "system")
    if any(message["role"] in ("system", "developer") for message in chat):
        raise Fault("it has a system message and the key system: keep one")
    return ({"role": "system", "content": text}, *chat)


def _tools(tools: Any) -> list[dict[str, Any]] | None:
    """The tools of a row: a list of objects, or (LLaMA-Factory) a string that holds one."""
    if isinstance(tools, str) and tools.strip():
        tools = _json(tools, "tools")
    if tools is None or tools == "":
        return None
    if not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise Fault(f"tools is {kind_of(tools)}, wanted a list of objects")
    return tools or None


def _messages(value: Any, key: str, ignore: Collection[str]) -> tuple[dict[str, Any], ...]:
    if not isinstance(value, list) or not value:
        raise Fault(f"{key} is {kind_of(value)}, wanted a list of at least one message")
    return tuple(_message(item, f"{key}[{i}]", ignore) for i, item in enumerate(value))


def _message(value: Any, where: str, ignore: Collection[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Fault(f'{where} is {kind_of(value)}, wanted {{"role": ..., "content": ...}}')
    value = {key: item for key, item in value.items() if key not in ignore}
    _refuse_unknown(value, MESSAGE_KEYS, f"{where}.", "a message")
    speaker, content = _one_of(value, ("role", "from"), where), _one_of(value, ("content", "value"), where)
    role = ROLES.get(value[speaker]) if isinstance(value[speaker], str) else None
    if role is None:
        hint = SPEAKERS.get(str(value[speaker]), "")
        raise Fault(
            f"{where}.{speaker} is {value[speaker]!r:.60}, wanted one of {', '.join(ROLES)}{hint and ': '}{hint}"
        )
    names = [key for key in MESSAGE_KEYS if key not in (speaker, content, "train") and not _is_empty(value.get(key))]
    others = {key: value[key] for key in names}
    message = {"role": role, "content": value.get(content), **others}
    if value.get("train") is not None:
        message["weight"] = _train(value["train"], value.get("weight"), where)
    if others.get("tool_calls"):
        message["tool_calls"] = _tool_calls(others["tool_calls"], f"{where}.tool_calls", ignore)
        if message["content"] is None:  # OpenAI writes null beside a call; templates want a string
            message["content"] = ""
    if isinstance(message["content"], list):
        message["content"] = "".join(_part(part, f"{where}.{content}") for part in message["content"])
    _string(message["content"], f"{where}.{content}")
    for key in ("reasoning_content", "reasoning", "thinking"):
        if key in message:
            _string(message[key], f"{where}.{key}")
    if "weight" in message:
        if message["weight"] not in (0, 1):
            raise Fault(f"{where}.weight is {message['weight']!r:.60}, wanted 0 (do not learn this message) or 1")
        if role != "assistant" and message.pop("weight"):
            raise Fault(f"{where} is to be learned, and its role is {role}: only the assistant's messages are")
    return message


def _train(train: Any, weight: Any, where: str) -> int:
    """Axolotl's "train": true or false, as OpenAI's "weight"."""
    if not isinstance(train, bool):
        raise Fault(f"{where}.train is {kind_of(train)}, wanted true or false")
    if weight is not None and weight != int(train):
        raise Fault(f"{where} has train {str(train).lower()} and weight {weight!r:.20}: keep one")
    return int(train)


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


def _tool_calls(value: Any, where: str, ignore: Collection[str]) -> list[dict[str, Any]]:
    """The calls as they are: arguments written as a string of JSON stay one (`chat_printed` says why)."""
    if not isinstance(value, list) or not all(isinstance(call, dict) for call in value):
        raise Fault(f"{where} is {kind_of(value)}, wanted a list of objects")
    calls = _without(value, ignore)
    for i, call in enumerate(calls):
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Fault(f'{where}[{i}] names no function, wanted {{"function": {{"name": ..., "arguments": ...}}}}')
        _refuse_unknown(call, CALL_KEYS, f"{where}[{i}].", "a tool call")
        if function is not call:
            _refuse_unknown(function, FUNCTION_KEYS, f"{where}[{i}].function.", "a tool call's function")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            arguments = _json(
                _string(arguments, f"{where}[{i}].function.arguments"), f"{where}[{i}].function.arguments"
            )
        if arguments is not None and not isinstance(arguments, dict):
            raise Fault(f"{where}[{i}].function.arguments is {kind_of(arguments)}, wanted an object or its JSON")
    return calls


def _without(calls: list[dict[str, Any]], keys: Collection[str]) -> list[dict[str, Any]]:
    """The calls of a message without `keys`, in each and in its function; arguments are left as they are."""
    return [
        {
            key: {k: v for k, v in item.items() if k not in keys}
            if key == "function" and isinstance(item, dict)
            else item
            for key, item in call.items()
            if key not in keys
        }
        for call in calls
    ]


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(
            text, object_pairs_hook=unique_keys, parse_constant=refuse_constant, parse_float=finite_number
        )
    except (ValueError, RecursionError) as error:
        raise Fault(f"{where} is not JSON ({error}): give a JSON value") from error


def _string(value: Any, where: str, *, empty: bool = True) -> str:
    if not isinstance(value, str):
        raise Fault(f"{where} is {kind_of(value)}, wanted a string")
    if not value and not empty:
        raise Fault(f"{where} is empty: remove the row")
    if fault := lone_surrogate(value):
        raise Fault(f"{where}: {fault}: correct it")
    return value


def kind_of(value: Any) -> str:
    """A JSON value's type in words."""
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    if value == []:
        return "an empty list"
    return kinds.get(type(value), "a number")
