"""Chat templates: which one is found, what it can do, and what it cannot."""

from __future__ import annotations

import gc
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from qlorag.models.errors import TemplateError
from qlorag.models.text.chat_template import ChatTemplate, ChatTemplates, load_templates

HI = {"messages": [{"role": "user", "content": "hi"}]}


def render(source: str, variables: dict[str, Any] = HI, **limits: Any) -> str:
    return ChatTemplate(source, origin="test.jinja", **limits).render(variables)


def refused(source: str, **limits: Any) -> str:
    with pytest.raises(TemplateError) as error:
        render(source, **limits)
    message = str(error.value)
    assert message.startswith("test.jinja: ") and "\n" not in message
    return message


def test_variables_and_blocks() -> None:
    source = "{% for m in messages %}\n  {% if 1 %}\n{{ bos_token }}\n  {% endif %}\n{{ m.content }}\n"
    source += "{% endfor %}\n"
    # trim_blocks takes the line end after a tag, lstrip_blocks the spaces before one; the last line end goes.
    assert render(source, {**HI, "bos_token": "<s>"}) == "<s>\nhi\n"


def test_loop_controls_tojson_and_globals() -> None:
    assert render("{% for i in range(9) %}{{ i }}{% if i == 2 %}{% break %}{% endif %}{% endfor %}") == "012"
    value = {"a": "<é>", "b": [1, None]}
    assert render("{{ v | tojson }}", {**HI, "v": value}) == json.dumps(value, ensure_ascii=False)
    assert render("{{ v | tojson(indent=2) }}", {**HI, "v": value}) == json.dumps(value, ensure_ascii=False, indent=2)
    assert render("{% set ns = namespace(n=1) %}{% set ns.n = ns.n + 1 %}{{ ns.n }}") == "2"
    assert render("{{ dict(a=1).a }}{{ undefined_name }}") == "1"
    assert render("{{ strftime_now('%Y') }}") == time.strftime("%Y")


def test_generation_block_is_marked_only_when_asked() -> None:
    template = ChatTemplate("a{% generation %}b{% endgeneration %}c", origin="t")
    assert template.render(HI) == "abc"
    assert template.render_cuts(HI, [(1, False)], generation=("<", ">")) == ["a<b>c"]


def test_cuts_render_beginnings_of_the_chat() -> None:
    template = ChatTemplate(
        "{% for m in messages %}[{{ m.content }}]{% endfor %}{% if add_generation_prompt %}>{% endif %}",
        origin="t",
    )
    variables = {"messages": [{"role": "user", "content": c} for c in "abc"]}
    assert template.render_cuts(variables, [(0, True), (2, False), (3, True)]) == [
        ">",
        "[a][b]",
        "[a][b][c]>",
    ]


ESCAPES = {
    "{{ ''.__class__.__mro__ }}": "SecurityError",
    "{{ messages.append(1) }}": "SecurityError",
    "{{ messages[0].update(a=1) }}": "SecurityError",
    "{{ cycler.__init__.__globals__ }}": "SecurityError",
    "{% set ns = namespace(__class__=1) %}": "SecurityError",
    "{% set f = '{0.__class__.__mro__}'.format %}{{ f('') }}": "SecurityError",
    "{% import 'os' as os %}": "TypeError",
    "{{ x.y.z }}": "UndefinedError",
    "{{ range(100001) }}": "OverflowError",
    "{% if %}": "line 1",
    "{{ raise_exception('Only user and assistant roles are supported!') }}": "Only user and assistant roles",
    "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}": "RecursionError",
    "{{" + "(" * 100_000 + "1" + ")" * 100_000 + "}}": "RecursionError",
}


@pytest.mark.parametrize(("source", "word"), ESCAPES.items(), ids=[source[:40] for source in ESCAPES])
def test_what_a_template_may_not_do(source: str, word: str) -> None:
    assert word in refused(source)


def test_format_reaches_no_attribute() -> None:
    # jinja2 resolves the field to an undefined value, which prints as nothing.
    assert render("{{ '{0.__class__}'.format('') }}") == ""


ENDLESS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 2 ** (10 ** 9) }}",  # one call inside the interpreter, which no check between statements would see
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(100) }}",
]


@pytest.mark.parametrize("source", ENDLESS)
def test_processor_time_is_bounded(source: str) -> None:
    began = time.monotonic()
    assert "more than 0.3 s of processor time" in refused(source, cpu_seconds=0.3)
    assert time.monotonic() - began < 30  # 0.3 s of processor time, on however busy a machine


@pytest.mark.parametrize("source", ["{{ 'a' * 10 ** 10 }}", "{{ 'a'.ljust(10 ** 11) }}"])
def test_memory_is_bounded(source: str) -> None:
    assert "1024 MiB of memory" in refused(source)


def test_output_is_bounded() -> None:
    assert "more than 1000 characters" in refused("{% for i in range(99999) %}abc{% endfor %}", max_chars=1000)


def test_a_template_works_again_after_a_limit() -> None:
    template = ChatTemplate("{% for i in range(n) %}{% for j in range(n) %}{% endfor %}{% endfor %}ok", origin="t")
    template.cpu_seconds = 0.3
    with pytest.raises(TemplateError, match="processor time"):
        template.render({**HI, "n": 99999})
    assert template.render({**HI, "n": 2}) == "ok"


def test_the_process_that_died_is_replaced_and_goes_with_its_owner() -> None:
    template = ChatTemplate("ok", origin="t")
    assert template.render(HI) == "ok"
    first = template._process
    assert first is not None
    first.kill()
    first.wait()
    assert template.render(HI) == "ok"
    second = template._process
    assert second is not None and second is not first
    del template
    gc.collect()
    assert second.wait(timeout=10) is not None


def test_threads_and_forks_get_their_own_answers() -> None:
    template = ChatTemplate("{{ messages[0].content }}", origin="t")
    wrong: list[str] = []

    def work(name: str) -> None:
        for i in range(50):
            text = f"{name}-{i}"
            if template.render({"messages": [{"role": "user", "content": text}]}) != text:
                wrong.append(text)

    threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    child = os.fork()
    if child == 0:
        text = template.render(HI)
        os._exit(0 if text == "hi" else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert template.render(HI) == "hi"


def test_only_plain_json_reaches_a_template() -> None:
    with pytest.raises(TemplateError, match="not plain JSON"):
        render("{{ x }}", {**HI, "x": object()})


def test_error_in_a_beginning_says_which() -> None:
    template = ChatTemplate("{% if messages | length == 1 %}{{ raise_exception('no') }}{% endif %}", origin="t")
    with pytest.raises(TemplateError, match="in the first 1 messages"):
        template.render_cuts({"messages": HI["messages"] * 2}, [(2, False), (1, True)])


def save(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")


def test_lookup_order(tmp_path: Path) -> None:
    config = {"chat_template": "from config"}
    assert load_templates(tmp_path, config).pick(tools=False).source == "from config"
    save(tmp_path, "additional_chat_templates/tool_use.jinja", "with tools")
    save(tmp_path, "additional_chat_templates/rag.jinja", "with documents")
    save(tmp_path, "chat_template.jinja", "from file\n")
    templates = load_templates(tmp_path, config)
    assert templates.pick(tools=False).source == "from file\n"
    assert templates.pick(tools=True).source == "with tools"
    named = {"chat_template": [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]}
    templates = load_templates(tmp_path / "none", named)
    assert (templates.pick(tools=False).source, templates.pick(tools=True).source) == ("D", "T")


def test_no_template_is_said_and_not_guessed(tmp_path: Path) -> None:
    templates = load_templates(tmp_path, {})
    assert not templates
    with pytest.raises(TemplateError, match=r"no chat template.*chat_template\.jinja.*base model"):
        templates.pick(tools=False)
    with pytest.raises(TemplateError, match='named rag and none is "default"'):
        ChatTemplates({"rag": ChatTemplate("", origin="t")}, folder="F").pick(tools=False)


@pytest.mark.parametrize("entry", [5, [{"name": "default"}], ["x"], [{"name": 1, "template": "x"}], {"a": "b"}])
def test_a_malformed_entry(tmp_path: Path, entry: object) -> None:
    with pytest.raises(TemplateError, match=r"tokenizer_config\.json: chat_template is"):
        load_templates(tmp_path, {"chat_template": entry})


def test_a_template_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"ab\xff")
    with pytest.raises(TemplateError, match=r"chat_template\.jinja: byte 2 is not UTF-8"):
        load_templates(tmp_path)
