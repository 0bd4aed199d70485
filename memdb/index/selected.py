"""Search in an index file where only some of its vectors may be found, or more than it was tuned
for: how many clusters to look at is decided query by query.

Clusters are looked at from the nearest centre on. A vector's score is that of its cluster's centre
and something more or less, whose spread was measured when the index was built. So, from the k-th
score found so far, the vectors that may be found and the centres not yet looked at follows how many
of the k nearest are still to be expected there. Where that is few enough, the search ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from memdb.index.ann import SPREAD_STEPS, AnnIndex, Bitmap, Ids, Vectors
from memdb.index.exact import exact_search, products

_FEW = 256  # with so few that may be found, to compare all of them takes no longer
_MISSED = 0.01  # of the k nearest that may be expected not to be found
_WIDER = 2  # at most, from one look to the next
_MIDDLES = (np.arange(SPREAD_STEPS) + 0.5) * (2 / SPREAD_STEPS) - 1


@dataclass(frozen=True)
class Selection:
    """Rows of an index file that may be found.

    Attributes:
        base: the index file.
        rows: (n,) ascending; None: all but `without`.
        without: (n,) ascending; none where `rows` are given.
    """

    base: AnnIndex
    rows: Ids | None
    without: Ids

    @cached_property
    def count(self) -> int:
        """How many."""
        return (
            self.base.info.references - len(self.without) if self.rows is None else len(self.rows)
        )

    @cached_property
    def counts(self) -> Ids:
        """(lists,) how many in each cluster."""
        if self.rows is not None:
            return self.base.counts(self.rows)
        return self.base.sizes - self.base.counts(self.without)

    @cached_property
    def clusters(self) -> Ids:
        """Those that hold any."""
        return np.flatnonzero(self.counts)

    @cached_property
    def bitmap(self) -> Bitmap | None:
        """A bit for each row; None: all."""
        if self.rows is None and not len(self.without):
            return None
        marks = np.full(self.base.info.references, self.rows is None)
        marks[self.without if self.rows is None else self.rows] = self.rows is not None
        return np.packbits(marks, bitorder="little")


def search_selected(selection: Selection, queries: Vectors, k: int) -> tuple[Vectors, Ids]:
    """Scores and rows of the nearest that may be found, best first; each (queries, k), or as many
    as there are.

    Args:
        selection: which may be found.
        queries: (n, dimension), each of length 1.
        k: at least 1.

    Raises:
        CorruptRecordError: a cluster is damaged.
    """
    k = min(k, selection.count)
    rows = selection.rows
    if rows is not None and len(rows) <= _FEW:
        return exact_search(queries, selection.base.vectors_of(rows), rows, k)
    scores, found = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
    centres = products(queries, selection.base.centres)
    for n, centre_scores in enumerate(centres if k else []):
        scores[n], found[n] = _nearest(selection, queries[n : n + 1], k, centre_scores)
    return scores, found


def _nearest(
    selection: Selection, query: Vectors, k: int, centre_scores: Vectors
) -> tuple[Vectors, Ids]:
    """Scores and rows of the k nearest, each (k,); there are as many."""
    base = selection.base
    near = centre_scores[selection.clusters]
    order = np.argsort(-near)
    near, clusters = near[order], selection.clusters[order]
    counts = selection.counts[clusters]
    spread = np.interp(near, _MIDDLES, base.info.spread)
    scores, rows = np.empty(0, np.float32), np.empty(0, np.int64)
    looked, end = 0, base.info.nprobe
    while looked < min(end, len(clusters)):
        more = base.scan(query, k, clusters[looked:end], selection.bitmap)
        there = more[1][0] >= 0
        scores, rows = np.append(scores, more[0][0][there]), np.append(rows, more[1][0][there])
        best = np.lexsort((rows, -scores))[:k]
        scores, rows = scores[best], rows[best]
        looked, end = end, _WIDER * end
        if len(rows) == k:
            above = (scores[-1] - near[looked:]) / spread[looked:]
            expected = np.cumsum((counts[looked:] * _share_above(above))[::-1])[::-1]
            end = min(end, looked + int(np.count_nonzero(expected > _MISSED * k)))
    return scores, rows


def _share_above(deviations: NDArray[np.float32]) -> NDArray[np.float64]:
    """How much of a normal distribution is further up than so many standard deviations, to within
    1e-7 (Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26)."""
    z = np.abs(deviations) * np.sqrt(0.5)
    t = 1 / (1 + 0.3275911 * z)
    series = 1.421413741 + t * (-1.453152027 + t * 1.061405429)
    half = 0.5 * t * (0.254829592 + t * (-0.284496736 + t * series)) * np.exp(-z * z)
    share: NDArray[np.float64] = np.where(deviations < 0, 1 - half, half)
    return share
