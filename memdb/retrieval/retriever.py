"""Retrieval in one open database: query vector -> index -> ids -> store -> codec -> memories."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from itertools import repeat
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memdb.errors import InvalidInputError
from memdb.filters.matching import Matcher
from memdb.index import Pinned, Searcher
from memdb.ingest.chunking import Chunker
from memdb.ingest.recording import unit_vectors
from memdb.keywords import Keywords, Matched, depth, fused
from memdb.memories.attached import Attached
from memdb.memories.memory_store import MemoryStore, StoredMemory
from memdb.retrieval.exact import search_exactly
from memdb.retrieval.hits import Hit, Retrieval
from memdb.retrieval.picking import Found, diverse, near_enough, permitted, reranked
from memdb.retrieval.wanted import Wanted
from memdb.storage.record_layout import REFERENCES
from memdb.storage.transaction import Transaction
from memdb.storage.usage import Usage
from memdb.types import arguments
from memdb.types.checks import check_text, is_id

#: What to look for: a text, token ids, or an embedding.
Query = str | Sequence[int] | NDArray[Any]

_MANY = 1000  # hits
_NOT_ASKED = repeat(None)  # keyword scores of a search without words


class Retriever:
    """Retrieval in one open database.

    Attributes:
        cold_start: whether the memories of cold references are written when they are retrieved.
    """

    def __init__(
        self,
        searcher: Searcher,
        chunker: Chunker,
        attached: Attached,
        memory_store: MemoryStore,
        usage: Usage,
        dimension: int,
        keywords: Keywords,
    ) -> None:
        self._searcher = searcher
        self._chunker = chunker
        self._attached = attached
        self._memory_store = memory_store
        self._usage = usage
        self._dimension = dimension
        self._keywords = keywords
        self._matching = Matcher()
        self.cold_start = memory_store.can_write

    def retrieve(
        self,
        queries: Sequence[Query],
        wanted: Wanted,
        pinned: AbstractContextManager[Pinned] | None = None,
    ) -> list[Retrieval]:
        """See `Readable.retrieve_batch`; in a state that is pinned, or in that of this moment."""
        if not isinstance(queries, np.ndarray) or queries.ndim == 0:
            queries = list(arguments.some(queries, "queries", "queries"))
        if len(queries) == 0:
            return []
        texts: list[str | None] = [self._text(query) for query in queries]
        if wanted.mode != "vector" and None in texts:
            raise InvalidInputError(
                f"an embedding has no words: give a text or tokens with mode={wanted.mode!r}, or "
                "use mode='vector'"
            )
        vectors = None if wanted.mode == "keyword" else self._vectors(queries, texts)
        with self._searcher.pin() if pinned is None else pinned as state:
            transaction = state.transaction
            found, matched = self._found(state, vectors, texts, wanted)
            numbers = found[0][0]
            if len(found) > 1:  # a reference that several queries find is read once
                numbers = list(dict.fromkeys(number for near, _ in found for number in near))
            records, stored = self._read(transaction, numbers, wanted.memories)
            if wanted.memories:
                self._usage.count(records, transaction.generation)
        written: dict[int, StoredMemory] = {}
        if wanted.memories and self.cold_start:
            cold = [number for number, memory in stored.items() if memory is None]
            # Who compacts keeps writers out, for long: what is cold stays so until then.
            if cold and not self._memory_store.writers_are_kept_out():  # a cold start
                references = [Hit(number, 0.0, records[number]).reference for number in cold]
                written = self._memory_store.remember(references)
                stored.update(written)
        retrievals = []
        for text, (numbers, scores), words in zip(texts, found, matched, strict=True):
            worded = _NOT_ASKED if words is None else words.scores_of(numbers)
            hits = [
                Hit(number, score, records[number], stored.get(number), keyword_score)
                for number, score, keyword_score in zip(numbers, scores, worded, strict=False)
            ]
            fresh = sum(number in written for number in numbers) if written else 0
            retrievals.append(Retrieval(text, hits, fresh))
        return retrievals

    def _found(
        self,
        state: Pinned,
        vectors: NDArray[np.float32] | None,
        texts: Sequence[str | None],
        wanted: Wanted,
    ) -> tuple[list[Found], list[Matched | None]]:
        """Ids and scores of each query's hits, best first; and what has its words."""
        transaction = state.transaction
        where = wanted.where
        k = wanted.pool
        if k > _MANY:  # room is made for all k, however few there are
            k = min(k, max(1, transaction.count(REFERENCES)))
        allowed = None if where is None else self._matching(transaction, where)
        excluded = _references(transaction, wanted.exclude) if wanted.exclude else set()
        if excluded and allowed is not None:
            allowed = np.setdiff1d(allowed, np.array(sorted(excluded)), assume_unique=True)
            excluded = set()
        compare = partial(search_exactly, state) if wanted.exact else state.search
        matched: list[Matched | None] = [None] * len(texts)
        if wanted.mode != "vector":
            matched = [self._keywords.search(transaction, text or "", allowed) for text in texts]

        def search(n: int, width: int) -> Found:
            """The best of one query, by what is asked for."""
            words = matched[n]
            if vectors is None:
                return ([], []) if words is None else words.best(transaction, width)
            vector = vectors[n : n + 1]
            scores, ids = compare(vector, width if words is None else depth(width), allowed)
            there = ids[0] >= 0
            near = ids[0][there].tolist(), scores[0][there].tolist()
            return near if words is None else fused(near, words, transaction, vector[0], width)

        if wanted.mode == "vector" and vectors is not None:
            rows, ids = compare(vectors, k, allowed)
            found: list[Found] = list(zip(ids.tolist(), rows.tolist(), strict=True))
        else:
            found = [search(n, k) for n in range(len(texts))]
        # By both kinds, hits do not come in the order of their scores: then the least score is
        # looked at last.
        least = None if wanted.mode == "hybrid" else wanted.min_score
        for n, near in enumerate(found):
            if excluded or wanted.accept is not None:
                may = partial(_may, transaction, excluded, wanted, n)
                near = permitted(near, k, least, partial(search, n), may)
            near = near_enough(near, wanted.min_score)
            if wanted.diversity is not None and near[0]:
                near = diverse(near, transaction.embeddings_of(near[0]), wanted.k, wanted.diversity)
            elif wanted.rerank is not None:
                read = transaction.hits(near[0], False)
                hits = [
                    Hit(number, score, records)
                    for (number, records, _), score in zip(read, near[1], strict=True)
                ]
                near = reranked(hits, texts[n], wanted.rerank, wanted.k)
            found[n] = near
        return found, matched

    def _read(
        self, transaction: Transaction, numbers: Iterable[int], memories: bool
    ) -> tuple[dict[int, tuple[bytes, bytes]], dict[int, StoredMemory | None]]:
        """By reference, its record and that of its document's metadata; and its memory, if these
        are asked for. Nothing is checked before somebody asks for it."""
        records: dict[int, tuple[bytes, bytes]] = {}
        stored: dict[int, StoredMemory | None] = {}
        wrapped = self._memory_store.wrapped
        for number, found, memory in transaction.hits(numbers, memories):
            records[number] = found
            if memories:
                stored[number] = None if memory is None else wrapped(number, memory)
        return records, stored

    def _text(self, query: Query) -> str | None:
        """What a query says; None: it is an embedding."""
        if isinstance(query, np.ndarray) and query.dtype.kind == "f" and query.size:
            return None
        if not isinstance(query, str):
            if isinstance(query, (list, tuple)) and {bool, int} <= set(map(type, query)):
                raise InvalidInputError("token ids are whole numbers, and some here are booleans")
            try:
                tokens = np.asarray(query)
            except ValueError as error:
                raise InvalidInputError(f"a query is not one row of numbers: {error}") from error
            if tokens.size and tokens.dtype.kind == "f":
                return None
            if tokens.ndim != 1 or not (tokens.size == 0 or tokens.dtype.kind in "iu"):
                raise InvalidInputError(
                    "a query is a text, a sequence of token ids or an embedding; got "
                    f"{tokens.dtype} of shape {tokens.shape}"
                )
            query = self._chunker.decode(tokens.tolist())
        if not query.strip():
            raise InvalidInputError("the query is empty: there is nothing to look for")
        check_text(query)
        return query

    def _vectors(
        self, queries: Sequence[Query], texts: Sequence[str | None]
    ) -> NDArray[np.float32]:
        """(queries, dimension); all texts are embedded together."""
        if len(queries) == 1 and texts[0] is None:
            return self._vector(queries[0])
        vectors = np.empty((len(queries), self._dimension), np.float32)
        for row, query in enumerate(queries):
            if texts[row] is None:
                vectors[row] = self._vector(query)[0]
        worded = {row: text for row, text in enumerate(texts) if text is not None}
        if worded:
            embedded = self._attached.embedder().embed(list(worded.values()), query=True)
            vectors[list(worded)] = unit_vectors(embedded, len(worded), self._dimension)
        return vectors

    def embedding(self, given: object) -> NDArray[np.float32]:
        """A query that is an embedding, whatever its dtype: (dimension,), of length 1."""
        try:
            numbers = np.asarray(given)
        except ValueError as error:
            raise InvalidInputError(f"an embedding is one row of numbers: {error}") from error
        if numbers.dtype.kind not in "fiu":
            raise InvalidInputError(
                f"an embedding has real numbers, got {numbers.dtype} of shape {numbers.shape}"
            )
        row: NDArray[np.float32] = self._vector(numbers)[0]
        return row

    def _vector(self, query: Query) -> NDArray[np.float32]:
        """An embedding as (1, dimension) of length 1."""
        given = query if isinstance(query, np.ndarray) else np.asarray(query)
        if given.shape != (self._dimension,):
            raise InvalidInputError(
                f"an embedding must have shape ({self._dimension},), got {given.shape}"
            )
        if given.dtype == np.float32 and abs(float(given.dot(given)) - 1) < 1e-5:
            return given[None]  # near enough to 1 for a score, and quick
        return unit_vectors(given[None], 1, self._dimension)


def _may(
    transaction: Transaction, excluded: set[int], wanted: Wanted, query: int, number: int
) -> bool:
    """Whether a reference may be a hit of a query."""
    if number in excluded:
        return False
    return wanted.accept is None or wanted.accept(query, transaction.reference(number))


def _references(transaction: Transaction, names: Sequence[str]) -> set[int]:
    """Those of the documents that are there."""
    found: set[int] = set()
    for name in names:
        entry = transaction.document(name) if is_id(name) else None
        if entry is not None:
            found.update(entry.references)
    return found
