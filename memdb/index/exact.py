"""Exact search: all vectors are compared."""

from __future__ import annotations

from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from memdb.index.ann import Ids, Vectors

_SCORES_AT_ONCE = 1 << 24  # of an exact search: 64 MiB


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
        scores = products(queries[start : start + step], vectors)
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


def products(queries: Vectors, vectors: Vectors) -> Vectors:
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
