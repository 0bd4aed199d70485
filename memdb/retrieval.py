"""The read path: tokens -> query vector -> index -> ids -> store -> codec -> memories."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memdb.chunking import Chunker
from memdb.documents import check_text
from memdb.errors import InvalidInputError
from memdb.parts import Parts
from memdb.records import ExplicitMemory, Reference
from memdb.remembering import Rememberer
from memdb.search import Searcher
from memdb.transaction import Transaction
from memdb.writing import unit_vectors

#: What to look for: a text, token ids, or an embedding.
Query = str | Sequence[int] | NDArray[Any]


@dataclass(frozen=True)
class Hit:
    """One retrieved reference.

    Attributes:
        reference: id, version, document id, ordinal, tokens and text.
        score: cosine similarity to the query.
        metadata: of its document.
        memory: decoded and ready for `memdb.pack`; None if not asked for, or cold without a writer.
    """

    reference: Reference
    score: float
    metadata: dict[str, Any]
    memory: ExplicitMemory | None = None


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
    def memories(self) -> list[ExplicitMemory]:
        """The hits' memories, for `memdb.pack`."""
        return [hit.memory for hit in self.hits if hit.memory is not None]


class Retriever:
    """Retrieval in one open database."""

    def __init__(
        self,
        searcher: Searcher,
        chunker: Chunker,
        parts: Parts,
        rememberer: Rememberer,
        dimension: int,
    ) -> None:
        self._searcher = searcher
        self._chunker = chunker
        self._parts = parts
        self._rememberer = rememberer
        self._dimension = dimension

    def retrieve(self, queries: Sequence[Query], k: int, memories: bool) -> list[Retrieval]:
        """See `MemDB.retrieve_batch`."""
        if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1:
            raise InvalidInputError(f"k must be a whole number of at least 1, got {k!r}")
        if len(queries) == 0:
            return []
        texts = [self._text(query) for query in queries]
        vectors = self._vectors(queries, texts)
        # A reference that several queries find is decoded once.
        decoded: dict[int, ExplicitMemory | None] = {}
        results = []
        with self._searcher.search(vectors, int(k)) as (transaction, scores, ids):
            for row, text in enumerate(texts):
                hits = [
                    self._hit(transaction, int(number), float(score))
                    for number, score in zip(ids[row], scores[row], strict=True)
                    if number >= 0
                ]
                results.append(Retrieval(text, hits))
            if memories:
                for number in np.unique(ids[ids >= 0]).tolist():
                    decoded[number] = self._rememberer.read(transaction, number)
        return self._with_memories(results, decoded) if memories else results

    def _text(self, query: Query) -> str | None:
        """What a query says; None: it is an embedding."""
        if not isinstance(query, str):
            try:
                tokens = np.asarray(query)
            except ValueError as error:
                raise InvalidInputError(f"a query is not one row of numbers: {error}") from error
            if tokens.size and np.issubdtype(tokens.dtype, np.floating):
                return None
            if tokens.ndim != 1 or not (
                tokens.size == 0 or np.issubdtype(tokens.dtype, np.integer)
            ):
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
        vectors = np.empty((len(queries), self._dimension), np.float32)
        for row, query in enumerate(queries):
            if texts[row] is None:
                given = np.asarray(query)
                if given.shape != (self._dimension,):
                    raise InvalidInputError(
                        f"an embedding must have shape ({self._dimension},), got {given.shape}"
                    )
                vectors[row] = unit_vectors(given[None], 1, self._dimension)[0]
        worded = {row: text for row, text in enumerate(texts) if text is not None}
        if worded:
            embedded = self._parts.embedder().embed(list(worded.values()), query=True)
            vectors[list(worded)] = unit_vectors(embedded, len(worded), self._dimension)
        return vectors

    @staticmethod
    def _hit(transaction: Transaction, number: int, score: float) -> Hit:
        reference = transaction.reference(number)
        return Hit(reference, score, transaction.metadata(reference.document_id))

    def _with_memories(
        self, results: list[Retrieval], decoded: dict[int, ExplicitMemory | None]
    ) -> list[Retrieval]:
        """The retrievals with their memories; those of cold references are written (cold start)."""
        references = {hit.reference.id: hit.reference for r in results for hit in r.hits}
        cold = [references[number] for number, memory in decoded.items() if memory is None]
        written = self._rememberer.remember(cold) if self._rememberer.can_write else {}
        memories = {**decoded, **written}
        return [
            replace(
                result,
                hits=[replace(hit, memory=memories[hit.reference.id]) for hit in result.hits],
                written=sum(hit.reference.id in written for hit in result.hits),
            )
            for result in results
        ]
