"""What a keyword search found, and how it is joined with what a vector search found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from memdb.storage.transaction import Transaction

Ids = NDArray[np.int64]
Scores = NDArray[np.float64]

#: Ids and scores, best first.
Found = tuple[list[int], list[float]]

_WEIGHT = 0.2  # of the best keyword score, in units of cosine; benchmarks/modes.py measures it
_LEAST_DEEP, _DEEPER = 100, 2  # how many of each kind of search are joined, for k hits


@dataclass(frozen=True)
class Matched:
    """The references that have words of a query, with their BM25 scores.

    Attributes:
        ids: (n,), best first; of equal ones the lower id. Some may be gone: see `living`.
        scores: (n,), more than 0.
    """

    ids: Ids = field(default_factory=lambda: np.zeros(0, np.int64))
    scores: Scores = field(default_factory=lambda: np.zeros(0, np.float64))

    @classmethod
    def joined(cls, parts: Sequence[tuple[Ids, Scores]]) -> Matched:
        """Of several indexes over different references, in any order."""
        if not parts:
            return cls()
        ids, scores = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        order = np.lexsort((ids, -scores))
        return cls(ids[order], scores[order])

    def scores_of(self, ids: Sequence[int]) -> list[float]:
        """The scores of some references, 0 where they have none of the words."""
        if not len(self.ids):
            return [0.0] * len(ids)
        order = np.argsort(self.ids)
        wanted = np.asarray(ids, np.int64)
        places = order[np.minimum(np.searchsorted(self.ids, wanted, sorter=order), len(order) - 1)]
        scores: list[float] = np.where(self.ids[places] == wanted, self.scores[places], 0).tolist()
        return scores

    def best(self, transaction: Transaction, count: int) -> Found:
        """The best of those that a state holds."""
        living = list(islice(self._living(transaction), count))
        return [number for number, _ in living], [score for _, score in living]

    def _living(self, transaction: Transaction) -> Iterator[tuple[int, float]]:
        for number, score in zip(self.ids.tolist(), self.scores.tolist(), strict=True):
            if transaction.has_reference(number):
                yield number, score


def depth(k: int) -> int:
    """How many hits of each kind of search are joined for the best k."""
    return max(_LEAST_DEEP, _DEEPER * k)


def fused(
    near: Found, matched: Matched, transaction: Transaction, vector: NDArray[np.float32], k: int
) -> Found:
    """The best k by both searches, with their cosines.

    What counts is the cosine, and 0.2 for the best keyword score, in proportion less for others: a
    weighted sum of scores (Bruch, Gai and Ingber, "An analysis of fusion functions for hybrid
    retrieval", 2023), which on the sets of benchmarks/modes.py finds more than reciprocal ranks
    do.

    Args:
        near: the `depth(k)` nearest by vector.
        matched: by keywords.
        transaction: the state that both are of.
        vector: (dimension,), of the query.
        k: at least 1.

    Returns:
        Ids by what counts, and cosines.
    """
    worded, scores = matched.best(transaction, depth(k))
    if not worded:
        return near[0][:k], near[1][:k]
    cosines = dict(zip(*near, strict=True))
    others = [number for number in worded if number not in cosines]
    if others:
        products = transaction.embeddings_of(others) @ vector
        cosines.update(zip(others, products.tolist(), strict=True))
    ids = list(cosines)
    counts = dict(zip(ids, matched.scores_of(ids), strict=True))
    best = scores[0]

    def worth(number: int) -> tuple[float, int]:
        return -(cosines[number] + _WEIGHT * counts[number] / best), number

    chosen = sorted(ids, key=worth)[:k]
    return chosen, [cosines[number] for number in chosen]
