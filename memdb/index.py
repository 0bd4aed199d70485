"""The index: query vector -> reference ids. Derived from the store, never the other way round."""

from __future__ import annotations

from typing import Protocol

import faiss
import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Vectors = NDArray[np.float32]


class Index(Protocol):
    """Nearest vectors by inner product. Not thread-safe; the database guards it."""

    def add(self, ids: Ids, vectors: Vectors) -> None:
        """Add (n,) ids with their (n, dimension) vectors; the ids are new."""

    def remove(self, ids: Ids) -> None:
        """Remove ids; unknown ones are passed over."""

    def search(self, queries: Vectors, k: int) -> tuple[Vectors, Ids]:
        """Scores and ids, each (queries, k), best first; -1 where there are fewer than k."""

    def __len__(self) -> int:
        """Vectors in the index."""


class FlatIndex:
    """Exact search over all vectors (FAISS IndexFlatIP): recall 1, time linear in their number.

    With vectors of length 1, as embedders give them, the inner product is the cosine similarity.
    """

    def __init__(self, dimension: int) -> None:
        self._index = faiss.IndexIDMap2(faiss.IndexFlatIP(dimension))

    def add(self, ids: Ids, vectors: Vectors) -> None:
        """See `Index.add`."""
        self._index.add_with_ids(np.ascontiguousarray(vectors, np.float32), ids)

    def remove(self, ids: Ids) -> None:
        """See `Index.remove`. One pass over the vectors."""
        self._index.remove_ids(faiss.IDSelectorBatch(ids))

    def search(self, queries: Vectors, k: int) -> tuple[Vectors, Ids]:
        """See `Index.search`."""
        scores, ids = self._index.search(np.ascontiguousarray(queries, np.float32), k)
        return scores, ids

    def __len__(self) -> int:
        return int(self._index.ntotal)
