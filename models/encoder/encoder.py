"""Text to vectors: sentence encoders of BERT's kind, read from their own files.

    enc = load_encoder("DIR")
    enc.encode(["hello world"])      # float32 [1, D]

Four steps, each in a file of its own: the tokenizer cuts a text into at most `max_tokens` ids, `bert` makes a vector of
every token, `pooling` makes one of them all, and the folder says whether it is scaled to unit length.

Texts are sorted by length and laid end to end without padding (see `bert`), so a text's vector depends on its
batch only through rounding in the matrix products (largest difference below 1e-6). A batch is filled up to a
number of *tokens*, so that the widest intermediate stays below the 32 MiB from which glibc maps fresh pages
for every allocation.

Left out: gradients (`encode` only). The text of a special token inside a document ("[SEP]") becomes that
token, as in sentence-transformers: vectors that agree with published ones matter more here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import overload

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import normalizers

from ..errors import ConfigError, TokenizerError, WeightsError
from ..files.config_json import read_config
from ..files.weights import Checkpoint
from ..text.tokenizer_files import add_missing_tokens, follow_config, parse, read_object, read_tokenizer
from ..text.unicode import lone_surrogate
from .bert import Bert, EncoderConfig, encoder_config, read_state
from .pooling import SentenceFiles, read_sentence_files

_WIDEST_BYTES = 16 << 20  # of the feed-forward intermediate: 2730 tokens of MiniLM's 1536 floats
_TOKENIZE_AT_ONCE = 1024  # texts; a result weighs about 100 bytes a token until its ids are copied out


class Encoder(Bert):
    """A network that embeds texts; made by `load_encoder`. `to(device)` moves it; threads may share it.

    dim:          dimensions of a vector.
    max_tokens:   longest text, [CLS] and [SEP] included; what exceeds it is cut off.
    num_special:  how many tokens of those the tokenizer adds to every text.
    prompts:      {name: text} from the folder; `default_prompt` is the name used when none is given, or None.
    fingerprint:  SHA-256 over all that decides a vector except dtype and device: weights, configuration,
                  tokenizer, pooling, normalisation, prompts, max_tokens. A vector store records it.
    """

    def __init__(
        self,
        config: EncoderConfig,
        files: SentenceFiles,
        tokenizer: RawTokenizer,
        *,
        max_tokens: int,
        fingerprint: str,
    ) -> None:
        super().__init__(config)
        self.pooling, self.normalize = files.pooling, files.normalize
        self.prompts, self.default_prompt = dict(files.prompts), files.default_prompt
        self.dim = config.hidden_size * len(files.pooling.modes)
        self.max_tokens = max_tokens
        self.num_special: int = tokenizer.num_special_tokens_to_add(False)
        self.fingerprint = fingerprint
        # Two objects: switching truncation on one would not be safe while another thread encodes.
        self._untruncated = tokenizer
        self._truncated = RawTokenizer.from_str(tokenizer.to_str())
        self._truncated.enable_truncation(max_tokens)

    @property
    def window(self) -> int:
        """How many tokens of a text it reads, by `count_tokens`; the special tokens around them are not counted."""
        return self.max_tokens - self.num_special

    @torch.inference_mode()
    def encode(
        self,
        texts: Sequence[str],
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        max_batch_tokens: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> npt.NDArray[np.float32]:
        """One vector per text, float32 [n, dim], in the texts' order; of unit length when the folder says so.

        prompt_name:       which of `prompts` to put before every text; None means `default_prompt`.
        prompt:            text to put there instead; "" for none at all.
        max_batch_tokens:  tokens computed at once; None keeps the widest intermediate below 16 MiB.
        progress:          called with (texts done, texts in all) after every batch.
        Raises TokenizerError: a text is not valid Unicode, or the prompt leaves it no token.
        Raises ConfigError: there is no prompt of that name.
        Raises WeightsError: a vector is not finite.
        """
        prefix = self._prompt(prompt_name, prompt)
        ids = self.tokenize([prefix + text for text in _checked(texts)])
        prompt_tokens = self._prompt_tokens(prefix) if prefix else 0
        skip = 0 if self.pooling.include_prompt else prompt_tokens
        if max_batch_tokens is None:
            max_batch_tokens = _WIDEST_BYTES // (self.config.intermediate_size * self.word.weight.itemsize)
        out = np.empty((len(ids), self.dim), np.float32)
        done = 0
        for batch in _batches([len(i) for i in ids], max_batch_tokens):
            out[batch] = self._embed([ids[i] for i in batch], skip).float().cpu().numpy()
            done += len(batch)
            if progress is not None:
                progress(done, len(ids))
        broken = np.flatnonzero(~np.isfinite(out).all(axis=1))
        if broken.size:
            raise WeightsError(
                f"text {broken[0]} ({broken.size} of {len(ids)}) got a vector with NaN or infinity: "
                "the weights are damaged, or too large for the dtype; try dtype=torch.float32"
            )
        return out

    def _embed(self, ids: list[npt.NDArray[np.int64]], skip: int) -> torch.Tensor:
        """Vectors [n, dim] of texts in order of length."""
        device = self.word.weight.device
        groups = [(len(list(same)), tokens) for tokens, same in groupby(ids, key=len)]
        positions = np.concatenate([self._positions(i) for i in ids])
        hidden = self(torch.from_numpy(np.concatenate(ids)).to(device), torch.from_numpy(positions).to(device), groups)
        if hidden.dtype in (torch.bfloat16, torch.float16):
            hidden = hidden.float()  # sums over a text's tokens need more than 8 bits
        sections = hidden.split([texts * tokens for texts, tokens in groups])
        pooled = torch.cat(
            [self.pooling(h.view(*group, -1), skip=skip) for h, group in zip(sections, groups, strict=True)]
        )
        return F.normalize(pooled, dim=-1) if self.normalize else pooled

    def tokenize(self, texts: Sequence[str]) -> list[npt.NDArray[np.int64]]:
        """The token ids of every text, special tokens included, cut to `max_tokens`.

        Raises TokenizerError: a text is not valid Unicode, or has no tokens.
        """
        ids = [
            np.array(encoding.ids, np.int64)
            for part in _slices(_checked(texts), _TOKENIZE_AT_ONCE)
            for encoding in self._truncated.encode_batch_fast(part)
        ]
        for i, row in enumerate(ids):
            if not len(row):
                raise TokenizerError(f"text {i} has no tokens, and the tokenizer adds none of its own: leave it out")
        return ids

    @overload
    def count_tokens(self, texts: str) -> int: ...  # type: ignore[overload-overlap]  # a str is a Sequence[str]
    @overload
    def count_tokens(self, texts: Sequence[str]) -> list[int]: ...
    def count_tokens(self, texts: str | Sequence[str]) -> int | list[int]:
        """How many tokens each text has: nothing cut off, no special tokens counted, no prompt.

        texts: one string for one number, or several for a list. A text is encoded whole when its count plus
               `num_special` is at most `max_tokens`.
        Raises TokenizerError: a text is not valid Unicode.
        """
        if isinstance(texts, str):
            return self.count_tokens([texts])[0]
        return [
            len(encoding)
            for part in _slices(_checked(texts), _TOKENIZE_AT_ONCE)
            for encoding in self._untruncated.encode_batch_fast(part, add_special_tokens=False)
        ]

    def _prompt(self, name: str | None, prompt: str | None) -> str:
        if prompt is not None:
            if name is not None:
                raise ConfigError(f"prompt={prompt!r} and prompt_name={name!r} are both given: give one")
            return prompt
        name = self.default_prompt if name is None else name
        if name is None:
            return ""
        if name not in self.prompts:
            raise ConfigError(f"prompt_name={name!r} is not one of this encoder's prompts: {sorted(self.prompts)}")
        return self.prompts[name]

    def _prompt_tokens(self, prefix: str) -> int:
        """Tokens of the prompt with the special ones before it, without those after it."""
        encoding = self._untruncated.encode(prefix)
        after = 0
        for special in reversed(encoding.special_tokens_mask):
            if not special:
                break
            after += 1
        tokens = len(encoding) - after
        if tokens + after >= self.max_tokens:
            raise TokenizerError(f"the prompt has {tokens} tokens, which leaves none of max_tokens={self.max_tokens}")
        return tokens


def load_encoder(folder: str | Path, *, dtype: torch.dtype = torch.float32) -> Encoder:
    """The encoder of a sentence-transformers folder, or of a plain BERT one (mean pooling, not normalised).

    folder:  config.json, model.safetensors or shards, tokenizer.json, and the files that `pooling` describes.
    dtype:   what the network computes in; vectors are float32 all the same.
    Raises ConfigError, WeightsError, TokenizerError: a file is missing, malformed, contradicts another, or
    asks for something that is not implemented.
    """
    folder = Path(folder)
    files = read_sentence_files(folder)
    source = files.transformer / "config.json"
    config = encoder_config(read_config(files.transformer), source=str(source))
    if files.width not in (None, config.hidden_size):
        raise ConfigError(f"{source}: hidden_size={config.hidden_size}, but the pooling is for {files.width}")
    positions = config.max_positions - config.first_position
    max_tokens = files.max_seq_length or min(positions, files.tokenizer_limit or positions)
    if max_tokens > positions:
        raise ConfigError(f"{source}: positions for {positions} tokens, but max_seq_length={max_tokens}: lower it")

    tokenizer = _load_tokenizer(files, config)
    if max_tokens <= tokenizer.num_special_tokens_to_add(False):
        raise ConfigError(f"{source}: max_seq_length={max_tokens} leaves no token for the text itself")
    checkpoint = Checkpoint(files.transformer)
    meaning = {
        "weights": checkpoint.fingerprint(),
        "tokenizer": hashlib.sha256((files.transformer / "tokenizer.json").read_bytes()).hexdigest(),
        "lower_case": files.lower_case,
        "config": asdict(config),
        "pooling": asdict(files.pooling),
        "normalize": files.normalize,
        "prompts": [files.prompts, files.default_prompt],
        "max_tokens": max_tokens,
    }
    fingerprint = hashlib.sha256(json.dumps(meaning, sort_keys=True).encode()).hexdigest()
    with torch.device("meta"):  # shapes only; the checkpoint's tensors take their places
        encoder = Encoder(config, files, tokenizer, max_tokens=max_tokens, fingerprint=fingerprint)
    encoder.load_state_dict(read_state(checkpoint, encoder, dtype=dtype), strict=True, assign=True)
    return encoder.requires_grad_(False).eval()


def _load_tokenizer(files: SentenceFiles, config: EncoderConfig) -> RawTokenizer:
    """The tokenizer, without its file's own truncation and padding (MiniLM's: to 128, always)."""
    path = files.transformer / "tokenizer.json"
    settings = read_object(files.transformer / "tokenizer_config.json")
    tokenizer = parse(follow_config(read_tokenizer(path), settings), path)
    add_missing_tokens(tokenizer, files.transformer, settings)
    if files.lower_case:
        rest = [] if tokenizer.normalizer is None else [tokenizer.normalizer]
        tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *rest])
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1], default=("", -1))
    if largest >= config.vocab_size:
        raise TokenizerError(
            f"{path}: token {token!r} has id {largest}, but config.json has vocab_size={config.vocab_size}: "
            "the two files belong to different models"
        )
    return tokenizer


def _checked(texts: Sequence[str]) -> Sequence[str]:
    """The texts, seen to be strings that have a UTF-8 form."""
    if isinstance(texts, str):
        raise TypeError("texts is one string, wanted a list of strings: put it in brackets")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"texts[{i}] is {type(text).__name__}, wanted str")
        if fault := lone_surrogate(text):
            raise TokenizerError(f"text {i}: {fault}: clean it, e.g. text.encode('utf-8', 'replace').decode()")
    return texts


def _batches(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Indices in batches of at most `max_tokens`, or one text. Longest first: what fails, fails at once."""
    batch: list[int] = []
    total = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and total + lengths[i] > max_tokens:
            yield batch
            batch, total = [], 0
        batch.append(i)
        total += lengths[i]
    if batch:
        yield batch


def _slices(texts: Sequence[str], size: int) -> Iterator[list[str]]:
    for start in range(0, len(texts), size):
        yield list(texts[start : start + size])
