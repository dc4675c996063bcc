"""`qlorag ask` on tiny random models: how many passages the model gets, and how much is left for the answer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from qlorag.models import load_tokenizer
from qlorag.recipes.cli.main import main
from qlorag.recipes.rag import prompt_messages
from qlorag.retrieval import Hit
from tokenizers import Tokenizer, models, pre_tokenizers, processors

QUESTION = "what do bees make"
DOCUMENTS = {"bees.txt": "Worker bees make honey.", "tides.txt": "The moon pulls the sea."}


@pytest.fixture(scope="module")
def encoder_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT whose every word is [UNK]: it finds both documents, which is all that is asked of it."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("encoder")
    special = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[UNK]": 3}
    raw = Tokenizer(models.WordLevel(special, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.add_special_tokens(list(special))
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    names = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=raw, model_max_length=24, **names).save_pretrained(folder)
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=4, max_position_embeddings=24, pad_token_id=0, **size)
    transformers.BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def ask(
    encoder_dir: Path, tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[[int, int], tuple[list[str], str]]:
    """Asks a model of `context` positions for `max_tokens`: the files that it was given, and what else was said."""
    documents = tmp_path / "documents"
    documents.mkdir()
    for name, text in DOCUMENTS.items():
        (documents / name).write_text(text)
    store = ["--store", str(tmp_path / "store"), "--encoder", str(encoder_dir)]
    assert main(["index", str(documents), *store]) == 0
    model = Path(shutil.copytree(tiny_dir, tmp_path / "model"))

    def run(context: int, max_tokens: int) -> tuple[list[str], str]:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": context}))
        capsys.readouterr()
        flags = ["--model", str(model), "--max-tokens", str(max_tokens), "--k", "2", "--score-threshold", "-1"]
        status = main(["ask", QUESTION, *store, *flags, "--json"])
        said = capsys.readouterr()
        sources = json.loads(said.out)["sources"] if status == 0 else []
        return [Path(s["uri"]).name for s in sources], said.err

    return run


def test_the_passages_leave_what_the_answer_needs(ask: Any, tiny_dir: Path) -> None:
    """Of a context of exactly two passages and 40 tokens, 40 go to the answer; with one token less only one passage
    fits. A large --max-tokens is given a quarter of the context, and so costs no passage that fits beside it."""
    hits = [Hit(text, 1.0, name, 0, len(text), "", {}, 0) for name, text in DOCUMENTS.items()]
    tok = load_tokenizer(tiny_dir)
    one, two = (max(len(tok.chat(prompt_messages(QUESTION, part))) for part in parts)
                for parts in ((hits[:1], hits[1:]), (hits,)))  # fmt: skip
    assert len(ask(two + 40, 40)[0]) == 2
    few, note = ask(two + 39, 40)
    assert len(few) == 1 and f"only the best 1 of 2 passages fit into the model's {two + 39} tokens" in note

    context = next(n for n in range(two, 2 * two) if n - n // 4 == two)
    assert len(ask(context, 10**6)[0]) == 2
    context = next(n for n in range(one, 2 * two) if n - n // 4 == two - 1)
    assert len(ask(context, 10**6)[0]) == 1
    context = next(n for n in range(10, one) if n - n // 4 == 10)
    none, error = ask(context, 10**6)
    assert none == [] and "the model reads 10 beside its answer" in error
