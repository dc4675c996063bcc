"""Text from a decoder, piece by piece, with the numbers a user wants to see afterwards.

    for text in generate(model, tok, "Who wrote Hamlet?", max_tokens=64):
        print(text, end="", flush=True)

The prompt runs through the model in one pass that fills the cache; after it each token is one pass of one position.
A piece of text is handed out once it can no longer change: a character whose bytes are not all there is held back,
and so is the beginning of what might become a stop string.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError, TemplateError
from ..text.tokenizer import Tokenizer
from .decoder import Decoder
from .sampling import Sampler, Sampling

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]


@dataclass
class GenerationStats:
    """What a generation took. Seconds are wall time; the rates leave out tokenizing and template.

    prompt_seconds:    the pass over the prompt, which also makes the first token.
    generated_tokens:  all that were made, an end token included.
    generated_seconds: the passes after it: one for each token but the first.
    """

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    generated_tokens: int = 0
    generated_seconds: float = 0.0
    peak_memory_bytes: int = 0
    finish_reason: str = ""

    @property
    def prompt_tps(self) -> float:
        """Prompt tokens per second."""
        return self.prompt_tokens / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def generation_tps(self) -> float:
        """Generated tokens per second after the first, which the pass over the prompt makes; 0 if there is no other."""
        return (self.generated_tokens - 1) / self.generated_seconds if self.generated_seconds else 0.0

    def lines(self) -> str:
        """Three lines, as mlx-lm prints them."""
        return (
            f"Prompt: {self.prompt_tokens} tokens, {self.prompt_tps:.3f} tokens-per-sec\n"
            f"Generation: {self.generated_tokens} tokens, {self.generation_tps:.3f} tokens-per-sec\n"
            f"Peak memory: {self.peak_memory_bytes / 1e9:.3f} GB"
        )


class Generation:
    """An iterator over pieces of text; `stats`, `ids` and `text` grow as it runs."""

    def __init__(
        self,
        model: Decoder,
        tok: Tokenizer,
        ids: list[int],
        *,
        max_tokens: int,
        sampling: Sampling,
        stop: Sequence[str],
        ends: Collection[int],
    ) -> None:
        self.prompt_ids = ids
        self.ids: list[int] = []
        self.text = ""
        self.stats = GenerationStats(prompt_tokens=len(ids))
        self._ends = ends
        self._pieces = self._run(model, tok, max_tokens, Sampler(sampling), [s for s in stop if s])

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        piece = next(self._pieces)
        self.text += piece
        return piece

    def _run(self, model: Decoder, tok: Tokenizer, max_tokens: int, sampler: Sampler, stop: list[str]) -> Iterator[str]:
        held = _StopBuffer(stop)
        stream = tok.stream()
        for token in self._tokens(model, max_tokens, sampler):
            piece, done = held.push(stream.push(token))
            if piece:
                yield piece
            if done:
                self.stats.finish_reason = "stop"
                return
        tail, done = held.push(stream.flush())
        if done:
            self.stats.finish_reason = "stop"
        else:
            tail += held.flush()
        if tail:
            yield tail

    def _tokens(self, model: Decoder, max_tokens: int, sampler: Sampler) -> Iterator[int]:
        """The generated ids, the end token left out. Runs the model inside inference mode, one step at a time."""
        device = model.model.embed_tokens.weight.device
        cache = model.new_cache(capacity=len(self.prompt_ids) + max_tokens)
        pending = self.prompt_ids
        self.stats.finish_reason = "length"
        while len(self.ids) < max_tokens:
            began = time.perf_counter()
            # Entered anew for each step: a generator that stays inside would leak the mode to its consumer.
            with torch.inference_mode():
                hidden = model.hidden(torch.tensor([pending], device=device), cache=cache)
                logits = _head(model.lm_head, hidden[0, -1])  # only the last position is needed: [V]
                token = sampler(logits, self.prompt_ids + self.ids)
            self._count(time.perf_counter() - began)
            if token in self._ends:
                self.stats.finish_reason = "eos"
                return
            self.ids.append(token)
            pending = [token]
            yield token

    def _count(self, seconds: float) -> None:
        if not self.stats.prompt_seconds:
            self.stats.prompt_seconds = seconds
        else:
            self.stats.generated_seconds += seconds
        self.stats.generated_tokens += 1
        self.stats.peak_memory_bytes = peak_memory_bytes()


class _StopBuffer:
    """Hands text on, except what may be the beginning of a stop string; ends at the first whole one."""

    def __init__(self, stop: list[str]) -> None:
        self._stop, self._held = stop, ""

    def push(self, text: str) -> tuple[str, bool]:
        self._held += text
        found = [at for at in (self._held.find(s) for s in self._stop) if at >= 0]
        if found:
            return self._held[: min(found)], True
        keep = max((_overlap(self._held, s) for s in self._stop), default=0)
        out, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return out, False

    def flush(self) -> str:
        out, self._held = self._held, ""
        return out


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of text that is a beginning of stop, shorter than stop."""
    for n in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0


def generate(
    model: Decoder,
    tok: Tokenizer,
    prompt: Prompt,
    *,
    max_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    stop: str | Sequence[str] = (),
    system: str | None = None,
    raw: bool = False,
    raw_special: bool = False,
) -> Generation:
    """The model's answer, as an iterator of pieces of text with `.stats` and `.text`.

    prompt:  a string, taken as one user message unless `raw`; a list of messages {"role", "content"}; or token ids,
             used as they are.
    max_tokens: the most tokens generated.
    temperature ... seed: see `Sampling`.
    stop:    a string, or several: the text ends before the first of them.
    system:  a system message put before a string prompt.
    raw:     continue the string as it stands, without a template.
    raw_special: with raw, special tokens written in the string ("<|im_start|>") are those tokens and not plain text.
    Raises ModelError: the prompt is empty, does not fit the model, or holds ids outside the vocabulary; or `system`
    is given where no template puts it in.
    Raises TemplateError: messages, or a string that is not raw, and the model has no chat template.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    ids = prompt_ids(tok, prompt, system=system, raw=raw, raw_special=raw_special)
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(isinstance(text, str) for text in stop):
        raise ModelError(f"stop: {stop!r:.60}: wanted a string or several")
    vocabulary = model.config.vocab_size
    if not ids:
        raise ModelError("prompt: it is empty: give at least one token")
    if min(ids) < 0 or max(ids) >= vocabulary:
        raise ModelError(
            f"prompt: token id {max(ids)} is outside the model's {vocabulary}: tokenizer and model do not match"
        )
    if len(ids) >= model.config.max_positions:
        raise ModelError(
            f"prompt: {len(ids)} tokens, the model was trained for {model.config.max_positions}: shorten it"
        )
    left = model.config.max_positions - len(ids)
    is_chat = not raw if isinstance(prompt, str) else not isinstance(prompt[0], int)
    ends = tok.eos_ids | tok.turn_ends if is_chat else tok.eos_ids
    return Generation(model, tok, ids, max_tokens=min(max_tokens, left), sampling=sampling, stop=stop, ends=ends)


def prompt_ids(
    tok: Tokenizer, prompt: Prompt, *, system: str | None = None, raw: bool = False, raw_special: bool = False
) -> list[int]:
    """The token ids that `generate` starts from, see there."""
    if system is not None and (raw or not isinstance(prompt, str)):
        raise ModelError("system: goes before a string that is not raw: write it into the prompt or the messages")
    if raw_special and not raw:
        raise ModelError("raw_special: it is about a raw string: give raw=True too (--raw)")
    if isinstance(prompt, str):
        if raw:
            # Who writes "<s>" by hand does not want a second one.
            bos = tok.special_tokens.get("bos_token")
            begun = raw_special and bos is not None and prompt.startswith(bos)
            return tok.encode(prompt, add_special=not begun, parse_special=raw_special)
        if not tok.has_chat_template:
            raise TemplateError(
                "prompt: the model has no chat template to ask a question with: use raw=True (--raw) to continue the "
                "text as it stands"
            )
        messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system is not None else []
        return tok.chat([*messages, {"role": "user", "content": prompt}])
    if prompt and isinstance(prompt[0], int):
        return [int(i) for i in prompt]  # type: ignore[arg-type]
    return tok.chat(list(prompt))  # type: ignore[arg-type]


def peak_memory_bytes() -> int:
    """The most memory this process has held resident, in bytes (on a CUDA device: the most that torch allocated)."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # on Linux getrusage counts the parent's memory too, from before this program began
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return 1024 * int(line.split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _head(head: nn.Module, h: Tensor) -> Tensor:
    """logits [V] of one position h [D]. A bfloat16 product of one row costs torch twice a matrix times a vector."""
    plain = isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward and head.bias is None
    logits: Tensor = torch.mv(head.weight, h) if plain else head(h)  # type: ignore[arg-type]
    return logits
