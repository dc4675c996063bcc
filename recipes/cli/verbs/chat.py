"""The verb `chat`: a conversation, turn by turn, and the commands that can be typed in it."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..display import Display
from ..flags import add_generation_flags, add_model_flags, add_verb, generation_options
from .text import say_doubt, stream

if TYPE_CHECKING:
    from ...hub.assemble import LoadedModel

HELP = """/system TEXT   begin anew with this system message
/reset         begin anew
/save FILE     write the conversation as a row of messages, as `train` reads it
/exit          end; so does the end of the input (ctrl-D)
Ctrl-C ends an answer, or drops the line that is typed; it does not end the conversation. When the conversation no
longer fits into the model's context, its oldest turns are left out, the system message is kept, and it is said."""
LEAST = 64  # tokens that an answer must have room for before old turns are left out


def register(verbs: Any) -> None:
    """Adds the verb's flags."""
    p = add_verb(verbs, "chat", run_chat)
    add_model_flags(p, required=False)
    add_generation_flags(p)


def run_chat(args: argparse.Namespace, display: Display) -> int:
    """`qlorag chat`."""
    from ...hub.assemble import assemble

    options = generation_options(args)
    loaded = assemble(args.model, adapter_path=args.adapter_path, quantize=args.quantize, dtype=args.dtype)
    say_doubt(loaded, display)
    display.say("/help lists what can be typed besides questions, /exit ends.", style="dim")
    chat = Conversation(loaded, args.system, options, display)
    with _line_editing():
        while (text := _ask(display)) is not None:
            if text == "/exit":
                break
            if text.startswith("/"):
                chat.command(text)
            elif text:
                chat.turn(text)
    display.result({"messages": chat.messages})
    return 0


class Conversation:
    """The messages so far, and what is done with a typed line."""

    def __init__(self, loaded: LoadedModel, system: str | None, options: dict[str, Any], display: Display) -> None:
        self._loaded, self._options, self._display = loaded, options, display
        self.messages: list[Mapping[str, Any]] = []
        self._begin(system)

    def _begin(self, system: str | None) -> None:
        self.messages = [{"role": "system", "content": system}] if system else []

    def command(self, line: str) -> None:
        """Runs a line that begins with a slash."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name == "/reset":
            system = next((m["content"] for m in self.messages if m["role"] == "system"), None)
            self._begin(system)
        elif name == "/system" and rest:
            self._begin(rest)
        elif name == "/save" and rest:
            self._save(Path(rest))
        else:
            if name != "/help":
                self._display.say(f"{line}: not a command, or one that lacks something")
            self._display.say(HELP)

    def _save(self, path: Path) -> None:
        try:
            path.write_text(json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n", encoding="utf-8")
        except OSError as fault:  # the conversation must not be lost to a mistyped name
            self._display.say(f"{path}: {fault.strerror}", style="yellow")
        else:
            self._display.say(f"{path}: {len(self.messages)} messages")

    def turn(self, text: str) -> None:
        """Asks, shows the answer, and keeps both; a question that cannot be asked is not kept."""
        from ....models import ModelError, generate

        self.messages.append({"role": "user", "content": text})
        run = None
        try:
            left_out = self._make_room()
            if left_out:
                self._display.say(f"(the oldest {left_out} messages no longer fit and are left out)", style="dim")
            run = generate(self._loaded.model, self._loaded.tok, self.messages, **self._options)
            stream(run, self._display)
        except KeyboardInterrupt:  # ends the answer, not the conversation
            self._display.piece("\n")
        except ModelError as fault:
            self._display.say(str(fault), style="yellow")
            run = None  # what it may have begun is no answer
        if run is None:
            self.messages.pop()
        else:
            self.messages.append({"role": "assistant", "content": run.text})

    def _make_room(self) -> int:
        """Leaves out the oldest turns until an answer fits. Returns how many messages that were."""
        tok, context = self._loaded.tok, self._loaded.model.config.max_positions
        wanted = min(LEAST, context // 4)
        first = int(bool(self.messages) and self.messages[0]["role"] == "system")
        left_out = 0
        while len(self.messages) - first > 2 and len(tok.chat(self.messages)) + wanted > context:
            del self.messages[first : first + 2]  # a question and its answer
            left_out += 2
        return left_out


@contextlib.contextmanager
def _line_editing() -> Any:
    """Arrow keys and the history of this conversation, where a person types."""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):  # Python may be built without it
            import readline  # noqa: F401 (importing it is what gives `input` both)
    yield


def _ask(display: Display) -> str | None:
    """The next line, without its white space; None at the end of the input."""
    if sys.stdin.isatty() and not display.as_json:
        try:
            return input("> ").strip()
        except EOFError:
            display.piece("\n")
            return None
        except KeyboardInterrupt:  # it may have been meant for an answer that ended a moment ago
            display.piece("\n")
            display.say("(/exit or ctrl-D ends)", style="dim")
            return ""
    display.piece("> ")
    line = sys.stdin.readline()
    return line.strip() if line else None
