"""Text to token ids and back, with the tokenizer that the model was trained with.

    tok = load_tokenizer("DIR")
    tok.decode(tok.encode("Hello"))                          # "Hello"
    tok.chat([{"role": "user", "content": "Hello"}])         # ids that end where the answer is to begin

The `tokenizers` library does the splitting and merging. What is added here:

- *Text stays text.* `<|im_start|>` typed by a user is encoded as the characters it is made of, and becomes
  the special token only where the caller says `parse_special=True`. The library has one switch for this on a
  shared object; here there are two tokenizer objects instead, one per setting, so that nothing is switched
  while another thread encodes. Only tokens that tokenizer.json marks "special" are affected. Its other added
  tokens (Qwen's `<tool_call>`) are ordinary vocabulary and always match, as in transformers and llama.cpp.
- *Whole characters.* A byte-level token may end inside a character; `stream()` waits for the rest of it.
- *Every end token.* A chat model may have several; `eos_ids` is the set that generation stops on.
- *Chats*, see `chat` and `chat_labels`.

Text is Unicode: a lone surrogate (half of a UTF-16 pair, which `json.loads` lets through) has no UTF-8 form
and is refused with TokenizerError. NUL and every other character is encoded. Costs are linear in the text's
length.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as RawTokenizer

from ..errors import TemplateError, TokenizerError
from .chat import ChatEncoder, Message
from .chat_labels import EndTokens, LabelledChat, label_chat
from .chat_printed import check_read
from .chat_template import ChatTemplates, load_templates
from .tokenizer_files import (
    add_missing_tokens,
    follow_config,
    parse,
    read_object,
    read_tokenizer,
    special_strings,
    token_ids,
)
from .unicode import lone_surrogate

_REPLACEMENT = "\ufffd"  # what a decoder shows for bytes that are not (yet) a character


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a Hugging Face model folder.

    folder: holds tokenizer.json; tokenizer_config.json, special_tokens_map.json, generation_config.json,
            config.json and chat templates are read where they exist.
    Raises TokenizerError: a file is missing or malformed; the message names file and component.
    Raises TemplateError: a chat template's entry is malformed.
    """
    folder = Path(folder)
    path = folder / "tokenizer.json"
    config = read_object(folder / "tokenizer_config.json")
    raw = parse(follow_config(read_tokenizer(path), config), path)
    add_missing_tokens(raw, folder, config)
    special = special_strings(folder, config)
    eos_ids = token_ids(folder, "eos_token_id")
    return Tokenizer(raw, special=special, eos_ids=eos_ids, templates=load_templates(folder, config), path=path)


class Tokenizer:
    """Encodes and decodes; made by `load_tokenizer`. No call changes it: threads may share it.

    special_tokens: {"eos_token": "<|im_end|>", ...}, the roles that tokenizer_config.json names.
    special_ids:    ids of every token that tokenizer.json marks "special".
    eos_ids:        ids that end a generation: generation_config.json's, else config.json's, else that of
                    `eos_token`; empty when no file names one.
    eos_id:         the one to write at a text's end: that of `eos_token` if it is in eos_ids, else the first;
                    or None.
    vocab_size:     one more than the largest id: what an embedding must have at least.
    """

    def __init__(
        self,
        raw: RawTokenizer,
        *,
        special: Mapping[str, str],
        eos_ids: Sequence[int] = (),
        templates: ChatTemplates,
        path: Path,
    ) -> None:
        self._raw = raw
        self._path = path
        self._templates = templates
        self.special_tokens = dict(special)
        self.special_ids = frozenset(i for i, t in raw.get_added_tokens_decoder().items() if t.special)
        self.vocab_size = 1 + max(raw.get_vocab(with_added_tokens=True).values(), default=-1)
        self._special_id("bos_token")  # refused if tokenizer.json does not have it
        own = self._special_id("eos_token")
        self.eos_ids = frozenset(eos_ids) if eos_ids else frozenset(() if own is None else (own,))
        self.eos_id = own if own in self.eos_ids or not eos_ids else eos_ids[0]

    def _special_id(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        if text is None:
            return None
        found: int | None = self._raw.token_to_id(text)
        if found is None:
            raise TokenizerError(
                f'{self._path.with_name("tokenizer_config.json")}: {name} is "{text}", which tokenizer.json '
                "does not have: the two files belong to different models"
            )
        return found

    @cached_property
    def _plain(self) -> RawTokenizer:
        plain = RawTokenizer.from_str(self._raw.to_str())
        # The library's name for: the text of a special token is encoded like any other text.
        plain.encode_special_tokens = True
        return plain

    @cached_property
    def _chat(self) -> ChatEncoder:
        return ChatEncoder(self._raw, self._plain)

    def encode(self, text: str, *, parse_special: bool = False, add_special: bool = False) -> list[int]:
        """The ids of `text`.

        parse_special: let special tokens written in the text become those tokens.
        add_special:   add what tokenizer.json's post-processor puts around a text ("<s>").
        Raises TokenizerError: the text holds a lone surrogate.
        """
        if fault := lone_surrogate(text):
            raise TokenizerError(f"text: {fault}: decode it properly")
        tokenizer = self._raw if parse_special else self._plain
        ids: list[int] = tokenizer.encode(text, add_special_tokens=add_special).ids
        return ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of `ids`; bytes that form no character come out as U+FFFD.

        An id without a token decodes to nothing: a model may have more rows than its tokenizer has tokens.
        skip_special: leave special tokens out.
        Raises TokenizerError: an id is negative or no 32-bit number.
        """
        ids = list(ids)
        try:
            text: str = self._raw.decode(ids, skip_special_tokens=skip_special)
        except OverflowError as error:
            raise TokenizerError(f"ids: {min(ids)} ... {max(ids)}: wanted token ids from 0 up") from error
        return text

    def stream(self, *, skip_special: bool = True) -> Detokenizer:
        """An incremental `decode`: `push(id)` returns the text that is now certain, `flush()` the rest."""
        return Detokenizer(self, skip_special=skip_special)

    def check_vocab(self, rows: int) -> None:
        """Raise TokenizerError unless every id has a row in an embedding of `rows` rows."""
        largest = max(self.vocab_size - 1, *self.eos_ids, -1)
        if largest >= rows:
            token = self._raw.id_to_token(largest)
            raise TokenizerError(
                f'{self._path}: token {largest} ("{token}") has no row in the model\'s {rows} rows: use the '
                "model's own tokenizer, or a model whose embedding was resized after tokens were added"
            )

    @cached_property
    def turn_ends(self) -> frozenset[int]:
        """The tokens with which its chat template closes an assistant turn; an answer in a chat ends there too.

        They are among eos_ids as a rule, and not in the folders of base models (Qwen's: "<|im_end|>" closes a turn, and
        the files stop at "<|endoftext|>" alone).
        """
        chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            examples = self.chat_examples(chat)
        except TemplateError:  # no template, or one that refuses so short a chat: then the files' end tokens have to do
            return frozenset()
        return frozenset().union(*(example.ends for example in examples if not example.appended))

    @property
    def prints_the_date(self) -> bool:
        """Whether its chat template prints the time of the call, so that the same chat differs from day to day."""
        return self._templates.prints_the_date

    def at(self, now: datetime) -> Tokenizer:
        """The same tokenizer, whose chat templates are told that it is `now`: the same chat gives the same ids."""
        fixed = copy.copy(self)
        fixed._templates = self._templates.at(now)
        return fixed

    def stopping_at(self, ids: Iterable[int]) -> Tokenizer:
        """The same tokenizer with more end tokens: those that training taught to end a turn."""
        more = copy.copy(self)
        more.eos_ids = self.eos_ids | frozenset(ids)
        return more

    @property
    def has_chat_template(self) -> bool:
        """Whether the folder has a chat template."""
        return bool(self._templates)

    def chat_text(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The chat as the template writes it. To look at: encoding this text again loses what `chat` protects.

        Arguments and errors as `chat`.
        """
        chat = self._chat.render(
            self._templates.pick(tools=tools is not None),
            messages,
            {**self.special_tokens, "tools": tools, **variables},
            cuts=[(len(messages), add_generation_prompt)],
            protect=False,
        )
        return chat.texts[0]

    def chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        parse_special: bool = False,
        **variables: Any,
    ) -> list[int]:
        """The ids of a chat.

        messages: [{"role": ..., "content": ...}, ...]; keys whose value is None are left out.
        add_generation_prompt: end where the assistant's answer begins.
        tools:    JSON schemas of the functions the assistant may call.
        parse_special: let special tokens written inside messages and tools become those tokens.
        variables: further template variables (documents, enable_thinking, ...); they win over special tokens.
        Raises TemplateError: there is no template, it refuses the messages, or it goes over a limit.
        """
        chat = self._chat.render(
            self._templates.pick(tools=tools is not None),
            messages,
            {**self.special_tokens, "tools": tools, **variables},
            cuts=[(len(messages), add_generation_prompt)],
            protect=not parse_special,
        )
        return self._chat.encode(chat, chat.texts[0]).ids

    def chat_examples(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        parse_special: bool = False,
        **variables: Any,
    ) -> list[LabelledChat]:
        """The training examples of a finished chat: ids, and which of them the assistant wrote.

        Usually one example. One per assistant turn where the template renders a turn differently once others follow,
        or where the end token is not the template's own. Labelled are the tokens of each assistant turn, its end token
        included, and no others (not the newline that follows). A message with "weight": 0 is not labelled.
        The rest is as in `chat`.
        Raises TemplateError: also when the template does not print what a message says, or gives no way to tell an
        assistant's tokens or where its turn ends.
        """
        template = self._templates.pick(tools=tools is not None)
        check_read(template, variables)
        return label_chat(
            self._chat,
            template,
            messages,
            {**self.special_tokens, "tools": tools, **variables},
            protect=not parse_special,
            end=EndTokens(self.eos_ids, self.eos_id),
        )

    def chat_with_mask(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        parse_special: bool = False,
        **variables: Any,
    ) -> tuple[list[int], list[bool]]:
        """`chat_examples` for a chat that is one example: its ids, and for each whether the assistant wrote it.

        A chat that takes several gives the last of them, with a warning that names `chat_examples`.
        """
        examples = self.chat_examples(messages, tools=tools, parse_special=parse_special, **variables)
        if len(examples) > 1:
            warnings.warn(
                f"this template renders earlier turns differently as the chat goes on, so the chat is {len(examples)} "
                "examples, of which this is the last: use chat_examples for all",
                stacklevel=2,
            )
        return examples[-1].ids, examples[-1].mask


class Detokenizer:
    """Decodes ids one at a time without splitting a character.

    Decoding is not a sum over tokens: some decoders drop the first token's leading space, and a character's
    bytes may be spread over tokens. So the new text is the difference of two decodings of a short window, the
    tokens handed out last and those since; while the longer one ends in U+FFFD a character may be unfinished
    and is held back. A UTF-8 character has at most four bytes: text held for `LONGEST` tokens is no character
    and is handed out as it is, so the window, and the cost per token, stay bounded.
    """

    LONGEST = 8

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._shown: list[int] = []  # tokens handed out last: context for the next
        self._held: list[int] = []

    def push(self, token: int) -> str:
        """The text that `token` completes, "" while a character is unfinished."""
        if self._skip_special and token in self._tokenizer.special_ids:
            return ""
        self._held.append(token)
        return self._take(final=len(self._held) >= self.LONGEST)

    def flush(self) -> str:
        """The text of an unfinished character; call it after the last token."""
        return self._take(final=True)

    def _take(self, *, final: bool) -> str:
        window = self._shown + self._held
        before, after = (self._tokenizer.decode(ids, skip_special=False) for ids in (self._shown, window))
        if after.endswith(_REPLACEMENT) and not final:
            return ""
        if len(after) > len(before):
            self._shown, self._held = self._held, []
        elif final:  # nothing to show, but still context (a space that is dropped at the start of a text)
            self._shown, self._held = window[-self.LONGEST :], []
        return after[len(before) :]
