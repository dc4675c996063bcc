"""A model folder's chat template: which one is used, and how it is run within limits.

    templates = load_templates("DIR")
    templates.pick(tools=False).render({"messages": [{"role": "user", "content": "hi"}], "bos_token": "<s>"})

Where a folder keeps it, as transformers 5 looks for it: `chat_template.jinja`, else "chat_template" in
`tokenizer_config.json` (a string, or a list of {"name", "template"}); extra ones in
`additional_chat_templates/*.jinja`. Among several, "tool_use" serves a request with tools and "default" every
other. There is no built-in template to fall back on: a guessed format gives plausible, worse answers
without an error.

A template is run by a child process under limits of processor time, memory and output (`template_worker` says
why and how). It starts with the first render (about 0.1 s), serves all later ones (some 0.2 ms each), is
replaced after it died, and ends with its owner.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from ..errors import TemplateError

CPU_SECONDS = 5.0
MAX_CHARS = 1 << 24

_WORKER = Path(__file__).with_name("template_worker.py")
# -I: neither the working directory nor PYTHON* variables decide what the child imports; it gets its parent's
# sys.path.
_BOOT = "import runpy, sys; worker, *sys.path = sys.argv[1:]; runpy.run_path(worker, run_name='__main__')"


class ChatTemplate:
    """One template.

    source: its text.  origin: where it was found, for messages.
    cpu_seconds, max_chars: limits of one render call.
    now: what `strftime_now` tells the template; None: the time of the call.
    """

    def __init__(
        self,
        source: str,
        *,
        origin: str,
        cpu_seconds: float = CPU_SECONDS,
        max_chars: int = MAX_CHARS,
        now: datetime | None = None,
    ) -> None:
        self.source = source
        self.origin = origin
        self.cpu_seconds = cpu_seconds
        self.max_chars = max_chars
        self.now = now
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def render(self, variables: Mapping[str, Any], *, add_generation_prompt: bool = False) -> str:
        """The text of `variables["messages"]`; the other variables are passed to the template as they are."""
        return self.render_cuts(variables, [(len(variables["messages"]), add_generation_prompt)])[0]

    def render_cuts(
        self,
        variables: Mapping[str, Any],
        cuts: Sequence[tuple[int, bool]],
        *,
        generation: tuple[str, str] = ("", ""),
    ) -> list[str]:
        """For each cut (n, add_generation_prompt), the text of the first n messages.

        generation: two strings put around the output of each `{% generation %}` block.
        Raises TemplateError: the template refused the messages, is faulty, or went over a limit.
        """
        request = {
            "template": self.source,
            "variables": dict(variables),
            "cuts": list(cuts),
            "generation": generation,
            "cpu_seconds": self.cpu_seconds,
            "max_chars": self.max_chars,
            "now": None if self.now is None else self.now.isoformat(),
        }
        try:
            line = json.dumps(request).encode("ascii") + b"\n"
        except (TypeError, ValueError, RecursionError) as error:
            raise TemplateError(f"messages: not plain JSON ({error}): use dicts, lists, strings and numbers") from error
        reply = json.loads(self._exchange(line))
        if "error" in reply:
            message = " ".join(reply["error"].split())
            all_messages = reply["cut"] in (-1, max(n for n, _ in cuts))
            where = "" if all_messages else f" (in the first {reply['cut']} messages, rendered for their labels)"
            raise TemplateError(f"{self.origin}: {message}{where}")
        texts: list[str] = reply["texts"]
        return texts

    def _exchange(self, line: bytes) -> bytes:
        with self._lock:
            process = self._running()
            assert process.stdin and process.stdout
            try:
                with contextlib.suppress(BrokenPipeError):  # it died while reading: the empty answer says so
                    process.stdin.write(line)
                    process.stdin.flush()
                answer = process.stdout.readline()
            except BaseException:
                # Also on KeyboardInterrupt: an answer left in the pipe would be taken for the next request's.
                _stop(process, self._owner)
                raise
            if answer:
                return answer
            status = process.wait()
            _stop(process, self._owner)
        if status == -signal.SIGPROF:
            raise TemplateError(
                f"{self.origin}: it ran for more than {self.cpu_seconds:g} s of processor time: shorten the "
                "messages or fix the template"
            )
        raise TemplateError(f"{self.origin}: the process that renders it ended with status {status}: try again")

    def _running(self) -> subprocess.Popen[bytes]:
        process = self._process
        # After os.fork the pipes are shared with the parent: a forked process starts a child of its own.
        if process is None or process.poll() is not None or self._owner != os.getpid():
            command = [sys.executable, "-I", "-c", _BOOT, str(_WORKER), *sys.path]
            try:
                process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
                )
            except OSError as error:
                raise TemplateError(f"{self.origin}: no process could be started to render it: {error}") from error
            self._process, self._owner = process, os.getpid()
            weakref.finalize(self, _stop, process, self._owner)
        return process


def _stop(process: subprocess.Popen[bytes], owner: int) -> None:
    if owner != os.getpid():
        return  # a copy inherited through fork: the child is not ours to end
    process.kill()
    for pipe in (process.stdin, process.stdout):
        if pipe:
            with contextlib.suppress(OSError):  # flushing what a dead child did not read
                pipe.close()
    process.wait()


class ChatTemplates:
    """The templates of one folder by name."""

    def __init__(self, templates: Mapping[str, ChatTemplate], *, folder: str = "") -> None:
        self._templates = dict(templates)
        self._folder = folder

    def __bool__(self) -> bool:
        return bool(self._templates)

    @property
    def prints_the_date(self) -> bool:
        """Whether one of them asks what time it is (Llama 3.1 and 3.2 print today's date)."""
        return any("strftime_now" in template.source for template in self._templates.values())

    def at(self, now: datetime) -> ChatTemplates:
        """The same templates, which are told that it is `now`."""
        fixed = {
            name: ChatTemplate(t.source, origin=t.origin, cpu_seconds=t.cpu_seconds, max_chars=t.max_chars, now=now)
            for name, t in self._templates.items()
        }
        return ChatTemplates(fixed, folder=self._folder)

    def pick(self, *, tools: bool) -> ChatTemplate:
        """The one named "tool_use" when tools are given and it exists, else "default".

        Raises TemplateError: there is none.
        """
        for name in ("tool_use", "default") if tools else ("default",):
            if name in self._templates:
                return self._templates[name]
        if self._templates:
            raise TemplateError(
                f"{self._folder}: its chat templates are named {', '.join(sorted(self._templates))} and "
                'none is "default": name one of them so'
            )
        raise TemplateError(
            f"{self._folder}: no chat template (chat_template.jinja, or one in tokenizer_config.json): a "
            "base model has none; give plain text, not messages, or add the template it was trained with"
        )


def load_templates(folder: str | Path, config: Mapping[str, Any] | None = None) -> ChatTemplates:
    """Every chat template of a model folder; none is not an error until one is asked for.

    config: the content of tokenizer_config.json.
    Raises TemplateError: a file is not UTF-8 text, or the configuration's entry has another shape.
    """
    folder = Path(folder)
    found: dict[str, ChatTemplate] = {}
    main = folder / "chat_template.jinja"
    if main.is_file():
        found["default"] = ChatTemplate(_read(main), origin=str(main))
    else:
        path = folder / "tokenizer_config.json"
        for name, text in _from_config((config or {}).get("chat_template"), path).items():
            found[name] = ChatTemplate(text, origin=f'{path}: chat_template "{name}"')
    for path in sorted(folder.glob("additional_chat_templates/*.jinja")):
        found[path.stem] = ChatTemplate(_read(path), origin=str(path))
    return ChatTemplates(found, folder=str(folder))


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise TemplateError(f"{path}: byte {error.start} is not UTF-8: save the template as UTF-8 text") from error


def _from_config(entry: Any, path: Path) -> dict[str, str]:
    if entry is None:
        return {}
    if isinstance(entry, str):
        return {"default": entry}
    try:
        named = {item["name"]: item["template"] for item in entry}
    except (TypeError, KeyError):
        named = {"": None}
    if not all(isinstance(part, str) for pair in named.items() for part in pair):
        raise TemplateError(
            f"{path}: chat_template is {type(entry).__name__}, wanted a string or a list of "
            '{"name": ..., "template": ...}'
        )
    return named
