"""Retrieval-augmented generation: passages to a prompt, an answer with its sources."""

from __future__ import annotations

from .answer import NOT_FOUND, Answering, answer, answer_from
from .citations import Answer, cite
from .prompt import fitting, prompt_messages

__all__ = ["NOT_FOUND", "Answer", "Answering", "answer", "answer_from", "cite", "fitting", "prompt_messages"]
