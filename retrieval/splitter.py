r"""Cut a text into chunks of at most `size` tokens that keep whole sentences and exact offsets.

The method is the one of LlamaIndex's SentenceSplitter, whose usual setting is size 1024, overlap 20:

1. *Units.* The text is cut at paragraph and sentence ends. A unit that is too long by itself is cut again, at
   line ends, then between words, then inside words.
2. *Packing.* Units are packed greedily, in order, while the sum of their token counts stays <= size. The next
   chunk starts with as many of the last units as fit into `overlap` tokens.
3. *Check.* Token counts are not additive (white space between units has tokens too), so each packed chunk is
   counted once as a whole, and loses units from its end while it is too long.

What holds for every text, and is tested as a property:

- `text[chunk.start:chunk.end] == chunk.text`: a chunk is a span, never a string that was searched for
  afterwards;
- chunks are in order, and every character that is not white space lies in at least one of them;
- a chunk has <= size tokens. The one exception is a single character that alone has more;
- the counter sees O(len(text)) characters, so a megabyte without one space splits in linear time.

Left out: language-specific sentence models (an abbreviation before a capital letter, "Dr. Smith", ends a
unit, which only moves the place where a chunk may end), and grapheme clusters: the last resort cuts between
code points.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .errors import SplitError

TokenCounter = Callable[[list[str]], Sequence[int]]
"""Texts -> their numbers of tokens, e.g. `encoder.count_tokens`."""

# A unit ends after each match. All patterns are linear: what precedes a white-space run has a fixed width.
_SENTENCE_END = re.compile(
    r"\n\s*\n"  # a blank line ends a paragraph
    r"|(?<=[.!?])\s+(?=[^\sa-z])"  # ". A", but not "e.g. a"
    r"|(?<=[.!?][\"')\]”’])\s+(?=[^\sa-z])"  # '." A'
    r"|(?<=[。！？])"  # no space follows these
)
_LINE_END = re.compile(r"\n")
_WORD_END = re.compile(r"\s+")

# No natural word is longer. Longer ones are cut before they are counted: WordPiece, for one, counts a word of
# any length above 100 as a single unknown token.
_MAX_WORD = 64
# For the same reason a unit of more characters than this per token of the budget is cut without asking the
# counter.
_MAX_CHARS_PER_TOKEN = 16
_COUNT_BATCH = 1024

Span = tuple[int, int]


@dataclass(frozen=True)
class Chunk:
    """A span of a text: `text == source[start:end]`, offsets in characters (code points)."""

    text: str
    start: int
    end: int


def count_words(texts: list[str]) -> list[int]:
    """The default token counter: the number of white-space separated words of each text.

    It needs no tokenizer. For English a subword tokenizer counts about 1.3 times as many.
    """
    return [len(text.split()) for text in texts]


def split_text(
    text: str, *, size: int = 1024, overlap: int = 20, count_tokens: TokenCounter = count_words
) -> list[Chunk]:
    """Chunks of <= `size` tokens that end at sentence ends and share <= `overlap` tokens of whole sentences.

    >>> [c.text for c in split_text("One two. Three four. Five six.", size=4, overlap=2)]
    ['One two. Three four.', 'Three four. Five six.']

    text:         any string; a text of white space only has no chunks.
    size:         the largest chunk, in tokens (>= 1).
    overlap:      the most tokens that a chunk repeats from the one before (0 <= overlap < size).
    count_tokens: list of texts -> number of tokens of each, special tokens not included.
    Raises SplitError: impossible size or overlap; the counter returns a wrong number of counts or a negative
    one.
    """
    if size < 1 or not 0 <= overlap < size:
        raise SplitError(f"size={size}, overlap={overlap}: give a size >= 1 and an overlap in 0...size-1")
    units, costs = _units(text, size, count_tokens)
    chunks: list[Chunk] = []
    first, done = 0, 0  # the next chunk's first unit; the number of units that are in some chunk
    while done < len(units):
        last = done + 1
        total = sum(costs[first:last])
        while last < len(units) and total + costs[last] <= size:
            total += costs[last]
            last += 1
        while True:  # the check: shrink from the end, then give up the overlap
            start, end = units[first][0], units[last - 1][1]
            if last - first == 1 or _counts([text[start:end]], count_tokens)[0] <= size:
                break
            if last - 1 > done:
                last = max(done + 1, last - max(1, (last - first) // 8))
            else:
                first += 1
        chunks.append(Chunk(text[start:end], start, end))
        done = last
        first = _overlap_start(costs, first, done, size, overlap)
    return chunks


def _overlap_start(costs: list[int], first: int, done: int, size: int, overlap: int) -> int:
    """Step back from unit `done` over whole units of <= overlap tokens while unit `done` still fits beside them."""
    if done == len(costs):
        return done
    budget = min(overlap, size - costs[done])
    start = done
    while start - 1 > first and costs[start - 1] <= budget:
        start -= 1
        budget -= costs[start]
    return start


def _units(text: str, size: int, count_tokens: TokenCounter) -> tuple[list[Span], list[int]]:
    """Spans without outer white space, in order, each of <= size tokens, and their token counts."""
    spans = _cut(text, (0, len(text)), _SENTENCE_END)
    costs = _count_spans(text, spans, size, count_tokens)
    steps: list[Callable[[Span], list[Span]]] = [
        lambda span: _cut(text, span, _LINE_END),
        lambda span: _cut(text, span, _WORD_END),
        _cut_word,
        *[_halve] * 6,  # _cut_word leaves at most 64 = 2^6 characters
    ]
    for cut in steps:
        spans, costs = _refine(text, spans, costs, cut, size, count_tokens)
    return spans, costs


def _refine(
    text: str,
    spans: list[Span],
    costs: list[int],
    cut: Callable[[Span], list[Span]],
    size: int,
    count_tokens: TokenCounter,
) -> tuple[list[Span], list[int]]:
    """Replace every span that is too long by its pieces; only these are counted."""
    pieces = [cut(span) for span, cost in zip(spans, costs, strict=True) if cost > size]
    if not pieces:
        return spans, costs
    counts = iter(_count_spans(text, [span for cuts in pieces for span in cuts], size, count_tokens))
    replacements = iter(pieces)
    new_spans: list[Span] = []
    new_costs: list[int] = []
    for span, cost in zip(spans, costs, strict=True):
        replacement = next(replacements) if cost > size else [span]
        new_spans += replacement
        new_costs += [next(counts) for _ in replacement] if cost > size else [cost]
    return new_spans, new_costs


def _cut(text: str, span: Span, boundary: re.Pattern[str]) -> list[Span]:
    """The stretches of a span between the boundary's matches, without their outer white space."""
    pieces: list[Span] = []
    start, stop = span
    for match in boundary.finditer(text, start, stop):
        pieces.append((start, match.end()))
        start = match.end()
    pieces.append((start, stop))
    trimmed: list[Span] = []
    for begin, end in pieces:
        piece = text[begin:end]
        left = len(piece) - len(piece.lstrip())
        if left < len(piece):
            trimmed.append((begin + left, begin + len(piece.rstrip())))
    return trimmed


def _cut_word(span: Span) -> list[Span]:
    start, stop = span
    return [(i, min(i + _MAX_WORD, stop)) for i in range(start, stop, _MAX_WORD)]


def _halve(span: Span) -> list[Span]:
    start, stop = span
    middle = (start + stop + 1) // 2
    return [(start, middle), (middle, stop)] if stop - start > 1 else [span]


def _count_spans(text: str, spans: list[Span], size: int, count_tokens: TokenCounter) -> list[int]:
    """Token counts; a span with absurdly many characters for the budget counts as too long without being
    counted.
    """
    costs = [size + 1] * len(spans)
    countable = [i for i, (a, b) in enumerate(spans) if b - a <= max(_MAX_WORD, size * _MAX_CHARS_PER_TOKEN)]
    for at in range(0, len(countable), _COUNT_BATCH):
        batch = countable[at : at + _COUNT_BATCH]
        counts = _counts([text[slice(*spans[i])] for i in batch], count_tokens)
        for i, count in zip(batch, counts, strict=True):
            costs[i] = count
    return costs


def _counts(texts: list[str], count_tokens: TokenCounter) -> list[int]:
    counts = [int(count) for count in count_tokens(texts)]
    if len(counts) != len(texts) or any(count < 0 for count in counts):
        raise SplitError(
            f"count_tokens returned {len(counts)} counts for {len(texts)} texts, smallest "
            f"{min(counts, default=0)}: it has to return one number >= 0 per text"
        )
    return counts
