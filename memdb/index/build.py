"""Building the index file, from the embeddings that one transaction sees, in bounded RAM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import faiss
import numpy as np

from memdb.background import Cancelled
from memdb.errors import CorruptRecordError
from memdb.index.ann import (
    SPREAD_STEPS,
    AnnIndex,
    Built,
    Ids,
    IndexInfo,
    Vectors,
    centres_of,
    search_parameters,
)
from memdb.protocols import Progress
from memdb.storage.record_layout import CHANGES, EMBEDDINGS
from memdb.storage.transaction import Transaction

_LISTS_PER_ROOT = 4  # clusters are 4 times the square root of the number of vectors
_SAMPLE = 48  # vectors for each cluster's centre, as FAISS advises (39 to 256)
_ROUNDS = 10  # of k-means
_LINKS = 32  # of each centre in the graph that finds the nearest ones
_QUERIES = 512  # that recall is measured with
_K = 5  # the paper's number of memories
_HITS = _K, 10, 20  # that the clusters looked at for 5 may be enough for
_LEAST_RECALL = 0.985  # what enough is, where no less is asked for
_SPREAD_SAMPLE = 4096  # vectors that the spread is measured on
_SAME = 2**-11  # by so much the scores of one vector, as float32 and as float16, may differ
_ENOUGH = 100  # vectors, to measure a spread
_COPIES = 1023  # of a query's own vector that are looked past, at most
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
) -> tuple[Built, IndexInfo]:
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
    truth = _Truth(transaction, np.sort(_chosen(numbers, _QUERIES)))
    done = 0
    for ids, vectors in transaction.embeddings(_BATCH):
        progress("building the index", done, n)
        _go_on(cancelled)
        index.add_with_ids(vectors, np.arange(done, done + len(ids)))
        truth.look_at(vectors)
        done += len(ids)
    progress("building the index", n, n)
    nprobe, reached, hits = _nprobe(index, truth, recall, cancelled)
    rows = np.sort(_chosen(np.arange(n), _SPREAD_SAMPLE))
    sample = transaction.embeddings_of(numbers[rows])
    spread = _spread(index, truth.queries, rows, sample)
    info = IndexInfo(
        database=database,
        change=change,
        seal=seal,
        references=n,
        dimension=dimension,
        lists=int(centres.ntotal),
        nprobe=nprobe,
        recall=reached,
        hits=hits,
        trained=trained,
        spread=spread,
    )
    return Built(index, numbers), info


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


class _Truth:
    """Some of the embeddings as queries, and the scores of those nearest to them.

    A hit counts by its score, so that of several copies of a text any may be found. A query does
    not find itself, nor what is the same: who asks has no copy of the answer.

    Attributes:
        queries: (q, dimension).
        scores: (q, 20) of the nearest, best first; -inf where there are fewer.
        copies: (q,) vectors that are the query's own, itself among them.
    """

    def __init__(self, transaction: Transaction, asked: Ids) -> None:
        self.queries = transaction.embeddings_of(asked)
        self.scores = np.full((len(asked), max(_HITS)), -np.inf, np.float32)
        self.copies = np.zeros(len(asked), np.int64)

    def look_at(self, vectors: Vectors) -> None:
        """Compare with more vectors."""
        scores = self.queries @ vectors.T
        same = scores > 1 - _SAME
        self.copies += same.sum(1)
        scores[same] = -np.inf
        k = min(max(_HITS), len(vectors))
        nearest = np.partition(scores, len(vectors) - k, axis=1)[:, -k:]
        both = np.concatenate([self.scores, nearest], 1)
        self.scores = -np.sort(-both, axis=1)[:, : max(_HITS)]


def _nprobe(
    index: Any, truth: _Truth, recall: float, cancelled: Callable[[], bool]
) -> tuple[int, float, int]:
    """The fewest clusters to look at for that recall of the nearest 5, the recall that they reach,
    and how many of the nearest may be asked for so that they are still enough.

    Other queries than these few are asked later, and the first number of clusters that seems enough
    is taken. So it has to be enough with a standard error to spare: without, every other index
    would find less than it is to."""
    usable = truth.copies <= _COPIES
    queries, due = truth.queries[usable], truth.scores[usable]
    if not np.isfinite(due).any():
        return max(1, index.nlist // 32), 1.0, _K
    k = due.shape[1] + int(truth.copies[usable].max())
    nprobe = 1
    while True:
        _go_on(cancelled)
        scores, rows = index.search(queries, k, params=search_parameters(nprobe))
        scores = np.where((rows >= 0) & (scores <= 1 - _SAME), scores, -np.inf)
        reached, error = _recall(scores, due[:, :_K])
        if reached - error >= recall or nprobe >= index.nlist:
            break
        nprobe = min(index.nlist, nprobe + max(1, nprobe // 4))
    least = min(recall, _LEAST_RECALL)
    enough = [hits for hits in _HITS if _recall(scores, due[:, :hits])[0] >= least]
    return nprobe, reached, max([_K, *enough])


def _recall(scores: Vectors, due: Vectors) -> tuple[float, float]:
    """Share of what is due that is found, and its standard error.

    Args:
        scores: (q, any) of what is found; -inf: nothing.
        due: (q, k) the true ones, best first; -inf where there are fewer.
    """
    there = np.isfinite(due).sum(1)
    least = due[np.arange(len(due)), np.maximum(there, 1) - 1] - _SAME
    found = np.minimum((scores >= least[:, None]).sum(1), there)
    share = found.sum() / there.sum()
    error = np.sqrt(((found - share * there) ** 2).sum()) / there.sum()  # of a ratio of two sums
    return float(share), float(error)


def _spread(index: Any, queries: Vectors, rows: Ids, vectors: Vectors) -> tuple[float, ...]:
    """See `IndexInfo.spread`. Centres of a score that few have count as those of the nearest score
    that enough have.

    Args:
        index: of FAISS.
        queries: (q, dimension).
        rows: (n,) of the vectors that it is measured on.
        vectors: (n, dimension).
    """
    clusters = np.empty(index.ntotal, np.int64)
    for cluster in range(index.nlist):
        if size := index.invlists.list_size(cluster):
            clusters[faiss.rev_swig_ptr(index.invlists.get_ids(cluster), size)] = cluster
    near = (queries @ centres_of(index).T)[:, clusters[rows]].ravel()
    scores = (queries @ vectors.T).ravel()
    others = scores <= 1 - _SAME
    steps = ((near + 1) * (SPREAD_STEPS / 2)).astype(np.int64).clip(0, SPREAD_STEPS - 1)
    total = np.bincount(steps, others, SPREAD_STEPS)
    squares = np.bincount(steps, others * (scores - near) ** 2, SPREAD_STEPS)
    enough = np.flatnonzero(total >= min(_ENOUGH, total.max()))
    nearest = np.abs(np.arange(SPREAD_STEPS)[:, None] - enough).argmin(1)
    spread = np.sqrt(squares[enough] / np.maximum(total[enough], 1))[nearest]
    return tuple(np.maximum(spread, _SAME).tolist())
