"""Files that are text as they stand: plain text, reStructuredText, source code."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal

from memdb.files.decoding import text_of
from memdb.files.found import Converted, Source, Unfit
from memdb.files.outline import Headings, first_heading, following
from memdb.types.document import Part

_Starts = list[tuple[int, Literal["heading", "text", "code"], tuple[str, ...]]]

# A line of reStructuredText and the line of punctuation below it, at least as long; likewise above.
_UNDERLINED = re.compile(
    r"^(?:(?P<over>([=\-`:.'\"~^_*+#])\2{1,}) *\r?\n)? ?(?P<title>\S.*?) *\r?\n"
    r"(?P<under>([=\-`:.'\"~^_*+#])\5{1,}) *\r?$",
    re.MULTILINE,
)
# In code: a line that begins at the margin, behind an empty one.
_AT_THE_MARGIN = re.compile(r"(?<=\n)[^\S\n]*\n(?=[^\s)\]}])")


def text(source: Source) -> Iterator[Converted]:
    """A text without structure."""
    yield Converted(filled(text_of(source)))


def code(source: Source) -> Iterator[Converted]:
    """A program's text; its parts begin where an empty line is followed by one at the margin."""
    content = filled(text_of(source))
    starts: _Starts = [(0, "code", ())]
    starts += [(m.end(), "code", ()) for m in _AT_THE_MARGIN.finditer(content)]
    yield Converted(content, parts=following(starts, len(content)))


def rst(source: Source) -> Iterator[Converted]:
    """reStructuredText as it is written: the libraries that read it drop what they do not know, as
    the directives of Sphinx. Its headings are found."""
    content = filled(text_of(source))
    parts = rst_parts(content)
    title = first_heading(parts)
    yield Converted(content, metadata={"title": title} if title else {}, parts=parts)


def rst_parts(content: str) -> tuple[Part, ...]:
    """Headings of reStructuredText, and what stands between them. The first way to underline one is
    the highest level, as its rules say."""
    levels: list[tuple[str, bool]] = []
    headings = Headings()
    starts: _Starts = [(0, "text", ())]
    for found in _UNDERLINED.finditer(content):
        title, under, over = found["title"], found["under"], found["over"]
        if len(under) < min(len(title), 4) or (over and over[0] != under[0]):
            continue
        style = (under[0], bool(over))
        if style not in levels:
            levels.append(style)
        headings.enter(levels.index(style) + 1, title)
        starts.append((found.start(), "heading", headings.place))
        end = found.end() + 1
        if end < len(content):
            starts.append((end, "text", headings.place))
    return following(starts, len(content))


def filled(content: str) -> str:
    """A text, unless it is blank.

    Raises:
        Unfit: it is.
    """
    if not content.strip():
        raise Unfit("empty", "it is empty")
    return content
