"""Filtered search, for benchmarks/engine.py: recall and time by how much a filter leaves.

Each size once more, without memories, in a database whose metadata keys are indexed. A filter
leaves references drawn at random, or those nearest to a place that the query is far from. Filters
are asked once before they are timed: which references one means is kept, and is not what is timed.
The same database is searched by words (engine_hybrid.py).
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from engine_data import SHAPE, K, Vectors, reference_id, reference_number
from engine_hybrid import Texts
from numpy.typing import NDArray

from memdb import Batch, Document, MemDB, Progress

KINDS = ("random", "unrelated")
PER_MILLE = (1, 10, 100, 500, 1000)

_PLACES = 4  # a query is far from at least one of them
_BATCH = 5000
_WIDE = 1 << 16


@dataclass
class FilteredRow:
    """What filters that leave so many in a thousand did; time in ms."""

    kind: str
    per_mille: int
    p50: float
    recall: float

    @property
    def share(self) -> str:
        """In per cent."""
        return f"{self.per_mille / 10:g}"


@contextmanager
def database(vectors: Vectors, texts: Texts, folder: Path, progress: Progress) -> Iterator[MemDB]:
    """The database, made in a folder, and removed. FAISS has one thread meanwhile."""
    metadata = _metadata(vectors)
    db = MemDB.create(
        folder,
        embedder=texts,
        shape=SHAPE,
        codec="exact",
        durability="off",
        keys=list(metadata),
    )
    with db:
        db.load(_batches(vectors, texts, metadata), progress=progress)
        db.build_index(progress=progress)
        threads = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(1)
        yield db
        faiss.omp_set_num_threads(threads)
    shutil.rmtree(folder)


def measure(db: MemDB, vectors: Vectors, queries: Vectors, progress: Progress) -> list[FilteredRow]:
    """The rows, of that database."""
    metadata = _metadata(vectors)
    rows: list[FilteredRow] = []
    for kind in KINDS:
        for per_mille in PER_MILLE:
            progress("filtered search", len(rows), len(KINDS) * len(PER_MILLE))
            rows.append(_row(db, kind, per_mille, vectors, queries, metadata))
    return rows


def _metadata(vectors: Vectors) -> dict[str, NDArray[np.int64]]:
    """By key, for each reference a number from 0 to 999, each as often."""
    n = len(vectors)
    random = np.random.default_rng(6)
    found = {"random": random.permutation(n)}
    for place, chosen in enumerate(random.choice(n, _PLACES, replace=False).tolist()):
        order = np.argsort(-(vectors @ vectors[chosen]), kind="stable")
        found[f"place{place}"] = np.empty(n, np.int64)
        found[f"place{place}"][order] = np.arange(n)
    return {key: ranks * 1000 // n for key, ranks in found.items()}


def _batches(
    vectors: Vectors, texts: Texts, metadata: dict[str, NDArray[np.int64]]
) -> Iterator[Batch]:
    for first in range(0, len(vectors), _BATCH):
        end = min(first + _BATCH, len(vectors))
        documents = [
            Document(
                texts.text(n), reference_id(n), {key: int(of[n]) for key, of in metadata.items()}
            )
            for n in range(first, end)
        ]
        yield Batch(documents, vectors[first:end])


def _row(
    db: MemDB,
    kind: str,
    per_mille: int,
    vectors: Vectors,
    queries: Vectors,
    metadata: dict[str, NDArray[np.int64]],
) -> FilteredRow:
    keys = ["random"] * len(queries)
    if kind == "unrelated":
        middles = np.stack(
            [vectors[metadata[f"place{place}"] == 0].mean(0) for place in range(_PLACES)]
        )
        keys = [f"place{place}" for place in np.argmin(queries @ middles.T, axis=1).tolist()]
    filters: list[dict[str, Any]] = [{key: {"$lt": per_mille}} for key in keys]
    for where in dict(zip(keys, filters, strict=True)).values():
        db.retrieve(queries[0], K, where=where)
    times, found = [], []
    for query, where in zip(queries, filters, strict=True):
        began = time.perf_counter()
        retrieval = db.retrieve(query, K, where=where)
        times.append(time.perf_counter() - began)
        found.append([reference_number(hit.reference.document_id) for hit in retrieval.hits])
    hits = due = 0
    for query, key, rows in zip(queries, keys, found, strict=True):
        true = _nearest(vectors, query, metadata[key] < per_mille)
        hits += len(set(rows) & set(true))
        due += len(true)
    return FilteredRow(kind, per_mille, float(np.median(times)) * 1e3, hits / due)


def _nearest(vectors: Vectors, query: Vectors, allowed: NDArray[np.bool_]) -> list[int]:
    """The K nearest of those allowed, by exact search in float32."""
    scores = np.empty(len(vectors), np.float32)
    for at in range(0, len(vectors), _WIDE):
        scores[at : at + _WIDE] = vectors[at : at + _WIDE] @ query
    scores[~allowed] = -np.inf
    k = min(K, int(np.count_nonzero(allowed)))
    nearest: list[int] = np.argpartition(scores, len(scores) - k)[-k:].tolist()
    return nearest
