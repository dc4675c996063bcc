"""The command line: one module per family of verbs, and what they share."""

from __future__ import annotations

from .main import build_parser, main

__all__ = ["build_parser", "main"]
