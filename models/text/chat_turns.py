r"""Where each assistant turn begins and ends in what a chat template renders.

For the assistant's message i the template is asked twice:

    prompt = render(messages[:i], add_generation_prompt=True)     what a model is given before it answers
    done   = render(messages[:i + 1])                             the chat with the answer

*Begin.* As a rule `done` goes on from `prompt`, and the turn begins where the prompt ends. Where it does not:
- the generation prompt holds more than the header (DeepSeek-R1's ends with "<think>"): the turn begins at the last
  special token that both have;
- the history itself differs (a template that looks at the last message): the turn is what follows the header in
  `done`, put after `prompt`, which is what a model will see. A template without a generation prompt (Mistral's, whose
  system message stands in the last question alone) has no header: then it follows what is left of the history once
  the part that `done` lacks is taken out of `prompt`.
A chat that the assistant opens has no prompt: its first turn follows the first header of `done`, as a chat with a user
shows that header. A template with `{% generation %}` blocks says itself where the turns are, and its word is taken.

*End.* Just after the token that ends the turn, so that it is labelled and a newline after it is not. It is the last
special token of `done` if only white space follows it; of several in a row ("<|end|>\n<|endoftext|>") the first at
which generation stops. A turn without one is *not closed* (Vicuna, Alpaca): its caller writes an end token.

*Reasoning.* Where the generation prompt opens "<think>" and the template then leaves the reasoning out of its own
answer (DeepSeek-R1), the turn is rebuilt as it was generated: reasoning, "</think>", answer, end token.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import TemplateError
from .chat import ChatEncoder, Message, Rendering, Span, unmarked
from .chat_template import ChatTemplate

GENERATION_TAG = re.compile(r"\{%[-+]?\s*generation\b")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True)
class Turn:
    """One assistant turn in a text of its own, marks included (see `chat`).

    text:  the chat up to the turn, and the turn.  start, end: the turn's characters in it.
    end_id: the special token that closes it, or None.
    rebuilt: whether its reasoning had to be put back.
    unopened: what the generation prompt goes on with after the header and this turn does not ("<think>"), or "".
    """

    text: str
    start: int
    end: int
    end_id: int | None
    rebuilt: bool = False
    unopened: str = ""

    @property
    def closed(self) -> bool:
        """Whether the template writes an end token."""
        return self.end_id is not None


def find_turns(
    encoder: ChatEncoder,
    template: ChatTemplate,
    messages: Sequence[Message],
    variables: Mapping[str, Any],
    *,
    protect: bool,
    end_ids: frozenset[int],
) -> tuple[Rendering, list[Turn]]:
    """The rendering of the whole chat (its first text) and every assistant turn, in order.

    Raises TemplateError: the template refuses the messages, or a turn cannot be told apart.
    """
    at = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    blocks = bool(GENERATION_TAG.search(template.source))
    cuts = [(len(messages), False)]
    # Most templates cannot render no messages at all: for a chat that the assistant opens, nothing is asked of them.
    cuts += [cut for i in at for cut in ((i or 1, False), (i or 1, i > 0), (i + 1, False))]
    chat = encoder.render(template, messages, variables, cuts=cuts, protect=protect, generation=blocks)
    finder = _Finder(encoder, template, chat, end_ids)
    if blocks:
        spans = _blocks(chat, chat.texts[0])
        if len(spans) != len(at):
            raise TemplateError(
                f"{template.origin}: {len(spans)} generation blocks for {len(at)} assistant messages: put one around "
                "what the assistant writes in each of its turns"
            )
        return chat, [finder.of_block(span, done) for span, done in zip(spans, chat.texts[3::3], strict=True)]
    parts = zip(at, chat.texts[1::3], chat.texts[2::3], chat.texts[3::3], strict=True)
    return chat, [
        finder.of_message(messages[i], i, *texts) if i else finder.of_opening(texts[-1], variables)
        for i, *texts in parts
    ]


class _Finder:
    def __init__(self, encoder: ChatEncoder, template: ChatTemplate, chat: Rendering, end_ids: frozenset[int]) -> None:
        self.encoder, self.template, self.chat, self.end_ids = encoder, template, chat, end_ids
        protected = f"{chat.marks[0]}[^{chat.marks[1]}]*{chat.marks[1]}"
        self._token = re.compile(f"{protected}|(?P<special>{encoder.special.pattern})")

    def of_message(self, message: Message, i: int, bare: str, prompt: str, done: str) -> Turn:
        """The turn of messages[i]. bare: the messages before it.  prompt, done: see the file's head."""
        common = _common(prompt, done)
        if common == len(prompt):
            return self._closed(done, common)
        begins = self._header(bare, prompt)
        if common >= begins:
            start = self._boundary(prompt, common)
            opened = unmarked(prompt[start:], self.chat.marks).strip()
            if opened == "<think>" and (rebuilt := self._with_reasoning(message, prompt, done, start)):
                return rebuilt
            return replace(self._closed(done, start), unopened=opened)
        header = prompt[begins:]
        found = done.rfind(header) + len(header) if header in done else -1
        if not header:
            found = self._past_insertion(prompt, done, common)
        if found < 0:
            raise TemplateError(
                f"{self.template.origin}: messages[{i}] (assistant) cannot be told apart, because what comes before "
                f"it renders differently with and without it, at {unmarked(done[common:][:30], self.chat.marks)!r} "
                f"against {unmarked(prompt[common:][:30], self.chat.marks)!r}: put {{% generation %}} around the "
                "assistant's text in the template"
            )
        return self._closed(prompt + done[found:], len(prompt))

    def of_opening(self, done: str, variables: Mapping[str, Any]) -> Turn:
        """The turn of an assistant that speaks first. done: the chat that ends with it."""
        question = [{"role": "user", "content": "?"}]
        cuts = [(1, False), (1, True)]
        bare, prompt = self.encoder.render(self.template, question, variables, cuts=cuts, protect=False).texts
        header = prompt[self._header(bare, prompt) :]
        if header not in done:  # it opens the reasoning, too
            header = header[: max((match.end() for match in self._specials(header, 0, len(header))), default=0)]
        if not header or header not in done:
            raise TemplateError(
                f"{self.template.origin}: messages[0] (assistant) cannot be told from what the template writes around "
                "it: begin the chat with a user's message, or with a system message"
            )
        return self._closed(done, done.index(header) + len(header))

    def of_block(self, span: Span, done: str) -> Turn:
        """The turn that a generation block of the whole chat holds. done: the chat that ends with it."""
        text = self.chat.texts[0]
        start, stop = span
        inside = [m for m in self._specials(text, start, stop) if not text[m.end() : stop].strip(self._blank)]
        if inside:
            return Turn(text, start, stop, self.encoder.special_id(inside[-1].group()))
        alone = _blocks(self.chat, done)[-1][1]
        space = len(done) - len(done[alone + 1 :].lstrip(self._blank))  # past the closing mark
        after = self._token.match(done, space)
        if after and after["special"] is not None and text.startswith(done[alone : after.end()], stop):
            return Turn(text, start, stop + after.end() - alone, self.encoder.special_id(after.group()))
        return Turn(text, start, stop, None)

    def _closed(self, text: str, start: int) -> Turn:
        """The turn from `start` to its end token, or to its last character that is no white space."""
        end = len(text.rstrip(self._blank))
        run: list[re.Match[str]] = []
        for match in reversed(list(self._specials(text, start, len(text)))):
            if match.end() != end:
                break
            run.insert(0, match)
            end = len(text[: match.start()].rstrip(self._blank))
        if not run:
            return Turn(text, start, max(start, end), None)
        stops = [match for match in run if self.encoder.special_id(match.group()) in self.end_ids]
        last = (stops or run[-1:])[0]
        return Turn(text, start, last.end(), self.encoder.special_id(last.group()))

    def _with_reasoning(self, message: Message, prompt: str, done: str, start: int) -> Turn | None:
        """The turn with the reasoning that the template left out; None if the message has none or it was printed."""
        content = str(message.get("content") or "")
        named = next((str(message[key]) for key in REASONING_KEYS if message.get(key)), None)
        reasoning, closing, answer = content.removeprefix("<think>").partition("</think>")
        if named is not None:
            reasoning, answer = named, content
        elif not closing:
            return None
        plain = self._closed(done, start)
        token = self._end_text(plain)
        if token is None or reasoning.strip() in unmarked(done[start : plain.end], self.chat.marks):
            return None
        written = f"{reasoning.strip()}\n</think>\n\n{answer.strip()}"
        written, _ = self.encoder.protect(written, self.chat.marks) if self.chat.protected else (written, False)
        text = prompt + written + token
        return Turn(text, len(prompt), len(text), plain.end_id, rebuilt=True)

    def _end_text(self, turn: Turn) -> str | None:
        specials = list(self._specials(turn.text, turn.start, turn.end))
        return specials[-1].group() if turn.closed and specials else None

    def _past_insertion(self, prompt: str, done: str, common: int) -> int:
        """Where the turn begins in `done` if it is `prompt` without one part of it, and the turn; -1 if it is not.

        common: how many characters both begin with. What follows the part has to hold a special token: a few
        characters may be alike by chance.
        """
        last = max((match.start() for match in self._specials(prompt, common, len(prompt))), default=common)
        begins = (begin for begin in range(common + 1, last + 1) if done.startswith(prompt[begin:], common))
        begin = next(begins, None)
        return -1 if begin is None else common + len(prompt) - begin

    def _header(self, bare: str, prompt: str) -> int:
        """Where the generation prompt begins in `prompt`: what it adds to `bare`, the same messages without it."""
        common = _common(bare, prompt)
        inside = [m.start() for m in self._specials(prompt, 0, len(prompt)) if m.start() < common < m.end()]
        return inside[0] if inside else common

    def _boundary(self, prompt: str, common: int) -> int:
        """`common`, moved back out of a word or a token that begins alike in two texts."""
        ends = [match.end() for match in self._specials(prompt, 0, common) if match.end() <= common]
        spaces = [match.end() for match in re.finditer(r"\s", prompt[:common])]
        return max(ends[-1:] + spaces[-1:], default=common)

    def _specials(self, text: str, start: int, stop: int) -> list[re.Match[str]]:
        found = self._token.finditer(text, start, stop)
        return [match for match in found if match["special"] is not None]

    @property
    def _blank(self) -> str:
        return " \t\r\n" + self.chat.marks[2:]


def _common(a: str, b: str) -> int:
    """How many characters the two begin with alike."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n
    low, high = 0, n
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[:middle] == b[:middle] else (low, middle - 1)
    return low


def _blocks(chat: Rendering, text: str) -> list[Span]:
    """Spans between generation marks in the marked text, nested ones joined."""
    spans, depth, start = [], 0, 0
    for match in re.finditer(f"[{chat.marks[2:]}]", text):
        if match.group() == chat.marks[2]:
            start = match.end() if depth == 0 else start
            depth += 1
        else:
            depth -= 1
            if depth == 0:
                spans.append((start, match.start()))
    return spans
