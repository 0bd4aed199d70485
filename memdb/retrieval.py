"""The read path: tokens -> query vector -> index -> ids -> store -> codec -> memories."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import lmdb
import numpy as np
from numpy.typing import NDArray

from memdb.canonical import read_json
from memdb.chunking import Chunker
from memdb.documents import check_text
from memdb.errors import InvalidInputError
from memdb.filters import Filter
from memdb.index import Pinned, Searcher
from memdb.layout import METADATA, REFERENCES, integer_key, read_owner, read_reference, unseal
from memdb.matching import Matcher
from memdb.parts import Parts
from memdb.records import ExplicitMemory, Reference
from memdb.remembering import Rememberer, StoredMemory
from memdb.transaction import Transaction, decoded
from memdb.usage import Usage
from memdb.writing import unit_vectors

#: What to look for: a text, token ids, or an embedding.
Query = str | Sequence[int] | NDArray[Any]


class Hit:
    """One retrieved reference. Its records were read with it; each is checked and decoded when it
    is first asked for, and raises `CorruptRecordError` then if it is damaged.

    Attributes:
        id: of the reference.
        score: cosine similarity to the query; from an ANN index, to within 1e-3.
        stored: its memory as it is stored; None if not asked for, or cold without a writer.
    """

    def __init__(
        self,
        id: int,
        score: float,
        reference: bytes,
        metadata: bytes,
        stored: StoredMemory | None = None,
    ) -> None:
        self.id = id
        self.score = score
        self.stored = stored
        self._reference = reference
        self._metadata = metadata

    def __repr__(self) -> str:
        return f"Hit(id={self.id}, score={self.score:.4f})"

    @cached_property
    def reference(self) -> Reference:
        """Id, version, document id, ordinal, tokens and text."""
        key = integer_key(self.id)
        found = unseal(REFERENCES, key, memoryview(self._reference))
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
        found = unseal(METADATA, key, memoryview(self._metadata))
        metadata: dict[str, Any] = decoded(METADATA, key, found, lambda _, p: read_json(p))
        return metadata

    @property
    def memory(self) -> ExplicitMemory | None:
        """Its memory, decoded and ready for `memdb.pack`; None where `stored` is."""
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
    def memories(self) -> list[ExplicitMemory]:
        """The hits' memories, for `memdb.pack`."""
        return [hit.memory for hit in self.hits if hit.memory is not None]


class Retriever:
    """Retrieval in one open database.

    Attributes:
        cold_start: whether the memories of cold references are written when they are retrieved.
    """

    def __init__(
        self,
        searcher: Searcher,
        chunker: Chunker,
        parts: Parts,
        rememberer: Rememberer,
        usage: Usage,
        dimension: int,
    ) -> None:
        self._searcher = searcher
        self._chunker = chunker
        self._parts = parts
        self._rememberer = rememberer
        self._usage = usage
        self._dimension = dimension
        self._matching = Matcher()
        self.cold_start = rememberer.can_write

    def retrieve(
        self,
        queries: Sequence[Query],
        k: int,
        memories: bool,
        where: Filter | None = None,
        pinned: Pinned | None = None,
    ) -> list[Retrieval]:
        """See `MemDB.retrieve_batch`; in a state that is pinned, or in that of this moment."""
        if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1:
            raise InvalidInputError(f"k must be a whole number of at least 1, got {k!r}")
        if len(queries) == 0:
            return []
        texts = [self._text(query) for query in queries]
        vectors = self._vectors(queries, texts)
        with self._searcher.pin() if pinned is None else nullcontext(pinned) as state:
            transaction = state.transaction
            allowed = None if where is None else self._matching(transaction, where)
            scores, ids = state.search(vectors, int(k), allowed)
            rows = [
                [(number, score) for number, score in zip(*row, strict=True) if number >= 0]
                for row in zip(ids.tolist(), scores.tolist(), strict=True)
            ]
            # A reference that several queries find is read once.
            numbers = list({number: None for row in rows for number, _ in row})
            records = {number: _records(transaction, number) for number in numbers}
            stored: dict[int, StoredMemory | None] = dict.fromkeys(numbers)
            if memories:
                for number in numbers:
                    stored[number] = self._rememberer.stored(transaction, number)
                self._usage.count(numbers, self._searcher.folder(transaction))
        written: dict[int, StoredMemory] = {}
        if memories and self.cold_start:
            cold = [number for number, memory in stored.items() if memory is None]
            if cold:  # a cold start
                references = [Hit(number, 0.0, *records[number]).reference for number in cold]
                written = self._rememberer.remember(references)
                stored.update(written)
        return [
            Retrieval(
                text,
                [Hit(number, score, *records[number], stored[number]) for number, score in row],
                sum(number in written for number, _ in row) if written else 0,
            )
            for text, row in zip(texts, rows, strict=True)
        ]

    def _text(self, query: Query) -> str | None:
        """What a query says; None: it is an embedding."""
        if not isinstance(query, str):
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


def _records(transaction: Transaction, number: int) -> tuple[bytes, bytes]:
    """The records of a reference and of its document's metadata, as they are."""
    key = integer_key(number)
    record = transaction.record(REFERENCES, key)
    if record is not None:
        reference = bytes(record)
        with suppress(struct.error, lmdb.Error):  # of an owner that no document can be
            metadata = transaction.record(METADATA, read_owner(reference[16:]))
            if metadata is not None:
                return reference, bytes(metadata)
    # One is missing, or the first says something wrong: this finds out which.
    owner = transaction.reference(number).document_id
    return reference, transaction.payload(METADATA, owner.encode())
