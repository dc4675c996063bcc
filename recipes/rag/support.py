"""Whether a source supports a sentence, by comparing words.

A sentence is supported if
- every *number* of it is in the source (9, "nine" and 1,400 as 1400),
- every *name* of it is in the source: each capitalized word, and each run of Han or Katakana,
- it denies nothing that the source does not deny ("not", "nobody", "unknown"),
- and enough of its other words are in the source: the share is returned.

So an invented name or number never counts as supported. What this costs: a true paraphrase with a word of its own in
capitals is refused. Left out: meaning. A sentence that puts the source's own names together wrongly is not noticed.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from functools import lru_cache


def _set(text: str) -> frozenset[str]:
    return frozenset(text.split())


# English words that say nothing by themselves, also at the beginning of a sentence. No other language has such a list.
_COMMON = _set(
    """a an the and or but if so as at by for from in into is are was were be been being it its this that these those
    there here he she they we you i his her their our your him them us my me who whom whose which what when where why
    how of on to with about after before during over under between also than then too very can could may might must
    shall should will would do does did done has have had having yes according based however therefore because since
    while although though both each all any some such more most other same only just answer question source sources
    document documents text passage"""
)
_DENIALS = _set(
    """no not never none nobody nothing nowhere neither nor without cannot unknown isn aren wasn weren don doesn didn
    hasn haven hadn won wouldn couldn shouldn can't"""
)
_NUMBER_WORDS = {  # but for "one", which is more often no number
    "zero": "0", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8",
    "nine": "9", "ten": "10", "eleven": "11", "twelve": "12", "thirteen": "13", "fourteen": "14", "fifteen": "15",
    "sixteen": "16", "seventeen": "17", "eighteen": "18", "nineteen": "19", "twenty": "20",
}  # fmt: skip
_NUMBER = re.compile(r"\d+(?:[.,:]\d+)*")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)?")
# Written without spaces: Han and Katakana carry the content, Hiragana mostly grammar.
_CONTENT_RUN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\u30a0-\u30ff]+")
_UNSPACED = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]")


@dataclass(frozen=True)
class Words:
    """What a text says, as sets of normalized strings. words: all that are not common, names among them."""

    text: str
    words: frozenset[str]
    names: frozenset[str]
    numbers: frozenset[str]
    runs: frozenset[str]
    denies: bool

    @property
    def says_something(self) -> bool:
        """Whether there is anything to compare."""
        return bool(self.words or self.numbers or self.runs)


@lru_cache(maxsize=256)
def words_of(text: str) -> Words:
    """The words of a text."""
    text = unicodedata.normalize("NFKC", text)
    spelled = [match[0] for match in _WORD.finditer(text) if not _UNSPACED.search(match[0])]
    folded = {word: word.casefold().replace("’", "'").removesuffix("'s") for word in spelled}
    all_words = set(folded.values())
    numbers = {_THOUSANDS.sub("", match[0]) for match in _NUMBER.finditer(text)}
    numbers |= {_NUMBER_WORDS[word] for word in all_words if word in _NUMBER_WORDS}
    denials = {word for word in all_words if word in _DENIALS or word.split("'")[0] in _DENIALS}
    said = frozenset(all_words - _COMMON - denials - _NUMBER_WORDS.keys())
    names = frozenset(plain for word, plain in folded.items() if word[0].isupper() and plain in said)
    unspaced = frozenset(_CONTENT_RUN.findall(text)) | _pieces(text)
    return Words(text.casefold(), said, names, frozenset(numbers), unspaced, bool(denials))


def _pieces(text: str) -> frozenset[str]:
    """Of scripts without spaces and without Han (Thai, Khmer, ...): each run, which must be in the source whole."""
    return frozenset(re.findall(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]+", text))


def support(sentence: str, source: str) -> float:
    """The share of the sentence's words that are in the source; 0 if a name, a number or a denial of it is not."""
    said, known = words_of(sentence), words_of(source)
    if not said.says_something:
        return 0.0
    if not (said.numbers <= known.numbers and said.names <= known.words):
        return 0.0
    if said.denies and not known.denies:
        return 0.0
    if any(run.casefold() not in known.text for run in said.runs):
        return 0.0
    return len(said.words & known.words) / len(said.words) if said.words else 1.0


def shares_words(answer: str, source: str) -> bool:
    """Whether any word, number or run of the answer is in the source."""
    said, known = words_of(answer), words_of(source)
    runs = any(run.casefold() in known.text for run in said.runs)
    return runs or bool(said.words & known.words or said.numbers & known.numbers)
