"""Every file, folder and command that CONTRIBUTING.md and README.md name exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = ("CONTRIBUTING.md", "README.md", "NOTES.md")
FOLDERS = (
    *("kernels", "lora", "models", "quant", "recipes", "retrieval", "bench"),
    *(f"kernels/{name}" for name in ("cross_entropy", "lora", "nf4", "rms_norm", "rope", "swiglu")),
)
SUFFIXES = (".py", ".md", ".c", ".toml", ".sql", ".json", "/")


def named(page: str) -> list[str]:
    """Paths from the root: in backticks, as a link's target, or as an argument of a command.

    NAME stands for a file or folder to be added; such a path is cut to the folder that it goes into.
    """
    text = (ROOT / page).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    quoted = [word for code in re.findall(r"`([^`\n]+)`", text) for word in code.split()]
    commands = [word for code in re.findall(r"^```text\n(.*?)^```", text, re.M | re.S) for word in code.split()]
    paths = [
        p for p in [*quoted, *commands] if "/" in p and p.endswith(SUFFIXES) and not p.startswith((".venv", "http"))
    ]
    return [p if "NAME" not in p else p[: p.index("NAME")].rpartition("/")[0] + "/" for p in [*links, *paths]]


@pytest.mark.parametrize("page", PAGES)
def test_the_files_it_names_exist(page: str) -> None:
    paths = named(page)
    assert len(paths) > 5
    assert [p for p in paths if not (ROOT / p).exists()] == []


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_tables_of_a_package_s_readme_name_its_files(folder: str) -> None:
    text = (ROOT / folder / "README.md").read_text(encoding="utf-8")
    cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    files = [name for cell in cells for name in re.findall(r"`([\w./*]+(?:\.py|\.c|\.sql|/))`", cell)]
    assert files
    assert [name for name in files if not [*(ROOT / folder).glob(name)]] == []


@pytest.mark.parametrize("page", PAGES)
def test_the_make_targets_it_names_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    commands = re.findall(r"^make ([^#\n]+)|`make ([^`]+)`", text, re.M)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8").replace("$(VENV)", ".venv")
    targets = set(re.findall(r"^([\w./-]+):(?!=)", makefile, re.M))
    assert {target for command in commands for target in "".join(command).split()} - targets == set()


def test_a_name_without_a_file_is_found() -> None:
    assert "kernels/rms_norm/" in named("CONTRIBUTING.md")
    assert "models/decoder/sampling.py" in named("README.md")
    assert "tests/interpreter/" in named("CONTRIBUTING.md")  # of tests/interpreter/test_NAME.py
