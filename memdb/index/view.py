"""What one state of the database can find: an index file, and what came and went since."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from memdb.index.ann import AnnIndex, Bitmap, Ids, Vectors

_NO_IDS: Ids = np.zeros(0, np.int64)
_SCORES_AT_ONCE = 1 << 24  # of an exact search: 64 MiB
_WIDER = 4  # each time that too few of the ids that may be found are in the clusters looked at
_DEAD_ROWS = 64  # that a tail keeps, at least


def exact_search(
    queries: Vectors, vectors: Vectors, ids: Ids, k: int, hidden: NDArray[Any] | None = None
) -> tuple[Vectors, Ids]:
    """Scores and ids of the k nearest, each (queries, at most k), best first; of those found that
    are equally near the lower id comes first.

    Args:
        queries: (q, dimension).
        vectors: (n, dimension).
        ids: (n,).
        k: at least 1.
        hidden: rows, or a mask of rows, that are not found; id -1 stands in their place.
    """
    k = min(k, len(ids))
    if k == 0:
        return np.zeros((len(queries), 0), np.float32), np.zeros((len(queries), 0), np.int64)
    found_scores, found_ids = [], []
    step = max(1, _SCORES_AT_ONCE // len(ids))
    for start in range(0, len(queries), step):
        scores = _products(queries[start : start + step], vectors)
        if hidden is not None:
            scores[:, hidden] = -np.inf
        if k < len(ids):
            nearest = np.argpartition(scores, len(ids) - k, axis=1)[:, -k:]
        else:
            nearest = np.broadcast_to(np.arange(k), scores.shape)
        scores = np.take_along_axis(scores, nearest, 1)
        near = np.where(np.isneginf(scores), -1, ids[nearest])
        order = np.lexsort((near, -scores))
        found_scores.append(np.take_along_axis(scores, order, 1))
        found_ids.append(np.take_along_axis(near, order, 1))
    return np.concatenate(found_scores), np.concatenate(found_ids)


def all_found(ids: Ids) -> bool:
    """Whether no id is missing; those that are come last. (For one query a reduction takes longer
    than what it looks at.)"""
    return bool(ids.item(-1) >= 0 if len(ids) == 1 else ids[:, -1].min() >= 0)


def _products(queries: Vectors, vectors: Vectors) -> Vectors:
    """(queries, n) inner products. A single query's in this thread: it takes less time than to wake
    another."""
    if len(queries) > 1:
        scores: Vectors = queries @ vectors.T
        return scores
    scores = np.empty((1, len(vectors)), np.float32)
    query, rows = np.ascontiguousarray(queries), np.ascontiguousarray(vectors)
    pointers = (faiss.swig_ptr(array) for array in (scores, query, rows))
    faiss.fvec_inner_products_ny(*pointers, rows.shape[1], len(rows))
    return scores


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
class View:
    """Search over exactly what the database holds up to one change. Never changes.

    Attributes:
        change: up to which.
        base: an index file, or None.
        tail: what came since the file was built; without a file, everything.
        dead: ids in base or tail that are gone, ascending.
        limit: an id above all.
    """

    change: int
    base: AnnIndex | None
    tail: Tail
    dead: Ids
    limit: int

    @classmethod
    def empty(cls, dimension: int, base: AnnIndex | None = None, limit: int = 0) -> View:
        """What an index file knows; without one, nothing."""
        change = 0 if base is None else base.info.change
        return cls(change, base, Tail.empty(dimension), _NO_IDS, limit)

    def after(self, change: int, gone: Sequence[int], ids: Ids, vectors: Vectors) -> View:
        """The view once some ids are gone, and others, higher than all, came with vectors."""
        dead, tail, limit = self.dead, self.tail, self.limit
        if len(ids):
            tail, limit = tail.grown(ids, vectors), int(ids[-1]) + 1
        if gone:
            dead = np.union1d(dead, np.array(gone, np.int64))
            rows = tail.rows_of(dead)
            if len(rows) > max(_DEAD_ROWS, tail.rows // 4):
                dead = np.setdiff1d(dead, tail.ids[rows], assume_unique=True)
                tail = tail.without(rows)
        return View(change, self.base, tail, dead, limit)

    @property
    def changed(self) -> int:
        """How many vectors came or went since the index file was built."""
        return self.tail.rows + len(self.dead)

    def search(self, queries: Vectors, k: int, allowed: Ids | None = None) -> tuple[Vectors, Ids]:
        """Scores and ids, each (queries, k), best first; id -1 where fewer were found.

        Args:
            queries: (n, dimension), each of length 1.
            k: at least 1.
            allowed: ids that may be found, ascending, none of them dead; default: all.
        """
        if self.base is not None and not self.tail.rows:
            return self._search_base(self.base, queries, k, allowed)
        if allowed is None:
            hidden = self._dead_rows if len(self._dead_rows) else None
        else:
            hidden = np.ones(self.tail.rows, np.bool_)
            hidden[self.tail.rows_of(allowed)] = False
        scores, ids = exact_search(queries, self.tail.vectors, self.tail.ids, k, hidden)
        if self.base is not None:
            more_scores, more_ids = self._search_base(self.base, queries, k, allowed)
            more_scores = np.where(more_ids >= 0, more_scores, -np.inf)
            scores = np.concatenate([scores, more_scores], 1)
            ids = np.concatenate([ids, more_ids], 1)
            order = np.lexsort((ids, -scores))[:, :k]
            scores, ids = np.take_along_axis(scores, order, 1), np.take_along_axis(ids, order, 1)
        if scores.shape[1] < k:
            missing = ((0, 0), (0, k - scores.shape[1]))
            scores = np.pad(scores, missing, constant_values=-np.inf)
            ids = np.pad(ids, missing, constant_values=-1)
        return scores, ids

    @cached_property
    def _dead_rows(self) -> NDArray[Any]:
        return self.tail.rows_of(self.dead)

    @cached_property
    def _living(self) -> Bitmap:
        """The ids that are not dead."""
        living = np.ones(self.limit, np.uint8)
        living[self.dead] = 0
        return np.packbits(living, bitorder="little")

    def _search_base(
        self, base: AnnIndex, queries: Vectors, k: int, allowed: Ids | None
    ) -> tuple[Vectors, Ids]:
        info = base.info
        if allowed is None and not len(self.dead):
            scores, ids = base.search(queries, k)
            if all_found(ids) or k > info.references:
                return scores, ids
        nprobe = info.nprobe
        if allowed is None:
            bitmap = self._living if len(self.dead) else None
            due = min(k, info.references - len(self.dead))
        else:
            marks = np.zeros(self.limit, np.uint8)
            marks[allowed] = 1
            bitmap = np.packbits(marks, bitorder="little")
            there = len(allowed) - len(self.tail.rows_of(allowed))
            due = min(k, there)
            # Where few of many may be found, those near the query are spread over more clusters.
            nprobe *= max(1, round((info.references / max(1, there)) ** 0.5))
        scores, ids = base.search(queries, k, bitmap, nprobe)
        while (ids >= 0).sum(1).min() < due and nprobe < info.lists:
            nprobe *= _WIDER
            scores, ids = base.search(queries, k, bitmap, nprobe)
        return scores, ids
