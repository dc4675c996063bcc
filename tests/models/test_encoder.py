"""The encoder against hand-worked numbers, transformers, sentence-transformers, and damaged folders."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qlorag.models.encoder.bert import encoder_config
from qlorag.models.encoder.encoder import Encoder, _batches, load_encoder
from qlorag.models.encoder.pooling import MODES, Pooling
from qlorag.models.errors import ConfigError, ModelError, TokenizerError, WeightsError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

pytestmark = pytest.mark.isa

WORDS = ["the", "cat", "dog", "sat", "ran", "on", "mat", "a", "query", ":", "red", "blue", "12", "x"]
TEXTS = [
    "",
    "the cat sat on the mat",
    "a",
    "blue dog ran",
    "red",
    "query : the dog",
    "unknown words here 12 x",
    "a a a a",
]


def edit(path: Path, **changes: Any) -> None:
    """Sets keys of a JSON file; a value of ... removes the key."""
    data = json.loads(path.read_text()) if path.exists() else {}
    data = {k: v for k, v in (data | changes).items() if v is not ...}
    path.write_text(json.dumps(data))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path)


def make_folder(folder: Path, family: str = "bert", **config: Any) -> Path:
    """A plain transformers folder: tiny random model, word-level tokenizer with [CLS] text [SEP]."""
    import transformers

    specials = ["<s>", "<pad>", "</s>", "<unk>"]  # pad is 1, as in RoBERTa's family
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(specials + WORDS)}, unk_token="<unk>"))
    raw.normalizer, raw.pre_tokenizer = normalizers.NFC(), pre_tokenizers.Whitespace()
    raw.add_special_tokens(specials)
    raw.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    names = {"cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=raw, model_max_length=24, **names).save_pretrained(folder)

    torch.manual_seed(0)
    cls = {
        "bert": (transformers.BertConfig, transformers.BertModel),
        "roberta": (transformers.RobertaConfig, transformers.RobertaModel),
        "xlm-roberta": (transformers.XLMRobertaConfig, transformers.XLMRobertaModel),
        "camembert": (transformers.CamembertConfig, transformers.CamembertModel),
    }[family]
    defaults = {
        "vocab_size": len(specials + WORDS),
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 26,
        "initializer_range": 0.2,
        "pad_token_id": 1,
    }
    model = cls[1](cls[0](**{**defaults, **config}))
    for (
        name,
        p,
    ) in model.named_parameters():  # fresh norms are all ones and biases all zeros: nothing to get wrong
        if p.dim() == 1:
            torch.nn.init.normal_(p, mean=float(name.endswith("LayerNorm.weight")), std=0.2)
    model.save_pretrained(folder)
    return folder


def add_sentence_files(folder: Path, pooling: dict[str, Any], *, normalize: bool = True, **prompts: Any) -> Path:
    kinds = ["Transformer", "Pooling"] + ["Normalize"] * normalize
    modules = [
        {
            "idx": i,
            "name": str(i),
            "path": f"{i}_{kind}" if i else "",
            "type": f"sentence_transformers.models.{kind}",
        }
        for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    edit(folder / "1_Pooling/config.json", **pooling)
    edit(folder / "config_sentence_transformers.json", **prompts)
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("plain"))


@pytest.fixture
def folder(plain: Path, tmp_path: Path) -> Path:
    """A sentence-transformers folder of one's own, mean pooling and normalisation."""
    shutil.copytree(plain, tmp_path / "m")
    return add_sentence_files(tmp_path / "m", {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True})


@pytest.fixture(scope="module")
def encoder(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    copy = tmp_path_factory.mktemp("shared") / "m"
    shutil.copytree(plain, copy)
    return load_encoder(add_sentence_files(copy, {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}))


def sentence_transformer(folder: Path) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu")


# --- pooling


def test_pooling_by_hand() -> None:
    hidden = torch.tensor([[[1.0, 8.0], [2.0, -4.0], [6.0, 2.0], [3.0, 6.0]]])  # one text of four tokens
    expected = {
        "cls": [1, 8],
        "lasttoken": [3, 6],
        "max": [6, 8],
        "mean": [3, 3],  # 12/4, 12/4
        "mean_sqrt_len_tokens": [6, 6],  # 12/sqrt(4)
        "weightedmean": [3.5, 3.0],  # (1 + 4 + 18 + 12)/10, (8 - 8 + 6 + 24)/10
    }
    assert expected.keys() == set(MODES)
    for mode, vector in expected.items():
        torch.testing.assert_close(Pooling((mode,))(hidden), torch.tensor([vector], dtype=torch.float32))
    both = Pooling(("max", "cls"))(hidden)
    assert both.tolist() == [[6, 8, 1, 8]]


def test_pooling_leaves_the_prompt_out() -> None:
    hidden = torch.tensor([[[1.0], [2.0], [6.0], [4.0]]])
    assert Pooling(("mean",))(hidden, skip=2).tolist() == [[5]]
    assert Pooling(("cls",))(hidden, skip=2).tolist() == [[6]]
    # Places 3 and 4 of the whole text: (3 * 6 + 4 * 4) / 7.
    torch.testing.assert_close(Pooling(("weightedmean",))(hidden, skip=2), torch.tensor([[34 / 7]]))
    assert Pooling(("mean",))(hidden, skip=9).tolist() == [[4]]  # never an empty mean


# --- the network, against transformers


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("bert", {}),
        ("bert", {"hidden_act": "gelu_new", "type_vocab_size": 1, "layer_norm_eps": 1e-3}),
        ("roberta", {"type_vocab_size": 1}),
        ("xlm-roberta", {"hidden_act": "gelu_pytorch_tanh"}),
        ("camembert", {"pad_token_id": 1}),
    ],
)
def test_token_vectors_equal_transformers(tmp_path: Path, family: str, config: dict[str, Any]) -> None:
    from transformers import AutoModel

    make_folder(tmp_path, family, **config)
    ours = load_encoder(tmp_path, dtype=torch.float64)
    theirs = AutoModel.from_pretrained(tmp_path, dtype=torch.float64, add_pooling_layer=False).eval()
    # Two of one length, one longer, one that holds the pad token: packed here, one by one there.
    rows = [
        np.array([0, 5, 6, 2]),
        np.array([0, 9, 9, 2]),
        np.array([0, *range(4, 17), 2]),
        np.array([0, 1, 7, 1, 8, 2]),
    ]
    positions = np.concatenate([ours._positions(row) for row in rows])
    with torch.inference_mode():
        packed = ours(torch.from_numpy(np.concatenate(rows)), torch.from_numpy(positions), [(2, 4), (1, 15), (1, 6)])
        expected = torch.cat([theirs(torch.from_numpy(row)[None]).last_hidden_state[0] for row in rows])
    # float64, values of order 1, two layers: what is left is the order of summation.
    torch.testing.assert_close(packed, expected, rtol=0, atol=1e-12)


def test_old_names_load_alike(plain: Path, tmp_path: Path) -> None:
    def age(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        def rename(name: str) -> str:
            name = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            return f"bert.{name}"

        out = {rename(name): tensor for name, tensor in tensors.items()}
        out["bert.embeddings.position_ids"] = torch.arange(26)[None]
        out["cls.predictions.bias"] = torch.zeros(18)
        return out

    shutil.copytree(plain, tmp_path / "m")
    edit_tensors(tmp_path / "m", age)
    assert "bert.encoder.layer.0.output.LayerNorm.gamma" in load_file(tmp_path / "m/model.safetensors")
    np.testing.assert_array_equal(load_encoder(tmp_path / "m").encode(TEXTS), load_encoder(plain).encode(TEXTS))


# --- whole folders, against sentence-transformers

_OLD = {"word_embedding_dimension": 32, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": False}


@pytest.mark.oracle
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    "pooling",
    [
        _OLD | {"pooling_mode_cls_token": True},
        _OLD | {"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True, "pooling_mode_cls_token": True},
        _OLD,  # none set
        {"embedding_dimension": 32, "pooling_mode": "mean_sqrt_len_tokens", "include_prompt": True},
        {"embedding_dimension": 32, "pooling_mode": ["weightedmean", "lasttoken"], "include_prompt": False},
        {"embedding_dimension": 32, "pooling_mode": ["max", "mean", "cls"], "include_prompt": False},
    ],
)
def test_sentence_vectors_equal_the_oracle(
    plain: Path, tmp_path: Path, pooling: dict[str, Any], normalize: bool
) -> None:
    folder = tmp_path / "m"
    shutil.copytree(plain, folder)
    prompts = {"query": "query : ", "other": "red blue "}
    add_sentence_files(folder, pooling, normalize=normalize, prompts=prompts, default_prompt_name="other")
    ours, theirs = load_encoder(folder), sentence_transformer(folder)
    assert ours.dim == theirs.get_embedding_dimension()
    for options in ({}, {"prompt_name": "query"}, {"prompt": "the cat "}, {"prompt": ""}):
        # float32 over two layers with values up to about 4.
        np.testing.assert_allclose(ours.encode(TEXTS, **options), theirs.encode(TEXTS, **options), atol=5e-6)


@pytest.mark.oracle
def test_newly_saved_folder_and_plain_folder(plain: Path, tmp_path: Path) -> None:
    theirs = sentence_transformer(plain)  # no modules.json: it adds mean pooling
    np.testing.assert_allclose(load_encoder(plain).encode(TEXTS), theirs.encode(TEXTS), atol=5e-6)
    theirs.save(str(tmp_path / "new"))
    assert "models.Pooling" not in (tmp_path / "new/modules.json").read_text()  # its class paths have moved
    np.testing.assert_allclose(load_encoder(tmp_path / "new").encode(TEXTS), theirs.encode(TEXTS), atol=5e-6)


@pytest.mark.oracle
def test_lower_case_from_the_sentence_file(folder: Path) -> None:
    edit(folder / "sentence_bert_config.json", do_lower_case=True, max_seq_length=7)
    texts = ["The CAT sat on the mat and more", "the cat"]
    np.testing.assert_allclose(
        load_encoder(folder).encode(texts), sentence_transformer(folder).encode(texts), atol=5e-6
    )


@pytest.mark.oracle
@pytest.mark.model
@pytest.mark.parametrize(("kind", "changes"), [("BertTokenizer", True), ("PreTrainedTokenizerFast", False)])
def test_lower_case_that_contradicts_the_normalizer(minilm_dir: Path, tmp_path: Path, kind: str, changes: bool) -> None:
    """transformers' BertTokenizer follows tokenizer_config.json, its other classes tokenizer.json."""
    shutil.copytree(minilm_dir, tmp_path / "cased")
    edit(tmp_path / "cased" / "tokenizer_config.json", do_lower_case=False, tokenizer_class=kind)
    texts = ["Berlin and PARIS", "berlin and paris"]
    ours = load_encoder(tmp_path / "cased").encode(texts)
    np.testing.assert_allclose(ours, sentence_transformer(tmp_path / "cased").encode(texts), atol=1e-5)
    assert (abs(ours[0] - ours[1]).max() > 0.01) == changes


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("transformer_task", "fill-mask"),
        ("processing_kwargs", {"text": {"max_length": 6}}),
        ("modality_config", {"text": {"method": "forward", "method_output_name": ["hidden_states", -2]}}),
        ("document_length", 6),
        ("something_new", True),
    ],
)
def test_a_setting_that_may_change_the_vectors_is_refused(folder: Path, key: str, value: Any) -> None:
    edit(folder / "sentence_bert_config.json", **{key: None})
    load_encoder(folder)
    edit(folder / "sentence_bert_config.json", **{key: value})
    with pytest.raises(ConfigError, match=f"sentence_bert_config.json: {key}=.* is not implemented"):
        load_encoder(folder)


def varied_texts() -> list[str]:
    """200 texts: ordinary words, and all that tokenizers stumble over."""
    rng = random.Random(0)
    docs = " ".join(str(getattr(random.Random, n).__doc__) for n in sorted(dir(random.Random))).split()
    special = [
        "", " ", "\n\t", "a", ".", "hello world", "HELLO World", "naïve café Ωμέγα", "你好，世界",
        "日本語のテキスト", "🙂🙂", "👩\u200d👩\u200d👧", "e\u0301 \u00e9", "\u200b", "a\x00b",
        "def f(x):\n    return x**2  # comment",
        "3.14159 -1e-7 0x7f 1,234,567", "[SEP] in the middle [CLS]", "x" * 5000, "word " * 1000, "ß ﬁ ﬃ",
        "مرحبا بالعالم", "<|im_start|>user", "http://a.b/c?d=e&f=%20", "\U0001d4d7\U0001d4ee",
    ]  # fmt: skip
    lengths = [rng.randint(1, 60) if i % 10 else rng.randint(60, 300) for i in range(200 - len(special))]
    return special + [" ".join(rng.choices(docs, k=n)) for n in lengths]


@pytest.mark.model
def test_golden(minilm_dir: Path) -> None:
    vector = load_encoder(minilm_dir).encode(["hello world"])[0]
    golden = [-0.0344772, 0.0310232, 0.0067350, 0.0261090]  # sentence-transformers 6.2, seven decimals
    np.testing.assert_allclose(vector[:4], golden, atol=2e-7)


@pytest.mark.model
@pytest.mark.oracle
def test_minilm_equals_sentence_transformers(minilm_dir: Path) -> None:
    texts = varied_texts()
    ours, theirs = load_encoder(minilm_dir), sentence_transformer(minilm_dir)
    a, b = ours.encode(texts), theirs.encode(texts)
    assert a.dtype == np.float32
    assert a.shape == (200, 384)
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert cosine.min() >= 0.99999
    np.testing.assert_allclose(np.linalg.norm(a, axis=1), 1, atol=1e-6)


@pytest.mark.model
def test_a_vector_hardly_depends_on_its_batch(minilm_dir: Path) -> None:
    encoder = load_encoder(minilm_dir)
    texts = varied_texts()[::3][:64]
    assert len({len(i) for i in encoder.tokenize(texts)}) > 20  # mixed lengths
    whole = encoder.encode(texts, max_batch_tokens=1 << 20)
    for size in (1, 7):
        parts = np.concatenate([encoder.encode(texts[i : i + size]) for i in range(0, 64, size)])
        assert np.abs(parts - whole).max() <= 1e-6


@pytest.mark.model
def test_minilm_limits_come_from_the_right_file(minilm_dir: Path) -> None:
    encoder = load_encoder(minilm_dir)
    assert (encoder.dim, encoder.max_tokens, encoder.num_special) == (384, 256, 2)
    assert [len(i) for i in encoder.tokenize(["cat " * 400, "cat"])] == [256, 3]  # not 128, and no padding
    assert encoder.count_tokens(["cat " * 400, "", "cat"]) == [400, 0, 1]
    assert encoder.count_tokens("hello world") == 2
    a, b = encoder.encode(["cat " * 254 + "dog", "cat " * 254])
    np.testing.assert_allclose(a, b, atol=1e-6)  # what lies past 256 does not count
    assert len(encoder.tokenize(["q" * 1_000_000])[0]) == 3  # one unknown word, in linear time


@pytest.mark.model
@pytest.mark.oracle
def test_bfloat16_stays_close(minilm_dir: Path) -> None:
    texts = varied_texts()[:40]
    a = load_encoder(minilm_dir, dtype=torch.bfloat16).encode(texts)
    b = load_encoder(minilm_dir).encode(texts)
    assert a.dtype == np.float32
    assert (a * b).sum(1).min() > 0.999  # 8 bits of mantissa, six layers


# --- encode


def test_order_and_batches(encoder: Encoder) -> None:
    seen: list[tuple[int, int]] = []
    whole = encoder.encode(TEXTS, max_batch_tokens=12, progress=lambda done, total: seen.append((done, total)))
    assert [total for _, total in seen] == [len(TEXTS)] * len(seen)
    assert len(seen) > 2
    assert seen[-1][0] == len(TEXTS)
    for text, vector in zip(TEXTS, whole, strict=True):
        np.testing.assert_allclose(encoder.encode([text])[0], vector, atol=1e-6)
    assert len({v.tobytes() for v in whole}) == len(TEXTS)  # the texts differ, and so do their vectors


def test_no_texts(encoder: Encoder) -> None:
    assert encoder.encode([]).shape == (0, 32)
    assert encoder.count_tokens([]) == []


@given(st.lists(st.integers(1, 300), max_size=60), st.integers(1, 1000))
def test_batches_hold_every_text_once(lengths: list[int], budget: int) -> None:
    batches = list(_batches(lengths, budget))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert batch
        assert len(batch) == 1 or sum(lengths[i] for i in batch) <= budget
    flat = [lengths[i] for batch in batches for i in batch]
    assert flat == sorted(flat, reverse=True)


@settings(max_examples=50, deadline=None)
@given(texts=st.lists(st.text(max_size=60), min_size=1, max_size=5))
def test_any_text_gets_a_unit_vector(encoder: Encoder, texts: list[str]) -> None:
    np.testing.assert_allclose(np.linalg.norm(encoder.encode(texts), axis=1), 1, atol=1e-5)
    assert encoder.count_tokens(texts) == [encoder.count_tokens(text) for text in texts]


def test_texts_that_are_refused(encoder: Encoder) -> None:
    with pytest.raises(TypeError, match="one string, wanted a list"):
        encoder.encode("the cat")
    with pytest.raises(TypeError, match=r"texts\[1\] is bytes"):
        encoder.encode(["a", b"b"])  # type: ignore[list-item]
    for call in (encoder.encode, encoder.count_tokens):
        with pytest.raises(TokenizerError, match=r"text 1: character 2 is the lone surrogate U\+D800"):
            call(["fine", "ab\ud800"])


def test_prompts_that_are_refused(folder: Path, plain: Path) -> None:
    edit(folder / "config_sentence_transformers.json", prompts={"query": "query : "})
    edit(folder / "1_Pooling/config.json", include_prompt=False)
    encoder = load_encoder(folder)
    with pytest.raises(ConfigError, match=r"prompt_name='passage' is not one of .*\['query'\]"):
        encoder.encode(["a"], prompt_name="passage")
    with pytest.raises(ConfigError, match="both given"):
        encoder.encode(["a"], prompt_name="query", prompt="x")
    for refusing in (
        encoder,
        load_encoder(plain),
    ):  # whether or not the prompt is pooled: no text would be left
        with pytest.raises(TokenizerError, match=r"the prompt has 24 tokens.*max_tokens=24"):
            refusing.encode(["a"], prompt="cat " * 23)


def test_damaged_weights_are_noticed(folder: Path) -> None:
    def poke(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors["embeddings.word_embeddings.weight"][5] = torch.nan  # "cat"
        return tensors

    edit_tensors(folder, poke)
    encoder = load_encoder(folder)
    encoder.encode(["the dog"])
    with pytest.raises(WeightsError, match=r"text 1 \(1 of 3\).*NaN"):
        encoder.encode(["dog", "the cat", "a"])


def test_fingerprint_names_what_decides_a_vector(plain: Path, tmp_path: Path) -> None:
    def fingerprint(name: str, change: Callable[[Path], None]) -> str:
        copy = tmp_path / name
        shutil.copytree(plain, copy)
        add_sentence_files(copy, {"embedding_dimension": 32, "pooling_mode": "mean"})
        change(copy)
        return load_encoder(copy).fingerprint

    def poke(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors["encoder.layer.1.output.dense.weight"][0, 0] += 1
        return tensors

    changes: dict[str, Callable[[Path], None]] = {
        "same": lambda f: None,
        "weights": lambda f: edit_tensors(f, poke),
        "tokenizer": lambda f: edit(f / "tokenizer.json", normalizer=None),
        "pooling": lambda f: edit(f / "1_Pooling/config.json", pooling_mode="cls"),
        "prompts": lambda f: edit(f / "config_sentence_transformers.json", prompts={"query": "q"}),
        "length": lambda f: edit(f / "sentence_bert_config.json", max_seq_length=9),
        "heads": lambda f: edit(f / "config.json", num_attention_heads=2),
    }
    found = {name: fingerprint(name, change) for name, change in changes.items()}
    assert len(set(found.values())) == len(changes)
    assert all(len(value) == 64 for value in found.values())
    assert load_encoder(tmp_path / "same", dtype=torch.bfloat16).fingerprint == found["same"]


# --- folders that are refused

NAME = "encoder.layer.1.intermediate.dense.weight"


def _dense(folder: Path) -> None:
    modules = json.loads((folder / "modules.json").read_text())
    modules.append({"idx": 3, "name": "3", "path": "3_Dense", "type": "sentence_transformers.models.Dense"})
    (folder / "modules.json").write_text(json.dumps(modules))


def _escape(folder: Path) -> None:
    text = (folder / "modules.json").read_text()
    (folder / "modules.json").write_text(text.replace("1_Pooling", "../1_Pooling"))


def _pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _without(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: v for k, v in tensors.items() if k != NAME}


def _config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "config.json", **changes)


def _pooling(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "1_Pooling/config.json", **changes)


def _sentence(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "config_sentence_transformers.json", **changes)


def _tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    return lambda folder: edit_tensors(folder, change)


def _file(name: str, text: str | None) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink() if text is None else (folder / name).write_text(text) and None


FAULTS: dict[str, tuple[Callable[[Path], None], type[ModelError], list[str]]] = {
    "no config": (_file("config.json", None), ConfigError, ["config.json", "not found"]),
    "cut config": (_file("config.json", '{"model_type": "be'), ConfigError, ["config.json", "not JSON"]),
    "family": (_config(model_type="mpnet"), ConfigError, ["config.json", "'mpnet'", "xlm-roberta"]),
    "no family": (_config(model_type=...), ConfigError, ["model_type=None"]),
    "activation": (_config(hidden_act="relu"), ConfigError, ["hidden_act='relu'", "gelu"]),
    "positions": (
        _config(position_embedding_type="relative_key"),
        ConfigError,
        ["position_embedding_type='relative_key'"],
    ),
    "decoder": (_config(is_decoder=True), ConfigError, ["is_decoder=True"]),
    "quantized": (
        _config(quantization_config={"quant_method": "gptq"}),
        ConfigError,
        ["quantization_config"],
    ),
    "heads": (_config(num_attention_heads=5), ConfigError, ["hidden_size=32", "num_attention_heads=5"]),
    "size missing": (_config(hidden_size=...), ConfigError, ["hidden_size=None"]),
    "size is text": (_config(num_hidden_layers="2"), ConfigError, ["num_hidden_layers='2'"]),
    "eps": (_config(layer_norm_eps=-1.0), ConfigError, ["layer_norm_eps=-1.0"]),
    "vocabulary": (_config(vocab_size=19), WeightsError, ["word_embeddings.weight", "[18, 32]", "[19, 32]"]),
    "width": (_config(intermediate_size=64), WeightsError, ["intermediate.dense", "[56, 32]", "[64, 32]"]),
    "layers": (_config(num_hidden_layers=3), WeightsError, ["missing encoder.layer.2.", "and 13 more"]),
    "fewer layers": (
        _config(num_hidden_layers=1),
        WeightsError,
        ["missing nothing", "unexpected encoder.layer.1."],
    ),
    "tensor missing": (_tensors(_without), WeightsError, [f"missing {NAME}", "unexpected nothing"]),
    "tensor unexpected": (
        _tensors(lambda t: t | {"extra": t[NAME].clone()}),
        WeightsError,
        ["unexpected extra"],
    ),
    "tensor twice": (
        _tensors(lambda t: t | {f"bert.{NAME}": t[NAME].clone()}),
        WeightsError,
        [NAME, "same tensor"],
    ),
    "integers": (_tensors(lambda t: t | {NAME: t[NAME].to(torch.int8)}), WeightsError, [NAME, "torch.int8"]),
    "pickle": (_pickle_only, WeightsError, ["pytorch_model.bin", "safetensors"]),
    "module": (_dense, ConfigError, ["modules.json", "'Dense'"]),
    "module outside": (_escape, ConfigError, ["modules.json", "'../1_Pooling'", "refused"]),
    "module list": (_file("modules.json", "{}"), ConfigError, ["modules.json", "list"]),
    "no modules": (_file("modules.json", "[]"), ConfigError, ["modules.json", "none"]),
    "null": (_file("modules.json", "null"), ConfigError, ["modules.json", "null"]),
    "no pooling": (_file("1_Pooling/config.json", None), ConfigError, ["1_Pooling/config.json", "not found"]),
    "pooling mode": (_pooling(pooling_mode="median"), ConfigError, ["'median'", "weightedmean"]),
    "pooling key": (_pooling(pooling_mode_new_tokens=True), ConfigError, ["pooling_mode_new_tokens=True"]),
    "pooling width": (_pooling(word_embedding_dimension=768), ConfigError, ["hidden_size=32", "768"]),
    "include_prompt": (_pooling(include_prompt="no"), ConfigError, ["include_prompt='no'"]),
    "truncate_dim": (_sentence(truncate_dim=16), ConfigError, ["truncate_dim=16"]),
    "sparse": (_sentence(model_type="SparseEncoder"), ConfigError, ["model_type='SparseEncoder'"]),
    "prompts": (_sentence(prompts={"query": 1}), ConfigError, ["prompts={'query': 1}"]),
    "default prompt": (_sentence(default_prompt_name="query"), ConfigError, ["default_prompt_name='query'"]),
    "too long": (
        _file("sentence_bert_config.json", '{"max_seq_length": 512}'),
        ConfigError,
        ["26 tokens", "max_seq_length=512"],
    ),
    "length": (
        _file("sentence_bert_config.json", '{"max_seq_length": "9"}'),
        ConfigError,
        ["sentence_bert_config.json", "'9'"],
    ),
    "no room": (
        _file("sentence_bert_config.json", '{"max_seq_length": 2}'),
        ConfigError,
        ["max_seq_length=2"],
    ),
    "no tokenizer": (_file("tokenizer.json", None), TokenizerError, ["tokenizer.json"]),
    "cut tokenizer": (_file("tokenizer.json", "{"), TokenizerError, ["tokenizer.json"]),
    "tokenizer model": (
        lambda f: edit(f / "tokenizer.json", model={"type": "Zip"}),
        TokenizerError,
        ["tokenizer.json", "model", "Zip"],
    ),
    "normalizer": (
        lambda f: edit(f / "tokenizer.json", normalizer={"type": "Zip"}),
        TokenizerError,
        ["tokenizer.json", "normalizer", "Zip"],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_folders_are_refused(folder: Path, fault: str) -> None:
    damage, error, words = FAULTS[fault]
    damage(folder)
    with pytest.raises(error) as caught:
        load_encoder(folder)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_token_ids_beyond_the_embedding_are_refused(folder: Path) -> None:
    edit(folder / "config.json", vocab_size=15)
    edit_tensors(folder, lambda t: {k: v[:15].clone() if "word_emb" in k else v for k, v in t.items()})
    with pytest.raises(TokenizerError, match=r"token 'x' has id 17, but config.json has vocab_size=15"):
        load_encoder(folder)


def test_the_longest_text(plain: Path, tmp_path: Path) -> None:
    shutil.copytree(plain, tmp_path / "m")
    found = []
    for limit in (24, 999, 1e30, ...):  # tokenizer_config.json; there are 26 positions
        edit(tmp_path / "m/tokenizer_config.json", model_max_length=limit)
        found.append(load_encoder(tmp_path / "m").max_tokens)
    edit(tmp_path / "m/sentence_bert_config.json", max_seq_length=9)
    encoder = load_encoder(tmp_path / "m")
    assert [*found, encoder.max_tokens] == [24, 26, 26, 26, 9]
    assert [len(i) for i in encoder.tokenize(["cat " * 7, "cat " * 8])] == [9, 9]


def test_first_position_needs_a_pad_token() -> None:
    sizes = ("vocab_size", "hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size")
    raw = {"model_type": "roberta", "max_position_embeddings": 12} | dict.fromkeys(sizes, 8)
    assert encoder_config(raw | {"pad_token_id": 1}).first_position == 2
    with pytest.raises(ConfigError, match="pad_token_id=None"):
        encoder_config(raw | {"pad_token_id": None})
