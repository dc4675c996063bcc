"""Fixtures of the kernels' tests."""

from __future__ import annotations

import pytest
import torch
from qlorag.kernels.native import LEVELS
from qlorag.kernels.nf4 import cpu


@pytest.fixture(params=LEVELS)
def level(request, monkeypatch):
    """Each instruction set in turn, as far as this processor has them."""
    if LEVELS.index(request.param) > cpu.best_level():
        pytest.skip(f"this processor has {LEVELS[cpu.best_level()]}, not {request.param}")
    monkeypatch.setenv("QLORAG_CPU_LEVEL", request.param)
    return request.param


@pytest.fixture
def poisoned():
    """torch.empty gives NaN, or the largest integer, so that an element left unwritten shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all() and (torch.empty(3, dtype=torch.uint8) == 255).all()
    yield
    torch.use_deterministic_algorithms(False)
