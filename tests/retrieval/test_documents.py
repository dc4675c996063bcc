from __future__ import annotations

import hashlib
import os
import re

import pytest
from qlorag.retrieval import Document, DocumentError, read_document, read_documents


def test_reads_files_and_folders_in_order(tmp_path):
    (tmp_path / "b.md").write_text("# B")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfna\xc3\xafve\r\nline")  # byte-order mark, CRLF
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.MARKDOWN").write_text("C")
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x.txt").write_text("no")
    report = read_documents([tmp_path, tmp_path / "b.md"], relative_to=tmp_path)  # b.md twice: read once
    assert [d.uri for d in report.documents] == ["a.txt", "b.md", "sub/c.MARKDOWN"]
    first = report.documents[0]
    assert first.text == "naïve\r\nline"  # the mark is gone, the newline stays
    assert first.sha256 == hashlib.sha256((tmp_path / "a.txt").read_bytes()).hexdigest()
    assert first.metadata == {"name": "a.txt"}
    assert report.failures == []
    assert report.skipped == [(str(tmp_path / "image.png"), "its name does not end in .txt, .md, .markdown")]
    assert read_documents([tmp_path]).documents[0].uri == str(tmp_path / "a.txt")


BAD_FILES = {
    "utf16.txt": ("text".encode("utf-16"), "UTF-16 text, wanted UTF-8: convert it"),
    "latin1.txt": (b"caf\xe9 au lait", r"not UTF-8 (byte 0xe9 at offset 3)"),
    "binary.txt": (b"ab\0cd", "binary (a NUL byte at offset 2)"),
    "empty.txt": (b"", "empty"),
    "blank.txt": (b" \n\n", "empty"),
    "bom-only.txt": (b"\xef\xbb\xbf", "empty"),
    "big.txt": (b"x" * 101, "101 bytes, the limit is 100"),
}


def test_one_bad_file_is_reported_and_the_others_are_read(tmp_path):
    for name, (data, _) in BAD_FILES.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "good.txt").write_text("good")
    report = read_documents([tmp_path, tmp_path / "absent.txt"], max_bytes=100)
    assert [d.metadata["name"] for d in report.documents] == ["good.txt"]
    reasons = {os.path.basename(path): reason for path, reason in report.failures}
    assert reasons.keys() == BAD_FILES.keys() | {"absent.txt"}
    for name, (_, wanted) in BAD_FILES.items():
        assert wanted in reasons[name] and name in reasons[name] and "\n" not in reasons[name]
    assert reasons["absent.txt"] == "No such file or directory"


def test_a_fifo_neither_hangs_nor_is_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    report = read_documents([tmp_path])
    assert report.documents == [] and "not a regular file" in report.failures[0][1]
    with pytest.raises(DocumentError, match=r"pipe\.txt: not a regular file"):
        read_document(tmp_path / "pipe.txt")
    with pytest.raises(DocumentError, match=r"not a regular file|directory"):
        read_document(tmp_path)


def test_links_cannot_loop_or_leave_the_folder(tmp_path):
    (tmp_path / "secret.txt").write_text("outside")
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (root / "a.txt").write_text("inside")
    (root / "sub" / "up").symlink_to(root, target_is_directory=True)
    (root / "out.txt").symlink_to(tmp_path / "secret.txt")
    (root / "away").symlink_to(tmp_path, target_is_directory=True)
    (root / "self.txt").symlink_to(root / "self.txt")
    report = read_documents([root], relative_to=root)
    assert [d.uri for d in report.documents] == ["a.txt"] and report.failures == []
    assert sorted(os.path.basename(path) for path, _ in report.skipped) == [
        "away",
        "out.txt",
        "self.txt",
        "up",
    ]
    assert all("symbolic link" in reason for _, reason in report.skipped)
    # What the caller names may be a link; a link to itself is a failure of that path only.
    named = read_documents([root / "out.txt", root / "self.txt"])
    assert [d.text for d in named.documents] == ["outside"]
    assert [os.path.basename(path) for path, _ in named.failures] == ["self.txt"]


def test_a_name_that_is_not_utf8(tmp_path):
    with open(os.path.join(os.fsencode(tmp_path), b"caf\xe9.txt"), "w") as file:
        file.write("text")
    report = read_documents([tmp_path])
    assert report.documents == []
    path, reason = report.failures[0]
    assert path.endswith("caf\\xe9.txt") and "lone surrogate" in reason
    reason.encode()  # printable


def test_an_unreadable_file_is_reported(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_text("b")
    real_open = os.open

    def refuse(path, *args, **kwargs):  # permissions do not bind root, who may be running this
        if str(path).endswith("a.txt"):
            raise PermissionError(13, "Permission denied")
        return real_open(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    report = read_documents([tmp_path])
    assert [d.text for d in report.documents] == ["b"]
    assert "a.txt: Permission denied" in report.failures[0][1]


def test_document_hash_and_refusals():
    document = Document("u", "naïve")
    assert document.sha256 == hashlib.sha256("naïve".encode()).hexdigest()
    with pytest.raises(DocumentError, match="without a uri"):
        Document("", "text")
    with pytest.raises(DocumentError, match=r"character 1 .* lone surrogate"):
        Document("u", "a\ud800")


@pytest.mark.parametrize("suffix", [".html", ".PDF", ".docx", ".csv", ".json", ".jsonl", ".xml", ".ipynb", ".rtf"])
def test_a_named_file_of_another_format_is_refused_with_advice(tmp_path, suffix):
    path = tmp_path / f"page{suffix}"
    path.write_text("<p>Otters swim.</p>")
    [(name, reason)] = read_documents([path]).failures
    assert name == str(path) and re.search(rf"a {suffix.lower()} file holds .*: (convert|save|write)", reason)


@pytest.mark.parametrize("name", ["notes", "main.py", "guide.rst", "run.log"])
def test_a_named_file_of_any_other_suffix_is_plain_text(tmp_path, name):
    (tmp_path / name).write_text("Otters swim.")
    assert [d.text for d in read_documents([tmp_path / name]).documents] == ["Otters swim."]
