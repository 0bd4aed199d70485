"""Text that is in no test, and queries on it whose document is known: by them benchmarks/router.py
chooses heads and fits weights."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model_adapter import LanguageModel
from model_adapter.training.corpus import Corpus, read

_EACH = 80  # queries of a kind
_WORDS = 6  # of a sentence, at least


@dataclass(frozen=True)
class Query:
    """A text, and what it should find.

    Attributes:
        text: the query.
        document: the right one, by number.
        left_out: the reference that it was taken from, which it must not find.
    """

    text: str
    document: int
    left_out: int | None


@dataclass(frozen=True)
class Tuning:
    """References and queries.

    Attributes:
        texts: of the references.
        owners: number of each reference's document, ascending.
        queries: of both kinds.
    """

    texts: list[str]
    owners: NDArray[np.int64]
    queries: list[Query]

    def masked(self, scores: NDArray[Any]) -> NDArray[np.float32]:
        """Scores, (queries, references), where none is better than the worst at finding the
        reference that a query was taken from."""
        shown = scores.astype(np.float32)
        for row, query in enumerate(self.queries):
            if query.left_out is not None:
                shown[row, query.left_out] = shown[row].min()
        return shown


def ranks(
    scores: NDArray[np.float32], owners: NDArray[np.int64], queries: Sequence[Query]
) -> NDArray[np.int64]:
    """At which place each query's document is, from 1; scores: (queries, references)."""
    best = np.maximum.reduceat(scores, np.flatnonzero(np.diff(owners, prepend=-1)), axis=1)
    right = best[range(len(queries)), [query.document for query in queries]]
    places: NDArray[np.int64] = (best > right[:, None]).sum(1) + 1
    return places


def tuning(model: LanguageModel, path: Path) -> Tuning:
    """Of a corpus of dictionary entries, whose ids are a number and a term.

    A query asks what a term is, or is a sentence of a reference, which should find the others of
    its document.

    Args:
        model: by whose tokens references are cut.
        path: the corpus.
    """
    corpus = read(model, [path])
    where = {(r.document, r.ordinal): place for place, r in enumerate(corpus.references)}
    queries = [*_terms(corpus), *_sentences(corpus, where)]
    owners = np.array([reference.document for reference in corpus.references])
    assert len(set(owners.tolist())) == len(corpus.names)
    return Tuning([reference.text for reference in corpus.references], owners, queries)


def _terms(corpus: Corpus) -> list[Query]:
    terms = [
        Query(f"What is {name.split(' ', 1)[1]}?", number, None)
        for number, name in enumerate(corpus.names)
        if " " in name
    ]
    return _drawn(terms)


def _sentences(corpus: Corpus, where: dict[tuple[int, int], int]) -> list[Query]:
    found = []
    for reference in corpus.references:
        if len(corpus.documents[reference.document]) == 1:
            continue
        sentences = [
            sentence
            for sentence in re.split(r"(?<=[.?!])\s+", reference.text)
            if len(sentence.split()) >= _WORDS
        ]
        if sentences:
            drawn = random.Random(reference.text).choice(sentences)
            place = where[reference.document, reference.ordinal]
            found.append(Query(drawn, reference.document, place))
    return _drawn(found)


def _drawn(queries: list[Query]) -> list[Query]:
    return random.Random(0).sample(queries, min(_EACH, len(queries)))
