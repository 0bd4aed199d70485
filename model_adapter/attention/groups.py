"""Heads that keep about as much are attended to together, so that little is read that is filling.

What a memory keeps differs from head to head by a hundred times, and far less from text to text:
in one array, each head would be as wide as the widest, and two slots be read for each pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

#: Slots (of one sequence and kv head) that take a CPU as long as one more call.
_CALL = 400


@dataclass(frozen=True)
class Group:
    """Kv heads side by side, from `first` up to `end`, that fill at most their last `width` slots.
    The first slots of the others are filling in these."""

    first: int
    end: int
    width: int


def grouped(widths: Sequence[int], rows: int, call: int = _CALL) -> tuple[Group, ...]:
    """Heads in the groups that take least time.

    Args:
        widths: of each kv head.
        rows: sequences.
        call: what a group costs, in slots.
    """
    # The cheapest way for the first n heads, from that for fewer.
    best: list[tuple[int, tuple[Group, ...]]] = [(0, ())]
    for end in range(1, len(widths) + 1):
        ways = []
        for first in range(end):
            width = max(widths[first:end])
            cost = best[first][0] + call + rows * (end - first) * width
            ways.append((cost, (*best[first][1], Group(first, end, width))))
        best.append(min(ways, key=lambda way: way[0]))
    return best[-1][1]
