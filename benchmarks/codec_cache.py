"""What the cache of decoded memories is worth, as part of benchmarks/codec.py: retrieval from a
database of many memories, of which all, a third, a tenth or none fit decoded."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from codec_run import RETRIEVED, Stock, one_core
from numpy.typing import NDArray

from memdb import Codec, Document, DocumentBatch, MemDB, pack
from memdb.codecs import codec_named

_DIMENSION = 32  # of the embeddings, which are random
_ROOMS = (0.0, 0.1, 1 / 3, 1.0)  # of all memories, decoded
_TIMED = 400  # retrievals
_TOPIC = 40  # retrievals of a burst


@dataclass(frozen=True)
class CacheRow:
    """Retrievals of one kind with a cache of one size.

    Attributes:
        uses: `even`: each memory is as likely as any other; `skewed`: by Zipf's law; `bursts`:
            a few memories for a while, then others.
        room: share of all memories that it holds decoded.
        found: share of the memories that were in it.
        ms: of a retrieval of five memories, search and packing included; the mean, on one core.
    """

    uses: str
    room: float
    found: float
    ms: float


def measure_cache(codec: str, stock: Stock) -> list[CacheRow]:
    """All rows; none where there are too few memories for the codec to be fitted to."""
    family = codec_named(codec)
    if not isinstance(family, Codec) and len(stock.memories) < family.enough:
        return []
    rng = np.random.default_rng(0)
    count = len(stock.memories)
    embeddings = rng.standard_normal((count, _DIMENSION)).astype(np.float32)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    with tempfile.TemporaryDirectory() as folder, one_core():
        path = Path(folder) / "cache.memdb"
        documents = [Document(str(number), f"text {number}") for number in range(count)]
        with MemDB.create(path, shape=stock.shape, dimension=_DIMENSION, codec=codec) as database:
            database.load([DocumentBatch(documents, embeddings, stock.memories)])
            database.recode(codec)
        size = sum(memory.nbytes for memory in stock.memories)
        rows = []
        for uses, asked in _uses(count, rng).items():
            for room in _ROOMS:
                with MemDB.open(path, cache_bytes=int(size * room)) as database:
                    rows.append(_row(database, uses, room, embeddings[asked]))
        return rows


def _uses(count: int, rng: np.random.Generator) -> dict[str, NDArray[np.int64]]:
    """Whose embedding each query is, by kind."""
    chances = 1 / np.arange(1.0, count + 1)
    topics = rng.integers(count, size=(2 * _TIMED // _TOPIC, 8))
    return {
        "even": rng.integers(count, size=2 * _TIMED),
        "skewed": rng.permutation(count)[rng.choice(count, 2 * _TIMED, p=chances / chances.sum())],
        "bursts": np.concatenate([rng.choice(topic, _TOPIC) for topic in topics]),
    }


def _row(database: MemDB, uses: str, room: float, queries: NDArray[np.float32]) -> CacheRow:
    """The first half of the queries fills the cache, the other is timed."""

    def retrieve(query: NDArray[np.float32]) -> None:
        pack(database.retrieve(query, RETRIEVED).stored, database.shape)

    for query in queries[:_TIMED]:
        retrieve(query)
    before, began = database.cache_stats(), time.perf_counter()
    for query in queries[_TIMED:]:
        retrieve(query)
    seconds, after = time.perf_counter() - began, database.cache_stats()
    looked = len(queries[_TIMED:]) * RETRIEVED
    found = (after.hits - before.hits) / looked
    return CacheRow(uses, room, found, 1000 * seconds / len(queries[_TIMED:]))
