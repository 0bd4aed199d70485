"""Lines of a text as Markdown has them: which are headings, and which are within fenced code.

storage_format.md describes the same, since the places of references follow from it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

#: Characters that a name, of a heading or a document, may have.
LONGEST_NAME = 200

Kind = Literal["blank", "text", "heading", "fence", "code"]

_FENCE = re.compile(r"[ \t]*(`{3,}(?=[^`]*$)|~{3,})")
_HEADING = re.compile(r" {0,3}(#{1,6})[ \t](.*)$")
_CLOSING = re.compile(r"[ \t]+#+$")


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a text.

    Attributes:
        start: the character where it begins.
        end: the character behind it, its line feed included.
        kind: `fence`: it opens a block of code; `code`: it is within one, or closes it.
    """

    start: int
    end: int
    kind: Kind


@dataclass(frozen=True, slots=True)
class Heading:
    """A heading.

    Attributes:
        at: the character where its first `#` is.
        level: 1 to 6.
        name: 1 to 200 characters.
    """

    at: int
    level: int
    name: str


def name_of(text: str) -> str:
    """A text as a name, on one line; empty if it is too long for one."""
    name = " ".join(text.split())
    return name if len(name) <= LONGEST_NAME else ""


def heading_of(line: str, start: int) -> Heading | None:
    """The heading that a line is, if it is one; it begins at character `start`."""
    found = _HEADING.match(line.rstrip())
    if found is None:
        return None
    name = name_of(_CLOSING.sub("", found[2]))
    return Heading(start + found.start(1), len(found[1]), name) if name.strip("#") else None


def lines_of(text: str) -> Iterator[Line]:
    """The lines of a text, in order; they end at line feeds."""
    fence = ""
    at = 0
    while at < len(text):
        end = text.find("\n", at) + 1 or len(text)
        line = text[at:end]
        kind: Kind = "text"
        if fence:
            kind = "code"
            closing = line.strip()
            if len(closing) >= len(fence) and closing == fence[0] * len(closing):
                fence = ""
        elif not line or line.isspace():
            kind = "blank"
        elif opening := _FENCE.match(line.rstrip()):
            kind, fence = "fence", opening[1]
        elif "#" in line and heading_of(line, at) is not None:
            kind = "heading"
        yield Line(at, end, kind)
        at = end


def headings_of(text: str) -> list[Heading]:
    """The headings of a text, in order."""
    if "#" not in text:
        return []
    found = (
        heading_of(text[line.start : line.end], line.start)
        for line in lines_of(text)
        if line.kind == "heading"
    )
    return [heading for heading in found if heading is not None]
