"""How heads score references: all tokens' keys against all tokens' queries, or one key each."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from router_pass import Floats, Seen

#: Kinds of scores by all tokens' keys, and by one key for each reference.
LATE = ("late", "late, long", "late, dot")
POOLED = ("pooled", "pooled, dot", "pooled, by value", "pooled, white")
KINDS = (*LATE, *POOLED)

_SMALL = 1e-6


@dataclass(frozen=True)
class Head:
    """What text in general looks like to one query head: fitted on text that is in no test.

    Attributes:
        query: the mean of all queries, (head_dim,).
        key: of all keys, (head_dim,).
        pooled: of the references' mean keys, by kind, (head_dim,).
        whiten: what makes mean keys white, (head_dim, head_dim).
    """

    query: Floats
    key: Floats
    pooled: dict[str, Floats]
    whiten: Floats


def unit(vectors: Floats) -> Floats:
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    units: Floats = vectors / np.maximum(norms, _SMALL)
    return units


def means(vectors: Floats, seen: Seen, weights: Floats | None = None) -> Floats:
    """Of each text, (texts, head_dim)."""
    ones = np.ones(len(vectors), np.float32) if weights is None else weights
    order = np.argsort(seen.starts)
    begins = seen.starts[order]
    out = np.empty((len(order), vectors.shape[1]), np.float32)
    out[order] = np.add.reduceat(vectors * ones[:, None], begins) / np.maximum(
        np.add.reduceat(ones, begins)[:, None], _SMALL
    )
    return out


def fitted(queries: Floats, keys: Floats, seen: Seen) -> Head:
    """Of queries and keys of one head, (tokens, head_dim + 1)."""
    plain, sizes = keys[:, :-1], keys[:, -1]
    mean = means(plain, seen)
    values, vectors = np.linalg.eigh(np.cov(mean.T))
    # What hardly varies is noise: it is not blown up beyond a tenth of the usual.
    values = np.maximum(values, values.mean() / 10)
    whiten = (vectors / np.sqrt(values)) @ vectors.T
    pooled = {"mean": mean.mean(0), "by value": means(plain, seen, sizes).mean(0)}
    return Head(queries[:, :-1].mean(0), plain.mean(0), pooled, whiten.astype(np.float32))


def late(
    queries: Floats,
    asked: Seen,
    keys: Floats,
    seen: Seen,
    head: Head,
    kinds: Collection[str] = LATE,
) -> dict[str, Floats]:
    """Each query token's best key, the mean over the question: (questions, references) by kind.

    `late`: cosines, all of the same weight; `late, long`: the longer queries weigh more;
    `late, dot`: products, as in attention.
    """
    centred = keys[:, :-1] - head.key
    order = np.argsort(seen.starts)
    begins = seen.starts[order]
    found: dict[str, Floats] = {}
    for kind, matrix in (("late", unit(centred)), ("late, dot", centred)):
        if not {kind, "late, long" if kind == "late" else kind} & set(kinds):
            continue
        across = np.ascontiguousarray(matrix.T)
        rows: dict[str, list[Floats]] = {}
        for at, count in zip(asked.starts, asked.counts, strict=True):
            query = queries[at : at + count, :-1] - head.query
            best = np.maximum.reduceat(query @ across, begins, axis=1)
            if kind == "late":
                sizes = np.maximum(np.linalg.norm(query, axis=1, keepdims=True), _SMALL)
                rows.setdefault("late", []).append((best / sizes).mean(0))
                rows.setdefault("late, long", []).append(best.mean(0))
            else:
                rows.setdefault(kind, []).append(best.mean(0))
        for name, each in rows.items():
            found[name] = np.empty((len(each), len(order)), np.float32)
            found[name][:, order] = np.stack(each)
    return found


def pooled(queries: Floats, asked: Seen, keys: Floats, seen: Seen, head: Head) -> dict[str, Floats]:
    """One key for each reference: (questions, references) by kind."""
    query: Floats = means(queries[:, :-1], asked) - head.query
    plain, sizes = keys[:, :-1], keys[:, -1]
    mean: Floats = means(plain, seen) - head.pooled["mean"]
    valued: Floats = means(plain, seen, sizes) - head.pooled["by value"]
    return {
        "pooled, dot": query @ mean.T,
        "pooled": unit(query) @ unit(mean).T,
        "pooled, by value": unit(query) @ unit(valued).T,
        "pooled, white": unit(query @ head.whiten) @ unit(mean @ head.whiten).T,
    }


def standard(scores: Floats) -> Floats:
    """Of each question, over the references: mean 0, deviation 1."""
    centred = scores - scores.mean(-1, keepdims=True)
    units: Floats = centred / np.maximum(scores.std(-1, keepdims=True), _SMALL)
    return units
