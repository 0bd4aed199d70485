"""The read path: tokens -> query vector -> index -> ids -> store -> codec -> memories."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from memdb.errors import InvalidInputError
from memdb.filters.language import Filter
from memdb.filters.matching import Matcher
from memdb.index import Pinned, Searcher
from memdb.ingest.chunking import Chunker
from memdb.ingest.recording import unit_vectors
from memdb.keywords import Found, Keywords, Matched, depth, fused
from memdb.memories.attached import Attached
from memdb.memories.memory_store import MemoryStore, StoredMemory
from memdb.storage.record_layout import (
    METADATA,
    REFERENCES,
    integer_key,
    read_metadata,
    read_reference,
    unseal,
)
from memdb.storage.transaction import Transaction, decoded
from memdb.storage.usage import Usage
from memdb.types import arguments
from memdb.types.checks import check_text
from memdb.types.document import Reference
from memdb.types.memory import ExplicitMemory

#: What to look for: a text, token ids, or an embedding.
Query = str | Sequence[int] | NDArray[Any]
#: How to look: by the similarity of vectors, by words, or by both.
Mode = Literal["vector", "keyword", "hybrid"]
MODES = ("vector", "keyword", "hybrid")
#: Whether a reference may be a hit of the query of this number.
Accept = Callable[[int, Reference], bool]

_WIDER = 4  # each time that too few of the hits are accepted


class Hit:
    """One retrieved reference. Its records were read with it; each is checked and decoded when it
    is first asked for, and raises `CorruptRecordError` then if it is damaged.

    Attributes:
        id: of the reference.
        score: cosine similarity to the query; from an ANN index, to within 1e-3. Of a search by
            words alone: the keyword score.
        stored: its memory as it is stored; None if not asked for; or cold, and there is no writer,
            or nothing can be written for now.
        keyword_score: how well it has the query's words (BM25): 0 where it has none; None in a
            search by vectors alone.
    """

    def __init__(
        self,
        id: int,
        score: float,
        records: tuple[bytes, bytes],
        stored: StoredMemory | None = None,
        keyword_score: float | None = None,
    ) -> None:
        self.id = id
        self.score = score
        self.stored = stored
        self.keyword_score = keyword_score
        self._records = records  # of the reference and of its document's metadata

    def __repr__(self) -> str:
        return f"Hit(id={self.id}, score={self.score:.4f})"

    @cached_property
    def reference(self) -> Reference:
        """Id, version, document id, ordinal, tokens and text."""
        key = integer_key(self.id)
        found = unseal(REFERENCES, key, memoryview(self._records[0]))
        reference: Reference = decoded(
            REFERENCES,
            key,
            found,
            lambda version, payload: read_reference(self.id, version, payload),
        )
        return reference

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """Of its document."""
        key = self.reference.document_id.encode()
        found = unseal(METADATA, key, memoryview(self._records[1]))
        metadata: dict[str, Any] = decoded(METADATA, key, found, lambda _, p: read_metadata(p))
        return metadata

    @property
    def memory(self) -> ExplicitMemory | None:
        """Its memory, decoded; None where `stored` is."""
        return None if self.stored is None else self.stored.memory


@dataclass(frozen=True)
class Retrieval:
    """What one query found, best first.

    Attributes:
        query: the text that was looked for; None if an embedding was given.
        hits: at most k.
        written: how many of the hits' memories were written for this retrieval (cold start).
    """

    query: str | None
    hits: list[Hit] = field(default_factory=list)
    written: int = 0

    @property
    def stored(self) -> list[StoredMemory]:
        """The hits' memories as they are stored, for `memdb.pack`."""
        return [hit.stored for hit in self.hits if hit.stored is not None]

    @property
    def memories(self) -> list[ExplicitMemory]:
        """The hits' memories, decoded one by one."""
        return [stored.memory for stored in self.stored]


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
        k: int,
        memories: bool,
        where: Filter | None = None,
        pinned: AbstractContextManager[Pinned] | None = None,
        accept: Accept | None = None,
        mode: Mode = "vector",
    ) -> list[Retrieval]:
        """See `Readable.retrieve_batch`; in a state that is pinned, or in that of this moment."""
        if not isinstance(mode, str) or mode not in MODES:
            raise InvalidInputError(
                f"mode is {mode!r:.60}; there are 'vector', 'keyword' and 'hybrid'"
            )
        k = arguments.whole_number(k, "k", 1)
        if not isinstance(queries, np.ndarray) or queries.ndim == 0:
            queries = list(arguments.some(queries, "queries", "queries"))
        if len(queries) == 0:
            return []
        texts: list[str | None] = [self._text(query) for query in queries]
        if mode != "vector" and None in texts:
            raise InvalidInputError(
                f"an embedding has no words: give a text or tokens with mode={mode!r}, or use "
                "mode='vector'"
            )
        vectors = None if mode == "keyword" else self._vectors(queries, texts)
        with self._searcher.pin() if pinned is None else pinned as state:
            transaction = state.transaction
            k = min(k, max(1, transaction.count(REFERENCES)))
            allowed = None if where is None else self._matching(transaction, where)
            matched: list[Matched | None] = [None] * len(texts)
            if mode != "vector":
                matched = [self._matched(transaction, text, allowed) for text in texts]
            searches = [
                partial(
                    _search, state, None if vectors is None else vectors[n : n + 1], one, allowed
                )
                for n, one in enumerate(matched)
            ]
            if mode == "vector" and vectors is not None:
                scores, ids = state.search(vectors, k, allowed)
                rows = list(zip(ids.tolist(), scores.tolist(), strict=True))
            else:
                rows = [search(k) for search in searches]
            found = [(text, *row) for text, row in zip(texts, rows, strict=True)]
            if accept is not None:
                for n, (text, *nearest) in enumerate(found):
                    asked = partial(accept, n)
                    found[n] = text, *_accepted(transaction, searches[n], k, nearest, asked)
            # A reference that several queries find is read once.
            once = dict.fromkeys(number for _, numbers, _ in found for number in numbers)
            once.pop(-1, None)
            records, stored = self._read(transaction, list(once), memories)
            if memories:
                self._usage.count(records, transaction.generation)
        written: dict[int, StoredMemory] = {}
        if memories and self.cold_start:
            cold = [number for number, memory in stored.items() if memory is None]
            # Who compacts keeps writers out, for long: what is cold stays so until then.
            if cold and not self._memory_store.writers_are_kept_out():  # a cold start
                references = [Hit(number, 0.0, records[number]).reference for number in cold]
                written = self._memory_store.remember(references)
                stored.update(written)
        return [
            Retrieval(
                text,
                [
                    Hit(number, score, records[number], stored.get(number), worded)
                    for number, score, worded in zip(
                        numbers, row, _worded(one, numbers), strict=True
                    )
                    if number >= 0
                ],
                sum(number in written for number in numbers) if written else 0,
            )
            for (text, numbers, row), one in zip(found, matched, strict=True)
        ]

    def _matched(
        self, transaction: Transaction, text: str | None, allowed: NDArray[np.int64] | None
    ) -> Matched:
        return self._keywords.search(transaction, text or "", allowed)

    def _read(
        self, transaction: Transaction, numbers: list[int], memories: bool
    ) -> tuple[dict[int, tuple[bytes, bytes]], dict[int, StoredMemory | None]]:
        """By reference, its record and that of its document's metadata; and its memory, if these
        are asked for. Nothing is checked before somebody asks for it."""
        records: dict[int, tuple[bytes, bytes]] = {}
        stored: dict[int, StoredMemory | None] = {}
        wrapped = self._memory_store.wrapped
        for number in numbers:
            reference, metadata, memory = transaction.hit(number, memories)
            records[number] = reference, metadata
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
        if given.dtype == np.float32 and abs(float(given @ given) - 1) < 1e-5:
            return given[None]  # near enough to 1 for a score, and quick
        return unit_vectors(given[None], 1, self._dimension)


def _search(
    state: Pinned,
    vector: NDArray[np.float32] | None,
    matched: Matched | None,
    allowed: NDArray[np.int64] | None,
    k: int,
) -> Found:
    """Ids and scores of one query's k best, best first; fewer where there are fewer.

    Args:
        state: what to search in.
        vector: (1, dimension); None: search by words alone.
        matched: what has the query's words; None: search by vectors alone.
        allowed: ids that may be found, ascending; default: all.
        k: at least 1.
    """
    if matched is not None and vector is None:
        return matched.best(state.transaction, k)
    assert vector is not None
    scores, ids = state.search(vector, k if matched is None else depth(k), allowed)
    there = ids[0] >= 0
    near = ids[0][there].tolist(), scores[0][there].tolist()
    if matched is None:
        return near
    return fused(near, matched, state.transaction, vector[0], k)


def _worded(matched: Matched | None, numbers: list[int]) -> list[float | None]:
    """Keyword scores of hits."""
    return [None] * len(numbers) if matched is None else [*matched.scores_of(numbers)]


def _accepted(
    transaction: Transaction,
    search: Callable[[int], Found],
    k: int,
    nearest: Sequence[list[Any]],
    accept: Callable[[Reference], bool],
) -> Found:
    """Ids and scores of the k best that are accepted, best first; fewer where there are fewer.

    Each is asked about once, from the best on, until there are k. Searches are widened query by
    query: widened together they would hold all ids of the database for each query at once, where
    nothing is accepted.

    Args:
        transaction: the state that is searched.
        search: the best of so many.
        k: at least 1.
        nearest: ids and scores of the k best.
        accept: what to ask.
    """
    answers: dict[int, bool] = {}
    width = k
    while True:
        kept: list[tuple[int, float]] = []
        there = [hit for hit in zip(*nearest, strict=True) if hit[0] >= 0]
        for number, score in there:
            if number not in answers:
                answers[number] = bool(accept(transaction.reference(number)))
            if answers[number]:
                kept.append((number, score))
                if len(kept) == k:
                    break
        if len(kept) == k or len(there) < width:
            return [number for number, _ in kept], [score for _, score in kept]
        width *= _WIDER
        nearest = search(width)
