"""Which of the places where a text may be cut are taken: those that cost least together."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence, Set

from memdb.cutting.units import Unit

# What a reference more costs; and, at most, one that is short, which falls to nothing at half of
# the room.
_REFERENCE = 100
_SHORT = 60
# What it costs that a reference goes on behind a heading: into a part of its own section; from the
# end of a section's text into a part of it; into the next section beside its own; the same from the
# middle of a section. Into a section above it never goes.
_INTO_PART, _ON_INTO_PART, _BESIDE, _ON_BESIDE = 2, 30, 110, 130
_NEVER = 1000
#: Tokens by which a part may count otherwise alone than within its text.
NEAR = 3


class Tokens:
    """The tokens of a text, where they start.

    Args:
        starts: the character where each starts, ascending.
    """

    def __init__(self, starts: Sequence[int]) -> None:
        self._starts = starts

    def first(self, at: int) -> int:
        """Which token a content begins with that begins at this character."""
        n = bisect_left(self._starts, at)
        if n < len(self._starts) and self._starts[n] == at:
            return n
        return max(0, bisect_right(self._starts, at) - 1)

    def behind(self, end: int) -> int:
        """How many tokens begin before this character."""
        return bisect_left(self._starts, end)

    def between(self, start: int, end: int) -> int:
        """How many tokens a content has, about."""
        return self.behind(end) - self.first(start)


def chosen(
    units: Sequence[Unit],
    levels: Sequence[int],
    tokens: Sequence[tuple[int, int]],
    rooms: Sequence[int],
    wrong: Set[tuple[int, int]],
    fits: Callable[[int, int], bool],
) -> list[int]:
    """Where the references of a text begin, as indices of its units; the first is 0.

    Args:
        units: the text's; each fits into a reference by itself.
        levels: of the section that each is in; a heading is in its own.
        tokens: of each unit, which token it begins with, and how many are before its end.
        rooms: tokens that a reference may have that begins with this unit.
        wrong: units, from one to before another, that together do not fit.
        fits: whether the units from one to before another fit, counted exactly.
    """
    n = len(units)
    best = [0, *[-1] * n]
    before = [0] * (n + 1)
    for i in range(n):
        room, half = rooms[i], max(1, rooms[i] // 2)
        joined = 0
        for j in range(i + 1, n + 1):
            if j > i + 1:
                joined += _joining(units, levels, i, j - 1)
                if joined >= _NEVER:
                    break
            length = max(j - i, tokens[j - 1][1] - tokens[i][0])
            if j > i + 1:
                if length > room + NEAR:
                    break
                if (i, j) in wrong or (length > room - NEAR and not fits(i, j)):
                    continue
            cost = best[i] + _REFERENCE + joined
            cost += max(0, _SHORT * (half - length) // half)
            cost += units[j].cost if j < n else 0
            if best[j] < 0 or cost < best[j]:
                best[j], before[j] = cost, i
    found = [n]
    while found[-1]:
        found.append(before[found[-1]])
    return found[:0:-1]


def _joining(units: Sequence[Unit], levels: Sequence[int], first: int, inner: int) -> int:
    """What it costs that a reference that begins with one unit goes on into another."""
    level = units[inner].level
    if not level:
        return 0
    own = levels[first]
    if level < own:
        return _NEVER
    begins = units[first].level > 0
    if level > own:
        return _INTO_PART if begins else _ON_INTO_PART
    return _BESIDE if begins else _ON_BESIDE
