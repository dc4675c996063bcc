"""Compile on first use: the cache, and every way it can go wrong, each ending in a working program."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import stat
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pytest
from qlorag.kernels.native import NativeBuildError, build, load

pytestmark = pytest.mark.slow

SOURCE = """
#include <stdint.h>
int answer(void) { return 42; }
int64_t sum(int64_t n, int threads) {
    int64_t total = 0;
#pragma omp parallel for reduction(+ : total) num_threads(threads)
    for (int64_t i = 0; i < n; i++) total += i;
    return total;
}
"""


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A small C file, an empty cache folder and an empty memory of what was loaded."""
    monkeypatch.setenv("QLORAG_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(build, "_loaded", {})
    path = tmp_path / "op" / "cpu.c"
    path.parent.mkdir()
    path.write_text(SOURCE)
    return path


def forget(monkeypatch):
    monkeypatch.setattr(build, "_loaded", {})


def cached(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "home" / "kernels").iterdir())


def answer(source: Path) -> int:
    return load(source).handle.answer()


def compiler(path: Path, body: str) -> str:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def count_compilations(monkeypatch) -> list[Path]:
    calls: list[Path] = []
    compile_ = build._compile

    def counting(source, *rest):
        calls.append(source)
        return compile_(source, *rest)

    monkeypatch.setattr(build, "_compile", counting)
    return calls


@pytest.mark.compiler
def test_compiles_once_then_reads_the_cache(source, tmp_path, monkeypatch):
    calls = count_compilations(monkeypatch)
    assert answer(source) == 42 and answer(source) == 42
    forget(monkeypatch)
    assert answer(source) == 42
    assert len(calls) == 1
    (entry,) = cached(tmp_path)
    assert entry.name.startswith("op-cpu-") and entry.suffix == ".so"


@pytest.mark.compiler
def test_a_changed_source_compiler_or_flag_is_another_entry(source, tmp_path, monkeypatch):
    calls = count_compilations(monkeypatch)
    load(source)
    source.write_text(SOURCE.replace("42", "43"))
    forget(monkeypatch)
    assert answer(source) == 43
    monkeypatch.setenv("CC", compiler(tmp_path / "mycc", 'exec cc "$@"'))
    forget(monkeypatch)
    load(source)
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-O1"))
    forget(monkeypatch)
    load(source)
    assert len(calls) == 4 and len(cached(tmp_path)) == 4


@pytest.mark.compiler
def test_a_changed_file_that_the_source_includes_is_another_entry(source, monkeypatch):
    part = source.with_name("part.c")
    part.write_text("enum { ANSWER = 42 };")
    source.write_text('#include "part.c"\nint answer(void) { return ANSWER; }')
    assert answer(source) == 42
    part.write_text("enum { ANSWER = 43 };")
    forget(monkeypatch)
    assert answer(source) == 43


@pytest.mark.compiler
def test_openmp_is_torchs_own(source):
    library = load(source)
    assert library.openmp
    library.handle.sum.argtypes = [ctypes.c_int64, ctypes.c_int]
    library.handle.sum.restype = ctypes.c_int64
    assert library.handle.sum(100_000, 2) == 99_999 * 100_000 // 2
    if sys.platform == "linux":
        needed = subprocess.run(["ldd", library.handle._name], capture_output=True, text=True, check=True)
        assert "omp" not in needed.stdout  # linked without: the symbols come from what torch has loaded


def test_a_compiler_without_openmp_gives_one_thread(source, tmp_path, monkeypatch):
    refuse = '[ "$a" = -fopenmp ] && { echo "error: no OpenMP" >&2; exit 1; }'
    script = f'for a in "$@"; do {refuse}; done; exec cc "$@"'
    monkeypatch.setenv("CC", compiler(tmp_path / "plaincc", script))
    assert load(source).openmp is False
    assert answer(source) == 42


@pytest.mark.parametrize(
    ("cc", "message"),
    [
        (
            "/nonexistent/cc",
            "no C compiler: '/nonexistent/cc' is not on PATH (install gcc or clang, or set CC)",
        ),
        ("false", "false failed with exit code 1: no message"),
    ],
)
def test_no_compiler_is_one_clear_line_once(source, monkeypatch, caplog, cc, message):
    monkeypatch.setenv("CC", cc)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            with pytest.raises(NativeBuildError) as error:
                load(source)
            assert message in str(error.value)
    (record,) = caplog.records
    assert "\n" not in record.getMessage()
    assert record.getMessage().startswith("cpu.c: ") and "slower torch reference" in record.getMessage()


@pytest.mark.parametrize("cc", ['gcc "', "'", "cc \\"])
def test_a_compiler_with_an_unbalanced_quote_is_one_clear_line(source, monkeypatch, caplog, cc):
    monkeypatch.setenv("CC", cc)
    with pytest.raises(NativeBuildError, match=r"^CC=.* is not a command \(No .*\): correct it, or unset it$"):
        load(source)
    (record,) = caplog.records
    assert "\n" not in record.getMessage()


@pytest.mark.compiler
@pytest.mark.parametrize("cc", ["/nonexistent/cc", 'cc "', "false"])
def test_a_warm_cache_serves_without_a_compiler(source, tmp_path, monkeypatch, caplog, cc):
    load(source)
    monkeypatch.setenv("CC", cc)
    forget(monkeypatch)
    library = load(source)
    assert library.handle.answer() == 42 and library.openmp
    assert caplog.records == []  # it is the same library: nothing to warn of
    (entry,) = cached(tmp_path)
    entry.write_bytes(b"no library")  # and it is still checked
    forget(monkeypatch)
    with pytest.raises(NativeBuildError):
        load(source)
    assert cached(tmp_path) == []


@pytest.mark.compiler
@pytest.mark.parametrize("change", ["source", "flags", "machine"])
def test_without_a_compiler_a_library_of_something_else_is_not_taken(source, monkeypatch, change):
    load(source)
    forget(monkeypatch)
    monkeypatch.setenv("CC", "/nonexistent/cc")
    if change == "source":
        source.write_text(SOURCE.replace("42", "43"))
    elif change == "flags":
        monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-O1"))
    else:
        monkeypatch.setattr(build.platform, "machine", lambda: "riscv64")
    with pytest.raises(NativeBuildError, match="no C compiler"):
        load(source)


@pytest.mark.compiler
def test_a_compiler_that_fails_is_quoted(source, caplog):
    source.write_text("int answer(void) { return forty_two; }")
    with pytest.raises(NativeBuildError, match="forty_two"):
        load(source)
    assert len(caplog.records) == 1


def test_a_compiler_that_hangs_is_given_up(source, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "COMPILE_TIMEOUT", 0.2)
    monkeypatch.setenv("CC", compiler(tmp_path / "slowcc", "exec sleep 20"))
    with pytest.raises(NativeBuildError, match="timed out"):
        load(source)


def test_a_compiler_that_writes_rubbish(source, tmp_path, monkeypatch):
    script = 'while [ $# -gt 0 ]; do [ "$1" = -o ] && echo rubbish > "$2"; shift; done; true'
    monkeypatch.setenv("CC", compiler(tmp_path / "liar", script))
    with pytest.raises(NativeBuildError, match="does not load"):
        load(source)


@pytest.mark.compiler
def test_a_cache_that_cannot_be_made_still_gives_a_library(source, tmp_path, monkeypatch, caplog):
    (tmp_path / "home").write_text("a file where the folder should be")
    with caplog.at_level(logging.INFO):
        assert answer(source) == 42
    assert "not cached" in caplog.text


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write to read-only folders")
def test_a_read_only_cache_still_gives_a_library(source, tmp_path):
    folder = tmp_path / "home" / "kernels"
    folder.mkdir(parents=True)
    folder.chmod(0o500)
    assert answer(source) == 42
    assert cached(tmp_path) == []


@pytest.mark.compiler
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_cache_still_gives_a_library_and_leaves_nothing(source, tmp_path, monkeypatch, step):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(build.os, step, full)
    assert answer(source) == 42
    assert cached(tmp_path) == []


@pytest.mark.compiler
@pytest.mark.parametrize("damage", ["truncated", "emptied", "flipped", "text"])
def test_a_damaged_entry_is_built_again(source, tmp_path, monkeypatch, damage):
    calls = count_compilations(monkeypatch)
    with monkeypatch.context() as context:  # leave an entry that this process has not mapped
        context.setattr(build.ctypes, "CDLL", lambda path: path)
        load(source)
    forget(monkeypatch)
    (entry,) = cached(tmp_path)
    good = entry.read_bytes()
    flipped = bytes([*good[:999], good[999] ^ 1, *good[1000:]])
    entry.write_bytes({"truncated": good[:1000], "emptied": b"", "flipped": flipped, "text": b"no library"}[damage])
    assert answer(source) == 42
    assert len(calls) == 2
    assert [e.read_bytes() for e in cached(tmp_path)] == [good]  # the compiler is deterministic


@pytest.mark.compiler
def test_an_entry_of_another_user_is_not_run(source, tmp_path, monkeypatch):
    load(source)
    forget(monkeypatch)
    calls = count_compilations(monkeypatch)
    (entry,) = cached(tmp_path)
    if os.getuid() == 0:
        os.chown(entry, 12345, -1)
    else:
        monkeypatch.setattr(build.os, "getuid", lambda: 12345)
    assert answer(source) == 42
    assert len(calls) == 1


@pytest.mark.compiler
def test_threads_that_load_at_once_compile_once(source, monkeypatch):
    calls = count_compilations(monkeypatch)
    answers: list[int] = []
    threads = [threading.Thread(target=lambda: answers.append(answer(source))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [42] * 8 and len(calls) == 1


PROGRAM = """
import sys, torch
torch.set_num_threads(1)
from qlorag.kernels import nf4
w = torch.arange(-50.0, 50.0)
q = nf4.quantize(w)
a = nf4.dequantize(q)
b = nf4.dequantize(q)
assert torch.equal(a, nf4.dequantize(q, backend="reference"))
status = [s for s in nf4.available_backends() if s.backend == "c"][0]
print(status.available, status.detail)
try:
    nf4.dequantize(q, backend="c")
except nf4.QuantizationError as error:
    print(error)
"""


def start(**env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.compiler
def test_two_processes_that_compile_at_once_both_work(tmp_path):
    processes = [start(QLORAG_HOME=str(tmp_path / "home")) for _ in range(2)]
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert out.startswith("True") and err == ""
    assert len(cached(tmp_path)) == 1


def test_a_failure_keeps_nothing_of_its_callers_alive(source, monkeypatch):
    """The error is known for the rest of the process; the weights that a caller held then are not."""
    monkeypatch.setenv("CC", str(source.parent / "nowhere"))

    def attempt() -> weakref.ref[set[int]]:
        weight = {1}
        with contextlib.suppress(NativeBuildError):
            load(source)
            pytest.fail("compiled without a compiler")
        return weakref.ref(weight)

    assert [attempt()() for _ in range(2)] == [None, None]


def test_a_program_without_a_compiler_runs_on_the_reference(tmp_path):
    process = start(QLORAG_HOME=str(tmp_path / "home"), CC="/nonexistent/cc")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    status, refused = out.splitlines()
    assert status.startswith("False no C compiler") and refused.startswith("backend='c' cannot run: no C compiler")
    assert err.count("\n") == 1 and "no C compiler" in err
