"""Every code block of every README runs, and prints what its comments say."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
READMES = sorted(p.relative_to(ROOT) for p in [*ROOT.glob("*.md"), *ROOT.glob("[a-z]*/**/README.md")])
READMES = [p for p in READMES if not p.parts[0].startswith((".", "build", "out"))]


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / path).read_text(), re.M | re.S)


def expected(code: str) -> list[str]:
    """The comments that state an output: behind a print, or alone on the line after it."""
    lines = code.splitlines()
    out = []
    for i, line in enumerate(lines):
        if re.match(r"\s*print\(", line):
            if said := re.search(r"\)\s+# (.+)$", line):
                out.append(said[1])
            elif i + 1 < len(lines) and lines[i + 1].startswith("# "):
                out.append(lines[i + 1][2:])
    return out


@pytest.mark.model
@pytest.mark.parametrize("path", [p for p in READMES if blocks(p, "python")], ids=str)
def test_python_blocks(path: Path, smollm2_dir: Path, minilm_dir: Path, tmp_path: Path) -> None:
    """One process for each file, its blocks in order; a stated output begins with what was printed."""
    code = "\n".join(blocks(path, "python"))
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    printed = iter(run.stdout.splitlines())
    for said in expected(code):
        assert any(line and said.startswith(line.strip()) for line in printed), f"{said!r} not in {run.stdout!r}"


@pytest.mark.model
def test_the_readme_s_commands_run_as_written(smollm2_dir: Path, minilm_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    (script,) = blocks(Path("README.md"), "bash")
    said: dict[str, str] = {}
    for command in re.split(r"\n(?!\s)", script.replace("\\\n", " ").strip()):
        if not command.strip():
            continue
        run = subprocess.run(shlex.split(command), cwd=tmp_path, env=env, capture_output=True, text=True)
        assert run.returncode == 0, (command, run.stderr[-2000:])
        said[command] = run.stdout
    verbs = [c.split()[1] for c in said]
    assert verbs == ["pull", "inspect", "train", "evaluate", "generate", "fuse", "generate", "index", "search", "ask"]
    answers = [out for c, out in said.items() if c.startswith("qlorag generate")]
    assert all(a.startswith("A software developer from Cyprus\n") for a in answers), answers


def test_the_tables_say_what_the_files_say() -> None:
    import importlib.util
    import json

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
