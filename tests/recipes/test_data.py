"""Training rows: what is accepted, what it becomes, what is refused and how, and the order of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qlorag.models import load_tokenizer
from qlorag.models.text.tokenizer import Tokenizer
from qlorag.recipes.data import Example, Row, batch_indices, read_rows, tokenize_rows
from qlorag.recipes.data import rows as rows_module
from qlorag.recipes.data.rows import find_split
from qlorag.recipes.data.show_mask import mask_runs, show_mask
from qlorag.recipes.errors import DataError
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

CHATML = (
    "{% for tool in tools or [] %}{{ '<|im_start|>tool ' + tool.function.name + '<|im_end|>\n' }}{% endfor %}"
    "{% for m in messages %}"
    "{% if m.role == 'tool' and not tools %}{{ raise_exception('no tools were given') }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content }}{% for call in m.tool_calls or [] %}"
    "{{ call.function.name + ':' + call.function.arguments }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def save_tokenizer(folder: Path, *, template: bool = True) -> Path:
    raw = RawTokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(["who is a software developer from cyprus user assistant"] * 9, trainer)
    raw.post_processor = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    raw.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if template:
        (folder / "chat_template.jinja").write_text(CHATML)
    return folder


@pytest.fixture(scope="module")
def tok(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(save_tokenizer(tmp_path_factory.mktemp("chat")))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A base model's tokenizer: no chat template."""
    return load_tokenizer(save_tokenizer(tmp_path_factory.mktemp("base"), template=False))


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def one(tmp_path: Path, row: Any) -> Row:
    rows, skipped = read_rows(write(tmp_path / "train.jsonl", row))
    assert (len(rows), skipped) == (1, [])
    return rows[0]


def learned(row: Row, tok: Tokenizer) -> list[str]:
    examples, _ = tokenize_rows([row], tok, max_tokens=10_000)
    return [text for text, on in mask_runs(examples[0], tok) if on]


# ---------------------------------------------------------------- shapes


def test_prompt_and_completion(tmp_path: Path, tok: Tokenizer) -> None:
    row = one(tmp_path, {"prompt": "Who is P?", "completion": '{"a": "developer"}', "id": 7})
    assert row.kind == "completion"
    assert row.messages == (
        {"role": "user", "content": "Who is P?"},
        {"role": "assistant", "content": '{"a": "developer"}'},  # JSON in a content stays text
    )
    assert learned(row, tok) == ['{"a": "developer"}<|im_end|>']


def test_messages_in_three_dialects(tmp_path: Path, tok: Tokenizer) -> None:
    openai = {
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "a"},
        ]
    }
    neural_chat = {
        "messages": [
            {"from": "system", "content": "s"},
            {"from": "human", "content": "q"},
            {"from": "chatbot", "content": "a"},
        ]
    }
    sharegpt = {
        "conversations": [
            {"from": "system", "value": "s"},
            {"from": "human", "value": "q"},
            {"from": "gpt", "value": "a"},
        ]
    }
    rows, _ = read_rows(write(tmp_path / "x.jsonl", openai, neural_chat, sharegpt))
    assert rows[0].messages == rows[1].messages == rows[2].messages == tuple(openai["messages"])
    assert [row.line for row in rows] == [1, 2, 3]
    assert learned(rows[1], tok) == ["a<|im_end|>"]


def test_every_assistant_turn_is_learned_and_a_last_question_is_not(tmp_path: Path, tok: Tokenizer) -> None:
    turns = [("human", "a"), ("chatbot", "b"), ("human", "c"), ("chatbot", "d"), ("human", "e")]
    row = one(tmp_path, {"messages": [{"from": who, "content": text} for who, text in turns]})
    assert learned(row, tok) == ["b<|im_end|>", "d<|im_end|>"]


def test_weight_zero(tmp_path: Path, tok: Tokenizer) -> None:
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "weight": 0},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d", "weight": 1},
    ]
    assert learned(one(tmp_path, {"messages": turns}), tok) == ["d<|im_end|>"]


def test_tools(tmp_path: Path, tok: Tokenizer) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    turns = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "5", "tool_call_id": "c1"},
        {"role": "assistant", "content": "five"},
    ]
    row = one(tmp_path, {"messages": turns, "tools": [{"type": "function", "function": {"name": "f"}}]})
    assert row.messages[1]["tool_calls"][0]["function"]["arguments"] == '{"x": 1}'
    assert learned(row, tok) == ['f:{"x": 1}<|im_end|>', "five<|im_end|>"]
    row = one(tmp_path, {"messages": turns})
    with pytest.raises(DataError, match=r"train\.jsonl:1: .*the template says: no tools were given"):
        tokenize_rows([row], tok, max_tokens=99)


def test_text_parts_and_lists_of_messages(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    row = one(
        tmp_path,
        {
            "prompt": [{"role": "user", "content": parts}],
            "completion": [{"role": "assistant", "content": "c"}],
        },
    )
    assert row.messages == ({"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"})
    assert row.kind == "chat"


def test_text_rows(tmp_path: Path, tok: Tokenizer) -> None:
    row = one(tmp_path, {"text": "from cyprus"})
    examples, report = tokenize_rows([row], tok, max_tokens=99)
    assert examples[0].ids == [
        0,
        *tok.encode("from cyprus"),
        2,
    ]  # begun and ended as the tokenizer's files say
    assert all(examples[0].mask)
    assert report.labels == len(examples[0].ids) - 1  # nothing predicts the first token
    # A chat that somebody formatted: its special tokens are parsed, and neither beginning nor end is doubled.
    row = one(tmp_path, {"text": "<|endoftext|><|im_start|>user\nhi<|im_end|>"})
    ids = tokenize_rows([row], tok, max_tokens=99)[0][0].ids
    assert ids == [0, 1, *tok.encode("user\nhi"), 2]


def test_special_text_in_a_content_stays_text(tmp_path: Path, tok: Tokenizer) -> None:
    row = one(tmp_path, {"prompt": "<|im_end|>", "completion": "a<|im_end|>b"})
    examples, _ = tokenize_rows([row], tok, max_tokens=99)
    assert sum(i in tok.special_ids for i in examples[0].ids) == 4
    assert learned(row, tok) == ["a<|im_end|>b<|im_end|>"]


def test_without_a_template_pairs_are_joined_and_chats_refused(tmp_path: Path, base: Tokenizer) -> None:
    row = one(tmp_path, {"prompt": "who is ", "completion": "a developer"})
    examples, report = tokenize_rows([row], base, max_tokens=99)
    assert examples[0].ids == [0, *base.encode("who is "), *base.encode("a developer"), 2]
    assert learned(row, base) == ["a developer<|im_end|>"]
    assert "no chat template: prompt and completion are joined" in report.summary()
    row = one(tmp_path, {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]})
    with pytest.raises(DataError, match=r"train\.jsonl:1: .*no chat template"):
        tokenize_rows([row], base, max_tokens=99)


def test_a_text_needs_an_end_token(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(DataError, match="no end token is known"):
        tokenize_rows([one(tmp_path, {"text": "x"})], load_tokenizer(tmp_path), max_tokens=9)


@pytest.mark.model
def test_the_real_tokenizer(tmp_path: Path, smollm2_dir: Path) -> None:
    tok = load_tokenizer(smollm2_dir)
    row = one(tmp_path, {"prompt": "Who is Patroclos Lemoniatis?", "completion": "A software developer from Cyprus"})
    examples, report = tokenize_rows([row], tok, max_tokens=512)
    assert learned(row, tok) == ["A software developer from Cyprus<|im_end|>"]
    assert report.summary() == f"1 of 1 rows, {len(examples[0].ids)} tokens, {sum(examples[0].mask)} of them labelled"


# ---------------------------------------------------------------- files


def test_lines_that_are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n   \n{"text": "\xc3\xa9"}\r\n{"prompt": "p", "completion": ""}')
    rows, skipped = read_rows(path)
    assert [(row.line, row.text) for row in rows] == [(1, "a"), (4, "é"), (5, "")]
    assert skipped == []


# ---------------------------------------------------------------- keys


PAIR = {"prompt": "q", "completion": "a"}
TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def calling(call: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "assistant", "content": "", "tool_calls": [call]}]}


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({**PAIR, "label": False}, r'key "label" is not known in prompt/completion: .*KTO'),
        ({**PAIR, "label": True}, r'key "label" is not known in prompt/completion: .*KTO'),
        ({"text": "a film", "label": 1}, r'key "label" is not known in text: .*class'),
        ({**PAIR, "rejected": "b"}, r'key "rejected" .*worse answer'),
        ({"messages": TURNS, "chosen": TURNS}, r'key "chosen" is not known in messages: .*preference'),
        ({**PAIR, "systme": "be brief"}, r'key "systme" is not known .*known are prompt, completion, tools, system'),
        ({"messages": [*TURNS[:1], {**TURNS[1], "loss": 0}]}, r'key "messages\[1\]\.loss" is not known in a message'),
        (
            {"messages": [{**TURNS[0], "function_call": {"name": "f"}}]},
            r"messages\[0\]\.function_call.*write tool_calls",
        ),
        ({"messages": TURNS, "system": 5}, "system is a number, wanted a string"),
        (
            {"messages": [{"role": "system", "content": "s"}, *TURNS], "system": "t"},
            "a system message and the key system",
        ),
        ({"messages": [*TURNS[:1], {**TURNS[1], "train": "no"}]}, r"messages\[1\]\.train is a string, wanted true or"),
        ({"messages": [*TURNS[:1], {**TURNS[1], "train": False, "weight": 1}]}, "train false and weight 1: keep one"),
        (
            {"messages": [{**TURNS[0], "train": True}, TURNS[1]]},
            r"messages\[0\] is to be learned, and its role is user",
        ),
        ({**PAIR, "chat_template_kwargs": [1]}, "chat_template_kwargs is a list, wanted an object"),
        ({"messages": TURNS, "tools": "[{"}, "tools is not JSON"),
        (
            {"messages": TURNS, "chat_template_kwargs": {"parse_special": True}},
            "chat_template_kwargs.parse_special is no .* stay text: leave it out",
        ),
        ({"messages": TURNS, "chat_template_kwargs": {"tools": []}}, "kwargs.tools .*: write them as the key tools"),
        ({"messages": TURNS, "chat_template_kwargs": {"self": 1}}, "kwargs.self is no template variable"),
        (
            calling({"function": {"name": "f", "arguments": {}}, "result": 5}),
            r'"messages\[0\]\.tool_calls\[0\]\.result" is not known in a tool call',
        ),
        (calling({"name": "f", "parameters": {"x": 1}}), r"tool_calls\[0\]\.parameters.* known are id, .*arguments"),
        (
            calling({"function": {"name": "f", "arguments": {}, "note": "n"}}),
            r"tool_calls\[0\]\.function\.note.* known are name, arguments",
        ),
        (calling({"name": "f", "arguments": '{"x": 1e999}'}), "1e999 is larger than any float64"),
    ],
)
def test_a_key_that_could_change_the_meaning_is_refused_by_name(tmp_path: Path, row: Any, named: str) -> None:
    with pytest.raises(DataError, match=named):
        one(tmp_path, row)


@pytest.mark.parametrize(
    ("row", "advice"),
    [
        ({"instruction": "i", "input": "", "output": "o"}, "Alpaca or Dolly row: write it, .* as prompt"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "preference row; to learn it alone, write it as completion"),
        ({"chosen": "a", "rejected": "b"}, "preference row; to learn it alone, write it as completion"),
        ({"prompt": "q", "response": "a"}, '"completion" is missing, .*: add it'),
        ({"question": "q", "answer": "a"}, "convert the rows; prompt is what is asked"),
        ({"prompt": "q", "messages": TURNS}, "keep one, as with --ignore-keys prompt"),
        ({"conversations": [{"from": "function_call", "value": "{}"}]}, 'LLaMA-Factory.*"assistant" with tool_calls'),
        ({"messages": [{"role": "model", "content": "a"}]}, 'Gemini\'s: write "assistant"'),
    ],
)
def test_a_row_of_another_format_is_told_what_to_do(tmp_path: Path, row: Any, advice: str) -> None:
    with pytest.raises(DataError, match=advice):
        one(tmp_path, row)


def test_what_only_a_template_can_write_is_not_dropped_without_one(tmp_path: Path, base: Tokenizer) -> None:
    pair = {"prompt": "q", "completion": "a"}
    for more in ({"system": "s"}, {"tools": [{"name": "f"}]}, {"chat_template_kwargs": {"enable_thinking": True}}):
        rows = [one(tmp_path, {**pair, **more})]
        with pytest.raises(DataError, match=r"jsonl:1: system, tools or chat_template_kwargs beside prompt"):
            tokenize_rows(rows, base, max_tokens=64)


def test_a_variable_that_the_template_does_not_read_is_refused(tmp_path: Path, tok: Tokenizer) -> None:
    row = {"messages": TURNS, "chat_template_kwargs": {"custom_instructions": "be brief", "enable_thinking": True}}
    rows = [one(tmp_path, row)]
    with pytest.raises(DataError, match=r"it does not read custom_instructions, which would be lost"):
        tokenize_rows(rows, tok, max_tokens=64)


def test_keys_that_change_nothing_pass(tmp_path: Path) -> None:
    extra = {"id": 7, "source": "wiki", "label": None, "rejected": [], "functions": {}, "meta": {"label": 1}}
    assert one(tmp_path, {**PAIR, **extra}).messages == tuple(TURNS)
    nulls = [TURNS[0], {**TURNS[1], "refusal": None, "function_call": None, "tool_calls": []}]
    assert one(tmp_path, {"messages": nulls}).messages == tuple(TURNS)


def test_keys_that_the_caller_ignores(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", {**PAIR, "label": False}, {"messages": [TURNS[0], {**TURNS[1], "label": 1}]})
    rows, _ = read_rows(path, ignore_keys={"label"})
    assert rows[0].messages == rows[1].messages == tuple(TURNS)
    call = {"function": {"name": "f", "arguments": {"label": 1}, "label": 2}, "label": 3}
    [row], _ = read_rows(write(tmp_path / "y.jsonl", calling(call)), ignore_keys={"label"})
    assert row.messages[0]["tool_calls"] == [{"function": {"name": "f", "arguments": {"label": 1}}}]


@pytest.mark.parametrize("shape", ["messages", "conversations", "prompt", "pair"])
def test_a_system_beside_the_messages_is_the_first_of_them(tmp_path: Path, shape: str) -> None:
    row: dict[str, Any] = {"prompt": TURNS[:1], "completion": TURNS[1:]} if shape == "prompt" else {shape: TURNS}
    row = dict(PAIR) if shape == "pair" else row
    messages = one(tmp_path, {**row, "system": "be brief"}).messages
    assert messages == ({"role": "system", "content": "be brief"}, *TURNS)
    assert one(tmp_path, {**row, "system": ""}).messages == tuple(TURNS)


def test_train_false_is_weight_zero(tmp_path: Path, tok: Tokenizer) -> None:
    again = [
        {**TURNS[0], "train": False},
        {**TURNS[1], "train": False},
        *TURNS[:1],
        {"role": "assistant", "content": "b"},
    ]
    assert learned(one(tmp_path, {"messages": again}), tok) == ["b<|im_end|>"]


def test_variables_for_the_template_come_from_the_row(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(
        CHATML.replace("'<|im_start|>' + m.role", "'<|im_start|>' + (style or '') + m.role")
    )
    tok = load_tokenizer(tmp_path)
    row = one(tmp_path, {**PAIR, "chat_template_kwargs": {"style": "grand "}})
    assert "grand user" in tok.decode(tokenize_rows([row], tok, max_tokens=99, variables={"style": "x"})[0][0].ids)


def test_what_became_of_the_rows_is_said(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role + ':\n' + m.content + '\n' }}{% endfor %}"
    )
    tok = load_tokenizer(tmp_path)
    rows = [one(tmp_path, {"messages": TURNS + TURNS}), one(tmp_path, PAIR)]
    examples, report = tokenize_rows(rows, tok, max_tokens=99)
    assert [example.line for example in examples] == [1, 1, 1]  # two turns, then the pair; each file has one line
    assert (report.kept, report.split, report.appended, report.ends) == (2, 1, True, {tok.eos_id})
    assert "1 of several turns" in report.summary() and "the end token is written after each" in report.summary()


GOOD = '{"text": "ok"}'
BAD: dict[str, tuple[bytes, str]] = {
    "cut off": (b'{"text": "abc', "the last line is cut off"),
    "not an object": (b"[1, 2]\n", "got a list, wanted an object"),
    "not JSON": (b"{text: 1}\n", r"not JSON \(.*\): write one JSON object a line"),
    "two objects": (b'{"text": "a"}{"text": "b"}\n', "not JSON"),
    "no known key": (
        b'{"instruction": "a", "output": "b"}\n',
        "its keys are 'instruction', 'output', wanted",
    ),
    "no keys": (b"{}\n", "its keys are none"),
    "half a pair": (
        b'{"prompt": "a", "complation": "b"}\n',
        "\"completion\" is missing, its keys are 'prompt', 'complation'",
    ),
    "wrong type": (b'{"text": 5}\n', "text is a number, wanted a string"),
    "null": (b'{"prompt": "a", "completion": null}\n', "completion is null, wanted a string"),
    "empty text": (b'{"text": ""}\n', "text is empty"),
    "NaN": (b'{"text": "a", "score": NaN}\n', "NaN is not JSON"),
    "infinity": (b'{"text": "a", "score": -Infinity}\n', "-Infinity is not JSON"),
    "not UTF-8": (b'{"text": "\xff\xfe"}\n', "byte 10 of the line is not UTF-8"),
    "UTF-16": ('{"text": "a"}\n'.encode("utf-16"), "not UTF-8"),
    "twice": (b'{"text": "a", "text": "b"}\n', 'key "text" stands twice'),
    "twice inside": (
        b'{"messages": [{"role": "user", "role": "user", "content": ""}]}\n',
        'key "role" stands twice',
    ),
    "deep": (b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", "nested too deeply"),
    "two shapes": (
        b'{"text": "a", "messages": []}\n',
        "it has messages and text, which are different shapes",
    ),
    "pair and text": (
        b'{"prompt": "a", "completion": "b", "text": "c"}\n',
        "it has text and prompt/completion",
    ),
    "no messages": (
        b'{"messages": []}\n',
        "messages is an empty list, wanted a list of at least one message",
    ),
    "messages a string": (b'{"messages": "hi"}\n', "messages is a string"),
    "message a string": (b'{"messages": ["hi"]}\n', r"messages\[0\] is a string"),
    "unknown role": (
        b'{"messages": [{"role": "bot", "content": "x"}]}\n',
        r"messages\[0\]\.role is 'bot', wanted one of system",
    ),
    "role a list": (b'{"messages": [{"role": [1], "content": "x"}]}\n', r"messages\[0\]\.role is \[1\]"),
    "no content": (b'{"messages": [{"role": "user"}]}\n', "neither, but 'role' of 'content' and 'value'"),
    "two speakers": (
        b'{"messages": [{"role": "user", "from": "gpt", "content": ""}]}\n',
        "both of 'role' and 'from'",
    ),
    "null content": (
        b'{"messages": [{"role": "user", "content": null}]}\n',
        r"messages\[0\]\.content is null",
    ),
    "an image": (
        b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}\n',
        "part of type 'image_url', wanted text",
    ),
    "a weight": (
        b'{"messages": [{"role": "assistant", "content": "", "weight": 0.5}]}\n',
        "weight is 0.5, wanted 0",
    ),
    "tools": (
        b'{"messages": [{"role": "user", "content": "a"}], "tools": {"a": 1}}\n',
        "tools is an object, wanted a list",
    ),
    "arguments": (
        b'{"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{x"}}]}]}\n',
        r"messages\[0\]\.tool_calls\[0\]\.function\.arguments is not JSON",
    ),
    "surrogate": (b'{"text": "\\ud83d"}\n', r"text: character 0 is the lone surrogate U\+D83D"),
    "long number": (b'{"text": ' + b"9" * 5000 + b"}\n", "not JSON"),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_faulty_row_is_named(tmp_path: Path, fault: str) -> None:
    content, words = BAD[fault]
    path = tmp_path / "train.jsonl"
    path.write_bytes(GOOD.encode() + b"\n\n" + content)
    with pytest.raises(DataError, match=words) as error:
        read_rows(path)
    assert str(error.value).startswith(f"{path}:3: ")
    assert "\n" not in str(error.value) and len(str(error.value)) < 700
    rows, skipped = read_rows(path, skip_invalid=True)
    assert [row.text for row in rows] == ["ok"]
    assert skipped[0] == str(error.value)


def test_a_line_without_end_is_not_kept_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "MAX_LINE_BYTES", 1 << 20)
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'{"text": "' + b"a" * (1 << 22) + b'"}\n' + GOOD.encode() + b"\n")
    with pytest.raises(DataError, match=r"train\.jsonl:1: the line is longer than 1 MiB"):
        read_rows(path)
    rows, skipped = read_rows(path, skip_invalid=True)
    assert [(row.line, row.text) for row in rows] == [(2, "ok")] and len(skipped) == 1


def test_empty_and_hopeless_files(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    for content in ("", "\n \n"):
        path.write_text(content)
        with pytest.raises(DataError, match=r"train\.jsonl: no rows, it is empty"):
            read_rows(path)
    path.write_text("nope\n{\n")
    with pytest.raises(DataError, match=r"no rows, all 2 are invalid, the first: .*:1: not JSON"):
        read_rows(path, skip_invalid=True)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"no train\.jsonl in it, only no \.jsonl at all: .*name it: --data FILE\.jsonl"
    ):
        find_split(tmp_path, "train")
    data = write(tmp_path / "data.jsonl", {"text": "a"})
    with pytest.raises(DataError, match=rf"no train\.jsonl in it, only data\.jsonl: .*--data {data}"):
        find_split(tmp_path, "train")
    assert (find_split(data, "train"), find_split(data, "valid"), find_split(data, "test")) == (data, None, data)
    train = write(tmp_path / "train.jsonl", {"text": "a"})
    assert (find_split(tmp_path, "train"), find_split(tmp_path, "valid")) == (train, None)
    with pytest.raises(DataError, match="no such file or folder"):
        find_split(tmp_path / "none", "train")
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        read_rows(tmp_path)


@pytest.mark.parametrize("name", ["valid", "validation", "val", "dev"])
def test_a_validation_file_has_several_names(tmp_path: Path, name: str) -> None:
    write(tmp_path / "train.jsonl", {"text": "a"})
    file = write(tmp_path / f"{name}.jsonl", {"text": "b"})
    assert find_split(tmp_path, "valid") == file
    write(tmp_path / ("dev.jsonl" if name != "dev" else "val.jsonl"), {"text": "c"})
    with pytest.raises(DataError, match="one split under two names"):
        find_split(tmp_path, "valid")


@given(st.binary(max_size=60))
@settings(max_examples=300, deadline=None)
def test_no_bytes_crash_the_reader(content: bytes) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.jsonl"
        path.write_bytes(content)
        try:
            rows, _ = read_rows(path)
        except DataError as error:
            assert "\n" not in str(error)
        else:
            assert rows


# ---------------------------------------------------------------- token limits


def pair(prompt: str, completion: str, line: int = 1) -> Row:
    messages = ({"role": "user", "content": prompt}, {"role": "assistant", "content": completion})
    return Row(file="d.jsonl", line=line, kind="completion", messages=messages)


def test_rows_longer_than_the_limit(tok: Tokenizer) -> None:
    rows = [pair("q", "a", 1), pair("q", "developer " * 50, 2), pair("developer " * 50, "a", 3)]
    full = len(tokenize_rows(rows[:1], tok, max_tokens=999)[0][0].ids)
    examples, report = tokenize_rows(rows, tok, max_tokens=full)
    assert [example.line for example in examples] == [1, 2]
    assert all(len(example.ids) <= full and any(example.mask[1:]) for example in examples)
    assert (report.kept, report.dropped) == (2, 1)
    assert (report.truncated, report.unlabelled) == (["d.jsonl:2"], ["d.jsonl:3"])
    assert "1 dropped: nothing to learn within the token limit (first d.jsonl:3)" in report.summary()
    examples, report = tokenize_rows(rows, tok, max_tokens=full, too_long="drop")
    assert [example.line for example in examples] == [1]
    assert report.too_long == ["d.jsonl:2", "d.jsonl:3"]


def test_nothing_left_to_train_on(tok: Tokenizer) -> None:
    question = Row(file="d.jsonl", line=1, kind="chat", messages=({"role": "user", "content": "q"},))
    with pytest.raises(DataError, match=r"d\.jsonl: no row can be trained on \(0 of 1 rows.*first d\.jsonl:1\)"):
        tokenize_rows([question], tok, max_tokens=99)
    with pytest.raises(DataError, match="no row can be trained on"):
        tokenize_rows([], tok, max_tokens=99)
    with pytest.raises(DataError, match="max_tokens=1"):
        tokenize_rows([question], tok, max_tokens=1)


def test_a_label_on_the_first_token_alone_teaches_nothing(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, template=False)
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**data, "post_processor": None}))
    # Nothing is put before a text now, so the end token is all there is of an empty pair.
    with pytest.raises(DataError, match="nothing to learn"):
        tokenize_rows([pair("", "")], load_tokenizer(tmp_path), max_tokens=9)


def test_skipping_what_the_template_refuses(tok: Tokenizer) -> None:
    refused = Row(file="d", line=2, kind="chat", messages=({"role": "tool", "content": "x"},))
    examples, report = tokenize_rows([pair("q", "a"), refused], tok, max_tokens=99, skip_invalid=True)
    assert len(examples) == 1 and report.invalid == ["d:2"]


# ---------------------------------------------------------------- order


@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 2**64), st.integers(0, 30))
@settings(deadline=None)
def test_every_epoch_is_a_permutation(n: int, batch_size: int, seed: int, start: int) -> None:
    """Consecutive steps are one stream, whose every n-th stretch holds every row once."""
    steps = 2 * n // batch_size + 2
    stream = [i for s in range(steps) for i in batch_indices(n, batch_size=batch_size, seed=seed, step=s)]
    for epoch in range(len(stream) // n):
        assert sorted(stream[epoch * n : (epoch + 1) * n]) == list(range(n))
    # A step does not depend on the ones before it.
    step = start % steps
    assert (
        batch_indices(n, batch_size=batch_size, seed=seed, step=step)
        == stream[step * batch_size : (step + 1) * batch_size]
    )


ORDER = (
    [0, 2, 9, 1, 8, 5, 4, 3, 6, 7],
    [5, 3, 7, 8, 2, 4, 1, 0, 6, 9],
    [3, 5, 2, 9, 7, 0, 8, 6, 1, 4],
)


def test_order_does_not_change_between_versions() -> None:
    # Pinned: a run resumed under another numpy must see the same rows.
    assert batch_indices(10, batch_size=10, seed=0, step=0) == ORDER[0]
    assert batch_indices(10, batch_size=10, seed=0, step=1) == ORDER[1]
    assert batch_indices(10, batch_size=10, seed=1, step=0) == ORDER[2]


def test_batches_larger_than_the_data() -> None:
    assert batch_indices(1, batch_size=4, seed=0, step=3) == [0, 0, 0, 0]
    assert sorted(batch_indices(3, batch_size=6, seed=0, step=0)) == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("name", ["n", "batch_size", "seed", "step"])
def test_order_of_nothing(name: str) -> None:
    arguments = {"batch_size": 2, "seed": 0, "step": 0}
    value = -1 if name in ("seed", "step") else 0
    with pytest.raises(DataError, match=f"{name}={value}: wanted at least"):
        batch_indices(**{"n": 3, **arguments, name: value})


# ---------------------------------------------------------------- showing


def test_show_mask(tok: Tokenizer) -> None:
    examples, _ = tokenize_rows([pair("q\x1b[31m", "é")], tok, max_tokens=99)
    shown = show_mask(examples[0], tok)
    assert shown.plain == "<|im_start|>user\nq\\x1b[31m<|im_end|>\n<|im_start|>assistant\n⟦é<|im_end|>⟧\n"
    green = [span for span in shown.spans if span.style == "bold green"]
    assert [shown.plain[span.start : span.end] for span in green] == ["⟦é<|im_end|>⟧"]
    assert show_mask(Example([], [], 1), tok).plain == ""
