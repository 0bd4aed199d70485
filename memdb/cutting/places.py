"""The place of a reference: what its document is called, and the headings above it.

"FastAPI docs > Security > OAuth2 scopes". It follows from what is stored of the document, and
storage_format.md says how.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from memdb.cutting.headings import Heading, headings_of, name_of

#: Most tokens of a place, its line feed included; and which part of a reference's room.
MOST_TOKENS, SHARE = 32, 4
_DERIVED = "sha256:"
_BETWEEN = " > "


def title_of(metadata: Mapping[str, Any]) -> str:
    """The title that a document's metadata gives it; empty if they give none."""
    title = metadata.get("title")
    return name_of(title) if isinstance(title, str) else ""


def placed(place: str, content: str) -> str:
    """What is embedded and made a memory: a content behind its place, if it has one."""
    return f"{place}\n{content}" if place else content


class Places:
    """The places in one document.

    Args:
        text: the document's.
        id: its id; None: it has none.
        title: what its metadata call it (`title_of`); empty: nothing.
        count: counts a text's tokens.
        room: most tokens of a reference; 0: they are not counted.
    """

    def __init__(
        self,
        text: str,
        id: str | None,
        title: str,
        count: Callable[[str], int],
        room: int,
    ) -> None:
        self._count = count
        self._room = room
        self._headings = headings_of(text)
        self._starts = [heading.at for heading in self._headings]
        self._title = name_of(title)
        if not self._title and self._headings:
            self._title = self._headings[0].name
        if not self._title and id is not None and not id.startswith(_DERIVED):
            self._title = name_of(id)
        above: list[Heading] = []
        self._above: list[tuple[Heading, ...]] = []  # each heading's own, from the highest
        for heading in self._headings:
            while above and above[-1].level >= heading.level:
                above.pop()
            self._above.append(tuple(above))
            above.append(heading)
        self._known: dict[tuple[str, ...], tuple[str, int]] = {}

    def at(self, start: int) -> tuple[str, int]:
        """The place of a content that begins at this character, and its tokens with the line feed
        behind it. Headings that the content begins with are not part of it."""
        n = bisect_right(self._starts, start)
        path: list[str] = []
        own = ""
        if n:
            nearest = self._headings[n - 1]
            path = [heading.name for heading in self._above[n - 1]]
            if nearest.at == start:
                own = nearest.name
            else:
                path.append(nearest.name)
        names = [self._title] if self._title else []
        names += path[1:] if names == path[:1] else path
        if names == [own]:
            names = []
        return self._shortened(tuple(names))

    def _shortened(self, names: tuple[str, ...]) -> tuple[str, int]:
        """As many of the names as there is room for: the last first, then the first."""
        found = self._known.get(names)
        if found is None:
            found = self._known[names] = self._fitting(list(names))
        return found

    def _fitting(self, names: list[str]) -> tuple[str, int]:
        most = min(MOST_TOKENS, self._room // SHARE)
        while names:
            place = _BETWEEN.join(names)
            tokens = self._count(place + "\n")
            if not self._room or tokens <= most:
                return place, tokens
            del names[1 if len(names) > 2 else 0]
        return "", 0

    def of_parts(self, parts: Sequence[str]) -> list[str]:
        """The places of the document's references, given their texts in order. One that does not
        fit in a reference's room with its content is left out."""
        places = []
        at = 0
        for part in parts:
            content = part.strip()
            place, _ = self.at(at + len(part) - len(part.lstrip()))
            if place and self._room and self._count(placed(place, content)) > self._room:
                place = ""
            places.append(place)
            at += len(part)
        return places
