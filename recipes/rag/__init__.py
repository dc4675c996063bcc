"""Retrieval-augmented generation: passages to a prompt, an answer with its sources."""

from __future__ import annotations

from .answer import NOT_FOUND, Answer, cite, fitting, prompt_messages

__all__ = ["NOT_FOUND", "Answer", "cite", "fitting", "prompt_messages"]
