"""Reading a tokenizer's files: tokenizer.json, and what its neighbours say about special tokens.

tokenizer.json is read by the `tokenizers` library, whose errors name neither file nor component ("data did
not match any variant of untagged enum ModelUntagged at line 1 column 919"). When it refuses, each component
is tried alone beside a tiny model that is known to work, which finds the one to name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken
from tokenizers import Tokenizer as RawTokenizer

from ..errors import TokenizerError

# The names under which templates and post-processors know special tokens, as transformers writes them.
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

_KNOWN_GOOD = {
    "version": "1.0",
    "added_tokens": [],
    "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"},
}
_COMPONENTS = ("model", "normalizer", "pre_tokenizer", "post_processor", "decoder", "added_tokens")


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file's object; {} when the file does not exist.

    Raises TokenizerError: it is not UTF-8, not JSON, or not an object.
    """
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise TokenizerError(f"{path}: not JSON ({error}): fetch the file again") from error
    if not isinstance(data, dict):
        raise TokenizerError(f"{path}: wanted a JSON object, got {type(data).__name__}: fetch the file again")
    return data


def read_tokenizer(path: Path) -> dict[str, Any]:
    """tokenizer.json as an object that `parse` accepts, without its truncation and padding.

    Those two are settings of the program that saved the file (all-MiniLM-L6's cuts every text at 128 tokens), not of
    the model.
    Raises TokenizerError: the file is missing, malformed, or of a kind `tokenizers` does not read.
    """
    data = read_object(path)
    if not data:
        others = [name for name in ("tokenizer.model", "vocab.json", "vocab.txt") if (path.parent / name).exists()]
        beside = f"; {', '.join(others)} alone is not enough" if others else ""
        raise TokenizerError(
            f"{path}: missing or empty{beside}: fetch it, or convert the tokenizer once with transformers' "
            "AutoTokenizer.save_pretrained"
        )
    return {**data, "truncation": None, "padding": None}


def follow_config(data: dict[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer.json with the settings of its BertNormalizer that tokenizer_config.json contradicts.

    transformers' BertTokenizer and sentence-transformers follow the configuration, and a model was trained through one
    of them. (What the configuration leaves out is the file's: transformers 5.23 takes its class's defaults there, and
    lower-cases what a cased model's tokenizer.json does not.)
    """
    if "Bert" not in (config.get("tokenizer_class") or "Bert"):
        return data  # PreTrainedTokenizerFast and others take tokenizer.json as it is
    names = {
        "do_lower_case": "lowercase",
        "strip_accents": "strip_accents",
        "tokenize_chinese_chars": "handle_chinese_chars",
    }
    wanted = {names[key]: config[key] for key in names if isinstance(config.get(key), bool)}

    def changed(normalizer: Any) -> Any:
        if not isinstance(normalizer, dict):
            return normalizer
        if normalizer.get("type") == "Sequence":
            return {**normalizer, "normalizers": [changed(part) for part in normalizer.get("normalizers") or ()]}
        return {**normalizer, **wanted} if normalizer.get("type") == "BertNormalizer" else normalizer

    return {**data, "normalizer": changed(data.get("normalizer"))}


def add_missing_tokens(raw: RawTokenizer, folder: Path, config: Mapping[str, Any]) -> None:
    """Adds the tokens that tokenizer_config.json or added_tokens.json has and tokenizer.json lacks.

    Raises TokenizerError: one of them would not get the id that its file gives it, or that id has another token.
    """
    listed: dict[int, tuple[AddedToken, str]] = {}
    for text, i in read_object(folder / "added_tokens.json").items():
        if type(i) is int:
            listed[i] = (AddedToken(text, special=False, normalized=False), "added_tokens.json")
    for key, entry in (config.get("added_tokens_decoder") or {}).items():
        if isinstance(entry, dict) and isinstance(entry.get("content"), str) and str(key).isdigit():
            options = {k: entry[k] for k in ("single_word", "lstrip", "rstrip", "normalized", "special") if k in entry}
            listed[int(key)] = (AddedToken(entry["content"], **options), "tokenizer_config.json")
    for i, (token, name) in sorted(listed.items()):
        if raw.token_to_id(token.content) == i:
            continue
        there = raw.id_to_token(i)
        if there is None and raw.token_to_id(token.content) is None:
            raw.add_special_tokens([token]) if token.special else raw.add_tokens([token])
        if raw.token_to_id(token.content) != i:
            got = raw.token_to_id(token.content) if there is None else f'"{there}" there'
            raise TokenizerError(
                f'{folder / name}: token {i} is "{token.content}", tokenizer.json makes it {got}: the two files belong '
                "to different models"
            )


def parse(data: Mapping[str, Any], path: Path) -> RawTokenizer:
    """The library's tokenizer for the content of a tokenizer.json.

    Raises TokenizerError: naming the first component that the library refuses.
    """
    problem = _problem(data)
    if isinstance(problem, RawTokenizer):
        return problem
    for component in _COMPONENTS:
        alone = {**_KNOWN_GOOD, component: data.get(component)}
        reason = _problem(alone)
        if isinstance(reason, str):
            value = data.get(component)
            kind = f' of type "{value["type"]}"' if isinstance(value, dict) and "type" in value else ""
            raise TokenizerError(
                f"{path}: {component}{kind} is not one that tokenizers {tokenizers.__version__} reads "
                f"({reason}): fetch the file again or upgrade tokenizers"
            )
    raise TokenizerError(f"{path}: {problem}: fetch the file again or upgrade tokenizers {tokenizers.__version__}")


def _problem(data: Mapping[str, Any]) -> RawTokenizer | str:
    """The tokenizer, or what the library says is wrong with it."""
    try:
        return RawTokenizer.from_str(json.dumps(data))
    except Exception as error:  # the Rust binding raises plain Exception for every fault of the file
        return " ".join(str(error).split())
    except BaseException as error:
        # A panic in the Rust code (a crafted precompiled_charsmap does it) arrives as pyo3's PanicException,
        # which derives from BaseException and cannot be imported. Everything else (KeyboardInterrupt) goes on
        # its way.
        if type(error).__name__ != "PanicException":
            raise
        return "it panics: " + " ".join(str(error).split())


def special_strings(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Such as {"eos_token": "</s>"}: from `config`, tokenizer_config.json's content, else special_tokens_map.json.

    Raises TokenizerError: a value is neither a string nor an object with content.
    """
    found: dict[str, str] = {}
    special_map = read_object(folder / "special_tokens_map.json")
    for name in SPECIAL_NAMES:
        for file, source in (("tokenizer_config.json", config), ("special_tokens_map.json", special_map)):
            value = source.get(name)
            text = value.get("content") if isinstance(value, dict) else value
            if text is None:
                continue
            if not isinstance(text, str):
                raise TokenizerError(f"{folder / file}: {name} is {value!r}: wanted a string or an object with content")
            found[name] = text
            break
    return found


def token_ids(folder: Path, field: str) -> tuple[int, ...]:
    """`field` (an id or a list of ids) from generation_config.json, else config.json; () when neither has it.

    generation_config.json wins because generation reads it: chat models often list their end-of-turn token
    only there.
    Raises TokenizerError: the value is not an id.
    """
    for name in ("generation_config.json", "config.json"):
        value = read_object(folder / name).get(field)
        if value is None:
            continue
        ids = [i for i in (value if isinstance(value, list) else [value]) if i != -1]
        if not ids:
            continue  # [] and -1 say that there is none
        if any(type(i) is not int or i < 0 for i in ids):
            raise TokenizerError(f"{folder / name}: {field} is {value!r}: wanted a token id or a list of token ids")
        return tuple(ids)
    return ()
