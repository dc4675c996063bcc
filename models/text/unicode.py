"""Whether a string is Unicode text, which Python's are not always.

A lone surrogate, half of a UTF-16 pair, gets through `json.loads` and file names. It has no UTF-8 form: no tokenizer
encodes it, and no file can hold it.
"""

from __future__ import annotations


def lone_surrogate(text: str) -> str | None:
    """What is wrong with a text that holds a lone surrogate, for an error message; None if it holds none."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return (
            f"character {error.start} is the lone surrogate U+{ord(text[error.start]):04X}, which is not Unicode text"
        )
    return None
