"""Which heads make a router, and how much it counts beside the embedder: fitted on text that is in
no test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.progress import track
from router_pass import Floats, Passes, Seen
from router_scores import KINDS, POOLED, Head, fitted, late, pooled, standard
from router_tuning import Query, Tuning, ranks

from model_adapter.evaluation.folder import digest

_NUMBERS = (1, 2, 4, 8)  # of heads, that are tried
_WEIGHTS = (0, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3)  # of a second score beside the first


@dataclass(frozen=True)
class Router:
    """Heads whose scores are added, each standardized over the references.

    Attributes:
        kind: of the scores.
        rows: the query heads, best first.
        heads: what text in general looks like to each.
        weight: of the sum beside the embedder's score, both standardized.
        mrr: on the text that it was fitted on, by heads and weight chosen on the other half of the
            queries: alone, and with the embedder.
    """

    kind: str
    rows: list[int]
    heads: list[Head]
    weight: float
    mrr: tuple[float, float]

    def scores(self, group: int, queries: Seen, keys: Seen) -> Floats:
        """(questions, references); `group`: query heads that share keys."""
        total = np.zeros((len(queries.starts), len(keys.starts)), np.float32)
        for row, head in zip(self.rows, self.heads, strict=True):
            given = queries.row(row), queries, keys.row(row // group), keys, head
            of = pooled(*given) if self.kind in POOLED else late(*given, [self.kind])
            total += standard(of[self.kind])
        return total


class Fit:
    """Everything that heads give on the tuning text.

    Args:
        passes: of the model.
        tuning: the text and its queries.
        folder: where scores are kept.
    """

    def __init__(self, passes: Passes, tuning: Tuning, folder: Path) -> None:
        model = passes.model
        self._tuning = tuning
        self._group = model.heads // model.kv_heads
        self._keys = passes.keys(tuning.texts)
        self._queries = passes.queries([query.text for query in tuning.queries])
        name = digest([model.fingerprint, tuning.texts, [query.text for query in tuning.queries]])
        file = folder / f"scores-{name}.npz"
        if not file.exists():
            rows = track(range(passes.layers * model.heads), "heads")
            each = [self._scores(row) for row in rows]
            half = file.with_suffix(".half.npz")
            stacked: dict[str, Any] = {
                kind: np.stack([one[kind] for one in each]) for kind in KINDS
            }
            np.savez(half, **stacked)
            half.rename(file)
        self._file = file

    def _head(self, row: int) -> Head:
        keys = self._keys.row(row // self._group)
        return fitted(self._queries.row(row), keys, self._keys)

    def _scores(self, row: int) -> dict[str, NDArray[np.float16]]:
        queries, keys = self._queries.row(row), self._keys.row(row // self._group)
        given = queries, self._queries, keys, self._keys, self._head(row)
        found = pooled(*given) | late(*given)
        return {kind: scores.astype(np.float16) for kind, scores in found.items()}

    def router(self, kind: str, embedded: Floats) -> Router:
        """The best heads by one kind of score; embedded: the embedder's, (queries, references)."""
        tuning = self._tuning
        with np.load(self._file) as file:
            scores = np.stack([standard(tuning.masked(one)) for one in file[kind]])
        number = max(_NUMBERS, key=lambda most: self._crossed(scores, most)[1])
        crossed, alone = self._crossed(scores, number)
        base = standard(tuning.masked(embedded))
        weight, both = best_weight(base, crossed, tuning)
        rows = best_heads(scores, tuning.owners, tuning.queries)[:number]
        return Router(kind, rows, [self._head(row) for row in rows], weight, (alone, both))

    def _crossed(self, scores: Floats, number: int) -> tuple[Floats, float]:
        """Sums of the heads that are best for the other half of the queries, and their MRR."""
        owners, queries = self._tuning.owners, self._tuning.queries
        total = np.empty(scores.shape[1:], np.float32)
        for mine, other in ((0, 1), (1, 0)):
            rows = best_heads(scores[:, other::2], owners, queries[other::2])[:number]
            total[mine::2] = scores[rows, mine::2].sum(0)
        return standard(total), mrr(ranks(total, owners, queries))


def best_heads(scores: Floats, owners: NDArray[np.int64], queries: Sequence[Query]) -> list[int]:
    """Heads by mean reciprocal rank; scores: (heads, queries, references)."""
    found = [mrr(ranks(one, owners, queries)) for one in scores]
    return sorted(range(len(found)), key=lambda head: -found[head])


def best_weight(base: Floats, other: Floats, tuning: Tuning) -> tuple[float, float]:
    """Of the other score, both standardized, and the MRR with it."""
    tried = {
        weight: mrr(ranks(base + weight * other, tuning.owners, tuning.queries))
        for weight in _WEIGHTS
    }
    weight = max(tried, key=lambda one: tried[one])
    return weight, tried[weight]


def mrr(places: NDArray[np.int64]) -> float:
    """Mean reciprocal rank."""
    return float((1 / places).mean())


def reciprocal(*scores: Floats) -> Floats:
    """Reciprocal rank fusion (Cormack et al., 2009)."""
    total = np.zeros(scores[0].shape, np.float32)
    for one in scores:
        places = np.argsort(np.argsort(-one, axis=1, kind="stable"), axis=1) + 1
        total += 1 / (60 + places)
    return total
