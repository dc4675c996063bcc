"""GGUF in, Hugging Face folders out: the same logits, the same ids, and no trust in what a header claims."""

from __future__ import annotations

import json
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from qlorag.models.errors import ConfigError, ModelError, TokenizerError, WeightsError
from qlorag.models.files import gguf_convert
from qlorag.models.files import gguf_read as gguf_file
from qlorag.models.files.gguf_convert import build_tokenizer, convert_gguf, unpermute_rotary
from qlorag.models.files.gguf_read import read_gguf
from tokenizers import Tokenizer, pre_tokenizers

HIDDEN, INNER, LAYERS, HEADS, KV_HEADS = 64, 96, 2, 4, 2
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ hello", "1 2"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"


def vocabulary() -> list[str]:
    """Three control tokens, the 256 bytes as GPT-2 spells them, the merges, and one token of the user's."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return [*SPECIALS, *alphabet, *(merge.replace(" ", "") for merge in MERGES), "<note>"]


def metadata() -> dict[str, Any]:
    tokens = vocabulary()
    return {
        "general.architecture": "llama",
        "llama.context_length": 128,
        "llama.embedding_length": HIDDEN,
        "llama.block_count": LAYERS,
        "llama.feed_forward_length": INNER,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 100000.0,
        "llama.vocab_size": len(tokens),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(tokens) - 4) + [4],
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.chat_template": TEMPLATE,
    }


def write_gguf(
    path: Path, fields: dict[str, Any], tensors: dict[str, Any], kinds: dict[str, Any] | None = None
) -> Path:
    """By the `gguf` library. kinds: name -> quantization type; float32 where not named."""
    writer = gguf.GGUFWriter(path, fields.get("general.architecture", "llama"))
    for key, value in fields.items():
        if key == "general.architecture":
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, value in tensors.items():
        kind = (kinds or {}).get(name, gguf.GGMLQuantizationType.F32)
        data = gguf.quants.quantize(np.ascontiguousarray(value, np.float32), kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def tiny(seed: int = 0, **changes: Any) -> tuple[Any, dict[str, np.ndarray]]:
    """A random transformers model, and its tensors as a GGUF file holds them."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = {
        "vocab_size": len(vocabulary()),
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 128,
        "rope_theta": 100000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        **changes,
    }
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    tensors = {}
    for key, value in model.state_dict().items():
        if key == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        array = value.numpy()
        if "q_proj" in key:
            array = permute(array, config["num_attention_heads"])
        if "k_proj" in key:
            array = permute(array, config["num_key_value_heads"])
        tensors[names.get_name(key, try_suffixes=(".weight",))] = array
    return model, tensors


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", metadata(), tiny()[1])


def test_the_rotary_order_of_one_head_by_hand() -> None:
    # A head of 4 rows has the halves (0, 1) and (2, 3), so (0, 2) and (1, 3) are rotated together: llama.cpp
    # keeps these beside each other. The second head is the first plus 10.
    stored = torch.tensor([0.0, 2, 1, 3, 10, 12, 11, 13])[:, None]
    assert unpermute_rotary(stored, 2).flatten().tolist() == [0, 1, 2, 3, 10, 11, 12, 13]


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        ({}, {}),
        ({"tie_word_embeddings": False}, {}),
        ({"num_key_value_heads": HEADS}, {"llama.attention.head_count_kv": HEADS}),
        ({"head_dim": 8}, {"llama.attention.key_length": 8, "llama.attention.value_length": 8}),
        ({"rope_theta": 500.0}, {"llama.rope.freq_base": 500.0}),
        ({"rms_norm_eps": 0.01}, {"llama.attention.layer_norm_rms_epsilon": 0.01}),
    ],
    ids=["tied", "untied", "no-gqa", "head-dim", "theta", "eps"],
)
def test_a_converted_model_gives_the_original_logits(
    tmp_path: Path, changes: dict[str, Any], fields: dict[str, Any]
) -> None:
    transformers = pytest.importorskip("transformers")
    model, tensors = tiny(**changes)
    path = write_gguf(tmp_path / "m.gguf", metadata() | fields, tensors)
    folder = convert_gguf(path, tmp_path / "out", dtype=torch.float32)
    got = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.arange(3, 35)[None]
    with torch.no_grad():
        assert torch.equal(got(ids).logits, model(ids).logits)  # the very same weights: no tolerance
    assert got.config.pad_token_id == got.config.eos_token_id == 2
    assert got.generation_config.eos_token_id == 2


@pytest.mark.oracle
def test_transformers_reads_the_tokenizer_and_the_template(tmp_path: Path, tiny_gguf: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = convert_gguf(tiny_gguf, tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert (
        tokenizer("hello 12<|im_end|>")["input_ids"]
        == Tokenizer.from_file(str(folder / "tokenizer.json")).encode("hello 12<|im_end|>").ids
    )
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert tokenizer.model_max_length == 128
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert text == "<|im_start|>hello<|im_end|>"


def test_four_bit_blocks_by_hand(tmp_path: Path) -> None:
    # Q4_1: 32 values share a scale d and a minimum m, both float16; byte j: values j (low nibble) and j + 16.
    d, m = 0.5, -1.0
    block = np.frombuffer(np.float16([d, m]).tobytes() + bytes(range(0x00, 0x100, 0x11)), np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "q.gguf", "llama")
    writer.add_tensor("w", np.stack([block] * 3), raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = read_gguf(tmp_path / "q.gguf")
    assert file.tensors["w"].shape == (3, 32)
    row = [d * code + m for code in range(16)] * 2
    assert file.tensor("w", torch.float32).tolist() == [row] * 3


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
@pytest.mark.parametrize("slice_elements", [64, 1 << 22])
def test_each_type_decodes_as_the_gguf_library_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, slice_elements: int
) -> None:
    monkeypatch.setattr(gguf_file, "_SLICE_ELEMENTS", slice_elements)
    values = np.random.default_rng(0).normal(size=(5, 96)).astype(np.float32)
    qtype = gguf.GGMLQuantizationType[kind]
    path = write_gguf(tmp_path / "q.gguf", {}, {"w": values}, {"w": qtype})
    got = read_gguf(path).tensor("w", torch.bfloat16)
    wanted = gguf.quants.dequantize(gguf.GGUFReader(path).tensors[0].data, qtype)
    assert torch.equal(got, torch.from_numpy(np.array(wanted)).bfloat16())


def test_a_large_model_becomes_shards_that_hold_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_gguf: Path
) -> None:
    from safetensors.torch import load_file

    whole = load_file(convert_gguf(tiny_gguf, tmp_path / "one") / "model.safetensors")
    monkeypatch.setattr(gguf_convert, "_SHARD_BYTES", 40_000)
    folder = convert_gguf(tiny_gguf, tmp_path / "many")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(files) > 2 and sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole.values())
    parts = {name: load_file(folder / name) for name in files}
    assert index["weight_map"].keys() == whole.keys()
    for name, file in index["weight_map"].items():
        assert torch.equal(parts[file][name], whole[name])
    # Only a tensor that is larger than a shard by itself may exceed it.
    assert all(len(part) == 1 or sum(t.nbytes for t in part.values()) <= 40_000 for part in parts.values())


def test_progress_counts_every_tensor(tmp_path: Path, tiny_gguf: Path) -> None:
    seen: list[tuple[int, int]] = []
    convert_gguf(tiny_gguf, tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    count = 2 + 9 * LAYERS
    assert seen == [(done, count) for done in range(1, count + 1)]


# The tokenizer


def tokenizer_of(tmp_path: Path, **changes: Any) -> Tokenizer:
    fields = metadata() | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    return build_tokenizer(read_gguf(write_gguf(tmp_path / "t.gguf", fields, {"w": np.zeros((1, 32))})))


def test_smollm_splits_every_digit_and_gpt2_does_not(tmp_path: Path) -> None:
    smollm = tokenizer_of(tmp_path)
    assert smollm.encode("hello hello12").tokens == ["hello", "Ġhello", "1", "2"]
    assert tokenizer_of(tmp_path, pre="gpt-2").encode("hello hello12").tokens == ["hello", "Ġhello", "12"]


def test_control_tokens_are_special_and_the_users_are_not(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path)
    ids = tokenizer.encode("<|im_start|>hello<note><|im_end|>").ids
    assert [tokenizer.id_to_token(i) for i in ids] == ["<|im_start|>", "hello", "<note>", "<|im_end|>"]
    assert tokenizer.decode(ids) == "hello<note>"
    added = tokenizer.get_added_tokens_decoder()
    assert {token.content: token.special for token in added.values()} == {
        **dict.fromkeys(SPECIALS, True),
        "<note>": False,
    }


def test_bos_is_put_in_front_only_when_the_file_says_so(tmp_path: Path) -> None:
    assert tokenizer_of(tmp_path).encode("hello").tokens == ["hello"]
    assert tokenizer_of(tmp_path, add_bos_token=True).encode("hello").tokens == ["<|im_start|>", "hello"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=40))
def test_any_text_survives_the_round_trip(tmp_path: Path, text: str) -> None:
    tokenizer = tokenizer_of(tmp_path)
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


# Files that must be refused

BAD_FIELDS = [
    ({"general.architecture": "qwen2"}, ConfigError, "general.architecture='qwen2'"),
    ({"llama.embedding_length": 0}, ConfigError, "llama.embedding_length=0"),
    ({"llama.embedding_length": "64"}, ConfigError, "llama.embedding_length is '64'"),
    ({"llama.attention.head_count_kv": 3}, ConfigError, "over 3 kv heads"),
    ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, ConfigError, "layer_norm_rms_epsilon=nan"),
    ({"llama.rope.freq_base": float("inf")}, ConfigError, "rope.freq_base=inf"),
    ({"llama.rope.scaling.type": "yarn"}, ConfigError, "llama.rope.scaling.type='yarn'"),
    ({"llama.rope.dimension_count": 8}, ConfigError, "llama.rope.dimension_count=8"),
    ({"llama.expert_count": 8}, ConfigError, "llama.expert_count=8"),
    ({"llama.vocab_size": 7}, ConfigError, "llama.vocab_size=7"),
    ({"llama.block_count": 2**31}, WeightsError, "llama.block_count=2147483648"),
    ({"llama.feed_forward_length": 32}, WeightsError, r"ffn_gate.weight is \[96, 64\], expected \[32, 64\]"),
    ({"tokenizer.ggml.model": "llama"}, TokenizerError, "tokenizer.ggml.model='llama'"),
    ({"tokenizer.ggml.pre": "tekken"}, TokenizerError, "tokenizer.ggml.pre='tekken'"),
    ({"tokenizer.ggml.tokens": [1, 2]}, ConfigError, "tokenizer.ggml.tokens does not hold strings"),
    ({"tokenizer.ggml.merges": ["h zz"]}, TokenizerError, r"merges\[0\]='h zz'"),
    ({"tokenizer.ggml.merges": ["h e l"]}, TokenizerError, r"merges\[0\]='h e l'"),
    ({"tokenizer.ggml.token_type": [1]}, TokenizerError, "1 in tokenizer.ggml.token_type"),
    ({"tokenizer.ggml.token_type": [6] * len(vocabulary())}, TokenizerError, "has type 6"),
    ({"tokenizer.ggml.eos_token_id": 9999}, TokenizerError, "eos_token_id=9999"),
]


@pytest.mark.parametrize(("fields", "error", "named"), BAD_FIELDS, ids=lambda value: str(value)[:40])
def test_metadata_that_cannot_be_converted_is_named(
    tmp_path: Path, fields: dict[str, Any], error: type[Exception], named: str
) -> None:
    path = write_gguf(tmp_path / "bad.gguf", metadata() | fields, tiny()[1])
    with pytest.raises(error, match=named) as caught:
        convert_gguf(path, tmp_path / "out")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()  # nothing is written before everything but the data was checked


REQUIRED = [
    "llama.context_length",
    "llama.embedding_length",
    "llama.block_count",
    "llama.feed_forward_length",
    "llama.attention.head_count",
    "llama.attention.layer_norm_rms_epsilon",
    "tokenizer.ggml.model",
    "tokenizer.ggml.pre",
    "tokenizer.ggml.tokens",
    "tokenizer.ggml.merges",
]


@pytest.mark.parametrize("key", REQUIRED)
def test_missing_metadata_is_named(tmp_path: Path, key: str) -> None:
    fields = metadata()
    del fields[key]
    path = write_gguf(tmp_path / "bad.gguf", fields, tiny()[1])
    with pytest.raises(ConfigError, match=f"{path}: {key} is missing"):
        convert_gguf(path, tmp_path / "out")


def test_missing_unexpected_and_unusable_tensors_are_named(tmp_path: Path) -> None:
    tensors = tiny()[1]
    short = {name: value for name, value in tensors.items() if name != "blk.1.attn_v.weight"} | {
        "blk.0.x": tensors["output_norm.weight"]
    }
    with pytest.raises(WeightsError, match=r"1 tensors missing: blk\.1\.attn_v\.weight"):
        convert_gguf(write_gguf(tmp_path / "a.gguf", metadata(), short), tmp_path / "out")
    extra = tensors | {"rope_freqs.weight": np.ones(8)}
    with pytest.raises(WeightsError, match=r"1 tensors unexpected: rope_freqs\.weight"):
        convert_gguf(write_gguf(tmp_path / "b.gguf", metadata(), extra), tmp_path / "out")
    damaged = tensors | {"blk.0.ffn_up.weight": np.full((INNER, HIDDEN), np.nan)}
    with pytest.raises(WeightsError, match=r"blk\.0\.ffn_up\.weight holds NaN or inf"):
        convert_gguf(write_gguf(tmp_path / "c.gguf", metadata(), damaged), tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()  # cut short: no loader takes it for a model


def test_a_model_is_not_written_over(tmp_path: Path, tiny_gguf: Path) -> None:
    convert_gguf(tiny_gguf, tmp_path)
    with pytest.raises(ModelError, match="already holds a model"):
        convert_gguf(tiny_gguf, tmp_path)


def test_a_file_that_is_not_gguf_is_said_to_be_none(tmp_path: Path) -> None:
    for content in (b"", b"GGU", b"PK\x03\x04 a zip"):
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(ModelError, match="not a GGUF file"):
            read_gguf(tmp_path / "x")
    with pytest.raises(ModelError, match="cannot be read: No such file"):
        read_gguf(tmp_path / "absent.gguf")


def header(*parts: bytes, version: int = 3, tensors: int = 0, fields: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, fields) + b"".join(parts) + bytes(64)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


HUGE = 2**64 - 1
LIES = {
    "version 1": (header(version=1), "version 1"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version 50331648"),
    "tensor count": (header(tensors=HUGE), "18446744073709551615 tensors"),
    "field count": (header(fields=2**61), "metadata entries"),
    "key length": (
        header(struct.pack("<Q", HUGE), fields=1),
        "metadata entry 0 claims 18446744073709551615 bytes",
    ),
    "string length": (
        header(text("k"), struct.pack("<IQ", 8, HUGE), fields=1),
        "k claims 18446744073709551615 bytes",
    ),
    "array length": (
        header(text("k"), struct.pack("<IIQ", 9, 4, 2**62), fields=1),
        "k claims 4611686018427387904 values",
    ),
    "empty strings": (
        header(text("k"), struct.pack("<IIQ", 9, 8, 2**40), fields=1),
        "k claims 1099511627776 strings",
    ),
    "nested array": (header(text("k"), struct.pack("<IIQ", 9, 9, 1), fields=1), "k has value type 9"),
    "value type": (header(text("k"), struct.pack("<I", 77), fields=1), "k has value type 77"),
    "not text": (header(struct.pack("<Q", 1), b"\xff", fields=1), "not UTF-8"),
    "twice": (header(*[text("k") + struct.pack("<IB", 0, 1)] * 2, fields=2), "k appears twice"),
    "alignment": (
        header(text("general.alignment"), struct.pack("<II", 4, 0), fields=1),
        "general.alignment=0",
    ),
    "dims": (header(text("w"), struct.pack("<I", 2**31), tensors=1), "w has 2147483648 dims"),
    # 2^32 x 2^32 elements: zero in 64-bit arithmetic, and then "fits" in any file.
    "overflow": (
        header(text("w"), struct.pack("<IQQIQ", 2, 2**32, 2**32, 0, 0), tensors=1),
        "w ends at byte 7378",
    ),
    "offset": (header(text("w"), struct.pack("<IQIQ", 1, 4, 0, HUGE), tensors=1), "w ends at byte 1844"),
    "tensor type": (header(text("w"), struct.pack("<IQIQ", 1, 4, 99, 0), tensors=1), "w has type 99"),
    "half a block": (
        header(text("w"), struct.pack("<IQIQ", 1, 33, 8, 0), tensors=1),
        r"w \[33\] is not whole blocks of 32",
    ),
    "no elements": (
        header(text("w"), struct.pack("<IQIQ", 1, 0, 0, 0), tensors=1),
        r"w \[0\] is not whole blocks",
    ),
}


@pytest.mark.parametrize(("content", "named"), LIES.values(), ids=LIES.keys())
def test_a_count_that_lies_is_refused_before_anything_is_allocated(tmp_path: Path, content: bytes, named: str) -> None:
    path = tmp_path / "lies.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        begun = time.process_time()
        with pytest.raises(ModelError, match=named):
            read_gguf(path)
        assert time.process_time() - begun < 5  # a loop over 2^40 entries would not end
        assert tracemalloc.get_traced_memory()[1] < 2**20  # the files are below 200 bytes
    finally:
        tracemalloc.stop()


def test_cut_anywhere_it_is_refused(tmp_path: Path, tiny_gguf: Path) -> None:
    whole = tiny_gguf.read_bytes()
    data_bytes = sum(tensor.nbytes for tensor in read_gguf(tiny_gguf).tensors.values())
    path = tmp_path / "cut.gguf"
    for length in [*range(0, len(whole) - data_bytes, 101), len(whole) - data_bytes // 2, len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(ModelError, match=r"cut short or damaged|not a GGUF file"):
            read_gguf(path)


@pytest.mark.parametrize("name", [b"general.architecture", b"token_embd.weight"])  # a key, a tensor
def test_a_name_with_control_characters_is_refused_in_one_line(tmp_path: Path, tiny_gguf: Path, name: bytes) -> None:
    content = tiny_gguf.read_bytes()
    assert content.count(name) == 1
    (tmp_path / "f.gguf").write_bytes(content.replace(name, b"\n" + name[1:]))
    with pytest.raises(
        ModelError, match=r"f.gguf: (metadata|tensor) entry \d+ is called '\\n.*not printable"
    ) as caught:
        convert_gguf(tmp_path / "f.gguf", tmp_path / "out")
    assert "\n" not in str(caught.value) and "\\n" in str(caught.value)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flips=st.lists(st.tuples(st.integers(4, 9000), st.integers(0, 255)), min_size=1, max_size=3))
def test_bytes_flipped_anywhere_give_a_model_or_a_model_error(
    tmp_path_factory: pytest.TempPathFactory, tiny_gguf: Path, flips: list[tuple[int, int]]
) -> None:
    content = bytearray(tiny_gguf.read_bytes())
    for at, byte in flips:
        content[at] = byte
    folder = tmp_path_factory.mktemp("flipped")
    (folder / "f.gguf").write_bytes(content)
    try:
        convert_gguf(folder / "f.gguf", folder / "out")
    except ModelError as error:
        assert "f.gguf" in str(error) and "\n" not in str(error)
    else:
        Tokenizer.from_file(str(folder / "out" / "tokenizer.json"))
        json.loads((folder / "out" / "config.json").read_text(), parse_constant=pytest.fail)


# The real model

# llama.cpp and transformers agree on these for SmolLM2.
GOLDEN = [
    ("Who is Patroclos Lemoniatis?", "10576 314 4209 291 9638 39701 6598 271 47"),
    (
        "The year 2024 had 366 days, 1234567890.",
        "504 713 216 34 32 34 36 761 216 35 38 38 2009 28 216 33 34 35 36 37 38 39 40 41 32 30",
    ),
    ("  two  spaces\n\nnewlines\t tab", "216 827 216 5600 198 198 2241 5110 197 10147"),
    (
        "na\u00efve caf\u00e9 \u03a9\u03bc\u03ad\u03b3\u03b1 \u4f60\u597d \U0001f642\U0001f642",
        "3546 46494 37366 5664 119 16674 34075 23098 8998 216 18645 250 48392 138 47526 10813 38887",
    ),
    ("def f(x):\n    return x**2  # comment", "1604 275 24 104 727 472 1003 1792 828 34 216 907 5189"),
    ("<|im_start|>user\nhi<|im_end|>\n", "1 4093 198 6004 2 198"),
    ("a1b22c333", "81 33 82 34 34 83 35 35 35"),
    ("\u200d\u0301\u00e9", "321 231 151 219 2756"),
]


@pytest.mark.model
@pytest.mark.parametrize(("string", "ids"), GOLDEN, ids=range(len(GOLDEN)))
def test_smollm2_golden_ids(smollm2_dir: Path, string: str, ids: str) -> None:
    tokenizer = Tokenizer.from_file(str(smollm2_dir / "tokenizer.json"))
    wanted = [int(token) for token in ids.split()]
    assert tokenizer.encode(string).ids == wanted
    assert tokenizer.decode(wanted, skip_special_tokens=False) == string


@pytest.mark.model
@pytest.mark.oracle
def test_smollm2_answers_in_transformers(smollm2_dir: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2_dir)
    for string, ids in GOLDEN:
        assert tokenizer(string)["input_ids"] == [int(token) for token in ids.split()]
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2_dir).eval()
    assert model.dtype == torch.bfloat16 and model.config.rms_norm_eps == 1e-5
    assert model.lm_head.weight is model.model.embed_tokens.weight

    def answer(question: str) -> str:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        out = model.generate(**prompt, max_new_tokens=16, do_sample=False)
        return str(tokenizer.decode(out[0, prompt["input_ids"].shape[1] :]))

    assert answer("What is the capital of France?") == "The capital of France is Paris.<|im_end|>"
    # It has not heard of him and makes something up, in good English; q and k out of order give word salad.
    assert answer("Who is Patroclos Lemoniatis?").startswith("Patroclos Lemoniatis is a")
