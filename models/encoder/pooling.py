"""From token vectors to one vector per text: the sentence-transformers files around an encoder.

    modules.json                       the chain, e.g. Transformer -> Pooling -> Normalize
    1_Pooling/config.json              which token vectors are combined, and how
    2_Normalize/                       often no folder at all: unit length, v / max(|v|, 1e-12)
    sentence_bert_config.json          max_seq_length, do_lower_case
    config_sentence_transformers.json  prompts: text put before each text, by name

Two generations of these files are read. Pooling was six booleans (`pooling_mode_mean_tokens`, ...), and is
now `"pooling_mode": "mean"` or a list. Class paths in modules.json moved between versions, so only their last
segment counts. A folder without modules.json is a plain BERT: it gets mean pooling and no normalisation, as
sentence-transformers gives it.

With h[t] the vector of token t = 1 ... T, after the last layer:

    cls                   h[1]
    lasttoken             h[T]
    max                   max_t h[t], per dimension
    mean                  sum_t h[t] / T
    mean_sqrt_len_tokens  sum_t h[t] / sqrt(T)
    weightedmean          sum_t t h[t] / sum_t t

Several modes are concatenated. Left out: Dense, LSTM, CNN and the other module types, and Matryoshka
truncation (`truncate_dim`). Each is refused by name: a vector that skips one is a wrong vector.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError

# Old boolean -> mode, in the order in which sentence-transformers concatenates them.
_OLD_NAMES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
MODES = tuple(_OLD_NAMES.values())

_NEW_NAMES = {"pooling_mode", "include_prompt", "embedding_dimension", "word_embedding_dimension"}

# The name depended on the architecture once; sentence-transformers tries them in this order too.
_LIMIT_FILES = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)


# Settings of sentence-transformers 6.2's transformer module, and the one value of each that is implemented.
_ONLY: dict[str, Any] = {
    "transformer_task": "feature-extraction",
    "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
    "module_output_name": "token_embeddings",
    "processing_kwargs": {},
}


@dataclass(frozen=True)
class Pooling:
    """One vector from the token vectors of a text.

    modes:           names from `MODES`; several are concatenated in this order.
    include_prompt:  False leaves the prompt's tokens, and the [CLS] before them, out (INSTRUCTOR models).
    """

    modes: tuple[str, ...] = ("mean",)
    include_prompt: bool = True

    def __call__(self, hidden: torch.Tensor, *, skip: int = 0) -> torch.Tensor:
        """[G, T, D] -> [G, D * len(modes)], for G texts of T tokens each.

        skip: leading tokens to leave out; at least the last token always stays.
        """
        kept = hidden[:, min(skip, hidden.shape[1] - 1) :]  # [G, S, D]
        return torch.cat([self._one(mode, kept, hidden.shape[1]) for mode in self.modes], dim=-1)

    @staticmethod
    def _one(mode: str, kept: torch.Tensor, tokens: int) -> torch.Tensor:
        if mode == "cls":
            return kept[:, 0]
        if mode == "lasttoken":
            return kept[:, -1]
        if mode == "max":
            return kept.amax(1)
        if mode == "mean":
            return kept.mean(1)
        size = kept.shape[1]
        if mode == "mean_sqrt_len_tokens":
            return kept.sum(1) / math.sqrt(size)
        assert mode == "weightedmean", mode
        # A token keeps the weight of its place in the whole text when a prompt before it is left out.
        weights = torch.arange(tokens - size + 1, tokens + 1, dtype=kept.dtype, device=kept.device)  # [S]
        return torch.einsum("gsd,s->gd", kept, weights / weights.sum())


@dataclass(frozen=True)
class SentenceFiles:
    """What the files around the transformer say.

    transformer:     folder of config.json, model.safetensors and tokenizer.json.
    pooling:         how token vectors become one.
    width:           dimensions of a token vector by the pooling's file, or None when it does not say.
    normalize:       whether that one gets unit length.
    prompts:         {name: text}, and `default_prompt`, the name used when a caller names none.
    max_seq_length:  tokens per text, [CLS] and [SEP] included, or None when its file does not say.
    tokenizer_limit: the same by the tokenizer's file; it counts only then, and only as far as positions go.
    lower_case:      texts are lower-cased before the tokenizer's own normalizer.
    """

    transformer: Path
    pooling: Pooling
    width: int | None
    normalize: bool
    prompts: dict[str, str]
    default_prompt: str | None
    max_seq_length: int | None
    tokenizer_limit: int | None
    lower_case: bool


def read_sentence_files(folder: Path) -> SentenceFiles:
    """The files of a sentence-transformers folder, or the defaults of a plain one.

    folder:  the model's folder.
    Raises ConfigError: a file is malformed, or asks for something that is not implemented.
    """
    transformer, pooling, width, normalize = _read_modules(folder)
    prompts, default_prompt = _read_prompts(folder)
    limits, source = _read_first(transformer, _LIMIT_FILES)
    _check_only(limits, source)
    lower_case = limits.get("do_lower_case", False)
    if not isinstance(lower_case, bool):
        raise ConfigError(f"{source}: do_lower_case={lower_case!r}, wanted true or false")
    config, config_source = _read_first(transformer, ("tokenizer_config.json",))
    tokenizer_limit = config.get("model_max_length")
    if isinstance(tokenizer_limit, (int, float)) and tokenizer_limit > 1e9:
        tokenizer_limit = None  # transformers writes 1e30 for "no limit"
    max_seq_length = limits.get("max_seq_length")
    for where, key, value in (
        (source, "max_seq_length", max_seq_length),
        (config_source, "model_max_length", tokenizer_limit),
    ):
        if value is not None and (type(value) is not int or value < 1):
            raise ConfigError(f"{where}: {key}={value!r}, wanted a whole number of at least 1")
    return SentenceFiles(
        transformer=transformer,
        pooling=pooling,
        width=width,
        normalize=normalize,
        prompts=prompts,
        default_prompt=default_prompt,
        max_seq_length=max_seq_length,
        tokenizer_limit=tokenizer_limit,
        lower_case=lower_case,
    )


def _check_only(limits: dict[str, Any], source: Path) -> None:
    """Raise ConfigError for a setting of the transformer module that may change the vectors and is not implemented."""
    for key, value in limits.items():
        if key in ("max_seq_length", "do_lower_case", "unpad_inputs"):  # read; or only how it computes
            continue
        if value not in (None, _ONLY.get(key)):
            wanted = f"only {_ONLY[key]!r}" if key in _ONLY else "it may change the vectors"
            raise ConfigError(f"{source}: {key}={value!r:.100} is not implemented: {wanted}")


def _read_modules(folder: Path) -> tuple[Path, Pooling, int | None, bool]:
    """(the transformer's folder, pooling, its width, normalize) from modules.json."""
    source = folder / "modules.json"
    modules = _read_json(source)
    if modules is None:
        return folder, Pooling(), None, False
    if not isinstance(modules, list) or not all(
        isinstance(m, dict) and isinstance(m.get("type"), str) and isinstance(m.get("path"), str) for m in modules
    ):
        raise ConfigError(f"{source}: wanted a list of objects with type and path")
    kinds = [m["type"].rpartition(".")[2] for m in modules]
    for kind in kinds:
        if kind not in ("Transformer", "Pooling", "Normalize"):
            raise ConfigError(
                f"{source}: module type {kind!r} is not implemented, only Transformer, Pooling and Normalize"
            )
    if kinds[:2] != ["Transformer", "Pooling"] or kinds[2:] not in ([], ["Normalize"]):
        raise ConfigError(
            f"{source}: the modules are {' -> '.join(kinds) or 'none'}, "
            "wanted Transformer -> Pooling, then Normalize or nothing"
        )
    paths = [_inside(folder, m["path"], source) for m in modules]
    if kinds[2:]:
        _check_normalize(paths[2] / "config.json")
    return paths[0], *_read_pooling(paths[1] / "config.json"), bool(kinds[2:])


def _check_normalize(source: Path) -> None:
    for key, value in (_read_object(source) or {}).items():
        if key not in ("module_input_name", "module_output_name") or value not in (
            None,
            "sentence_embedding",
        ):
            raise ConfigError(f"{source}: {key}={value!r} is not implemented: only sentence_embedding is normalised")


def _read_pooling(source: Path) -> tuple[Pooling, int | None]:
    config = _read_object(source)
    if config is None:
        raise ConfigError(f"{source}: not found, though modules.json names it: download the folder again")
    unknown = sorted(config.keys() - _OLD_NAMES.keys() - _NEW_NAMES)
    if unknown:
        raise ConfigError(
            f"{source}: {unknown[0]}={config[unknown[0]]!r} is not known here, and may change the vectors"
        )
    if "pooling_mode" in config:
        modes = config["pooling_mode"]
        modes = [modes] if isinstance(modes, str) else modes
    else:  # none of them set means mean, as in sentence-transformers
        modes = [mode for old, mode in _OLD_NAMES.items() if config.get(old)] or ["mean"]
    if not isinstance(modes, list) or not modes or any(mode not in MODES for mode in modes):
        raise ConfigError(f"{source}: pooling_mode={modes!r} is not implemented, only {', '.join(MODES)}")
    include_prompt = config.get("include_prompt", True)
    if not isinstance(include_prompt, bool):
        raise ConfigError(f"{source}: include_prompt={include_prompt!r}, wanted true or false")
    width = config.get("embedding_dimension", config.get("word_embedding_dimension"))
    return Pooling(tuple(modes), include_prompt), width


def _read_prompts(folder: Path) -> tuple[dict[str, str], str | None]:
    source = folder / "config_sentence_transformers.json"
    config = _read_object(source) or {}
    kind = config.get("model_type", "SentenceTransformer")
    if kind != "SentenceTransformer":
        raise ConfigError(f"{source}: model_type={kind!r} is not implemented, only 'SentenceTransformer'")
    if config.get("truncate_dim") is not None:
        raise ConfigError(f"{source}: truncate_dim={config['truncate_dim']!r} is not implemented, only null")
    prompts, default = config.get("prompts") or {}, config.get("default_prompt_name")
    if not isinstance(prompts, dict) or not all(isinstance(text, str) for text in prompts.values()):
        raise ConfigError(f"{source}: prompts={prompts!r}, wanted an object of name to text")
    if default is not None and default not in prompts:
        raise ConfigError(f"{source}: default_prompt_name={default!r} is not among prompts: {sorted(prompts)}")
    return prompts, default


def _inside(folder: Path, path: str, source: Path) -> Path:
    target = (folder / path).resolve()
    if not target.is_relative_to(folder.resolve()):
        raise ConfigError(f"{source}: path={path!r} leaves the model's folder: refused")
    return folder / path


def _read_first(folder: Path, names: tuple[str, ...]) -> tuple[dict[str, Any], Path]:
    """The first of the files that exists, and its path; {} and the first path when none does."""
    for name in names:
        config = _read_object(folder / name)
        if config is not None:
            return config, folder / name
    return {}, folder / names[0]


def _read_object(path: Path) -> dict[str, Any] | None:
    value = _read_json(path)
    if value is not None and not isinstance(value, dict):
        raise ConfigError(f"{path}: holds a JSON {type(value).__name__}, wanted an object")
    return value


def _read_json(path: Path) -> Any:
    """The file's value, or None when there is no such file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as fault:
        raise ConfigError(f"{path}: cannot be read ({fault.strerror})") from None
    except (ValueError, RecursionError) as fault:
        raise ConfigError(f"{path}: not JSON ({fault}): download it again") from None
    if value is None:
        raise ConfigError(f"{path}: holds a JSON null: download it again")
    return value
