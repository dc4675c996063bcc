"""GGUF -> an ordinary Hugging Face folder: config.json, model.safetensors, tokenizer.json, chat template.

Two things differ between the formats and are undone on the way:

* *Rotary pairs.* llama.cpp rotates neighbours (2i, 2i + 1), Hugging Face halves (i, i + d/2). For
  architecture "llama" the rows of q and k are stored permuted, head by head; `unpermute_rotary` undoes it.
* *The tokenizer.* GGUF names the text splitter (`tokenizer.ggml.pre`) but does not describe it. A name this
  file does not know is refused: the wrong splitter would give wrong ids without any error.

Left out: other architectures, biases, SentencePiece vocabularies, rotary scaling, mixtures of experts. Each
is refused by name. The container, and how it is checked: `gguf_read`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import decoders, models, pre_tokenizers, processors

from ..errors import ConfigError, ModelError, TokenizerError, WeightsError
from .gguf_read import GGUFFile, read_gguf

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5  # tokenizer.ggml.token_type
_SPECIAL_ROLES = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}  # as each format calls them
_SHARD_BYTES = 2 << 30  # weights held in memory before they are written

Progress = Callable[[int, int], None]


def unpermute_rotary(weight: torch.Tensor, n_heads: int) -> torch.Tensor:
    """Undo llama.cpp's order of the rows of q or k: in each head, row 2i -> i and row 2i + 1 -> i + d/2."""
    pairs = weight.reshape(n_heads, -1, 2, *weight.shape[1:])  # [H, d/2, 2, K]
    return pairs.swapaxes(1, 2).reshape(weight.shape)  # [H, 2, d/2, K] -> [H * d, K]


def llama_config(file: GGUFFile, dtype: torch.dtype) -> dict[str, Any]:
    """The config.json of a file of architecture "llama".

    Raises ConfigError: a field is missing or impossible, or asks for something that is not converted.
    """
    arch = file.get("general.architecture", str)
    if arch != "llama":
        raise ConfigError(f"{file.path}: general.architecture={arch!r}: only 'llama' is converted")
    width = file.positive("llama.embedding_length", int)
    heads = file.positive("llama.attention.head_count", int)
    kv_heads = file.positive("llama.attention.head_count_kv", int, heads)
    head_dim = file.positive("llama.attention.key_length", int, width // heads)
    if head_dim % 2 or heads % kv_heads:
        raise ConfigError(f"{file.path}: {heads} heads of {head_dim} over {kv_heads} kv heads: damaged file")
    vocab = len(file.strings("tokenizer.ggml.tokens"))
    only: dict[str, int | str] = {
        "llama.vocab_size": vocab,
        "llama.attention.value_length": head_dim,
        "llama.rope.dimension_count": head_dim,
        "llama.rope.scaling.type": "none",
        "llama.expert_count": 0,
    }
    for key, wanted in only.items():
        if (got := file.get(key, type(wanted), wanted)) != wanted:
            raise ConfigError(f"{file.path}: {key}={got!r}: in this file only {wanted!r} can be converted")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": file.positive("llama.feed_forward_length", int),
        "num_hidden_layers": file.positive("llama.block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": file.positive("llama.context_length", int),
        "rope_theta": file.positive("llama.rope.freq_base", float, 10000.0),  # llama.cpp's default
        "rope_scaling": None,
        "rms_norm_eps": file.positive("llama.attention.layer_norm_rms_epsilon", float),
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": file.token_id("bos"),
        "eos_token_id": file.token_id("eos"),
        "pad_token_id": file.token_id("padding"),
        "torch_dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
    }


@dataclass(frozen=True)
class _Target:
    """What one GGUF tensor becomes. rotary_heads: heads whose rows are permuted, 0 for none."""

    name: str
    shape: tuple[int, ...]
    rotary_heads: int = 0


def _llama_tensors(file: GGUFFile, config: dict[str, Any]) -> dict[str, _Target]:
    """GGUF name -> target, for exactly the tensors there must be; WeightsError if the file holds others."""
    width, inner, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    block = {
        "attn_norm": _Target("input_layernorm", (width,)),
        "attn_q": _Target("self_attn.q_proj", (heads * dim, width), heads),
        "attn_k": _Target("self_attn.k_proj", (kv_heads * dim, width), kv_heads),
        "attn_v": _Target("self_attn.v_proj", (kv_heads * dim, width)),
        "attn_output": _Target("self_attn.o_proj", (width, heads * dim)),
        "ffn_norm": _Target("post_attention_layernorm", (width,)),
        "ffn_gate": _Target("mlp.gate_proj", (inner, width)),
        "ffn_up": _Target("mlp.up_proj", (inner, width)),
        "ffn_down": _Target("mlp.down_proj", (width, inner)),
    }
    layers, held = config["num_hidden_layers"], len(file.tensors)
    if layers * len(block) > held:  # before a list of that length is made
        raise WeightsError(f"{file.path}: llama.block_count={layers} needs {len(block)} tensors each, has {held}")
    targets = {
        "token_embd.weight": _Target("model.embed_tokens.weight", (config["vocab_size"], width)),
        "output_norm.weight": _Target("model.norm.weight", (width,)),
    }
    if not config["tie_word_embeddings"]:
        targets["output.weight"] = _Target("lm_head.weight", (config["vocab_size"], width))
    for layer in range(layers):
        for name, t in block.items():
            full = f"model.layers.{layer}.{t.name}.weight"
            targets[f"blk.{layer}.{name}.weight"] = _Target(full, t.shape, t.rotary_heads)
    for what, names in (
        ("missing", targets.keys() - file.tensors),
        ("unexpected", file.tensors.keys() - targets),
    ):
        if names:
            shown = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
            raise WeightsError(f"{file.path}: not a plain llama model: {len(names)} tensors {what}: {shown}")
    for name, target in targets.items():
        if (got := file.tensors[name].shape) != target.shape:
            raise WeightsError(f"{file.path}: tensor {name} is {list(got)}, expected {list(target.shape)}")
    return targets


def build_tokenizer(file: GGUFFile) -> tokenizers.Tokenizer:
    """The byte-level BPE tokenizer of a GGUF file; its control and unknown tokens become special ones.

    Raises TokenizerError: a splitter, token type or merge that is not known.
    """
    model, pre = file.get("tokenizer.ggml.model", str), file.get("tokenizer.ggml.pre", str)
    if model != "gpt2":
        raise TokenizerError(f"{file.path}: tokenizer.ggml.model={model!r}: only 'gpt2' (byte-level BPE) is read")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=_prefix_space(file))  # GPT-2's pattern
    digits = pre_tokenizers.Digits(individual_digits=True)  # every digit alone
    splitters = {"gpt-2": byte_level, "smollm": pre_tokenizers.Sequence([digits, byte_level])}
    if pre not in splitters:
        raise TokenizerError(f"{file.path}: tokenizer.ggml.pre={pre!r}: only {', '.join(splitters)} are known")

    tokens = file.strings("tokenizer.ggml.tokens")
    types: list[int] = file.get("tokenizer.ggml.token_type", list, [_NORMAL] * len(tokens))
    vocab = {token: index for index, token in enumerate(tokens)}
    if not len(vocab) == len(tokens) == len(types):
        raise TokenizerError(
            f"{file.path}: {len(tokens)} tokenizer.ggml.tokens, {len(vocab)} of them different, "
            f"{len(types)} in tokenizer.ggml.token_type: the three must be equal"
        )
    merges = []
    for index, merge in enumerate(file.strings("tokenizer.ggml.merges")):
        left, _, right = merge.partition(" ")
        if not {left, right, left + right} <= vocab.keys():
            raise TokenizerError(f"{file.path}: tokenizer.ggml.merges[{index}]={merge!r}: unknown token")
        merges.append((left, right))

    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = splitters[pre]
    tokenizer.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, types, strict=True):
        if kind in (_UNKNOWN, _CONTROL):
            tokenizer.add_special_tokens([tokenizers.AddedToken(token, normalized=False, special=True)])
        elif kind == _USER_DEFINED:
            tokenizer.add_tokens([tokenizers.AddedToken(token, normalized=False, special=False)])
        elif kind not in (_NORMAL, _UNUSED):
            raise TokenizerError(f"{file.path}: token {token!r} has type {kind}, which byte-level BPE lacks")
    if file.get("tokenizer.ggml.add_bos_token", bool, False):
        if (bos := file.token_id("bos")) is None:
            raise TokenizerError(f"{file.path}: add_bos_token is set, but tokenizer.ggml.bos_token_id is missing")
        tokenizer.post_processor = processors.TemplateProcessing(
            single=["bos", "$A"],
            pair=["bos", "$A", "bos:1", "$B:1"],
            special_tokens=[{"id": "bos", "ids": [bos], "tokens": [tokens[bos]]}],
        )
    return tokenizer


def _prefix_space(file: GGUFFile) -> bool:
    return bool(file.get("tokenizer.ggml.add_space_prefix", bool, False))


def convert_gguf(
    path: str | Path,
    out_dir: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    progress: Progress | None = None,
) -> Path:
    """Write the model in a GGUF file as a Hugging Face folder that this package and transformers both load.

    out_dir:  made if need be. config.json is written last, so a folder cut short is not taken for a model.
    dtype:    of the weights written. At most 2 GiB of them are held in memory; more become numbered shards.
    progress: called with (tensors done, tensors in all) after each tensor.
    Raises ModelError: `out_dir` holds a model; or the file is damaged or holds what cannot be converted.
    """
    out = Path(out_dir)
    if (out / "config.json").exists():
        raise ModelError(f"{out}: already holds a model: give another folder")
    file = read_gguf(path)
    config = llama_config(file, dtype)
    targets = _llama_tensors(file, config)
    tokenizer = build_tokenizer(file)
    out.mkdir(parents=True, exist_ok=True)
    _write_tokenizer(file, tokenizer, config, out)
    _write_weights(file, targets, dtype, out, progress)
    _write_json(out / "config.json", config)
    return out


def _write_weights(
    file: GGUFFile, targets: dict[str, _Target], dtype: torch.dtype, out: Path, progress: Progress | None
) -> None:
    """model.safetensors; or shards and their index, so that no more than a shard is in memory."""
    shards: list[list[str]] = [[]]
    held = total = done = 0
    for name, target in targets.items():
        size = math.prod(target.shape) * dtype.itemsize
        if shards[-1] and held + size > _SHARD_BYTES:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held, total = held + size, total + size
    weight_map = {}
    for number, names in enumerate(shards, 1):
        part = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        tensors = {}
        for name in names:
            target = targets[name]
            tensor = file.tensor(name, dtype)
            tensors[target.name] = unpermute_rotary(tensor, target.rotary_heads) if target.rotary_heads else tensor
            weight_map[target.name] = f"model{part}.safetensors"
            done += 1
            if progress:
                progress(done, len(targets))
        try:
            save_file(tensors, out / f"model{part}.safetensors", metadata={"format": "pt"})
        except SafetensorError as fault:  # its own type, also for a full disk
            raise WeightsError(f"{out}: the weights cannot be written ({fault})") from None
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(out / "model.safetensors.index.json", index)


def _write_tokenizer(file: GGUFFile, tokenizer: tokenizers.Tokenizer, config: dict[str, Any], out: Path) -> None:
    tokenizer.save(str(out / "tokenizer.json"))
    tokens = file.strings("tokenizer.ggml.tokens")
    ids = {role: file.token_id(key) for role, key in _SPECIAL_ROLES.items()}
    special = {f"{role}_token": tokens[token] for role, token in ids.items() if token is not None}
    _write_json(out / "special_tokens_map.json", special)
    described = {
        "add_prefix_space": _prefix_space(file),
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
        "tokenizer_class": "PreTrainedTokenizerFast",  # reads tokenizer.json as it is
    }
    _write_json(out / "tokenizer_config.json", special | described)
    stops = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(out / "generation_config.json", {k: v for k, v in stops.items() if v is not None})
    if "tokenizer.chat_template" in file.metadata:
        (out / "chat_template.jinja").write_text(file.get("tokenizer.chat_template", str), encoding="utf-8")


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
