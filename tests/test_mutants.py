"""The mutation runner's own steps (tests/mutants/run.py), by hand."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def run() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mutants_run", ROOT / "tests" / "mutants" / "run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


DECORATED = """
class A:
    @staticmethod
    @once(
        1
    )
    def f(x):
        return x

    # a comment
    @property
    def g(self):
        @inner
        def h():
            return 1

        return h


@cache
def k():
    return 2
"""

UNDECORATED = """
class A:
    def f(x):
        return x
    f = staticmethod(once(1)(f))

    # a comment
    def g(self):
        def h():
            return 1
        h = inner(h)

        return h
    g = property(g)


def k():
    return 2
k = cache(k)
"""


def test_decorators_are_applied_below_the_function(run: ModuleType) -> None:
    assert run.undecorated(DECORATED) == UNDECORATED


def test_a_diff_is_named_by_function_and_lines(run: ModuleType) -> None:
    diff = (
        "--- a.py\n+++ a.py\n@@ -1,3 +1,3 @@\n def f(self):\n-    return 1 +\n-        2\n+    return 1 -\n+        2\n"
    )
    assert run.change("qlorag.a.xǁAǁf__mutmut_3", diff) == ("A.f", "return 1 + 2", "return 1 - 2")
    assert run.change("qlorag.a.x__f__mutmut_12", diff)[0] == "_f"


def test_every_module_and_every_test_file_is_there(run: ModuleType) -> None:
    for module, target in run.TARGETS.items():
        assert (ROOT / module).is_file(), module
        assert all((ROOT / "tests" / name).is_file() for name in target.tests), module
