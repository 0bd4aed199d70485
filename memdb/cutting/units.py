"""A text as units that are better not cut: headings, sentences, items, rows, lines of code."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from memdb.cutting.headings import Heading, Line, heading_of, lines_of
from memdb.cutting.sentences import sentence_ends

# What it costs to cut before a unit; a reference more costs 100 (`choosing`).
HEADING = 0
BLOCK = 4
ITEM = 15
ROW = 15
INTRODUCED = 25  # behind "as follows:"
PART_OF_ITEM = 30
SENTENCE = 40
WHOLE_ROW = 60  # of a table that fits
TORN = 130  # behind a heading, a table's head, the first line of code: all but the last resort
WORD = 200
WHOLE_CODE = 300  # within a block of code that fits
# Lines of code that does not fit: from the margin, behind a blank one, any other.
OUTER_LINE, FREE_LINE, CODE_LINE = 25, 30, 45

_ITEM = re.compile(r"[ \t]*(?:[-*+•‣]|\(?\d{1,3}[.)])[ \t]+\S")
_ROW = re.compile(r"[ \t]*\|.*\|[ \t]*$")
_RULE = re.compile(r"[ \t]*\|?[ \t:|-]*-[ \t:|-]*$")


@dataclass(frozen=True, slots=True)
class Unit:
    """A part of a text; the text is its units, joined.

    Attributes:
        start: the character where it begins.
        cost: of cutting before it.
        level: of the heading that it is; 0: it is none.
    """

    start: int
    cost: int
    level: int = 0


def units_of(text: str, fits: Callable[[int, int], bool]) -> list[Unit]:
    """The units of a text that is not blank, in order. White space belongs to the unit before it,
    and at the start to the first.

    Args:
        text: the text.
        fits: whether what is between two characters fits into a reference, about.
    """
    found = list(_Scan(text, fits).units())
    first = len(text) - len(text.lstrip())
    while len(found) > 1 and found[1].start <= first:
        del found[0]
    head = found[0]
    return [Unit(0, 0, head.level), *found[1:]]


class _Scan:
    """The blocks of a text, one after the other."""

    def __init__(self, text: str, fits: Callable[[int, int], bool]) -> None:
        self._text = text
        self._fits = fits
        self._in_list = False
        self._torn = False  # whether what comes next belongs to a heading
        self._introduced = False  # or to a line that ends with a colon

    def units(self) -> Iterator[Unit]:
        """The units; blank lines are part of the one before."""
        for block in _blocks(lines_of(self._text)):
            kind = block[0].kind
            if kind == "heading":
                heading = heading_of(self._of(block[0]), block[0].start)
                assert heading is not None
                yield self._heading(heading, block[0])
            elif kind == "fence":
                yield from self._code(block)
            elif _is_table(self._text, block):
                yield from self._table(block)
            else:
                yield from self._prose(block)

    def _of(self, line: Line) -> str:
        return self._text[line.start : line.end]

    def _heading(self, heading: Heading, line: Line) -> Unit:
        cost = TORN if self._torn else HEADING
        self._torn, self._introduced, self._in_list = True, False, False
        return Unit(line.start, cost, heading.level)

    def _before_block(self, cost: int = BLOCK) -> int:
        """What it costs to cut before a block, which is not a heading."""
        if self._torn:
            cost = TORN
        elif self._introduced:
            cost = max(cost, INTRODUCED)
        self._torn = self._introduced = False
        return cost

    def _code(self, lines: Sequence[Line]) -> Iterator[Unit]:
        whole = self._fits(lines[0].start, lines[-1].end)
        yield Unit(lines[0].start, self._before_block())
        blank = False
        for n, line in enumerate(lines[1:], 1):
            text = self._of(line)
            if text.isspace():
                blank = True
                continue
            closes = n == len(lines) - 1 and not text.strip("`~ \t\r\n")
            if n == 1 or closes:
                cost = TORN
            elif not text[0].isspace():
                cost = OUTER_LINE
            else:
                cost = FREE_LINE if blank else CODE_LINE
            yield Unit(line.start, WHOLE_CODE if whole else cost)
            blank = False

    def _table(self, lines: Sequence[Line]) -> Iterator[Unit]:
        self._in_list = False
        whole = self._fits(lines[0].start, lines[-1].end)
        head = 2 if _RULE.match(self._of(lines[1]).rstrip()) else 0
        yield Unit(lines[0].start, self._before_block())
        for n, line in enumerate(lines[1:], 1):
            yield Unit(line.start, TORN if n <= head else WHOLE_ROW if whole else ROW)

    def _prose(self, lines: Sequence[Line]) -> Iterator[Unit]:
        """A paragraph, or items of a list without blank lines between them."""
        starts = [0]
        starts += [n for n in range(1, len(lines)) if _ITEM.match(self._of(lines[n]))]
        for first, behind in zip(starts, [*starts[1:], len(lines)], strict=True):
            start, end = lines[first].start, lines[behind - 1].end
            line = self._of(lines[first])
            if _ITEM.match(line):
                cost = self._before_block(ITEM) if self._in_list else self._before_block()
                self._in_list = True
            elif self._in_list and line[0].isspace():
                cost = self._before_block(PART_OF_ITEM)
            else:
                cost = self._before_block()
                self._in_list = False
            yield Unit(start, cost)
            content = self._text[start:end].rstrip()
            for at in sentence_ends(content):
                if at < len(content):
                    yield Unit(start + at, SENTENCE)
            self._introduced = content.endswith((":", "："))


def _blocks(lines: Iterable[Line]) -> Iterator[list[Line]]:
    """Lines that belong together: a heading, a block of code, lines of text without a blank one."""
    block: list[Line] = []
    for line in lines:
        goes_on = line.kind == "code" or (
            line.kind == "text" and bool(block) and block[0].kind == "text"
        )
        if not goes_on and block:
            yield block
            block = []
        if line.kind != "blank":
            block.append(line)
    if block:
        yield block


def _is_table(text: str, lines: Sequence[Line]) -> bool:
    return len(lines) > 1 and all(
        _ROW.match(text[line.start : line.end].rstrip()) for line in lines
    )
