"""What the metadata index tells of a filter, before any metadata is read.

Of each reference the index says yes, no, or that its metadata has to be asked (Kleene's logic:
`and` is the least of the answers, `or` the greatest, `not` turns them round). Most filters say the
same of nearly all references, so that is held once, beside those of which something else is
known.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from memdb.filters.language import All, Condition, Exists, Filter, Node, Not, One
from memdb.filters.order import EVERY, OTHERS
from memdb.filters.postings import Postings

NO, ASK, YES = -1, 0, 1

Ids = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Known:
    """What is known of all references.

    Attributes:
        rest: `YES`, `NO` or `ASK`, of all but `ids`.
        ids: ascending.
        answers: (ids,) int8; none is `rest`.
    """

    rest: int
    ids: Ids
    answers: NDArray[np.int8]

    def of(self, answer: int) -> Ids:
        """The ids of that answer; it is not `rest`."""
        found: Ids = self.ids[self.answers == answer]
        return found

    def turned(self) -> Known:
        """What is known of `not`."""
        return Known(-self.rest, self.ids, -self.answers)


def known(where: Filter, postings: Postings, indexed: Collection[str]) -> Known:
    """What the index tells of a filter.

    Args:
        where: the filter.
        postings: of the transaction that it is asked in.
        indexed: the metadata keys that it is of.

    Raises:
        CorruptRecordError: a block of the index is damaged.
    """
    return _known(where.root, postings, frozenset(indexed))


def _known(node: Node, postings: Postings, indexed: frozenset[str]) -> Known:
    if isinstance(node, Not):
        return _known(node.part, postings, indexed).turned()
    if isinstance(node, (All, One)):
        parts = (_known(part, postings, indexed) for part in node.parts)
        if isinstance(node, All):
            return _folded(np.minimum, _everywhere(YES), parts)
        return _folded(np.maximum, _everywhere(NO), parts)
    if isinstance(node, Exists):
        return _at_path(node.path, [EVERY, OTHERS], [], postings, indexed)
    assert isinstance(node, Condition)
    return _at_path(node.path, node.ranges(), [OTHERS], postings, indexed)


def _at_path(
    path: str,
    yes: Sequence[tuple[bytes, bytes]],
    ask: Sequence[tuple[bytes, bytes]],
    postings: Postings,
    indexed: frozenset[str],
) -> Known:
    """What is known of a path, given where the index holds, under a key of that name, the values
    that match and those that may."""
    parts = path.split(".")
    heads = [".".join(parts[:end]) for end in range(1, len(parts))]
    if not indexed.issuperset([path, *heads]):
        return _everywhere(ASK)
    # A longer name of the metadata's own comes first: it may hide what a shorter one leads to, but
    # a document with neither does not match. An object lies among the others.
    beside = [postings.within(name, [OTHERS]) for name in heads]
    asked = _union([postings.within(path, ask), *beside] if ask or beside else [])
    sure = postings.within(path, yes)
    # Who has the key itself need not be asked what lies under a shorter one.
    asked = np.setdiff1d(asked, sure, assume_unique=True)
    if not len(asked):
        return _these(sure, YES)
    return _folded(np.maximum, _everywhere(NO), (_these(sure, YES), _these(asked, ASK)))


def _everywhere(answer: int) -> Known:
    return Known(answer, np.empty(0, np.int64), np.empty(0, np.int8))


def _these(ids: Ids, answer: int) -> Known:
    return Known(NO, ids, np.full(len(ids), answer, np.int8))


def _union(found: Sequence[Ids]) -> Ids:
    return np.unique(np.concatenate(found)) if found else np.empty(0, np.int64)


def _folded(least_or_most: np.ufunc, empty: Known, parts: Iterable[Known]) -> Known:
    """All parts as one, two and two, so that of many parts none is gone through often.

    Args:
        least_or_most: of two answers, `np.minimum` or `np.maximum`.
        empty: what no parts are.
        parts: any number.
    """
    left = list(parts) or [empty]
    settles = -empty.rest  # with this, whatever the other says
    while len(left) > 1:
        pairs = [left[at : at + 2] for at in range(0, len(left), 2)]
        left = [_both(least_or_most, settles, *p) if len(p) == 2 else p[0] for p in pairs]
    return left[0]


def _both(least_or_most: np.ufunc, settles: int, one: Known, other: Known) -> Known:
    settled = [part.ids for part in (one, other) if part.rest == settles]
    ids = min(settled, key=len) if settled else _union([one.ids, other.ids])
    answers: NDArray[np.int8] = least_or_most(_of_each(one, ids), _of_each(other, ids))
    rest = int(least_or_most(one.rest, other.rest))
    differ = answers != rest
    return Known(rest, ids[differ], answers[differ])


def _of_each(known: Known, ids: Ids) -> NDArray[np.int8]:
    """The answer for each of these ids."""
    if known.ids is ids or not len(known.ids):
        return known.answers if len(known.ids) else np.full(len(ids), known.rest, np.int8)
    places = np.minimum(np.searchsorted(known.ids, ids), len(known.ids) - 1)
    rest = np.int8(known.rest)
    return np.where(known.ids[places] == ids, known.answers[places], rest)
