#!/usr/bin/env bash
# trl 1.16.0 brings chat templates for training whose {% generation %} blocks mark what is learned
# (assistant_only_loss). That for DeepSeek-R1-Distill prints tool calls only where content is null. For an assistant
# message with a tool call and content "" it prints neither the call nor the tools, and the block that is learned holds
# the header and the end token alone: the model is taught to answer the question with nothing.
# Seen: learned: ['<｜Assistant｜><｜end▁of▁sentence｜>', '<｜tool▁outputs▁end｜>It is sunny<｜end▁of▁sentence｜>'];
# tool name printed: False
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q jinja2==3.1.6
"$work/venv/bin/pip" download -q --no-deps --dest "$work" trl==1.16.0
"$work/venv/bin/python" -m zipfile -e "$work"/trl-*.whl "$work/trl"
"$work/venv/bin/python" - "$work/trl/trl/chat_templates/deepseek_r1_distill_training.jinja" <<'PY'
import re, sys
from jinja2.ext import Extension
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

class Generation(Extension):
    tags = {"generation"}
    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)
    def _mark(self, caller):
        return f"\ue000{caller()}\ue001"

env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation])
call = {"type": "function", "function": {"name": "weather", "arguments": "{}"}}
messages = [{"role": "user", "content": "Weather in Rome?"}, {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "sunny"}, {"role": "assistant", "content": "It is sunny"}]
text = env.from_string(open(sys.argv[1], encoding="utf-8").read()).render(
    messages=messages, tools=[call], bos_token="", add_generation_prompt=False)
learned = re.findall("\ue000(.*?)\ue001", text, flags=re.S)
print(f"trl 1.16.0: learned: {learned}; tool name printed: {'weather' in text}")
raise SystemExit(0 if learned[0] == "<｜Assistant｜><｜end▁of▁sentence｜>" and "weather" not in text else 1)
PY
