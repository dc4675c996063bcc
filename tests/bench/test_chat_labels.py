"""The committed comparison with trl's templates for training is found again, for the families that load here."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench" / "chat_labels"
pytestmark = [pytest.mark.deep, pytest.mark.oracle]


def test_the_committed_page_is_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    import measure

    committed = (BENCH / "CHAT_LABELS.md").read_text(encoding="utf-8")
    with measure.templates() as folder:
        assert set(measure.LOADABLE) <= set(measure.stock_names(folder))
        for name in measure.LOADABLE:
            found = measure.compare(folder, name)
            assert f"| **{name}** | {' | '.join(found.values())} |" in committed
            assert "refused" not in [found[chat] for chat in ("one turn", "system", "two turns", "<think>")]
    sys.modules.pop("measure")
