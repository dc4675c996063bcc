"""What is labelled in a chat, beside trl: its templates for training mark the assistant's text themselves.

    python bench/chat_labels/measure.py [--only qwen3 llama3] [--page bench/chat_labels/CHAT_LABELS.md]

trl's wheel (pinned below, fetched without its dependencies into a temporary folder) holds stock chat templates and, for
31 of them, a twin with `{% generation %}` around what is to be learned. Here the *stock* template is given, and what
`Tokenizer.chat_examples` labels is compared, character by character, with what the twin encloses.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qlorag.models import ModelError, Tokenizer, load_tokenizer
from qlorag.models.text.chat_template import ChatTemplate
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as RawTokenizer

TRL = "trl==1.16.0"
# Templates of the families that load here.
LOADABLE = ("deepseek_r1_distill", "llama3", "qwen2_5", "qwen3", "qwen3_instruct_2507")


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def says(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def called(arguments: Any) -> dict[str, Any]:
    function = {"name": "weather", "arguments": arguments}
    return says("", tool_calls=[{"id": "call12345", "type": "function", "function": function}])


CITY = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "now", "parameters": CITY}}]
SUNNY = [{"role": "tool", "name": "weather", "tool_call_id": "call12345", "content": "sunny"}, says("It is sunny")]
ONE, TWO = [user("Hi there"), says("Hello you")], [user("And now?"), says("Good bye")]
CHATS: dict[str, tuple[list[dict[str, Any]], Any]] = {
    "one turn": (ONE, None),
    "system": ([{"role": "system", "content": "Be brief"}, *ONE], None),
    "two turns": ([*ONE, *TWO], None),
    "reasoning": (
        [ONE[0], {**ONE[1], "reasoning_content": "I greet"}, TWO[0], {**TWO[1], "reasoning_content": "I leave"}],
        None,
    ),
    "<think>": (
        [ONE[0], says("<think>\nI greet\n</think>\n\nHello you"), TWO[0], says("<think>\nI leave\n</think>\n\nBye")],
        None,
    ),
    "tool call": ([user("Rome?"), called({"city": "Rome"}), *SUNNY], TOOLS),
    "arguments as a string": ([user("Rome?"), called('{"city": "Rome"}'), *SUNNY], TOOLS),
}
OPEN, CLOSE = "\ue000", "\ue001"


@contextmanager
def templates() -> Iterator[Path]:
    """The folder of trl's templates."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", folder, TRL]
        subprocess.run(command, check=True)
        wheel = next(Path(folder).glob("trl-*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        yield Path(folder) / "trl" / "chat_templates"


def stock_names(folder: Path) -> list[str]:
    """The templates that have a twin."""
    return sorted(path.stem.removesuffix("_training") for path in folder.glob("*_training.jinja"))


def tokenizer_for(template: Path, folder: Path) -> Tokenizer:
    """A byte-level tokenizer that has every special token that the template writes, with an end token of its family."""
    source = template.read_text(encoding="utf-8")
    pattern = r"<[|｜][^<>\s'\"{}]*?[|｜]>|</?s>|<eos>|<bos>|<(?:start|end)_of_turn>|<turn\|>|<\|turn>|\[/?[A-Z_]{3,}\]"
    specials = sorted({*re.findall(pattern, source), "<|endoftext|>", "</s>", "<s>"})
    vocabulary: dict[str, int] = {}
    for text in [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())]:
        vocabulary.setdefault(text, len(vocabulary))
    raw = RawTokenizer(models.BPE(vocabulary, []))
    raw.add_special_tokens([AddedToken(text, special=True) for text in specials])
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    raw.save(str(folder / "tokenizer.json"))
    ends = ("<|eot_id|>", "<｜end▁of▁sentence｜>", "<|im_end|>", "<end_of_turn>", "<|end|>", "</s>")
    end = next(text for text in ends if text in vocabulary)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": end, "bos_token": "<s>"}))
    ids = sorted({vocabulary[end], vocabulary["<|endoftext|>"]})
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    (folder / "chat_template.jinja").write_text(source, encoding="utf-8")
    return load_tokenizer(folder)


def ours(tok: Tokenizer, messages: list[dict[str, Any]], tools: Any) -> list[str]:
    """The labelled runs of every example, as text. Raises ModelError: the chat is refused."""
    runs = []
    for example in tok.chat_examples(messages, tools=tools):
        run: list[int] = []
        for token, labelled in [*zip(example.ids, example.mask, strict=True), (0, False)]:
            if labelled:
                run.append(token)
            elif run:
                runs.append(tok.decode(run, skip_special=False))
                run = []
    return runs


def theirs(tok: Tokenizer, twin: ChatTemplate, messages: list[dict[str, Any]], tools: Any) -> list[str]:
    """What the twin encloses. Raises ModelError: it refuses the chat."""
    variables = {**tok.special_tokens, "tools": tools, "documents": None, "messages": messages}
    text = twin.render_cuts(variables, [(len(messages), False)], generation=(OPEN, CLOSE))[0]
    return re.findall(f"{OPEN}(.*?){CLOSE}", text, flags=re.DOTALL)


def compare(folder: Path, name: str) -> dict[str, str]:
    """{chat: what came of it} of one template, see LEGEND."""
    found = {}
    with tempfile.TemporaryDirectory() as work:
        tok = tokenizer_for(folder / f"{name}.jinja", Path(work))
        twin = ChatTemplate((folder / f"{name}_training.jinja").read_text(encoding="utf-8"), origin="twin")
        for chat, (messages, tools) in CHATS.items():
            try:
                labelled: list[str] | None = ours(tok, messages, tools)
            except ModelError:
                labelled = None
            try:
                wanted: list[str] | None = theirs(tok, twin, messages, tools)
            except ModelError:
                wanted = None
            found[chat] = verdict(labelled, wanted)
    return found


def verdict(labelled: list[str] | None, wanted: list[str] | None) -> str:
    if wanted is None:
        return "both refuse" if labelled is None else "only trl refuses"
    if labelled is None:
        return "refused"
    if labelled == wanted:
        return "equal"
    joined = ["".join(part.strip() for part in parts) for parts in (labelled, wanted)]
    if joined[0] == joined[1]:
        return "white space"
    return "less" if joined[1].endswith(joined[0]) or all(a.strip() in joined[1] for a in labelled) else "other"


LEGEND = {
    "equal": "the same characters",
    "white space": "trl also learns the newline after the end token (qwen2_5: the one before the answer), which is "
    "never generated: generation stops at the end token",
    "less": "trl also learns what the generation prompt already holds (`<｜Assistant｜>`, `<think>`), which is never "
    "generated either, or a second end token after the first (phi3)",
    "other": "named below",
    "refused": "the template does not print what a message says: trl learns an answer without it, an empty one where "
    "it was a tool call",
    "both refuse": "the template refuses the chat, or does not print what it says",
    "only trl refuses": "its twin wants arguments as objects; here a string of JSON is given as the object it is",
}
OTHER = """\
- deepseek_r1_distill and deepseekv3, reasoning: trl learns the answer and loses `reasoning_content`; here it is put
  back where it is generated, after the generation prompt's `<think>`.
- qwen2_5, arguments as a string: its template would print the string as JSON once more, quoted and escaped; here it
  is given the object.
- the Nemotron templates, reasoning: the first of two turns is labelled with its reasoning, as it is generated; the
  twin drops it.
- glm4moe: its turns end with the next turn's role, which the twin moves into the turn; here an end token is written.
- gptoss, muse_glimmer, diffusion_gemma, qwen3.5 to 3.8: headers inside the twin's blocks. None of them loads here."""


def page(results: dict[str, dict[str, str]]) -> str:
    """The committed page."""
    chats = list(CHATS)
    rows = [
        "| template | " + " | ".join(f"`{c}`" if "<" in c else c for c in chats) + " |",
        "|---" * (len(chats) + 1) + "|",
    ]
    ordered = sorted(results, key=lambda name: (name not in LOADABLE, name))
    for name in ordered:
        shown = f"**{name}**" if name in LOADABLE else name
        rows.append(f"| {shown} | " + " | ".join(results[name][chat] for chat in chats) + " |")
    counts = Counter(result for name in results for result in results[name].values())
    here = Counter(result for name in results if name in LOADABLE for result in results[name].values())
    legend = ["| result | cells | of families that load | meaning |", "|---|---:|---:|---|"]
    legend += [f"| {key} | {counts[key]} | {here[key]} | {meaning} |" for key, meaning in LEGEND.items()]
    return "\n".join(
        [
            "# What is labelled in a chat, beside trl",
            "",
            f"Written by `python bench/chat_labels/measure.py --page bench/chat_labels/CHAT_LABELS.md` with {TRL}.",
            "Each stock template in its wheel renders seven chats here; what is labelled is compared with what the",
            "twin of that template encloses in `{% generation %}`. Bold: the families that load here.",
            "",
            *legend,
            "",
            "Other differences:",
            "",
            OTHER,
            "",
            *rows,
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", help="names of templates")
    parser.add_argument("--page", type=Path, help="write the page there")
    args = parser.parse_args()
    with templates() as folder:
        results = {name: compare(folder, name) for name in stock_names(folder) if not args.only or name in args.only}
    for name, found in results.items():
        print(f"{name:26}", "  ".join(f"{chat}: {result}" for chat, result in found.items()))
    if args.page:
        args.page.write_text(page(results), encoding="utf-8")


if __name__ == "__main__":
    main()
