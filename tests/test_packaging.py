"""The rules of the source: packages listed, arrows only downward, folders that can be lifted out, no oracle used."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PACKAGES = ("kernels", "quant", "lora", "models", "retrieval", "recipes")
# The table of README's "Rooms": what each may import of the others, and the third-party libraries it may name.
MAY_IMPORT: dict[str, set[str]] = {
    "kernels": set(),
    "quant": {"kernels"},
    "lora": {"kernels"},
    "models": {"kernels", "quant"},
    "retrieval": set(),
    "recipes": {"kernels", "quant", "lora", "models", "retrieval"},
}
LIBRARIES: dict[str, set[str]] = {
    "kernels": {"torch", "numpy", "triton"},
    "quant": {"torch"},
    "lora": {"torch", "safetensors"},
    "models": {"torch", "numpy", "safetensors", "tokenizers", "jinja2", "gguf"},
    "retrieval": {"numpy", "hnswlib"},
    "recipes": {"torch", "numpy", "safetensors", "rich", "matplotlib", "yaml", "huggingface_hub"},
}
# What stands directly in a package, from the bottom up: each may import those on the lines before its own.
LEVELS: dict[str, tuple[tuple[str, ...], ...]] = {
    "models": (("errors",), ("text",), ("decoder",), ("files",), ("encoder",)),
    "retrieval": (("errors",), ("documents", "splitter"), ("sqlite",), ("index",), ("ingest",), ("store",)),
    "recipes": (
        ("errors",),
        ("hub", "data"),
        ("training", "rag", "evaluation"),
        ("inspection",),
        ("cli",),
    ),
}
ORACLES = (
    "transformers",
    "peft",
    "bitsandbytes",
    "accelerate",
    "sentence_transformers",
    "llama_index",
    "langchain",
)


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(path: Path) -> list[tuple[int, str, int]]:
    """(relative level, module, line) of every import in a file, wherever it stands."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(0, alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found += [(node.level, name, node.lineno) for name in names]
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_what_its_row_names(package: str) -> None:
    for path in sources(package):
        depth = len(path.relative_to(ROOT).parts) - 1  # packages between the file and `qlorag`
        for level, module, line in imports(path):
            where, first = f"{path.relative_to(ROOT)}:{line}", module.split(".")[0]
            if level > depth:  # it climbs out of its package
                assert level == depth + 1, f"{where} climbs out of qlorag"
                assert first in MAY_IMPORT[package], f"{where} imports {first}, which {package} may not"
            elif level == 0 and first not in sys.stdlib_module_names:
                assert first in LIBRARIES[package], f"{where} imports {first}, which {package} may not"


@pytest.mark.parametrize("package", LEVELS)
def test_no_import_inside_a_package_runs_upward(package: str) -> None:
    level = {name: at for at, names in enumerate(LEVELS[package]) for name in names}
    for path in sources(package):
        here = path.relative_to(ROOT / package).with_suffix("").parts
        if len(here) == 1 and here[0] not in level:  # __init__.py, and documented import paths such as models/config.py
            defined = [n for n in ast.parse(path.read_text()).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
            assert not defined, f"{path.relative_to(ROOT)} defines {defined[0].name}: name the file in LEVELS"
            continue
        for climb, module, line in imports(path):
            if climb == len(here):  # from the package's root
                target = module.split(".")[0]
                where = f"{path.relative_to(ROOT)}:{line}"
                assert target in level, f"{where} imports {target}, which LEVELS does not name"
                assert target == here[0] or level[target] < level[here[0]], f"{where}: {here[0]} is below {target}"


def test_every_python_folder_is_listed() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {str(p.parent.relative_to(ROOT)) for package in PACKAGES for p in sources(package)}
    assert set(settings["package-dir"].values()) == folders
    assert {"qlorag." + f.replace("/", ".") for f in folders} == set(settings["packages"])
    assert set(settings["package-dir"]) == set(settings["packages"])
    assert not (ROOT / "__init__.py").exists()
    assert not (ROOT / "kernels" / "__init__.py").exists()  # it would shadow another distribution's `kernels`


@pytest.mark.parametrize("package", [r for r in PACKAGES if r != "recipes"])
def test_a_package_can_be_lifted_out(package: str, tmp_path: Path) -> None:
    """Copied with those its row names into another package, a package imports there, without oracles or triton."""
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "__init__.py").touch()
    for name in {package, *MAY_IMPORT[package]}:
        shutil.copytree(ROOT / name, tmp_path / "theirs" / name, ignore=shutil.ignore_patterns("__pycache__"))
    folders = {p.parent.relative_to(ROOT) for p in sources(package)}
    modules = ["theirs." + str(f).replace("/", ".") for f in sorted(folders)]
    code = (
        f"import importlib, sys\nfor m in {modules!r}: importlib.import_module(m)\n"
        f"bad = [m for m in {(*ORACLES, 'triton', 'qlorag')!r} if m in sys.modules]\nassert not bad, bad\n"
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


RECIPES = {  # the sections "To lift it": what is copied
    **{f"kernels/{name}": ("kernels/dispatch",) for name in ("cross_entropy", "lora", "rms_norm", "rope", "swiglu")},
    "kernels/nf4": ("kernels/native", "kernels/dispatch"),
    "quant": ("kernels/nf4", "kernels/native", "kernels/dispatch"),
    "lora": ("kernels/lora", "kernels/dispatch"),
}


@pytest.mark.parametrize(
    "folder", [pytest.param(f, marks=pytest.mark.compiler) if f in ("quant", "kernels/nf4") else f for f in RECIPES]
)
def test_a_folder_can_be_lifted_out_with_what_its_readme_names(folder: str, tmp_path: Path) -> None:
    for name in (folder, *RECIPES[folder]):
        shutil.copytree(ROOT / name, tmp_path / "theirs" / name, ignore=shutil.ignore_patterns("__pycache__"))
        assert (
            name == folder
            or any(f"`{n}/`" in (ROOT / folder / "README.md").read_text() for n in (name, Path(name).name))
            or (f"../{Path(name).name}" in (ROOT / folder / "README.md").read_text())
        )
    module = f"theirs.{folder.replace('/', '.')}"
    code = f"import sys, {module}\nassert not any(name.startswith('qlorag') for name in sys.modules)\n"
    if folder in ("quant", "kernels/nf4"):
        code += "import torch\nfrom theirs.kernels import nf4\nq = nf4.quantize(torch.ones(64))\n"
        code += "assert nf4.dequantize(q, backend='c').tolist() == [1.0] * 64\n"
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_the_command_line_imports_no_oracle() -> None:
    code = (
        "import sys\nfrom qlorag.recipes.cli import build_parser\nbuild_parser()\n"
        f"bad = [m for m in {(*ORACLES, 'triton', 'matplotlib')!r} if m in sys.modules]\nassert not bad, bad\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_dependency_is_imported_and_explained() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    declared = tomllib.loads(text)["project"]["dependencies"]
    names = {d.split(">")[0].split(";")[0].strip() for d in declared}
    imported = {
        m.split(".")[0] for package in PACKAGES for p in sources(package) for level, m, _ in imports(p) if not level
    }
    modules = {"pyyaml": "yaml"}
    assert {n for n in names if modules.get(n, n) not in imported} == set()
    for line in text.splitlines():
        if any(line.strip().startswith(f'"{d.split(";")[0].strip()}') for d in declared):
            assert "#" in line, f"no reason beside {line.strip()}"
