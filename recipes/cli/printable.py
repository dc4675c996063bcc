"""Text from files, models and people, made safe to show: control characters act on a terminal, and are escaped.

An escape sequence in a document could change the window's title, clear the screen, write to the clipboard or forge a
line of sources. Also escaped are the characters that reverse the direction of what follows.
"""

from __future__ import annotations

import re

_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")  # all but tab and line end


def printable(text: str) -> str:
    r"""`text` with every control character but tab and line end as its escape, such as \x1b."""
    return _UNSAFE.sub(_escaped, text)


def one_line(text: str) -> str:
    r"""`printable`, with line ends and tabs escaped too: for names, which must not begin a line of their own."""
    return printable(text).replace("\n", r"\n").replace("\t", r"\t")


def _escaped(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode("ascii")
