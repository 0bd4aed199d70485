"""Building the index file, from the embeddings that one transaction sees, in bounded RAM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import faiss
import numpy as np

from memdb.background import Cancelled
from memdb.errors import CorruptRecordError
from memdb.index.ann import AnnIndex, Ids, IndexInfo, Vectors, search_parameters
from memdb.index.view import exact_search
from memdb.protocols import Progress
from memdb.storage.record_layout import CHANGES, EMBEDDINGS
from memdb.storage.transaction import Transaction

_LISTS_PER_ROOT = 4  # clusters are 4 times the square root of the number of vectors
_SAMPLE = 48  # vectors for each cluster's centre, as FAISS advises (39 to 256)
_ROUNDS = 10  # of k-means
_LINKS = 32  # of each centre in the graph that finds the nearest ones
_QUERIES = 256  # that recall is measured with
_K = 5  # the paper's number of memories
_BATCH = 8192
_NODES = 256  # of the graph of centres, added at once
_PRODUCTS = 1 << 31  # multiplications between two looks whether to go on: a tenth of a second
_OFF = 1 / 1024  # by which the halves of a cluster begin apart


def build_index(
    transaction: Transaction,
    database: str,
    dimension: int,
    recall: float,
    previous: AnnIndex | None,
    progress: Progress,
    cancelled: Callable[[], bool],
) -> tuple[Any, IndexInfo]:
    """An IVF index over all embeddings, and its description.

    Args:
        transaction: the state to build for.
        database: the database's id.
        dimension: length of an embedding.
        recall: that `nprobe` is chosen for, with some of the embeddings as queries.
        previous: an index whose clusters are used again where they still fit.
        progress: told of the work.
        cancelled: whether to give up.

    Raises:
        Cancelled: it said so.
        CorruptRecordError: an embedding, or the newest change, is damaged.
    """
    change = transaction.last_change()
    seal = transaction.change_seal(change)
    if seal is None:
        raise CorruptRecordError(CHANGES, str(change), "it is missing")
    numbers = transaction.numbers(EMBEDDINGS)
    n = len(numbers)
    centres, trained = _centres(transaction, numbers, dimension, previous, progress, cancelled)
    index = faiss.IndexIVFScalarQuantizer(
        centres,
        dimension,
        centres.ntotal,
        faiss.ScalarQuantizer.QT_fp16,
        faiss.METRIC_INNER_PRODUCT,
        False,  # vectors as they are, not their distance from the centre: nothing to train
    )
    index.is_trained = True
    asked = np.sort(_chosen(numbers, _QUERIES))
    queries = transaction.embeddings_of(asked)
    best_scores = np.full((len(asked), _K), -np.inf, np.float32)
    best_ids = np.full((len(asked), _K), -1, np.int64)
    done = 0
    for ids, vectors in transaction.embeddings(_BATCH):
        progress("building the index", done, n)
        _go_on(cancelled)
        index.add_with_ids(vectors, ids)
        scores, near = exact_search(queries, vectors, ids, _K + 1)
        scores = np.where(near == asked[:, None], -np.inf, scores)  # a query does not find itself
        best_scores, best_ids = _merged((best_scores, best_ids), (scores, near))
        done += len(ids)
    progress("building the index", n, n)
    nprobe, reached = _nprobe(index, queries, asked, best_ids, recall, cancelled)
    info = IndexInfo(
        database=database,
        change=change,
        seal=seal,
        references=n,
        dimension=dimension,
        lists=int(centres.ntotal),
        nprobe=nprobe,
        recall=reached,
        trained=trained,
    )
    return index, info


def _centres(
    transaction: Transaction,
    numbers: Ids,
    dimension: int,
    previous: AnnIndex | None,
    progress: Progress,
    cancelled: Callable[[], bool],
) -> tuple[Any, int]:
    """The clusters' centres as a FAISS index, and how many vectors there were when it was made."""
    n = len(numbers)
    if previous is not None and n / 2 <= previous.info.trained <= 2 * n:
        return previous.quantizer(), previous.info.trained
    lists = max(1, min(int(_LISTS_PER_ROOT * n**0.5), n // 4))
    chosen = np.sort(_chosen(numbers, _SAMPLE * lists))
    sample = np.empty((len(chosen), dimension), np.float32)
    for start in range(0, len(chosen), _BATCH):
        _go_on(cancelled)
        sample[start : start + _BATCH] = transaction.embeddings_of(chosen[start : start + _BATCH])
    centres = _first_centres(sample, lists)
    for step in range(_ROUNDS):
        progress("finding clusters", step, _ROUNDS)
        centres = _moved(centres, sample, cancelled)
    progress("finding clusters", _ROUNDS, _ROUNDS)
    graph = faiss.IndexHNSWFlat(dimension, _LINKS, faiss.METRIC_INNER_PRODUCT)
    for start in range(0, lists, _NODES):
        _go_on(cancelled)
        graph.add(centres[start : start + _NODES])
    return graph, n


def _first_centres(sample: Vectors, lists: int) -> Vectors:
    """Vectors of the sample; the same ones each time."""
    return sample[np.random.default_rng(1).permutation(len(sample))[:lists]]


def _moved(centres: Vectors, sample: Vectors, cancelled: Callable[[], bool]) -> Vectors:
    """One round of spherical k-means, as FAISS does it; but it can be given up in the middle, which
    a call of FAISS that takes a minute cannot."""
    lists, dimension = centres.shape
    nearest_centre = faiss.IndexFlatIP(dimension)
    nearest_centre.add(centres)
    sums = np.zeros((lists, dimension), np.float32)
    sizes = np.zeros(lists, np.int64)
    rows = max(256, _PRODUCTS // (lists * dimension))
    for start in range(0, len(sample), rows):
        _go_on(cancelled)
        some = sample[start : start + rows]
        nearest = nearest_centre.search(some, 1)[1][:, 0]
        order = np.argsort(nearest, kind="stable")
        found, starts = np.unique(nearest[order], return_index=True)
        sums[found] += np.add.reduceat(some[order], starts, axis=0)
        sizes[found] += np.diff(starts, append=len(some))
    _split_for_empty(sums, sizes)
    lengths = np.linalg.norm(sums, axis=1, keepdims=True)
    return np.ascontiguousarray(sums / np.maximum(lengths, 1e-30))


def _split_for_empty(sums: Vectors, sizes: Ids) -> None:
    """Give clusters that are empty half of a large one, a little off its centre, in place."""
    rng = np.random.default_rng(0)
    off = np.where(np.arange(sums.shape[1]) % 2, 1 - _OFF, 1 + _OFF).astype(np.float32)
    for empty in np.flatnonzero(sizes == 0).tolist():
        shares = np.maximum(sizes - 1, 0)
        if not shares.any():
            return  # fewer different vectors than clusters
        large = int(rng.choice(len(sizes), p=shares / shares.sum()))
        sums[empty], sums[large] = sums[large] * off, sums[large] * (2 - off)
        sizes[empty], sizes[large] = sizes[large] // 2, sizes[large] - sizes[large] // 2


def _go_on(cancelled: Callable[[], bool]) -> None:
    if cancelled():
        raise Cancelled


def _chosen(numbers: Ids, count: int) -> Ids:
    """Some ids, uniformly; the same ones each time."""
    if count >= len(numbers):
        return numbers
    return np.random.default_rng(0).choice(numbers, count, replace=False)


def _merged(one: tuple[Vectors, Ids], other: tuple[Vectors, Ids]) -> tuple[Vectors, Ids]:
    scores = np.concatenate([one[0], other[0]], 1)
    ids = np.concatenate([one[1], other[1]], 1)
    order = np.argsort(-scores, axis=1)[:, :_K]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(ids, order, 1)


def _nprobe(
    index: Any,
    queries: Vectors,
    asked: Ids,
    truth: Ids,
    recall: float,
    cancelled: Callable[[], bool],
) -> tuple[int, float]:
    """The fewest clusters to look at for that recall, and the recall that they reach."""
    nprobe, reached = 1, 0.0
    while True:
        _go_on(cancelled)
        _, found = index.search(queries, _K + 1, params=search_parameters(nprobe))
        found = np.where(found == asked[:, None], -2, found)
        hits = (truth[:, :, None] == found[:, None, :]).any(2) & (truth >= 0)
        reached = float(hits.sum() / max(1, (truth >= 0).sum()))
        if reached >= recall or nprobe >= index.nlist:
            return nprobe, reached
        nprobe = min(index.nlist, nprobe + max(1, nprobe // 4))
