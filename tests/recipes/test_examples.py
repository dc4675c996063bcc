"""Rows to examples and the order of a run, with a tokenizer that can be read: one token per character."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import pytest
from qlorag.models.errors import TemplateError
from qlorag.models.text.chat_labels import LabelledChat
from qlorag.recipes.data.examples import Example, Row, TokenizeReport, batch_indices, tokenize_rows
from qlorag.recipes.errors import DataError

END, BOS = 3, 1


class Characters:
    """Ids are code points; "^" is the token before any text, END the end token. A chat is "q>a" and its end."""

    eos_id: int | None = END
    has_chat_template = True
    special_tokens: ClassVar[dict[str, str]] = {"bos_token": "^"}

    def encode(self, text: str, *, parse_special: bool = False, add_special: bool = False) -> list[int]:
        ids = [END if c == "$" and parse_special else BOS if c == "^" and parse_special else ord(c) for c in text]
        return [BOS] * add_special + ids

    def chat_examples(self, messages: Any, *, tools: Any = None, **variables: Any) -> list[LabelledChat]:
        self.seen = (tools, variables)
        if messages[0]["role"] == "tool":
            raise TemplateError("no tools were given")
        question, *answers = (m["content"] for m in messages)
        return [
            LabelledChat(
                [ord(c) for c in f"{question}>{answer}"] + [END],
                [False] * (len(question) + 1) + [True] * (len(answer) + 1),
                frozenset({END + i}),
                appended=answer.endswith("!"),
            )
            for i, answer in enumerate(answers)
        ]


class Base(Characters):
    has_chat_template = False


def chat(*contents: str, line: int = 1, **more: Any) -> Row:
    messages = tuple({"role": "user" if i == 0 else "assistant", "content": c} for i, c in enumerate(contents))
    return Row(file="d.jsonl", line=line, kind="chat", messages=messages, **more)


def pair(prompt: str, completion: str, line: int = 1) -> Row:
    messages = ({"role": "user", "content": prompt}, {"role": "assistant", "content": completion})
    return Row(file="d.jsonl", line=line, kind="completion", messages=messages)


def text(content: str, line: int = 1) -> Row:
    return Row(file="d.jsonl", line=line, kind="text", text=content)


def made(row: Row, tok: Any) -> tuple[list[int], list[bool]]:
    [example], _ = tokenize_rows([row], tok, max_tokens=99)
    return example.ids, example.mask


def test_a_chat_is_what_the_tokenizer_makes_of_it() -> None:
    ids, mask = made(chat("ab", "c"), Characters())
    assert ids == [97, 98, ord(">"), 99, END] and mask == [False, False, False, True, True]
    assert made(pair("ab", "c"), Characters()) == (ids, mask)


def test_without_a_template_a_pair_is_joined_and_its_completion_labelled() -> None:
    assert made(pair("ab", "^c"), Base()) == ([BOS, 97, 98, ord("^"), 99, END], [False] * 3 + [True] * 3)
    _, report = tokenize_rows([pair("ab", "c")], Base(), max_tokens=99)
    assert report.joined_plain and report.ends == {END} and not report.appended
    assert not tokenize_rows([text("ab")], Base(), max_tokens=99)[1].joined_plain
    assert not tokenize_rows([pair("ab", "c")], Characters(), max_tokens=99)[1].joined_plain


@pytest.mark.parametrize(
    ("content", "ids"),
    [
        ("ab", [BOS, 97, 98, END]),
        ("^ab", [BOS, 97, 98, END]),  # begun already by the program that formatted it,
        ("ab$", [BOS, 97, 98, END]),  # or ended it
        ("^ab$", [BOS, 97, 98, END]),
        ("a$b", [BOS, 97, END, 98, END]),
        ("$$", [BOS, END, END]),
        ("", [BOS, END]),
    ],
)
def test_a_text_begins_and_ends_once_and_all_of_it_is_labelled(content: str, ids: list[int]) -> None:
    assert made(text(content), Characters()) == (ids, [True] * len(ids))
    assert tokenize_rows([text(content)], Characters(), max_tokens=99)[1].ends == {END}


def test_a_text_without_a_bos_token_is_encoded_as_the_tokenizer_does() -> None:
    class NoBos(Characters):
        special_tokens: ClassVar[dict[str, str]] = {}

    assert made(text("^ab"), NoBos())[0] == [BOS, BOS, 97, 98, END]


def test_an_end_token_is_needed_where_none_is_rendered() -> None:
    class Endless(Base):
        eos_id = None

    for row in (text("ab"), pair("a", "b")):
        with pytest.raises(DataError) as error:
            tokenize_rows([row], Endless(), max_tokens=99)
        assert str(error.value) == (
            "tokenizer: no end token is known, so a text would never end: name it as eos_token in "
            "tokenizer_config.json or eos_token_id in generation_config.json"
        )


def test_tools_and_variables_reach_the_template_and_a_rows_own_win() -> None:
    tok = Characters()
    row = chat("a", "b", tools=({"name": "f"},), variables={"date": "now"})
    tokenize_rows([row], tok, max_tokens=99, variables={"date": "then", "place": "here"})
    assert tok.seen == (({"name": "f"},), {"date": "now", "place": "here"})
    tokenize_rows([chat("a", "b")], tok, max_tokens=99)
    assert tok.seen[1] == {}


def test_rows_at_the_token_limit() -> None:
    """ "a>bc" and its end are 5 tokens, of which the last 3 are labelled."""
    row = chat("a", "bc")
    for limit, ids, labels in ((6, 5, 3), (5, 5, 3), (4, 4, 2), (3, 3, 1)):
        [example], report = tokenize_rows([row], Characters(), max_tokens=limit)
        assert (len(example.ids), len(example.mask), sum(example.mask)) == (ids, ids, labels)
        assert (report.tokens, report.labels) == (ids, labels)
        assert report.truncated == (["d.jsonl:1"] if limit < 5 else []) and report.unlabelled == []
    with pytest.raises(DataError) as error:
        tokenize_rows([row], Characters(), max_tokens=2)
    assert str(error.value) == (
        "d.jsonl: no row can be trained on (0 of 1 rows, 0 tokens, 0 of them labelled; 1 dropped: nothing to learn "
        "within the token limit (first d.jsonl:1)): raise --max-seq-length"
    )
    with pytest.raises(DataError) as error:
        tokenize_rows([row], Characters(), max_tokens=1)
    assert str(error.value) == "max_tokens=1: nothing can be predicted within it: give at least 2"
    with pytest.raises(DataError, match=r"^data: no row"):
        tokenize_rows([], Characters(), max_tokens=9)


def test_what_became_of_each_row() -> None:
    rows = [
        chat("a", "b", line=1),  # 4 tokens
        chat("a", "bcdef", line=2),
        chat("abcdef", "b", line=3),
        Row(file="d.jsonl", line=4, kind="chat", messages=({"role": "tool", "content": "x"},)),
        chat("a", "b", "c!", line=5),  # two examples
        chat("a", line=6),  # none
        chat("a", "d", line=7),
    ]
    examples, report = tokenize_rows(rows, Characters(), max_tokens=5, skip_invalid=True)
    assert [e.line for e in examples] == [1, 2, 5, 5, 7] and all(e.file == "d.jsonl" for e in examples)
    assert (report.rows, report.kept, report.dropped, report.split) == (7, 4, 3, 1)
    assert (report.tokens, report.labels) == (4 + 5 + 4 + 5 + 4, 2 + 3 + 2 + 3 + 2)
    assert (report.truncated, report.unlabelled) == (["d.jsonl:2"], ["d.jsonl:3"])
    assert (report.too_long, report.invalid) == ([], ["d.jsonl:4"])
    assert report.ends == {END, END + 1} and report.appended  # by the fifth
    examples, report = tokenize_rows(rows, Characters(), max_tokens=5, too_long="drop", skip_invalid=True)
    assert [e.line for e in examples] == [1, 5, 5, 7] and report.too_long == ["d.jsonl:2", "d.jsonl:3"]
    assert report.truncated == report.unlabelled == []
    with pytest.raises(DataError) as error:
        tokenize_rows(rows, Characters(), max_tokens=5)
    assert str(error.value) == "d.jsonl:4: no tools were given"


def test_why_no_row_is_left_says_what_to_do() -> None:
    class Silent(Characters):
        def chat_examples(self, messages: Any, **_: Any) -> list[LabelledChat]:
            return [LabelledChat([97, 98, 99], [False] * 3, frozenset())]

    nothing = "d.jsonl: no row can be trained on (0 of 1 rows, 0 tokens, 0 of them labelled; 1 dropped: "
    with pytest.raises(DataError) as error:
        tokenize_rows([chat("a", "b")], Silent(), max_tokens=9)
    assert str(error.value) == nothing + "no turn of the assistant to learn (first d.jsonl:1)): mend the rows"
    with pytest.raises(DataError) as error:
        tokenize_rows([chat("a", "b")], Characters(), max_tokens=3, too_long="drop")
    assert str(error.value) == (nothing + "longer than the token limit (first d.jsonl:1)): raise --max-seq-length")


@pytest.mark.parametrize(
    "more",
    [{"messages": tuple({"role": r, "content": "x"} for r in ("system", "user", "assistant"))},
     {"tools": ({"name": "f"},)}, {"variables": {"date": "now"}}],
)  # fmt: skip
def test_what_stands_beside_a_pair_needs_a_template(more: dict[str, Any]) -> None:
    row = replace(pair("a", "b", line=4), **more)
    assert tokenize_rows([row], Characters(), max_tokens=9)
    with pytest.raises(DataError) as error:
        tokenize_rows([row], Base(), max_tokens=9)
    assert str(error.value) == (
        "d.jsonl:4: system, tools or chat_template_kwargs beside prompt and completion, and the model has no chat "
        "template that could write them: leave them out, or write the system message into the prompt"
    )


def test_the_summary_names_the_first_of_each_kind() -> None:
    report = TokenizeReport(
        rows=9, kept=3, tokens=40, labels=12, truncated=["a:1", "a:2"], too_long=["a:3"], unlabelled=["a:4", "a:5"],
        invalid=["a:6"], split=2, joined_plain=True, appended=True, unopened="<think>",
    )  # fmt: skip
    assert report.summary() == (
        "3 of 9 rows, 40 tokens, 12 of them labelled; 2 cut at the token limit (first a:1); 1 dropped: longer than the "
        "token limit (first a:3); 2 dropped: nothing to learn within the token limit (first a:4); 1 left out as "
        "invalid (first a:6); 2 of several turns, which the template renders one example a turn; the template closes "
        "no turn: the end token is written after each and labelled; generation begins an answer with '<think>', which "
        "answers without reasoning lack: the tuned model is not asked as it was trained; no chat template: prompt and "
        "completion are joined as plain text"
    )
    assert report.remarkable and TokenizeReport(rows=1, kept=1, unopened="<think>").remarkable
    assert not TokenizeReport(rows=1, kept=1, tokens=4, labels=2).remarkable
    assert TokenizeReport(rows=1, kept=1, tokens=4, labels=2).summary() == "1 of 1 rows, 4 tokens, 2 of them labelled"


def test_steps_go_through_one_stream_of_epochs() -> None:
    epoch = [batch_indices(5, batch_size=5, seed=3, step=step) for step in range(3)]
    assert all(sorted(rows) == [0, 1, 2, 3, 4] for rows in epoch) and epoch[0] != epoch[1]
    stream = [row for rows in epoch for row in rows]
    assert [i for s in range(7) for i in batch_indices(5, batch_size=2, seed=3, step=s)] == stream[:14]
    assert batch_indices(5, batch_size=5, seed=2**64 + 3, step=0) == epoch[0]  # Philox's keys have 64 bits
    seeds = [*range(20), 2**64 - 1, 2**64 - 2]  # the last two are one as float64
    assert len({tuple(batch_indices(9, batch_size=9, seed=s, step=0)) for s in seeds}) == len(seeds)


@pytest.mark.parametrize(("name", "least"), [("n", 1), ("batch_size", 1), ("seed", 0), ("step", 0)])
def test_an_order_that_is_none_is_refused(name: str, least: int) -> None:
    arguments = {"n": 3, "batch_size": 2, "seed": 1, "step": 1}
    assert batch_indices(**{**arguments, name: least})
    with pytest.raises(DataError) as error:
        batch_indices(**{**arguments, name: least - 1})
    assert str(error.value) == f"{name}={least - 1}: wanted at least {least}"


def test_an_example_is_its_numbers() -> None:
    assert Example([1, 2, 3], [True, True, False], 4).labels == 1  # no token before the first predicts it
    assert Example([1], [True], 4) == Example([1], [True], 4, file="")
