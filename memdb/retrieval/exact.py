"""Exact search over the store's own vectors, in pieces, whatever index there is."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from memdb.index import Pinned
from memdb.index.exact import exact_search

Ids = NDArray[np.int64]
Vectors = NDArray[np.float32]

_AT_ONCE = 4096  # vectors


def search_exactly(
    state: Pinned, queries: Vectors, k: int, allowed: Ids | None
) -> tuple[Vectors, Ids]:
    """As `Pinned.search`, each vector compared; no more than a few thousand of them are in RAM."""
    if state.view.base is None:  # then all vectors are compared anyway
        return state.search(queries, k, allowed)
    scores = np.empty((len(queries), 0), np.float32)
    ids = np.empty((len(queries), 0), np.int64)
    for numbers, vectors in _pieces(state, allowed):
        more_scores, more_ids = exact_search(queries, vectors, numbers, k)
        scores = np.concatenate([scores, more_scores], axis=1)
        ids = np.concatenate([ids, more_ids], axis=1)
        order = np.lexsort((ids, -scores))[:, :k]
        scores, ids = np.take_along_axis(scores, order, 1), np.take_along_axis(ids, order, 1)
    return scores, ids


def _pieces(state: Pinned, allowed: Ids | None) -> Iterator[tuple[Ids, Vectors]]:
    if allowed is None:
        yield from state.transaction.embeddings(_AT_ONCE)
        return
    for start in range(0, len(allowed), _AT_ONCE):
        numbers = allowed[start : start + _AT_ONCE]
        yield numbers, state.transaction.embeddings_of(numbers)
