"""Every kind of damaged input through the command line: one line that names the file, status 1, nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from qlorag.recipes.cli.main import main
from safetensors import safe_open
from safetensors.torch import load_file, save_file

CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
GOOD_LINE = json.dumps(CHAT).encode() + b"\n"


@dataclass(frozen=True)
class Place:
    """Copies of whole files, for a case to damage."""

    model: Path
    data: Path
    adapter: Path

    @property
    def config(self) -> Path:
        return self.model / "config.json"

    @property
    def weights(self) -> Path:
        return self.model / "model.safetensors"

    @property
    def rows(self) -> Path:
        return self.data / "train.jsonl"


Damage = Callable[[Place], object]


@pytest.fixture(scope="module")
def whole(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, data and an adapter trained for one step."""
    root = tmp_path_factory.mktemp("whole")
    shutil.copytree(tiny_dir, root / "model")
    (root / "data").mkdir()
    (root / "data" / "train.jsonl").write_bytes(GOOD_LINE * 3)
    assert main([*command("train", root), "--adapter-path", str(root / "adapter")]) == 0
    return root


def command(verb: str, root: Path) -> list[str]:
    shared = [verb, "--model", str(root / "model"), "--dtype", "float32"]
    if verb == "train":
        return [*shared, "--data", str(root / "data"), "--iters", "1", "--batch-size", "1", "--adapter-path",
                str(root / "out")]  # fmt: skip
    return [*shared, "--prompt", "x", "--max-tokens", "2"]


# The damages, by what they do to a file.


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def config(**changes: Any) -> Damage:
    return lambda at: change_json(at.config, **changes)


def template(text: str) -> Damage:
    return lambda at: change_json(at.model / "tokenizer_config.json", chat_template=text)


def tokenizer(**changes: Any) -> Damage:
    return lambda at: change_json(at.model / "tokenizer.json", **changes)


def rows(content: bytes) -> Damage:
    return lambda at: at.rows.write_bytes(content)


def cut(path: Path, by: int) -> None:
    path.write_bytes(path.read_bytes()[:-by])


def index(**weight_map: str) -> Damage:
    """The single weight file becomes a shard behind an index, some of whose entries are wrong."""

    def damage(at: Place) -> None:
        shard = at.weights.rename(at.model / "model-00001-of-00001.safetensors")
        names = dict.fromkeys(load_file(shard), shard.name) | weight_map
        (at.model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))

    return damage


def twice_the_key(at: Place) -> None:
    info = '"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    header = f"{{{info},{info}}}".encode()
    at.weights.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))


def pickle_only(at: Place) -> None:
    at.weights.unlink()
    (at.model / "pytorch_model.bin").write_bytes(b"never opened")


def too_many_tokens(at: Place) -> None:
    path = at.model / "tokenizer.json"
    raw = json.loads(path.read_text())
    vocab = raw["model"]["vocab"]
    vocab["new"] = len(vocab)
    path.write_text(json.dumps(raw))


def no_template(at: Place) -> None:
    path = at.model / "tokenizer_config.json"
    raw = json.loads(path.read_text())
    del raw["chat_template"]
    path.write_text(json.dumps(raw))


def another_base(at: Place) -> None:
    raw = bytearray(at.weights.read_bytes())
    raw[-2] ^= 1
    at.weights.write_bytes(raw)


def adapter_without_a_tensor(at: Place) -> None:
    path = at.adapter / "adapter_model.safetensors"
    with safe_open(path, framework="pt") as f:
        metadata = f.metadata()
    tensors = load_file(path)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, path, metadata=metadata)


SCALED = {"rope_type": "linear", "factor": 2.0}
ADAPTER = "adapter/adapter_model.safetensors"

# name -> (verb, damage, what the message must hold). B2 rows 1, 2 and 4: config.json.
CONFIG: dict[str, tuple[str, Damage, tuple[str, ...]]] = {
    "config missing": ("generate", lambda at: at.config.unlink(), ("config.json", "not found")),
    "config cut short": ("generate", lambda at: cut(at.config, 20), ("config.json", "not JSON")),
    "config not UTF-8": ("generate", lambda at: at.config.write_bytes(b'{"\xff": 1}'), ("config.json", "not JSON")),
    "config is a list": ("generate", lambda at: at.config.write_text("[]"), ("config.json", "wanted an object")),
    "unknown model_type": ("train", config(model_type="gpt9"), ("model_type='gpt9'", "qwen3")),
    "model_type is a list": ("generate", config(model_type=["llama"]), ("model_type=['llama']",)),
    "fewer kv heads": ("train", config(num_key_value_heads=1), ("k_proj.weight", "[32, 64]", "[16, 64]")),
    "kv heads do not divide": ("generate", config(num_key_value_heads=3), ("num_key_value_heads=3",)),
    "other vocabulary": ("generate", config(vocab_size=99), ("embed_tokens.weight", "[99, 64]")),
    "head that is not there": ("generate", config(tie_word_embeddings=False), ("missing lm_head.weight",)),
    "unknown rope": ("generate", config(rope_scaling={"type": "spiral"}), ("rope type 'spiral'",)),
    "unknown activation": ("generate", config(hidden_act="relu"), ("hidden_act='relu'",)),
    "sliding window of 0": (
        "generate",
        config(model_type="mistral", sliding_window=0),
        ("sliding_window=0", "at least 1"),
    ),
    "rope_scaling is a string": ("generate", config(rope_scaling="linear"), ("rope_scaling='linear'", "an object")),
    "rope_parameters is a list": ("generate", config(rope_parameters=["x"]), ("rope_parameters=['x']", "an object")),
    "rope type is a list": ("generate", config(rope_scaling={"type": ["linear"]}), ("rope type ['linear']",)),
    "rope_theta is a string": (
        "generate",
        config(rope_parameters={"rope_type": "default", "rope_theta": "abc"}),
        ("rope_parameters.rope_theta='abc'", "a number above 0"),
    ),
    "rope factor is a string": (
        "generate",
        config(rope_scaling={**SCALED, "factor": "two"}),
        ("rope_scaling.factor='two'", "a number above 0"),
    ),
    "rope factor is 0": (
        "generate",
        config(rope_scaling={**SCALED, "factor": 0}),
        ("rope_scaling.factor=0", "a number above 0"),
    ),
    "rope factor is NaN": ("generate", config(rope_scaling={**SCALED, "factor": float("nan")}), ("factor=nan",)),
    "rope factor of 400 digits": ("generate", config(rope_scaling={**SCALED, "factor": 10**400}), ("factor=1000",)),
    "rope truncate is a number": (
        "generate",
        config(rope_scaling={"type": "yarn", "factor": 2.0, "truncate": 3}),
        ("rope_scaling.truncate=3", "true or false"),
    ),
    "yarn over one position": (
        "generate",
        config(rope_scaling={"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 1}),
        ("original_max_position_embeddings=1", "above 1"),
    ),
    "llama3 without a ramp": (
        "generate",
        config(
            rope_scaling={
                "type": "llama3",
                "factor": 2,
                "low_freq_factor": 4,
                "high_freq_factor": 4,
                "original_max_position_embeddings": 64,
            }
        ),
        ("low_freq_factor=4",),
    ),
    "longrope's factors are numbers": (
        "generate",
        config(rope_scaling={"type": "longrope", "short_factor": 1, "long_factor": 2}),
        ("rope_scaling.short_factor=1", "a list of 8"),
    ),
    "longrope's factors hold a string": (
        "generate",
        config(rope_scaling={"type": "longrope", "short_factor": [1.0] * 8, "long_factor": ["a"] * 8}),
        ("rope_scaling.long_factor=['a'", "a list of 8"),
    ),
    "longrope's factors are too few": (
        "generate",
        config(rope_scaling={"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0]}),
        ("long_factor has 1 entries",),
    ),
    "quantization_config is a string": (
        "generate",
        config(quantization_config="x"),
        ("quantization_config='x'", "an object"),
    ),
    "already quantized": ("generate", config(quantization_config={"quant_method": "gptq"}), ("(gptq)",)),
    "layer_types holds a list": (
        "generate",
        config(model_type="qwen2", use_sliding_window=True, layer_types=[["a"]] * 3),
        ("layer_types must name 3 layers",),
    ),
    "vocab_size of 10^18": ("generate", config(vocab_size=10**18), ("vocab_size=1000000000000000000", "2^40")),
    "vocab_size of 2^39": ("generate", config(vocab_size=2**39), ("vocab_size=549755813888", "2^40")),
    "a million layers": ("generate", config(num_hidden_layers=10**6), ("num_hidden_layers=1000000",)),
    "a thousand layers": ("generate", config(num_hidden_layers=1000), ("num_hidden_layers=1000", "holds 3 layers")),
}

# Rows 3, 5 and 6: weights.
WEIGHTS: dict[str, tuple[str, Damage, tuple[str, ...]]] = {
    "shard outside the folder": (
        "generate",
        index(**{"model.norm.weight": "../x.safetensors"}),
        ("model.safetensors.index.json: model.norm.weight", "'../x.safetensors'"),
    ),
    "shard missing": (
        "train",
        index(**{"model.norm.weight": "model-00002-of-00002.safetensors"}),
        ("index.json", "shards are missing: model-00002-of-00002.safetensors"),
    ),
    "index names a tensor that is nowhere": (
        "generate",
        index(**{"model.extra.weight": "model-00001-of-00001.safetensors"}),
        ("index.json", "model.extra.weight"),
    ),
    "pickle only": ("generate", pickle_only, ("pytorch_model.bin", "convert it to safetensors")),
    "no weights": ("generate", lambda at: at.weights.unlink(), ("no model.safetensors",)),
    "weights cut short": ("train", lambda at: cut(at.weights, 5), ("model.safetensors", "tensors end at byte")),
    "weights with a byte too many": (
        "generate",
        lambda at: at.weights.write_bytes(at.weights.read_bytes() + b"\0"),
        ("model.safetensors", "tensors end at byte"),
    ),
    "header of length 0": (
        "generate",
        lambda at: at.weights.write_bytes(bytes(8)),
        ("model.safetensors", "header is not JSON"),
    ),
    "header with a key twice": ("generate", twice_the_key, ("model.safetensors", "a key appears twice")),
}

# Rows 9, 10, 12 and 13: tokenizer and chat template.
TEXT: dict[str, tuple[str, Damage, tuple[str, ...]]] = {
    "tokenizer missing": ("generate", lambda at: (at.model / "tokenizer.json").unlink(), ("tokenizer.json",)),
    "tokenizer cut short": (
        "generate",
        lambda at: cut(at.model / "tokenizer.json", 9),
        ("tokenizer.json", "not JSON"),
    ),
    "unknown tokenizer model": ("generate", tokenizer(model={"type": "Runes"}), ("tokenizer.json", "model")),
    "unknown normalizer": ("generate", tokenizer(normalizer={"type": "Runes"}), ("tokenizer.json", "normalizer")),
    "eos_token is a number": (
        "generate",
        lambda at: change_json(at.model / "tokenizer_config.json", eos_token=2),
        ("tokenizer_config.json: eos_token is 2",),
    ),
    "eos_token_id is a string": (
        "generate",
        lambda at: change_json(at.model / "generation_config.json", eos_token_id="two"),
        ("generation_config.json: eos_token_id is 'two'",),
    ),
    "chat_template is a number": (
        "generate",
        lambda at: change_json(at.model / "tokenizer_config.json", chat_template=3),
        ("tokenizer_config.json: chat_template is int",),
    ),
    "more tokens than rows": ("train", too_many_tokens, ("tokenizer.json", "has no row")),
    "template that refuses": (
        "generate",
        template("{{ raise_exception('only\nin pairs') }}"),
        ("tokenizer_config.json", "only in pairs"),
    ),
    "template that never ends": (
        "generate",
        template("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"),
        ("tokenizer_config.json", "processor time"),
    ),
    "template that reaches for __class__": (
        "generate",
        template("{{ messages.__class__.__mro__ }}"),
        ("tokenizer_config.json", "__class__"),
    ),
    "template that is no template": ("train", template("{% for %}"), ("tokenizer_config.json",)),
    "no template for a chat": ("train", no_template, ("train.jsonl:1", "chat template")),
}

# Rows 14 and 15: training data.
DATA: dict[str, tuple[str, Damage, tuple[str, ...]]] = {
    "no train.jsonl": ("train", lambda at: at.rows.unlink(), ("train.jsonl",)),
    "empty file": ("train", rows(b""), ("train.jsonl", "no rows")),
    "last line cut short": ("train", rows(GOOD_LINE + GOOD_LINE[:-9]), ("train.jsonl:2", "cut off")),
    "row is a list": ("train", rows(GOOD_LINE + b"[1]\n"), ("train.jsonl:2", "wanted an object")),
    "row without a known key": ("train", rows(GOOD_LINE + b'{"id": 3}\n'), ("train.jsonl:2",)),
    "prompt without completion": ("train", rows(b'{"prompt": "a"}\n'), ("train.jsonl:1", "completion")),
    "NaN": ("train", rows(b'{"text": NaN}\n'), ("train.jsonl:1", "NaN")),
    "not UTF-8": ("train", rows(GOOD_LINE + b'{"text": "\xff"}\n'), ("train.jsonl:2", "UTF-8")),
    "lone surrogate": ("train", rows(b'{"text": "\\ud800"}\n'), ("train.jsonl:1", "surrogate")),
    "key twice": ("train", rows(b'{"text": "a", "text": "b"}\n'), ("train.jsonl:1", "text")),
    "line without end": ("train", rows(b'{"text": "' + b"a" * (33 << 20)), ("train.jsonl:1", "32 MiB")),
    "nothing to learn": (
        "train",
        rows(json.dumps({"messages": [{"role": "user", "content": "hi"}]}).encode() + b"\n"),
        ("train.jsonl",),
    ),
}

# Row 23: adapters.
ADAPTERS: dict[str, tuple[str, Damage, tuple[str, ...]]] = {
    "adapter missing": ("adapter", lambda at: shutil.rmtree(at.adapter), ("adapter: no such folder",)),
    "adapter of another base": ("adapter", another_base, ("adapter", "fingerprint")),
    "adapter without a tensor": ("adapter", adapter_without_a_tensor, (ADAPTER, "missing")),
    "adapter cut short": (
        "adapter",
        lambda at: cut(at.adapter / "adapter_model.safetensors", 3),
        (ADAPTER, "not a readable safetensors file"),
    ),
    "adapter of another rank": (
        "adapter",
        lambda at: change_json(at.adapter / "adapter_config.json", r=3),
        ("adapter", "r=3"),
    ),
    "adapter's config cut short": (
        "adapter",
        lambda at: cut(at.adapter / "adapter_config.json", 9),
        ("adapter/adapter_config.json", "JSON"),
    ),
}

CASES = CONFIG | WEIGHTS | TEXT | DATA | ADAPTERS


@pytest.mark.parametrize("case", CASES)
def test_a_damaged_file_is_one_line_and_writes_nothing(
    case: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verb, damage, words = CASES[case]
    root = tmp_path / "run"
    shutil.copytree(whole, root)
    damage(Place(root / "model", root / "data", root / "adapter"))
    before = contents(tmp_path)
    arguments = command("train" if verb == "train" else "generate", root)
    capsys.readouterr()
    status = main([*arguments, "--adapter-path", str(root / "adapter")] if verb == "adapter" else arguments)
    error = capsys.readouterr().err
    assert status == 1
    assert error.startswith("qlorag: error: ") and error.count("\n") == 1 and error.endswith("\n"), error
    assert str(root) in error and all(word in error for word in words), error
    assert len(error) < 1000  # a line that a terminal can show, whatever the file holds
    assert contents(tmp_path) == before


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder with its size and time of change; a folder's own tell of files that came and went."""
    found = {str(p): p.stat() for p in folder.rglob("*")}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in found.items()}
