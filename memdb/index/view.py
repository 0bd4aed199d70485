"""What one state of the database can find: an index file, and what came and went since."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memdb.index.ann import AnnIndex, Ids, Vectors
from memdb.index.exact import exact_search
from memdb.index.selected import Selection, search_selected

_NO_IDS: Ids = np.zeros(0, np.int64)
_DEAD_ROWS = 64  # that a tail keeps, at least
_KEPT = 8  # filters whose rows a view remembers


@dataclass(frozen=True)
class Tail:
    """Vectors that are compared one by one, in rows by ascending id.

    Growing gives a new tail that shares its room with the old one, which stays as it was. Only the
    newest tail is grown: so the room behind its rows is nobody's.
    """

    room_ids: Ids
    room_vectors: Vectors
    rows: int

    @classmethod
    def empty(cls, dimension: int) -> Tail:
        """Without rows."""
        return cls(_NO_IDS, np.zeros((0, dimension), np.float32), 0)

    @property
    def ids(self) -> Ids:
        """(rows,)."""
        return self.room_ids[: self.rows]

    @property
    def vectors(self) -> Vectors:
        """(rows, dimension)."""
        return self.room_vectors[: self.rows]

    def grown(self, ids: Ids, vectors: Vectors) -> Tail:
        """With more rows, of higher ids."""
        rows = self.rows + len(ids)
        room_ids, room_vectors = self.room_ids, self.room_vectors
        if rows > len(room_ids):
            room = rows if self.rows == 0 else 2 * rows
            room_ids = np.empty(room, np.int64)
            room_vectors = np.empty((room, vectors.shape[1]), np.float32)
            room_ids[: self.rows], room_vectors[: self.rows] = self.ids, self.vectors
        room_ids[self.rows : rows], room_vectors[self.rows : rows] = ids, vectors
        return Tail(room_ids, room_vectors, rows)

    def without(self, gone: NDArray[Any]) -> Tail:
        """Without some rows, as a copy."""
        ids = np.delete(self.ids, gone)
        return Tail(ids, np.delete(self.vectors, gone, axis=0), len(ids))

    def rows_of(self, ids: Ids) -> NDArray[Any]:
        """The rows of those of some ids that are in it; ids and rows ascend."""
        if not len(ids) or not self.rows:
            return _NO_IDS
        places = np.minimum(np.searchsorted(self.ids, ids), self.rows - 1)
        found: NDArray[Any] = places[self.ids[places] == ids]
        return found


@dataclass(frozen=True)
class _Allowed:
    """What some ids that may be found are here.

    Attributes:
        ids: they themselves.
        rows: of the tail.
        selection: of the index file; None without one.
    """

    ids: Ids
    rows: NDArray[Any]
    selection: Selection | None


class _Remembered:
    """What the last filters allow: who filters by something does so again and again."""

    def __init__(self) -> None:
        self._kept: OrderedDict[int, _Allowed] = OrderedDict()  # which keeps the ids, by identity
        self._guard = Lock()

    def get(self, ids: Ids) -> _Allowed | None:
        with self._guard:
            return self._kept.get(id(ids))

    def keep(self, allowed: _Allowed) -> None:
        with self._guard:
            self._kept[id(allowed.ids)] = allowed
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)


@dataclass(frozen=True)
class View:
    """Search over exactly what the database holds up to one change. Never changes.

    Attributes:
        change: up to which.
        base: an index file, or None.
        tail: what came since the file was built; without a file, everything.
        dead: ids in base or tail that are gone, ascending.
    """

    change: int
    base: AnnIndex | None
    tail: Tail
    dead: Ids
    _remembered: _Remembered = field(default_factory=_Remembered, repr=False, compare=False)

    @classmethod
    def empty(cls, dimension: int, base: AnnIndex | None = None) -> View:
        """What an index file knows; without one, nothing."""
        change = 0 if base is None else base.info.change
        return cls(change, base, Tail.empty(dimension), _NO_IDS)

    def after(self, change: int, gone: Sequence[int], ids: Ids, vectors: Vectors) -> View:
        """The view once some ids are gone, and others, higher than all, came with vectors."""
        dead, tail = self.dead, self.tail
        if len(ids):
            tail = tail.grown(ids, vectors)
        if gone:
            dead = np.union1d(dead, np.array(gone, np.int64))
            rows = tail.rows_of(dead)
            if len(rows) > max(_DEAD_ROWS, tail.rows // 4):
                dead = np.setdiff1d(dead, tail.ids[rows], assume_unique=True)
                tail = tail.without(rows)
        return View(change, self.base, tail, dead)

    @property
    def changed(self) -> int:
        """How many vectors came or went since the index file was built."""
        return self.tail.rows + len(self.dead)

    def search(self, queries: Vectors, k: int, allowed: Ids | None = None) -> tuple[Vectors, Ids]:
        """Scores and ids, each (queries, k), best first; id -1 where there are fewer.

        Args:
            queries: (n, dimension), each of length 1.
            k: at least 1.
            allowed: ids that may be found, ascending, none of them dead; default: all. Never
                changed afterwards.

        Raises:
            CorruptRecordError: the index file is damaged.
        """
        here = None if allowed is None else self._allowed(allowed)
        if self.base is None:
            scores, ids = exact_search(queries, self.tail.vectors[:0], _NO_IDS, k)
        else:
            selection = None if here is None else here.selection
            scores, rows = self._search_base(self.base, queries, k, selection)
            ids = self.base.ids[rows]
        if self.tail.rows:
            more_scores, more_ids = self._search_tail(queries, k, here)
            scores = np.concatenate([scores, more_scores], 1)
            ids = np.concatenate([ids, more_ids], 1)
            order = np.lexsort((ids, -scores))[:, :k]
            scores, ids = np.take_along_axis(scores, order, 1), np.take_along_axis(ids, order, 1)
        if scores.shape[1] < k:
            missing = ((0, 0), (0, k - scores.shape[1]))
            scores = np.pad(scores, missing, constant_values=-np.inf)
            ids = np.pad(ids, missing, constant_values=-1)
        return scores, ids

    def _search_tail(self, queries: Vectors, k: int, here: _Allowed | None) -> tuple[Vectors, Ids]:
        tail = self.tail
        if here is None:
            hidden = self._dead_rows if len(self._dead_rows) else None
            return exact_search(queries, tail.vectors, tail.ids, k, hidden)
        if len(here.rows) < tail.rows // 4:  # to copy these takes less time than to compare all
            return exact_search(queries, tail.vectors[here.rows], tail.ids[here.rows], k)
        hidden = np.ones(tail.rows, np.bool_)
        hidden[here.rows] = False
        return exact_search(queries, tail.vectors, tail.ids, k, hidden)

    def _search_base(
        self, base: AnnIndex, queries: Vectors, k: int, selection: Selection | None
    ) -> tuple[Vectors, Ids]:
        """Scores and rows, each (queries, at most k)."""
        if k <= base.info.hits and (selection is None or selection.count == base.info.references):
            scores, rows = base.nearest(queries, k)
            if _all_found(rows) and not self._any_dead(rows):
                return scores, rows
        return search_selected(self._living if selection is None else selection, queries, k)

    def _any_dead(self, rows: Ids) -> bool:
        dead = self._dead_base_rows
        if not len(dead):
            return False
        places = np.searchsorted(dead, rows)
        return bool((dead.take(places, mode="clip") == rows).any())

    def _allowed(self, ids: Ids) -> _Allowed:
        found = self._remembered.get(ids)
        if found is None:
            base, tail = self.base, self.tail
            selection = None if base is None else Selection(base, base.rows_of(ids), _NO_IDS)
            late = ids[np.searchsorted(ids, tail.ids[0]) :] if tail.rows else _NO_IDS
            found = _Allowed(ids, tail.rows_of(late), selection)
            self._remembered.keep(found)
        return found

    @cached_property
    def _dead_rows(self) -> NDArray[Any]:
        """Of the tail."""
        return self.tail.rows_of(self.dead)

    @cached_property
    def _dead_base_rows(self) -> Ids:
        return _NO_IDS if self.base is None else self.base.rows_of(self.dead)

    @cached_property
    def _living(self) -> Selection:
        assert self.base is not None
        return Selection(self.base, None, self._dead_base_rows)


def _all_found(ids: Ids) -> bool:
    """Whether no id is missing; those that are come last. (For one query a reduction takes longer
    than what it looks at.)"""
    return bool(ids.item(-1) >= 0 if len(ids) == 1 else ids[:, -1].min() >= 0)
