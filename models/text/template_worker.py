"""The program that renders chat templates: a child process of its own, started by `chat_template`, never
imported.

A chat template is a program out of a downloaded file. jinja2's sandbox keeps it from reaching Python's
internals, but not from looping for ever, and one call such as `'a' * 10**10` or `2 ** 10**9` runs inside the
interpreter where no check of ours is reached. The only bound that holds for every template is the kernel's,
and it holds for processes. So templates run here, under two limits:

- processor time: a timer (ITIMER_PROF) armed for each request. Its signal has no handler, so the kernel ends
  this process, whatever it is doing; the parent reads that off the exit status and starts a new one next
  time;
- memory: RLIMIT_AS, so that an allocation fails with MemoryError. (macOS does not enforce it.)

A third one, the length of the rendered text, is counted as the text is produced.

Protocol: one JSON object per line in, one per line out, ASCII. Only JSON crosses, so a template never holds
an object with methods of ours.

    {"template": str, "variables": {...}, "cuts": [[n, add_generation_prompt], ...], "generation": [open,
    close],
     "cpu_seconds": float, "max_chars": int, "now": ISO 8601 or null}

answers {"texts": [str, ...]}, one text per cut: the rendering of the first n messages; or {"error": str,
"cut": int}. The environment is the one that Hugging Face templates are written for (transformers,
`chat_template_utils.py`).
"""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import sys
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MEMORY_BYTES = 1 << 30


class RefusedError(Exception):
    """A message that is shown as it is: from the template's raise_exception, or about a limit."""


class GenerationTag(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}`: the request's two marks around the block's output."""

    tags = {"generation"}  # noqa: RUF012  (the name and kind that jinja2 looks up)
    marks = ("", "")

    def parse(self, parser: Parser) -> nodes.Node:
        """Turn the block into a call of `_wrap` with the block's body as its caller."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_wrap"), [], [], body).set_lineno(line)

    def _wrap(self, caller: Macro) -> str:
        opening, closing = GenerationTag.marks
        return f"{opening}{caller()}{closing}"


class PublicNamespace(Namespace):
    """jinja2's namespace without underscore names, which lead to the interpreter's own attributes."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # jinja2's own signature: `namespace(self=1)` must work
        self, values = args[0], dict(*args[1:], **kwargs)
        for name in values:
            _public(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _public(name)
        Namespace.__setitem__(self, name, value)


def _public(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"namespace attribute {name!r} starts with an underscore")


def _raise_exception(message: object) -> NoReturn:
    raise RefusedError(f"the template says: {message}")


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes <, > and & for HTML; a prompt is not HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Now:
    """The time that templates are told: that of the request, else the clock's."""

    at: datetime | None = None


_now = _Now()


@lru_cache(maxsize=4)
def _compile(source: str) -> jinja2.Template:
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, jinja2.ext.loopcontrols]
    )
    env.filters["tojson"] = _tojson
    env.globals["raise_exception"] = _raise_exception
    env.globals["strftime_now"] = lambda fmt: (_now.at or datetime.now()).strftime(fmt)
    env.globals["dict"] = lambda *args, **kwargs: dict(*args, **kwargs)
    env.globals["namespace"] = PublicNamespace
    return env.from_string(source)


def _render(template: jinja2.Template, variables: dict[str, Any], max_chars: int) -> str:
    pieces, size = [], 0
    for piece in template.generate(**variables):
        size += len(piece)
        if size > max_chars:
            raise RefusedError(
                f"it produced more than {max_chars} characters: shorten the messages or fix the template"
            )
        pieces.append(piece)
    return "".join(pieces)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Render every cut of one request; errors become data."""
    GenerationTag.marks = tuple(request["generation"])
    _now.at = datetime.fromisoformat(request["now"]) if request["now"] else None
    variables = request["variables"]
    texts: list[str] = []
    cut = -1
    try:
        template = _compile(request["template"])
        for cut, add_generation_prompt in request["cuts"]:
            messages = variables["messages"][:cut]
            values = {**variables, "messages": messages, "add_generation_prompt": add_generation_prompt}
            texts.append(_render(template, values, request["max_chars"]))
        return {"texts": texts}
    except RefusedError as error:
        return {"error": str(error), "cut": cut}
    except MemoryError:
        return {"error": f"it needed more than {MEMORY_BYTES >> 20} MiB of memory", "cut": cut}
    except jinja2.TemplateSyntaxError as error:
        return {"error": f"line {error.lineno}: {error.message}", "cut": cut}
    except Exception as error:  # a template can raise anything that Python can: it is reported, never lost
        return {"error": f"{type(error).__name__}: {error}", "cut": cut}


def main() -> None:
    """Answer requests until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C is the parent's to handle
    # Refused where a lower hard limit is already in force or the system has none: the time limit still holds.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    for line in sys.stdin.buffer:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, request["cpu_seconds"])
        reply = answer(request)
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(json.dumps(reply).encode("ascii") + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
