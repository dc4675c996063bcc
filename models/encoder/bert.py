"""The network of BERT and its relatives (RoBERTa, XLM-R, CamemBERT): token ids to token vectors.

It is a transformer encoder (Devlin et al., arXiv:1810.04805) with the norm *after* each sum:

    x = LN(word[id] + token_type[0] + position[p])
    x = LN(x + W_o attention(x) + b_o)         attention(x) = softmax(q kT / sqrt(d)) v, per head
    x = LN(x + W_d gelu(W_u x + b_u) + b_d)    q|k|v = W_qkv x + b_qkv

p counts from 0. In RoBERTa's family it counts from pad_token_id + 1, and the pad token itself, should a text
contain it, sits at pad_token_id.

**No padding.** The texts of a batch lie end to end in one packed [T, D] tensor, T the sum of their lengths.
The linear layers, the norms and gelu work on tokens alone and need no more than that. Attention runs on
views: texts of equal length are neighbours, and G texts of L tokens are one [G, H, L, d]. There is no mask,
and nothing is computed in vain.

**Strict weights.** The file must hold exactly the tensors that config.json implies, in their shapes. Older
spellings of a name are understood; the pooler and the heads of pre-training are passed over; any other tensor
missing or too many is refused by name.

Left out: the pooler, relative positions, use as a decoder, other families of encoders. A configuration that
asks for one of the last three is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn

from ..errors import ConfigError, WeightsError
from ..files.weights import Checkpoint

# model_type -> whether positions are counted from the pad token's id.
_FAMILIES = {"bert": False, "roberta": True, "xlm-roberta": True, "camembert": True}
# hidden_act -> torch's name for the form of gelu: exact erf, or the tanh approximation.
_ACTIVATIONS = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}


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
        """[T, D] -> [T, D]; groups as in `Bert.forward`."""
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


class Bert(nn.Module):
    """Embeddings and layers; the weights are put in place by `read_state` and `load_state_dict`."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.config = config
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

    def _positions(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        first = self.config.first_position
        if first == 0:
            return np.arange(len(ids))
        real = ids != first - 1
        positions: npt.NDArray[np.int64] = np.cumsum(real) * real + (first - 1)
        return positions


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


def read_state(checkpoint: Checkpoint, network: Bert, *, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The network's state, read once the file is seen to hold exactly the tensors wanted, in their shapes.

    network:  gives names and shapes; it may be on the meta device.
    Raises WeightsError: a tensor is missing, unexpected, there twice, of another shape, or not floating-point.
    """
    wanted: dict[str, tuple[int, ...]] = {}
    for ours, tensor in network.state_dict().items():
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
        for ours in network.state_dict()
        for parts in [[read(name) for name in _sources(ours)]]
    }


def _listed(names: list[str]) -> str:
    if not names:
        return "nothing"
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
