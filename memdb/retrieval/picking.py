"""Which of what is near become hits: those that may, those that differ, those that a reranker
prefers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memdb.errors import InvalidInputError
from memdb.retrieval.hits import Hit
from memdb.retrieval.wanted import Rerank

#: Ids and scores, best first.
Found = tuple[list[int], list[float]]

_WIDER = 4  # each time that too few of those that are near may be hits


def near_enough(found: Found, least: float | None) -> Found:
    """Those that are there, with at least this score."""
    if least is None:
        if found[0] and found[0][-1] >= 0:  # those that are missing come last
            return found
        least = -math.inf
    kept = [
        (number, score)
        for number, score in zip(*found, strict=True)
        if number >= 0 and score >= least
    ]
    return [number for number, _ in kept], [score for _, score in kept]


def permitted(
    found: Found,
    k: int,
    least: float | None,
    search: Callable[[int], Found],
    may: Callable[[int], bool],
) -> Found:
    """The k nearest that may be hits, best first; fewer where there are fewer.

    Each is asked about once, from the nearest on, until there are k. Searches are widened query by
    query: widened together they would hold all ids of the database for each query at once, where
    nothing is permitted.

    Args:
        found: the k nearest.
        k: at least 1.
        least: the least score.
        search: the nearest, of any number.
        may: what to ask.
    """
    answers: dict[int, bool] = {}
    width = k
    while True:
        there = near_enough(found, least)
        numbers: list[int] = []
        scores: list[float] = []
        for number, score in zip(*there, strict=True):
            if number not in answers:
                answers[number] = bool(may(number))
            if answers[number]:
                numbers.append(number)
                scores.append(score)
                if len(numbers) == k:
                    return numbers, scores
        if len(there[0]) < width:
            return numbers, scores
        width *= _WIDER
        found = search(width)


def diverse(found: Found, vectors: NDArray[np.float32], k: int, diversity: float) -> Found:
    """k of the candidates, which are near and differ, in the order in which they are chosen:
    Maximal Marginal Relevance (Carbonell and Goldstein, SIGIR 1998, section 2). With S chosen so
    far, the next is the candidate d for which this is largest:

        (1 - diversity) * score(d)  -  diversity * max over s in S of cos(d, s)

    Their lambda is 1 - diversity. The first is always the nearest.

    Args:
        found: candidates, best first.
        vectors: theirs, (candidates, dimension), each of length 1.
        k: at least 1.
        diversity: 0 to 1.
    """
    numbers, scores = found
    relevance = (1 - diversity) * np.array(scores, np.float64)
    likeness = np.full(len(numbers), -np.inf)
    chosen: list[int] = []
    worth = relevance
    while len(chosen) < min(k, len(numbers)):
        worth[chosen] = -np.inf
        chosen.append(int(worth.argmax()) if chosen else 0)
        likeness = np.maximum(likeness, vectors @ vectors[chosen[-1]])
        worth = relevance - diversity * likeness
    return [numbers[place] for place in chosen], [scores[place] for place in chosen]


def reranked(hits: list[Hit], query: str | None, rerank: Rerank, k: int) -> Found:
    """The k best of some hits by a reranker.

    Raises:
        InvalidInputError: it gave neither a finite number for each hit nor hits of these.
    """
    if not hits:
        return [], []
    given: Any = rerank(query, list(hits))
    ranked = _ordered(hits, given) if _is_hits(given) else _scored(hits, given)
    return [hit.id for hit in ranked[:k]], [hit.score for hit in ranked[:k]]


def _is_hits(given: Any) -> bool:
    return isinstance(given, (list, tuple)) and all(isinstance(one, Hit) for one in given)


def _ordered(hits: list[Hit], given: Sequence[Hit]) -> Sequence[Hit]:
    numbers = [hit.id for hit in given]
    if len(set(numbers)) < len(numbers) or not set(numbers) <= {hit.id for hit in hits}:
        raise InvalidInputError("a reranker gave a hit twice, or one that it was not given")
    return given


def _scored(hits: list[Hit], given: Any) -> list[Hit]:
    try:
        scores = np.asarray(given, np.float64)
    except (TypeError, ValueError):
        scores = np.empty(0)
    if scores.shape != (len(hits),) or not np.isfinite(scores).all():
        raise InvalidInputError(
            f"a reranker gives a finite number for each of the {len(hits)} hits, or a list of "
            f"them; it gave {given!r:.80}"
        )
    order = np.argsort(-scores, kind="stable").tolist()
    return [Hit(hits[place].id, float(scores[place]), hits[place]._records) for place in order]
