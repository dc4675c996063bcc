"""Files to documents: one reader per format."""

from __future__ import annotations

from .read import Document, ReadReport, read_document, read_documents

__all__ = ["Document", "ReadReport", "read_document", "read_documents"]
