"""Shared by all tests: the real models, pulled once and kept in the user's cache."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from pathlib import Path

# Before any test imports a Hugging Face library: nothing here may reach for a hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as the command line sets it, see recipes/cli/main.py

import pytest

# Whether a Triton kernel is compiled or interpreted is decided at import, so each kind has a process of its own:
# `make test` starts both.
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreter"]

NO_COMPILER = None if shutil.which(CC := shlex.split(os.environ.get("CC") or "cc")[0]) else f"no C compiler: {CC}"
OF_C = {"build_driver", "isa", "level", "matrix_unit"}  # fixtures that run what was compiled


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Function) -> None:
    """Without a C compiler, skips what is marked, names the C backend as a parameter, or uses a fixture that runs C."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    of_c = parameters.get("backend") == "c" or OF_C & set(item.fixturenames) or item.get_closest_marker("compiler")
    if NO_COMPILER and of_c:
        pytest.skip(NO_COMPILER)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A worker of pytest-xdist takes whole files in this order: what takes longest begins first."""
    items.sort(key=lambda item: item.path.name != "test_demo.py")


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder, bf16."""
    from qlorag.recipes.hub.pull import pull

    return pull("smollm2-135m-instruct", progress=False)


@pytest.fixture(scope="session")
def minilm_dir() -> Path:
    """all-MiniLM-L6-v2 as a folder, float32."""
    from qlorag.recipes.hub.pull import pull

    return pull("minilm-l6", progress=False)


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama of 3 layers with a byte-level tokenizer and ChatML: whole, and loaded in milliseconds."""
    import torch
    from qlorag.models import Decoder, decoder_config
    from safetensors.torch import save_file
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("tiny") / "model"
    folder.mkdir()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(specials + alphabet)}, []))
    tokenizer.add_special_tokens([AddedToken(s, special=True) for s in specials])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    raw = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "chat_template": CHATML,
             "tokenizer_class": "PreTrainedTokenizerFast"}
        )
    )  # fmt: skip
    torch.manual_seed(3)
    model = Decoder(decoder_config(raw))
    weights = {
        n: p.detach() * (1 if "norm" in n else 0.5) for n, p in model.named_parameters() if n != "lm_head.weight"
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
