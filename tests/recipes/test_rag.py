"""Citations by hand, and prompts that fit: no model is needed for either."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from qlorag.models import generate
from qlorag.recipes.errors import UsageError
from qlorag.recipes.hub.assemble import assemble
from qlorag.recipes.rag import NOT_FOUND, answer, answer_from, cite, fitting, prompt_messages
from qlorag.recipes.rag.prompt import EXAMPLES, SYSTEM
from qlorag.retrieval import Document, Hit, Store

BEES = "A hive has one queen. Worker bees gather nectar and make honey from it."
TIDES = "The moon pulls the sea, so the water rises and falls twice a day."


def hit(text: str) -> Hit:
    return Hit(text=text, score=0.5, uri="a.txt", start=0, end=len(text), sha256="", metadata={}, chunk_id=0)


HITS = [hit(BEES), hit(TIDES)]


@pytest.mark.parametrize(
    ("text", "citations", "cited_by", "shown"),
    [
        ("Worker bees make honey. [1]", [1], "model", "Worker bees make honey. [1]"),
        ("Bees make honey [1]. The moon pulls the sea [2].", [1, 2], "model", None),
        ("According to [1], worker bees make honey.", [1], "model", None),
        # a paraphrase: of twice, daily, water, climbs, drops two stand in the source
        ("Twice daily the water climbs and drops [2]", [2], "model", None),
        # the number is wrong: the words lead to the right source
        ("Worker bees make honey. [2]", [1], "overlap", "Worker bees make honey. [1]"),
        ("Worker bees make honey.", [1], "overlap", "Worker bees make honey. [1]"),
        # one number right, one out of range, one wrong
        ("Bees make honey from nectar [1]. Paris has museums [2] [9].", [1], "model",
         "Bees make honey from nectar [1]. Paris has museums."),
        # the digit of the citation is no word of the answer
        ("Paris. [1]", [], "none", "Paris."),
        ("", [], "none", ""),
    ],
)  # fmt: skip
def test_citations_by_hand(text: str, citations: list[int], cited_by: str, shown: str | None) -> None:
    answer = cite("?", text, HITS)
    assert (answer.citations, answer.cited_by) == (citations, cited_by)
    assert answer.cited_text() == (text if shown is None else shown) and answer.text == text


@pytest.mark.parametrize(
    ("text", "share", "cited_by"),
    [
        ("Worker bees build temples.", "2 of 4", "overlap"),
        ("Worker bees build tall temples.", "2 of 5", "none"),
        ("Worker bees gather 7 huge mossy stones.", "3 of 7", "none"),  # a digit counts as a content word
        # with a number that the model wrote, less will do: 0.3
        ("Worker bees build tall temples. [1]", "2 of 5", "model"),
        ("Gather tall mossy stones. [1]", "1 of 4", "none"),
    ],
)
def test_half_of_the_content_words_must_stand_in_the_source(text: str, share: str, cited_by: str) -> None:
    """Less by comparison is chance; a number that the model wrote is evidence of its own, so 3 in 10 are enough."""
    answer = cite("?", text, HITS)
    assert (answer.cited_by, answer.citations) == (cited_by, [] if cited_by == "none" else [1]), share


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_echoed_example_is_not_a_citation(example: tuple[str, str, str]) -> None:
    answer = cite("?", example[2], HITS)
    assert answer.text.endswith("[1]") and answer.citations == [] and answer.cited_by == "none"
    assert cite("?", example[2], [hit(example[0])]).citations == [1]  # where it is true it counts


def test_nothing_found_asks_no_model() -> None:
    class NoModel:
        config = SimpleNamespace(max_positions=512)  # anything else that is asked of it raises

    run = answer_from([], NoModel(), None, "What?")  # type: ignore[arg-type]
    assert list(run) == [NOT_FOUND]
    assert (run.answer.text, run.answer.citations, run.answer.cited_by, run.sources) == (NOT_FOUND, [], "none", [])


def test_an_answer_from_a_store(tiny_dir: Path, tmp_path: Path) -> None:
    """A question, the passages of a store, a random model: what is asked of it, and what is known afterwards."""

    def embed(texts: list[str]) -> np.ndarray:
        return np.array([[1.0, text.count("bee")] for text in texts], np.float32)

    config = json.loads((tiny_dir / "config.json").read_text()) | {"max_position_embeddings": 2048}
    model_dir = Path(shutil.copytree(tiny_dir, tmp_path / "model"))
    (model_dir / "config.json").write_text(json.dumps(config))
    loaded = assemble(str(model_dir), dtype="float32")
    with Store.open(tmp_path / "store", embedder=embed, embedder_id="bees") as store:
        store.add([Document("bees", BEES), Document("tides", TIDES)])
        run = answer(store, loaded.model, loaded.tok, "bee bee", k=2, max_tokens=5)
        assert [h.uri for h in run.found] == ["bees", "tides"] and run.sources == run.found
        wanted = generate(loaded.model, loaded.tok, prompt_messages("bee bee", run.sources), max_tokens=5)
        assert "".join(run) == "".join(wanted)
        assert run.answer == cite("bee bee", wanted.text, run.sources)
        nothing = answer(store, loaded.model, loaded.tok, "bee", score_threshold=1.0)
        assert "".join(nothing) == NOT_FOUND


def test_a_system_message_replaces_the_instruction() -> None:
    usual, own = prompt_messages("?", HITS), prompt_messages("?", HITS, system="Be brief.")
    assert usual[0] == {"role": "system", "content": SYSTEM} and own[0] == {"role": "system", "content": "Be brief."}
    assert usual[1:] == own[1:] and BEES in own[-1]["content"]


def test_the_worst_passages_are_left_out_until_the_prompt_fits() -> None:
    hits = [hit(c * 100) for c in "pqxz"]

    def length(messages: list[dict[str, str]]) -> int:
        return sum(len(m["content"]) for m in messages)

    two = length(prompt_messages("?", hits[:2]))
    kept, messages = fitting("?", hits, count_tokens=length, most=two)
    assert kept == hits[:2] and messages == prompt_messages("?", hits[:2])
    assert fitting("?", hits, count_tokens=length, most=two - 1)[0] == hits[:1]
    assert fitting("?", hits, count_tokens=length, most=10**6)[0] == hits
    with pytest.raises(UsageError, match=r"has \d+ tokens, and the model reads 10 beside its answer: shorten"):
        fitting("?", hits, count_tokens=length, most=10)
