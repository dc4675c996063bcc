"""Mutation tests: small faults are put into the code one at a time, and the tests of the unit have to fail.

    make mutants                                          every module, then tests/MUTANTS.md
    python tests/mutants/run.py lora/layer.py ...         some modules; their results replace the old ones
    python tests/mutants/run.py --show lora/layer.py      the survivors of the last run, as diffs
    python tests/mutants/run.py --again lora/layer.py     only these, after a test was added

The faults are mutmut's: another operator, number, string or constant, an argument left out or None, and so on. Three
things stand between mutmut and this repository, and are dealt with in a copy under build/mutants:

- It needs a folder `qlorag`, since it names a mutant by path; here setuptools maps the packages.
- It leaves functions with decorators alone, which are the hand-written backwards, the optimizer and every property.
  In the copy a decorator is applied by an assignment after the function instead (`undecorated`).
- hypothesis draws anew in each run. In the copy it draws the same examples each time and does not shrink.

Not mutated: module constants and the fields of dataclasses, for mutmut looks into functions only.

A survivor is justified in equivalent.toml, with its reason, if no test can tell it from the original. An entry that
matches no survivor is an error, so the list cannot go stale.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "mutants"
TABLE = ROOT / "tests" / "MUTANTS.md"
PACKAGES = ("kernels", "quant", "lora", "models", "retrieval", "recipes")
MEMORY = 8 << 30  # bytes of addresses; torch alone takes 2 to 3 GB of them
LEAST = 85  # percent of the mutants that are not equivalent


class Target(NamedTuple):
    """The tests that have to notice a fault in a module, and those of them left out (pytest -k).

    Left out are tests that start processes, load real models or take seconds: what only they notice survives.
    """

    tests: tuple[str, ...]
    left_out: str = ""


LORA = ("lora/test_layer.py", "lora/test_layer_choices.py", "kernels/test_lora_kernel.py")
TARGETS = {
    "recipes/training/trainer.py": Target(("recipes/test_steps.py",)),
    "recipes/training/optimizers.py": Target(("recipes/test_optimizers.py",)),
    "recipes/training/checkpoint.py": Target(("recipes/test_checkpoint.py",)),
    "recipes/data/examples.py": Target(("recipes/test_examples.py",)),
    "models/text/chat_labels.py": Target(("models/test_tokenizer.py",), "real"),
    "models/decoder/sampling.py": Target(("models/test_sampling.py",)),
    "retrieval/splitter.py": Target(("retrieval/test_splitter.py",), "megabyte"),
    "retrieval/index/exact.py": Target(("retrieval/test_exact.py",)),
    "retrieval/sqlite/records.py": Target(("retrieval/test_records.py",)),
    "lora/layer.py": Target(LORA),
    "kernels/lora/ops.py": Target(LORA),
    "kernels/lora/dropout.py": Target(LORA),
    "kernels/nf4/reference.py": Target(("kernels/test_nf4_reference.py",)),
}

CASELESS = re.compile(r'SELECT |INSERT INTO |UPDATE |DELETE FROM |"-inf"|"utf-8"')
CASELESS_REASON = 'SQL, encodings and `float("-inf")` are read in either case'

CONFTEST = """
import hypothesis

hypothesis.settings.register_profile(
    "mutants", derandomize=True, database=None, deadline=None,
    phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate),
)
hypothesis.settings.load_profile("mutants")
"""


class Mutant(NamedTuple):
    """One fault: where it is, the lines that it takes out and those it puts in, and what became of it."""

    name: str
    function: str
    was: str
    becomes: str
    status: str


def undecorated(source: str) -> str:
    """The source with `@d` above a function turned into `f = d(f)` below it.

    >>> print(undecorated("@d(1)\\ndef f():\\n    return 2\\n"), end="")
    def f():
        return 2
    f = d(1)(f)
    """
    lines = source.splitlines(keepends=True)
    decorated = [
        node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef) and node.decorator_list
    ]
    for node in sorted(decorated, key=lambda node: -node.lineno):  # from the end, so that line numbers stay true
        value = node.name
        for decorator in reversed(node.decorator_list):
            value = f"{ast.unparse(decorator)}({value})"
        lines.insert(node.end_lineno or 0, f"{' ' * node.col_offset}{node.name} = {value}\n")
        del lines[node.decorator_list[0].lineno - 1 : node.lineno - 1]
    return "".join(lines)


def build(module: str) -> Path:
    """A fresh copy of the repository in which mutmut can work on `module`."""
    target = TARGETS[module]
    folder = BUILD / Path(module).with_suffix("")
    shutil.rmtree(folder, ignore_errors=True)
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / "qlorag" / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    with (folder / "tests" / "conftest.py").open("a", encoding="utf-8") as file:
        file.write(CONFTEST)
    (folder / "mutants").mkdir()  # Python looks once whether a folder on its path exists
    source = folder / "qlorag" / module
    source.write_text(undecorated(source.read_text(encoding="utf-8")), encoding="utf-8")
    config = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[tool.pytest.ini_options]\n")
    mutmut = {
        "source_paths": [f"qlorag/{module}"],
        "also_copy": ["qlorag", "tests"],
        "pytest_add_cli_args_test_selection": [f"tests/{name}" for name in target.tests],
        "pytest_add_cli_args": ["-m", "not model", *(["-k", f"not ({target.left_out})"] if target.left_out else [])],
        "timeout_constant": 2.0,
        "timeout_multiplier": 4.0,
    }
    settings = "".join(f"{key} = {json.dumps(value)}\n" for key, value in mutmut.items())
    text = f"{config[1]}pythonpath = ['.']\n{config[2]}\n[tool.mutmut]\n{settings}"
    (folder / "pyproject.toml").write_text(text, encoding="utf-8")
    return folder


def run(module: str, *, again: bool = False) -> None:
    """Makes and tests the mutants of `module`; the results go to a file beside the copy.

    again: only those that survived the last run, which must have been of the same source. The others stay killed, as
    long as tests were added and none was taken away.
    """
    source = hashlib.sha256((ROOT / module).read_bytes()).hexdigest()
    names = [m.name for m in survivors(module)] if again else []
    if again and (not names or source != json.loads(result_file(module).read_text(encoding="utf-8"))["source"]):
        print(f"{module}: {'nothing survived' if not names else 'another source, so all are run'}", flush=True)
        if not names:
            return
        names = []
    old = {m.name: m for m in mutants_of(module)} if names else {}
    folder = build(module)
    # One thread: after a fork, OpenMP waits for the threads of the parent for ever.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder / "mutants")}
    command = [sys.executable, "-m", "mutmut", "run", "--max-children", "1", *names]
    with (folder / "log").open("w") as log:
        done = subprocess.run(
            command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT, preexec_fn=limit_memory
        )
    meta = folder / "mutants" / "qlorag" / f"{module}.meta"
    if done.returncode or not meta.exists():
        raise SystemExit(f"{module}: mutmut failed, see {folder / 'log'}")
    mutants = [old[m.name] if names and m.name not in names else m for m in read(folder, module)]
    results = {"source": source, "mutants": [m._asdict() for m in mutants]}
    result_file(module).write_text(json.dumps(results, indent=1), encoding="utf-8")


def limit_memory() -> None:
    """A mutant that appends for ever ends in a MemoryError, which kills it, and not the machine."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def read(folder: Path, module: str) -> list[Mutant]:
    """The mutants of a finished run. mutmut reads its files from the working folder."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        from mutmut.mutation.data import SourceFileMutationData
        from mutmut.mutation.diff_apply import get_diff_for_mutant
        from mutmut.stats import status_by_exit_code

        path = Path("qlorag") / module
        data = SourceFileMutationData(path=path)
        data.load()
        return [
            Mutant(name, *change(name, get_diff_for_mutant(name, path=path)), status_by_exit_code[code])
            for name, code in data.exit_code_by_key.items()
        ]
    finally:
        os.chdir(before)


def change(name: str, diff: str) -> tuple[str, str, str]:
    """(function, lines taken out, lines put in) of a mutant's diff; white space at the ends of lines is dropped."""
    function = name.rpartition(".")[2].rpartition("__mutmut_")[0].removeprefix("x_").removeprefix("xǁ")
    lines = [line for line in diff.splitlines() if not line.startswith(("---", "+++", "@@"))]
    sides = (" ".join(line[1:].strip() for line in lines if line.startswith(sign)) for sign in "-+")
    was, becomes = sides
    return function.replace("ǁ", "."), was, becomes


def result_file(module: str) -> Path:
    return BUILD / (module.replace("/", ".") + ".json")


def mutants_of(module: str) -> list[Mutant]:
    """All mutants of the module's last run."""
    return [Mutant(**m) for m in json.loads(result_file(module).read_text(encoding="utf-8"))["mutants"]]


def survivors(module: str) -> list[Mutant]:
    """Those that no test noticed, or that no test ran."""
    return [m for m in mutants_of(module) if m.status not in ("killed", "timeout", "segfault")]


def justified() -> dict[str, list[dict[str, Any]]]:
    """{module: entries of equivalent.toml}, each with `function`, `changes` ([was, becomes]) and `why`."""
    import tomllib

    return tomllib.loads((ROOT / "tests" / "mutants" / "equivalent.toml").read_text(encoding="utf-8"))


def reason_of(module: str, m: Mutant, entries: list[dict[str, Any]]) -> str | None:
    """Why no test can tell this mutant from the original; None if one could."""
    if m.was.lower() == m.becomes.lower() and CASELESS.search(m.was):
        return CASELESS_REASON
    for entry in entries:
        if entry["function"] == m.function and [m.was, m.becomes] in entry["changes"]:
            return str(entry["why"])
    return None


def table() -> tuple[str, list[str]]:
    """The text of tests/MUTANTS.md, and what is wrong: too few killed, or entries that match no survivor."""
    rows, reasons, wrong = [], [], []
    entries_of = justified()
    for module in TARGETS:
        total, alive = len(mutants_of(module)), survivors(module)
        entries = entries_of.get(module, [])
        keys = [[m.function, m.was, m.becomes] for m in alive]
        for entry in entries:
            stale = [pair for pair in entry["changes"] if [entry["function"], *pair] not in keys]
            wrong += [f"{module}: {entry['function']}: justified, but no survivor: {was} -> {to}" for was, to in stale]
        excused = [(m.function, why) for m in alive if (why := reason_of(module, m, entries)) is not None]
        for (function, why), n in Counter(excused).items():
            reasons.append(f"| {module} | `{function}` | {n} | {why} |")
        killed, left = total - len(alive), len(alive) - len(excused)
        share = 100 * killed / (killed + left)
        if share < LEAST:
            wrong.append(f"{module}: {share:.1f} % killed, wanted {LEAST}")
        rows.append(f"| {module} | {total} | {killed} | {len(excused)} | {left} | {share:.1f} |")
    return TEXT.format(rows="\n".join(rows), reasons="\n".join(reasons)), wrong


TEXT = """# Mutants

Made by `make mutants` (tests/mutants/run.py says how); not part of CI. A mutant is one small fault in one function.
It is killed if a test of its unit fails or runs out of time. It is justified if no test can tell it from the original:
those are listed below with the reason. Percent: killed of those not justified. Most other survivors of
kernels/lora/ops.py are in its Triton branch, which runs in a process of its own (tests/interpreter/test_lora.py).

| module | mutants | killed | justified | other survivors | percent |
|---|---:|---:|---:|---:|---:|
{rows}

| module | function | mutants | why no test can tell |
|---|---|---:|---|
{reasons}
"""


def main() -> int:
    """Runs what the command line asks for; 0 if enough mutants died and nothing in the list of reasons is stale."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", help="default: all")
    parser.add_argument("--again", action="store_true", help="only what survived the last run of the same source")
    parser.add_argument("--show", action="store_true", help="show survivors, run nothing")
    args = parser.parse_args()
    modules, entries_of = args.modules or list(TARGETS), justified()
    for module in modules:
        if not args.show:
            run(module, again=args.again)
        count, alive = len(mutants_of(module)), survivors(module)
        left = [m for m in alive if reason_of(module, m, entries_of.get(module, [])) is None]
        print(f"{module}: {count} mutants, {count - len(alive)} killed, {len(left)} others not justified", flush=True)
        for m in left if args.show else ():
            print(f"  {m.function} ({m.status})\n    - {m.was}\n    + {m.becomes}")
    if args.show or not all(result_file(module).exists() for module in TARGETS):
        return 0
    text, wrong = table()
    TABLE.write_text(text, encoding="utf-8")
    print("\n".join(wrong) or f"{TABLE.relative_to(ROOT)} written")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
