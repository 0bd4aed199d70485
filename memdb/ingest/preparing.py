"""Documents made ready to be written: cut, embedded and remembered, before any lock is taken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memdb.cutting.places import title_of
from memdb.ingest.chunking import Chunker
from memdb.ingest.recording import Prepared, prepared, unit_vectors
from memdb.memories.attached import Attached
from memdb.memories.memory_store import MemoryStore
from memdb.protocols import Progress, no_progress
from memdb.types import arguments
from memdb.types.document import Document
from memdb.types.memory import ExplicitMemory

_AT_ONCE = 64  # references that the embedder, and the writer, are given together


class Preparer:
    """Prepares the documents of one open database.

    Args:
        chunker: cuts them.
        attached: the embedder.
        memory_store: writes and encodes memories.
        dimension: of an embedding.
    """

    def __init__(
        self, chunker: Chunker, attached: Attached, memory_store: MemoryStore, dimension: int
    ) -> None:
        self._chunker = chunker
        self._attached = attached
        self._memory_store = memory_store
        self._dimension = dimension

    def are_placed_alike(self, one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
        """Whether references have the same places under these metadata of their document as under
        those."""
        return not self._memory_store.placing.is_on or title_of(one) == title_of(other)

    def prepare(
        self,
        named: Sequence[tuple[str, Document]],
        *,
        cold: bool = False,
        embeddings: NDArray[Any] | None = None,
        memories: Sequence[ExplicitMemory] | None = None,
        progress: Progress = no_progress,
    ) -> list[Prepared]:
        """Documents with their ids, ready to be written. Embeddings and memories that are not given
        are made, unless they are to stay cold.

        Args:
            named: ids and documents, checked.
            cold: write no memories.
            embeddings: (references, dimension), of all documents' references in order.
            memories: one for each of them.
            progress: told of the work.
        """
        cold = arguments.flag(cold, "cold")
        arguments.function(progress, "progress")
        codec = self._memory_store.codec_choice.codec.name
        pieces = [
            self._chunker.split(document.text, id=name, title=title_of(document.metadata))
            for name, document in named
        ]
        texts = [piece.placed for parts in pieces for piece in parts]
        vectors = self._vectors(texts, embeddings, progress)
        encoded = self._memories(texts, cold, memories, progress)
        ready = []
        at = 0
        for (name, document), parts in zip(named, pieces, strict=True):
            end = at + len(parts)
            own = None if encoded is None else encoded[at:end]
            ready.append(prepared(name, document, parts, vectors[at:end], own, codec=codec))
            at = end
        return ready

    def _vectors(
        self, texts: Sequence[str], given: NDArray[Any] | None, progress: Progress
    ) -> NDArray[np.float32]:
        if given is not None or not texts:
            empty = np.empty((0, self._dimension), np.float32)
            return unit_vectors(empty if given is None else given, len(texts), self._dimension)
        embedder = self._attached.embedder()
        rows = []
        for start in range(0, len(texts), _AT_ONCE):
            progress("embedding", start, len(texts))
            part = texts[start : start + _AT_ONCE]
            rows.append(unit_vectors(embedder.embed(part), len(part), self._dimension))
        progress("embedding", len(texts), len(texts))
        return np.concatenate(rows)

    def _memories(
        self,
        texts: Sequence[str],
        cold: bool,
        given: Sequence[ExplicitMemory] | None,
        progress: Progress,
    ) -> list[bytes] | None:
        store = self._memory_store
        if given is not None:
            return store.encode(given, len(texts))
        if cold or not store.can_write:
            return None
        encoded: list[bytes] = []
        for start in range(0, len(texts), _AT_ONCE):
            progress("writing memories", start, len(texts))
            part = texts[start : start + _AT_ONCE]
            encoded += store.encode(store.write(part), len(part))
        progress("writing memories", len(texts), len(texts))
        return encoded
