"""Texts put together from blocks, whose parts are known: headings, running text, code."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from memdb.types.document import Part


class Headings:
    """The headings that a place in a text stands under."""

    def __init__(self, title: str = "") -> None:
        self._title = title
        self._open: list[tuple[int, str]] = []

    def enter(self, level: int, text: str) -> None:
        """A heading of this level, 1 the highest, begins."""
        self._open = [(other, name) for other, name in self._open if other < level]
        self._open.append((level, text))

    @property
    def place(self) -> tuple[str, ...]:
        """All of them, below the document's title."""
        names = [name for _, name in self._open if name]
        if self._title:
            # A title mostly repeats the first heading, and says more: "json - Python 3.11".
            repeated = bool(names) and names[0] in self._title
            names = [self._title, *names[repeated:]]
        return tuple(names)


class Outline:
    """Puts a text together, a blank line between its blocks, and none between items of a list or
    rows of a table.

    Args:
        title: of the document, which its place begins with.
    """

    def __init__(self, title: str = "") -> None:
        self._headings = Headings(title)
        self._blocks: list[str] = []
        self._size = 0
        self._in_list = False
        self._starts: list[tuple[int, Literal["heading", "text", "code"], tuple[str, ...]]] = []

    def heading(self, level: int, text: str) -> None:
        """A heading, written as Markdown has it."""
        if text:
            self._headings.enter(level, text)
            self._add("heading", f"{'#' * level} {text}", self._headings.place)

    def text(self, text: str, *place: str) -> None:
        """Running text, a list or a table; at a further place below the headings."""
        if text.strip():
            self._add("text", text, (*self._headings.place, *place))

    def item(self, text: str) -> None:
        """An item of a list, or a row of a table."""
        if text.strip():
            self._add("text", text, self._headings.place, item=True)

    def code(self, text: str, language: str = "") -> None:
        """Code, written as Markdown has it."""
        if text.strip():
            fence = "```"
            while fence in text:
                fence += "`"
            code = text.strip("\n")
            self._add("code", f"{fence}{language}\n{code}\n{fence}", self._headings.place)

    def _add(
        self,
        kind: Literal["heading", "text", "code"],
        block: str,
        place: tuple[str, ...],
        item: bool = False,
    ) -> None:
        if self._blocks:
            gap = "\n" if item and self._in_list else "\n\n"
            self._blocks.append(gap)
            self._size += len(gap)
        self._in_list = item
        self._starts.append((self._size, kind, place))
        self._blocks.append(block)
        self._size += len(block)

    @property
    def whole(self) -> str:
        """The text."""
        return "".join(self._blocks)

    @property
    def parts(self) -> tuple[Part, ...]:
        """Its parts."""
        return following(self._starts, self._size)


def first_heading(parts: Iterable[Part]) -> str:
    """The first heading that says something; "" if there is none."""
    return next((part.place[-1] for part in parts if part.kind == "heading" and part.place), "")


def following(
    starts: list[tuple[int, Literal["heading", "text", "code"], tuple[str, ...]]], length: int
) -> tuple[Part, ...]:
    """Parts that begin there, each of which ends where the next begins.

    Args:
        starts: first character, kind and place of each, ascending. The first begins at 0.
        length: of the text.
    """
    ends = [start for start, _, _ in starts[1:]] + [length]
    return tuple(
        Part(start, end, kind, place)
        for (start, kind, place), end in zip(starts, ends, strict=True)
        if end > start
    )
