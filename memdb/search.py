"""The index of one open database, kept in step with the store's change log."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from memdb.index import FlatIndex, Ids, Index, Vectors
from memdb.layout import DELETED, INSERTED
from memdb.store import Store
from memdb.transaction import Transaction

_LOAD_BATCH = 4096


class Searcher:
    """Search over exactly what one read transaction sees, whoever wrote it."""

    def __init__(self, store: Store, dimension: int) -> None:
        self._store = store
        self._dimension = dimension
        self._index: Index = FlatIndex(dimension)
        self._change: int | None = None  # the change up to which the index is built
        self._guard = threading.Lock()

    @contextmanager
    def search(self, queries: Vectors, k: int) -> Iterator[tuple[Transaction, Vectors, Ids]]:
        """A read transaction, and the k best scores and ids in it for each query.

        Args:
            queries: (n, dimension) float32, each of length 1.
            k: at least 1.

        Yields:
            The transaction; scores and ids, each (n, at most k); -1 where an id is missing.
        """
        with ExitStack() as stack:
            with self._guard:
                # The transaction begins under the guard, so the index never runs ahead of it.
                transaction = stack.enter_context(self._store.read())
                self._catch_up(transaction)
                # An index makes room for all k, however few it holds.
                scores, ids = self._index.search(queries, min(k, max(1, len(self._index))))
            yield transaction, scores, ids

    def _catch_up(self, transaction: Transaction) -> None:
        last = transaction.last_change()
        if self._change == last:
            return
        try:
            if self._change is None or not self._apply(transaction, self._change, last):
                self._index = FlatIndex(self._dimension)
                self._add(transaction.embeddings())
        except BaseException:
            # Half of it is in the index: begin anew at the next search.
            self._index, self._change = FlatIndex(self._dimension), None
            raise
        self._change = last

    def _apply(self, transaction: Transaction, after: int, last: int) -> bool:
        """Do what the changes behind `after`, up to `last`, did; False if the log has a gap there:
        the index is then of another past than the database's."""
        changes = list(transaction.changes(after))
        if len(changes) != last - after:
            return False
        inserted: dict[int, None] = {}  # a set that keeps its order
        deleted: list[int] = []
        for change in changes:
            for what, reference in change.tolist():
                if what == INSERTED:
                    inserted[reference] = None
                elif what == DELETED:
                    deleted.append(reference)
                    inserted.pop(reference, None)
        if deleted:
            self._index.remove(np.array(deleted, np.int64))
        self._add((number, transaction.embedding(number)) for number in inserted)
        return True

    def _add(self, entries: Iterable[tuple[int, NDArray[np.float32]]]) -> None:
        remaining = iter(entries)
        while batch := list(islice(remaining, _LOAD_BATCH)):
            numbers, vectors = zip(*batch, strict=True)
            self._index.add(np.array(numbers, np.int64), np.stack(vectors))
