"""Search by words beside vectors, for benchmarks/engine.py: recall and time of each mode.

Each query asks for one reference: its vector is the reference's, moved at random, and its words are
some of the reference's and some that are not. So what is right is known at every size. Some queries
are harder than others, in both ways: moved further, with fewer of the words. Neither kind of search
finds all, so that it can be seen what both together find. How much that is of real questions,
`benchmarks/modes.py` measures.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from engine_data import DIMENSION, K, Vectors, reference_number

from memdb import MemDB, Mode, Progress

MODES: tuple[Mode, ...] = ("vector", "keyword", "hybrid")

_WORDS = 60  # of a reference
_KNOWN = 30_000  # words that there are
_STEEP = 1.0  # by how much a word is rarer than the one before it (Zipf)
_OWN = 1, 7  # words of a query that its reference has, of the hardest and the easiest
_OTHER = 4  # that are drawn
_MOVED = 5.0, 1.0  # length of what a query's vector is moved by, likewise


@dataclass
class ModeRow:
    """What searches of one mode did; time in ms."""

    mode: str
    p50: float
    recall: float


class Texts:
    """The references' texts, and the queries: the same each time.

    As an embedder it knows the queries alone.

    Attributes:
        queries: their texts.
        asked: (queries,) which reference each asks for.
    """

    name = fingerprint = "drawn"
    dimension = DIMENSION

    def __init__(self, vectors: Vectors, queries: int) -> None:
        random = np.random.default_rng(7)
        weights = np.arange(1, _KNOWN + 1) ** -_STEEP
        self._bounds = np.cumsum(weights / weights.sum())
        self.asked = random.integers(0, len(vectors), queries)
        ease = random.random(queries, np.float32)
        own = np.rint(np.interp(ease, (0, 1), _OWN)).astype(np.int64)
        self.queries = [
            " ".join(
                [
                    *random.choice(self.text(number).split(), count, replace=False),
                    *self._words(random, _OTHER),
                ]
            )
            for number, count in zip(self.asked.tolist(), own.tolist(), strict=True)
        ]
        moved = random.standard_normal((queries, DIMENSION), np.float32)
        far = np.interp(ease, (0, 1), _MOVED)[:, None].astype(np.float32)
        moved *= far / np.linalg.norm(moved, axis=1, keepdims=True)
        moved += vectors[self.asked]
        moved /= np.linalg.norm(moved, axis=1, keepdims=True)
        self._vectors = dict(zip(self.queries, moved, strict=True))

    def text(self, number: int) -> str:
        """Of a reference."""
        return " ".join(self._words(np.random.default_rng([8, number]), _WORDS))

    def embed(self, texts: Sequence[str], *, query: bool = False) -> Vectors:
        return np.stack([self._vectors[text] for text in texts])

    def _words(self, random: np.random.Generator, count: int) -> list[str]:
        drawn = np.searchsorted(self._bounds, random.random(count)).clip(max=_KNOWN - 1)
        return [f"w{word}" for word in drawn.tolist()]


def measure(db: MemDB, texts: Texts, progress: Progress) -> list[ModeRow]:
    """The rows, of a database that holds these texts. Words are indexed before anything is
    timed."""
    db.build_keywords(progress=progress)
    rows = []
    for done, mode in enumerate(MODES):
        progress("search by words and vectors", done, len(MODES))
        db.query(texts.queries[0], K, mode=mode)
        times, found = [], 0
        for text, asked in zip(texts.queries, texts.asked.tolist(), strict=True):
            began = time.perf_counter()
            hits = db.query(text, K, mode=mode).hits
            times.append(time.perf_counter() - began)
            found += asked in [reference_number(hit.reference.document_id) for hit in hits]
        rows.append(ModeRow(mode, float(np.median(times)) * 1e3, found / len(times)))
    return rows
