"""The structure of the source: no circle of imports between files or folders, and no folder that is a drawer."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("kernels", "quant", "lora", "models", "retrieval", "recipes")
MOST_FILES = 14  # of Python and C in one folder

Graph = dict[str, set[str]]


def test_no_two_files_import_each_other() -> None:
    assert circles(product_imports()) == []


def test_no_two_folders_import_each_other() -> None:
    """Of the files in `models/text` none may import `models/decoder` if one there imports `models/text`.

    Files that only collect names for importers are left out: they would join every folder with its children. A file
    beside sub-folders stands for itself: some are below all of them (`errors.py`) and some above (`store.py`).
    """
    folders: Graph = {}
    for file, imported in product_imports().items():
        if not only_reexports(ROOT / file):
            here = unit(file)
            folders.setdefault(here, set()).update({unit(other) for other in imported} - {here})
    assert circles(folders) == []


def unit(file: str) -> str:
    """What counts as one in the rule on folders: the file's folder, or the file itself beside sub-folders."""
    folder = Path(file).parent
    return file if any((ROOT / folder).glob("*/*.py")) else str(folder)


def test_a_file_with_a_definition_of_its_own_is_no_reexport() -> None:
    assert only_reexports(ROOT / "models" / "config.py") and only_reexports(ROOT / "models" / "__init__.py")
    assert not only_reexports(ROOT / "models" / "errors.py")


def test_no_circle_of_imports_in_bench() -> None:
    """Its files are scripts, which import each other from the folder `bench`, or from their own."""
    files = {str(p.relative_to(ROOT)): p for p in (ROOT / "bench").rglob("*.py")}
    graph: Graph = {}
    for name, path in files.items():
        targets = {
            str(Path(folder, *module.split(".")).with_suffix(".py"))
            for module in absolute_imports(path)
            for folder in ("bench", str(Path(name).parent))
        }
        graph[name] = targets & set(files)
    assert circles(graph) == []


def test_no_folder_is_a_drawer() -> None:
    counts: dict[str, int] = {}
    for folder in (*PACKAGES, "bench"):
        for path in (ROOT / folder).rglob("*.[pc]*"):
            if path.suffix in (".py", ".c"):
                counts[str(path.parent.relative_to(ROOT))] = counts.get(str(path.parent.relative_to(ROOT)), 0) + 1
    assert {folder: n for folder, n in counts.items() if n > MOST_FILES} == {}


def test_the_search_for_circles_finds_one() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]


def product_imports() -> Graph:
    """{file: the files that it imports}, wherever the import stands, but for those that only a type checker sees."""
    graph: Graph = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = str(path.relative_to(ROOT))
            graph[name] = {str(file.relative_to(ROOT)) for file in relative_imports(path)} - {name}
    return graph


def only_reexports(path: Path) -> bool:
    """Whether a file holds a docstring, imports and `__all__`, and nothing else."""
    return all(
        isinstance(node, (ast.Import, ast.ImportFrom))
        or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        or (isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"])
        for node in ast.parse(path.read_text(encoding="utf-8")).body
    )


def relative_imports(path: Path) -> Iterator[Path]:
    for node in import_nodes(path):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        folder = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
        for alias in node.names:
            for file in (folder / f"{alias.name}.py", folder / alias.name / "__init__.py"):
                if file.exists():
                    yield file
                    break
            else:  # a name that the module itself defines
                yield from (f for f in (folder.with_suffix(".py"), folder / "__init__.py") if f.exists())


def absolute_imports(path: Path) -> Iterator[str]:
    for node in import_nodes(path):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def import_nodes(path: Path) -> Iterator[ast.AST]:
    """Every node of a file that is not under `if TYPE_CHECKING:`."""
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        yield node
        if not (isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"):
            waiting.extend(ast.iter_child_nodes(node))


def circles(graph: Graph) -> list[list[str]]:
    """The sets of more than one node that all reach each other, each sorted (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph.get(node, ())):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            members = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(members) > 1:
                found.append(sorted(members))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found
