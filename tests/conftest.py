"""Shared by all tests: the real models, pulled once and kept in the user's cache."""

from __future__ import annotations

import os
from pathlib import Path

# Before any test imports a Hugging Face library: nothing here may reach for a hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest  # noqa: E402


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder, bf16."""
    from qlorag.recipes.pull import pull

    return pull("smollm2-135m-instruct", progress=False)


@pytest.fixture(scope="session")
def minilm_dir() -> Path:
    """all-MiniLM-L6-v2 as a folder, float32."""
    from qlorag.recipes.pull import pull

    return pull("minilm-l6", progress=False)
