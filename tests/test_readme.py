"""Every code block of every README runs, and prints what its comments say."""

from __future__ import annotations

import ast
import io
import itertools
import json
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
READMES = sorted(p.relative_to(ROOT) for p in [*ROOT.glob("*.md"), *ROOT.glob("[a-z]*/**/README.md")])
READMES = [p for p in READMES if not p.parts[0].startswith((".", "build", "out"))]


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / path).read_text(), re.M | re.S)


# Runs the file argv[1], and writes [[line, text], ...] of what its own calls of print printed, to argv[2].
RECORDER = """
import builtins, io, json, sys
code, told = sys.argv[1:]
printed, plain = [], builtins.print
def recording(*values, **options):
    text = io.StringIO()
    plain(*values, **{**options, "file": text})
    caller = sys._getframe(1)
    if caller.f_code.co_filename == code:
        printed.append([caller.f_lineno, text.getvalue()])
builtins.print = recording
with open(code, encoding="utf-8") as file:
    exec(compile(file.read(), code, "exec"), {"__name__": "__main__"})
with open(told, "w", encoding="utf-8") as file:
    json.dump(printed, file)
"""


def stated(code: str) -> list[tuple[range, list[str]]]:
    """The lines of each print with a stated output, and that: a comment behind it, or lines of comment below it."""
    comments = {
        token.start[0]: token.string.removeprefix("# ")
        for token in tokenize.generate_tokens(io.StringIO(code).readline)
        if token.type == tokenize.COMMENT
    }
    alone = {number for number, line in enumerate(code.splitlines(), 1) if line.lstrip().startswith("#")}
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            end = node.end_lineno or node.lineno
            below = list(itertools.takewhile(alone.__contains__, itertools.count(end + 1)))
            if said := [comments[end]] if end in comments else [comments[number] for number in below]:
                found.append((range(node.lineno, end + 1), said))
    return found


def wrong(code: str, printed: list[tuple[int, str]]) -> list[str]:
    """Each stated output that is not what was printed, whole.

    Behind a colon it may say why, and dots at its end stand for what is left out.
    """
    found = []
    for lines, said in stated(code):
        got = "".join(text for line, text in printed if line in lines).splitlines()
        pairs = list(itertools.zip_longest(got, said, fillvalue=None))
        if not all(g is not None and s is not None and same(g, s) for g, s in pairs):
            found.append(f"stated {said}, printed {got}")
    return found


def same(got: str, said: str) -> bool:
    if said.endswith("..."):
        start = said.removesuffix("...")
        return bool(start) and got.startswith(start) and got != start
    return got == said or said.startswith(f"{got}: ")


def run_python(code: str, folder: Path) -> list[tuple[int, str]]:
    (folder / "blocks.py").write_text(code, encoding="utf-8")
    command = [sys.executable, "-c", RECORDER, "blocks.py", "printed.json"]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return [(line, text) for line, text in json.loads((folder / "printed.json").read_text())]


@pytest.mark.model
@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=[pytest.mark.compiler] if path == Path("kernels/README.md") else [], id=str(path))
        for path in READMES
        if blocks(path, "python")
    ],
)
def test_python_blocks(path: Path, smollm2_dir: Path, minilm_dir: Path, tmp_path: Path) -> None:
    """One process for each file, its blocks in order; what is stated is all that was printed there."""
    code = "\n".join(blocks(path, "python"))
    assert wrong(code, run_python(code, tmp_path)) == []


def test_a_wrong_output_is_found(tmp_path: Path) -> None:
    right = [
        "print(12.5)  # 12.5",
        "print(12.5)  # 12.5: twice 6.25",
        "print(f'{12.5}',\n      1)  # 12.5 1",
        "for i in range(2):\n    print(i)\n# 0\n# 1",
        "print('one two three')  # one two...",
        "print(7)",
    ]
    left_out = [
        "print(1)  # 12.5",
        "print(12.5)  # 1",
        "print(12.5)  # 12.5 or so",
        "print(12)  # 12...",
        "print(1, 2)  # ...",
        "print()  # 1",
        "print('1\\n2')  # 1",
        "for i in range(2):\n    print(i)\n# 0",
        "if 0:\n    print(1)  # 1",
    ]
    for number, code in enumerate(right + left_out):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert bool(wrong(code, run_python(code, folder))) == (code in left_out), code


def test_the_tables_say_what_the_files_say() -> None:
    import importlib.util

    spec = importlib.util.spec_from_file_location("readme_tables", ROOT / "bench" / "readme_tables.py")
    assert spec and spec.loader
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    readme = (ROOT / "README.md").read_text()
    results = json.loads((ROOT / "bench" / "results.json").read_text())
    assert readme == tables.filled(readme, results), "run: python bench/readme_tables.py"
    page = (ROOT / "bench" / "RESULTS.md").read_text()
    assert page == tables.results_page(results), "run: python bench/readme_tables.py"
    assert len(tables.figures(readme)) == len(tables.SHOWN) <= 12
