"""Text to vectors: BERT-type encoders (BERT, RoBERTa, XLM-R, CamemBERT), read from their own files.

    enc = load_encoder("DIR")
    enc.encode(["hello world"])      # float32 [1, D]

The network (Devlin et al., arXiv:1810.04805) is a transformer encoder with the norm *after* each sum:

    x = LN(word[id] + token_type[0] + position[p])
    x = LN(x + W_o attention(x) + b_o)         attention(x) = softmax(q kT / sqrt(d)) v, per head
    x = LN(x + W_d gelu(W_u x + b_u) + b_d)    q|k|v = W_qkv x + b_qkv

p counts from 0. In RoBERTa's family it counts from pad_token_id + 1, and the pad token itself, should a text
contain it, sits at pad_token_id.

**No padding.** The texts of a batch lie end to end in one packed [T, D] tensor, T the sum of their lengths.
The linear layers, the norms and gelu work on tokens alone and need no more than that. Attention runs on
views: texts are sorted by length, equal lengths are neighbours, and G texts of L tokens are one [G, H, L, d].
There is no mask, nothing is computed in vain, and a text's vector depends on its batch only through rounding
in the matrix products (largest difference below 1e-6). A batch is filled up to a number of *tokens*, so that
the widest intermediate stays below the 32 MiB from which glibc maps fresh pages for every allocation.

Left out: gradients (`encode` only), the pooler, relative positions, other families of encoders. A file that
asks for what is left out is refused by name. The text of a special token inside a document ("[SEP]") becomes
that token, as in sentence-transformers: vectors that agree with published ones matter more here.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import normalizers
from torch import nn

from .config import read_config
from .errors import ConfigError, TokenizerError, WeightsError
from .pooling import SentenceFiles, read_sentence_files
from .tokenizer_files import parse, read_tokenizer
from .weights import Checkpoint

# model_type -> whether positions are counted from the pad token's id.
_FAMILIES = {"bert": False, "roberta": True, "xlm-roberta": True, "camembert": True}
# hidden_act -> torch's name for the form of gelu: exact erf, or the tanh approximation.
_ACTIVATIONS = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}

_WIDEST_BYTES = 16 << 20  # of the feed-forward intermediate: 2730 tokens of MiniLM's 1536 floats
_TOKENIZE_AT_ONCE = 1024  # texts; a result weighs about 100 bytes a token until its ids are copied out


@dataclass(frozen=True)
class EncoderConfig:
    """What the mathematics depends on. Sizes count elements.

    first_position:  position of a text's first token; 0 for BERT, pad_token_id + 1 for RoBERTa's family.
    gelu:            "none" is the exact erf form, "tanh" its approximation.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    max_positions: int
    type_vocab_size: int
    norm_eps: float
    first_position: int
    gelu: str


def encoder_config(raw: dict[str, Any], *, source: str = "config.json") -> EncoderConfig:
    """The checked configuration of an encoder.

    raw: config.json as a dict.  source: the file's name, for messages.
    Raises ConfigError: unknown model_type, a missing or ill-typed field, or a setting not implemented.
    """

    def size(key: str, default: int | None = None) -> int:
        value = raw.get(key, default)
        if type(value) is not int or value < 1:
            raise ConfigError(f"{source}: {key}={value!r}, wanted a whole number of at least 1")
        return value

    family = raw.get("model_type")
    if family not in _FAMILIES:
        raise ConfigError(f"{source}: model_type={family!r} is not an encoder known here: {', '.join(_FAMILIES)}")
    for key, only in (
        ("position_embedding_type", "absolute"),
        ("is_decoder", False),
        ("add_cross_attention", False),
    ):
        if raw.get(key, only) != only:
            raise ConfigError(f"{source}: {key}={raw[key]!r} is not implemented, only {only!r}")
    if raw.get("quantization_config"):
        raise ConfigError(f"{source}: quantization_config is not implemented: give the unquantized model")
    act = raw.get("hidden_act", "gelu")
    if act not in _ACTIVATIONS:
        raise ConfigError(f"{source}: hidden_act={act!r} is not implemented, only {', '.join(_ACTIVATIONS)}")
    heads, hidden = size("num_attention_heads"), size("hidden_size")
    if hidden % heads:
        raise ConfigError(f"{source}: hidden_size={hidden} is not a multiple of num_attention_heads={heads}")
    eps = raw.get("layer_norm_eps", 1e-12)
    if type(eps) is not float or not 0 < eps < 1:
        raise ConfigError(f"{source}: layer_norm_eps={eps!r}, wanted a number between 0 and 1")
    pad = raw.get("pad_token_id", 1)
    if _FAMILIES[family] and (type(pad) is not int or pad < 0):
        raise ConfigError(f"{source}: pad_token_id={pad!r}, wanted a token id: positions are counted from it")
    return EncoderConfig(
        family=family,
        vocab_size=size("vocab_size"),
        hidden_size=hidden,
        intermediate_size=size("intermediate_size"),
        num_layers=size("num_hidden_layers"),
        num_heads=heads,
        max_positions=size("max_position_embeddings"),
        type_vocab_size=size("type_vocab_size", 2),
        norm_eps=eps,
        first_position=pad + 1 if _FAMILIES[family] else 0,
        gelu=_ACTIVATIONS[act],
    )


class EncoderLayer(nn.Module):
    """x = LN(x + W_o attention(x) + b_o);  x = LN(x + W_d gelu(W_u x + b_u) + b_d), on packed tokens."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        d, f = config.hidden_size, config.intermediate_size
        self.num_heads, self.gelu = config.num_heads, config.gelu
        self.qkv = nn.Linear(d, 3 * d)  # rows [q | k | v]: one matrix product instead of three
        self.attention_out = nn.Linear(d, d)
        self.attention_norm = nn.LayerNorm(d, eps=config.norm_eps)
        self.up = nn.Linear(d, f)
        self.down = nn.Linear(f, d)
        self.output_norm = nn.LayerNorm(d, eps=config.norm_eps)

    def forward(self, x: torch.Tensor, groups: Sequence[tuple[int, int]]) -> torch.Tensor:
        """[T, D] -> [T, D]; groups as in `Encoder.forward`."""
        x = self.attention_norm(x + self.attention_out(self.attention(self.qkv(x), groups)))
        x = self.output_norm(x + self.down(F.gelu(self.up(x), approximate=self.gelu)))
        return x

    def attention(self, qkv: torch.Tensor, groups: Sequence[tuple[int, int]]) -> torch.Tensor:
        """[T, 3D] -> [T, D], every text attending to itself alone."""
        out = qkv.new_empty(qkv.shape[0], qkv.shape[1] // 3)
        start = 0
        for texts, tokens in groups:
            rows = slice(start, start + texts * tokens)
            split = qkv[rows].view(texts, tokens, 3, self.num_heads, -1)  # [G, L, 3, H, d]
            q, k, v = split.permute(2, 0, 3, 1, 4)  # each [G, H, L, d]
            mixed = F.scaled_dot_product_attention(q, k, v)
            out[rows].view(texts, tokens, self.num_heads, -1).copy_(mixed.transpose(1, 2))
            start = rows.stop
        return out


def _table(rows: int, columns: int) -> nn.Embedding:
    # nn.Embedding(rows, columns) draws random numbers, and that on the meta device imports half of torch's
    # compiler: a second and more for nothing.
    empty = torch.empty(rows, columns)
    table: nn.Embedding = nn.Embedding.from_pretrained(empty)  # type: ignore[no-untyped-call]
    return table


class Encoder(nn.Module):
    """Embeds texts; made by `load_encoder`. `to(device)` moves it; threads may share it.

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
        super().__init__()
        d = config.hidden_size
        self.config = config
        self.pooling, self.normalize = files.pooling, files.normalize
        self.prompts, self.default_prompt = dict(files.prompts), files.default_prompt
        self.dim = d * len(files.pooling.modes)
        self.max_tokens = max_tokens
        self.num_special: int = tokenizer.num_special_tokens_to_add(False)
        self.fingerprint = fingerprint
        # Two objects: switching truncation on one would not be safe while another thread encodes.
        self._untruncated = tokenizer
        self._truncated = RawTokenizer.from_str(tokenizer.to_str())
        self._truncated.enable_truncation(max_tokens)
        self.word = _table(config.vocab_size, d)
        self.position = _table(config.max_positions, d)
        self.token_type = _table(config.type_vocab_size, d)
        self.embedding_norm = nn.LayerNorm(d, eps=config.norm_eps)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_layers))

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, groups: Sequence[tuple[int, int]]) -> torch.Tensor:
        """The token vectors [T, D] after the last layer.

        ids, positions:  int64 [T], the texts end to end.
        groups:          (texts, tokens in each of them) in that order; the products sum to T.
        """
        x: torch.Tensor = self.embedding_norm(self.word(ids) + self.token_type.weight[0] + self.position(positions))
        for layer in self.layers:
            x = layer(x, groups)
        return x

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
        Raises TokenizerError: a text is not valid Unicode, or the prompt leaves it no room.
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

    def _positions(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        first = self.config.first_position
        if first == 0:
            return np.arange(len(ids))
        real = ids != first - 1
        positions: npt.NDArray[np.int64] = np.cumsum(real) * real + (first - 1)
        return positions

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
    room = config.max_positions - config.first_position
    max_tokens = files.max_seq_length or min(room, files.tokenizer_limit or room)
    if max_tokens > room:
        raise ConfigError(f"{source}: positions for {room} tokens, but max_seq_length={max_tokens}: lower it")

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
    encoder.load_state_dict(_read_state(checkpoint, encoder, dtype), strict=True, assign=True)
    return encoder.requires_grad_(False).eval()


def _load_tokenizer(files: SentenceFiles, config: EncoderConfig) -> RawTokenizer:
    """The tokenizer, without its file's own truncation and padding (MiniLM's: to 128, always)."""
    path = files.transformer / "tokenizer.json"
    tokenizer = parse(read_tokenizer(path), path)
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


# Our module -> the HF modules whose tensors it is made of, within a layer and outside.
_SOURCES = {
    "word": ["embeddings.word_embeddings"],
    "position": ["embeddings.position_embeddings"],
    "token_type": ["embeddings.token_type_embeddings"],
    "embedding_norm": ["embeddings.LayerNorm"],
    "qkv": ["attention.self.query", "attention.self.key", "attention.self.value"],
    "attention_out": ["attention.output.dense"],
    "attention_norm": ["attention.output.LayerNorm"],
    "up": ["intermediate.dense"],
    "down": ["output.dense"],
    "output_norm": ["output.LayerNorm"],
}


def _sources(ours: str) -> list[str]:
    """`layers.3.up.bias` -> `encoder.layer.3.intermediate.dense.bias`; three names for a qkv."""
    *layer, module, kind = ours.split(".")
    prefix = f"encoder.layer.{layer[1]}." if layer else ""
    return [f"{prefix}{name}.{kind}" for name in _SOURCES[module]]


def _stored_names(checkpoint: Checkpoint) -> dict[str, str]:
    """{HF name: name in the file}, without what an encoder does not use.

    Files of a whole pre-training model put "bert." or "roberta." before each name and add heads; files made
    from TensorFlow call a norm's weight and bias gamma and beta; old files hold position_ids; many a pooler.
    """
    found: dict[str, str] = {}
    for stored in checkpoint.names():
        name = stored.removeprefix("bert.").removeprefix("roberta.")
        name = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name))
        if name == "embeddings.position_ids" or name.startswith(("pooler.", "cls.", "lm_head.")):
            continue
        if name in found:
            raise WeightsError(f"{checkpoint.folder}: {found[name]} and {stored} are the same tensor: remove one")
        found[name] = stored
    return found


def _read_state(checkpoint: Checkpoint, encoder: Encoder, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The encoder's state, read once the file is seen to hold exactly the tensors wanted, in their shapes."""
    wanted: dict[str, tuple[int, ...]] = {}
    for ours, tensor in encoder.state_dict().items():
        sources = _sources(ours)
        wanted |= dict.fromkeys(sources, (tensor.shape[0] // len(sources), *tensor.shape[1:]))
    stored = _stored_names(checkpoint)
    missing, unexpected = sorted(wanted.keys() - stored.keys()), sorted(stored.keys() - wanted.keys())
    if missing or unexpected:
        raise WeightsError(
            f"{checkpoint.folder}: the weights do not fit config.json: missing {_listed(missing)}; "
            f"unexpected {_listed(unexpected)}: fetch both from the same model"
        )

    def read(name: str) -> torch.Tensor:
        where, file, got = stored[name], checkpoint.file(stored[name]), checkpoint.shape(stored[name])
        if got != wanted[name]:
            raise WeightsError(
                f"{file}: {where} has shape {list(got)}, config.json asks for {list(wanted[name])}: "
                "fetch both from the same model"
            )
        tensor = checkpoint.read(where)
        if not tensor.is_floating_point():
            raise WeightsError(f"{file}: {where} is {tensor.dtype}, wanted a floating-point type")
        return tensor.to(dtype)

    return {
        ours: torch.cat(parts) if len(parts) > 1 else parts[0]
        for ours in encoder.state_dict()
        for parts in [[read(name) for name in _sources(ours)]]
    }


def _listed(names: list[str]) -> str:
    if not names:
        return "nothing"
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _checked(texts: Sequence[str]) -> Sequence[str]:
    """The texts, seen to be strings that have a UTF-8 form."""
    if isinstance(texts, str):
        raise TypeError("texts is one string, wanted a list of strings: put it in brackets")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"texts[{i}] is {type(text).__name__}, wanted str")
        try:
            text.encode()
        except UnicodeEncodeError as fault:
            raise TokenizerError(
                f"text {i}: character {fault.start} is {text[fault.start]!r}, half of a surrogate pair: "
                "clean it, e.g. text.encode('utf-8', 'replace').decode()"
            ) from None
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
