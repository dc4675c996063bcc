"""Read text and Markdown files into `Document`s; one bad file is reported and does not stop the others.

What is a document here: a regular file of valid UTF-8 (a byte-order mark is allowed and dropped), not empty,
without NUL bytes, of at most `max_bytes`. Newlines stay as they are, so that a chunk's offsets count the
file's own characters.

Folders are walked in sorted order. Names that start with a dot are passed over, and so are symbolic links: a
link to something inside the folder adds nothing, as its target is read under its own name, and a link to the
outside must not be followed. That one rule also ends every loop. A path that the caller names may itself be a
link.

A file is opened without blocking and looked at after it was opened, so that a FIFO cannot hang the walk.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import DocumentError

SUFFIXES = (".txt", ".md", ".markdown")
# Formats whose files are text, or may pass for it, and whose text is not what a reader sees: what to do about each.
NOT_PLAIN = {
    **dict.fromkeys((".html", ".htm", ".xhtml", ".mhtml"), "markup: convert it, e.g. pandoc -t plain"),
    **dict.fromkeys((".pdf", ".ps"), "laid-out pages: convert it, e.g. pdftotext"),
    **dict.fromkeys((".docx", ".doc", ".odt", ".rtf", ".epub"), "a word processor's: convert it, e.g. pandoc -t plain"),
    **dict.fromkeys((".pptx", ".ppt", ".odp", ".xlsx", ".xls", ".ods"), "an office program's: save it as text"),
    **dict.fromkeys((".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".xml", ".ipynb"),
                    "data, not prose: write what is to be found as text, a file for each document"),
}  # fmt: skip
MAX_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Document:
    """A text with a name.

    uri:      what the store knows it by, and what a citation shows; adding the same uri again replaces the
              document.
    text:     the whole text; every offset counts its characters (code points).
    sha256:   of the bytes it was read from (what `sha256sum FILE` prints); by default of the text's UTF-8.
    metadata: anything that JSON can hold; it comes back with every hit.
    Raises DocumentError: an empty uri, or characters that UTF-8 cannot hold (lone surrogates).
    """

    uri: str
    text: str
    sha256: str = ""
    metadata: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.uri:
            raise DocumentError("document without a uri: give it a name to be cited by")
        try:
            self.uri.encode()
            encoded = self.text.encode()
        except UnicodeEncodeError as error:
            raise DocumentError(
                f"{self.uri!a}: character {error.start} of the uri or text is a lone surrogate, "
                "which UTF-8 cannot hold: decode the text with errors='strict' or 'replace'"
            ) from None
        if not self.sha256:
            object.__setattr__(self, "sha256", hashlib.sha256(encoded).hexdigest())


@dataclass(frozen=True)
class ReadReport:
    """What `read_documents` read, what it could not read and why, and what it passed over.

    failures: (path, one-line reason) of each file that should have been a document.
    skipped:  (path, reason) of what is in a folder but is no text file by its name, or is a symbolic link.
    """

    documents: list[Document]
    failures: list[tuple[str, str]]
    skipped: list[tuple[str, str]]


def read_documents(
    paths: Iterable[str | Path],
    *,
    suffixes: tuple[str, ...] = SUFFIXES,
    relative_to: str | Path | None = None,
    max_bytes: int = MAX_BYTES,
) -> ReadReport:
    """Read the files and the folders' text files, each file once, in the order given and sorted inside
    folders.

    paths:       files (of any suffix that is not in `NOT_PLAIN`) and folders (walked for files with one of `suffixes`).
    relative_to: folder that uris are relative to; by default a uri is the file's absolute path.
    Errors of single files are in the report, with the reason; this function raises none for them.
    """
    report = ReadReport([], [], [])
    seen: set[Path] = set()
    base = None if relative_to is None else Path(relative_to).resolve()
    for given in map(Path, paths):
        try:
            root = given.resolve(strict=True)
        except (OSError, RuntimeError) as error:  # missing, or a loop of links
            report.failures.append((_printable(given), _reason(error)))
            continue
        for path in _walk(root, suffixes, report) if root.is_dir() else [root]:
            if path in seen:
                continue
            seen.add(path)
            try:
                report.documents.append(read_document(path, relative_to=base, max_bytes=max_bytes))
            except DocumentError as error:
                report.failures.append((_printable(path), str(error)))
    return report


def read_document(path: str | Path, *, relative_to: str | Path | None = None, max_bytes: int = MAX_BYTES) -> Document:
    """One file as a Document, `metadata={"name": file name}`.

    Raises DocumentError: not a regular file, unreadable, empty, too big, binary, not UTF-8, or by its name of a format
    that holds more than text (HTML, PDF, CSV, ...); the message says which.
    """
    given = Path(path)
    if (suffix := given.suffix.lower()) in NOT_PLAIN:
        raise DocumentError(f"{_printable(given)}: a {suffix} file holds {NOT_PLAIN[suffix]}")
    try:
        path = given.resolve(strict=True)  # links are followed here, once; the opening below follows none
        data = _read_regular_file(path, max_bytes)
    except (OSError, RuntimeError) as error:
        raise DocumentError(f"{_printable(given)}: {_reason(error)}") from error
    text = _decode(given, data)
    uri = path if relative_to is None else Path(os.path.relpath(path, Path(relative_to).resolve()))
    return Document(uri.as_posix(), text, hashlib.sha256(data).hexdigest(), {"name": path.name})


def _walk(root: Path, suffixes: tuple[str, ...], report: ReadReport) -> Iterable[Path]:
    def unreadable(error: OSError) -> None:
        report.failures.append((_printable(Path(error.filename)), _reason(error)))

    for folder, folders, files in os.walk(root, onerror=unreadable):  # does not follow links to folders
        here = Path(folder)
        for name in sorted(folders + files):
            if not name.startswith(".") and (here / name).is_symlink():
                report.skipped.append((_printable(here / name), "symbolic link: name its target to read it"))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = here / name
            if name.startswith(".") or path.is_symlink():
                continue
            if path.suffix.lower() in suffixes:
                yield path
            else:
                report.skipped.append((_printable(path), f"its name does not end in {', '.join(suffixes)}"))


def _read_regular_file(path: Path, max_bytes: int) -> bytes:
    # O_NONBLOCK: opening a FIFO for reading would wait for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise DocumentError(f"{_printable(path)}: not a regular file: only files hold documents")
        data = file.read(max_bytes + 1)  # bounded even if the file grows meanwhile
    if len(data) > max_bytes:
        raise DocumentError(
            f"{_printable(path)}: {max(status.st_size, len(data))} bytes, the limit is {max_bytes}: "
            "split the file, or raise max_bytes"
        )
    return data


def _decode(path: Path, data: bytes) -> str:
    name = _printable(path)
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DocumentError(f"{name}: UTF-16 text, wanted UTF-8: convert it, e.g. iconv -f UTF-16 -t UTF-8")
    zero = data.find(b"\0")
    if zero >= 0:
        raise DocumentError(f"{name}: binary (a NUL byte at offset {zero}), wanted UTF-8 text")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DocumentError(
            f"{name}: not UTF-8 (byte 0x{data[error.start]:02x} at offset {error.start}): "
            "convert it, e.g. iconv -f LATIN1 -t UTF-8"
        ) from None
    if not text.strip():
        raise DocumentError(f"{name}: empty: nothing to index")
    return text


def _reason(error: OSError | RuntimeError) -> str:
    strerror = getattr(error, "strerror", None)
    return str(strerror or error)


def _printable(path: Path) -> str:
    """A path for a message; bytes that are no UTF-8 are escaped."""
    return os.fsencode(path).decode("utf-8", errors="backslashreplace")
