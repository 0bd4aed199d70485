"""Which references a metadata filter means, in one transaction."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from memdb.filters.declared import declared_keys
from memdb.filters.language import Filter
from memdb.filters.postings import Postings
from memdb.storage.record_layout import DocumentEntry
from memdb.storage.transaction import Transaction

Ids = NDArray[np.int64]

_KEPT = 32  # answers of `Matcher`


def matching(transaction: Transaction, where: Filter) -> Ids:
    """Ids of the references whose documents a filter means, (n,) ascending.

    Where all its keys are indexed the postings tell; where one is, they leave few documents whose
    metadata has to be read; where none is, all metadata is.
    """
    found: Ids | None = None
    certain = True
    indexed = declared_keys(transaction)
    postings = Postings(transaction)
    for name, condition in where.conditions.items():
        if name not in indexed:
            certain = False
            continue
        sure, unsure = postings.candidates(name, condition)
        certain = certain and not len(unsure)
        both = np.union1d(sure, unsure) if len(unsure) else sure
        found = both if found is None else np.intersect1d(found, both, assume_unique=True)
    if found is None:
        return _scan(transaction, where)
    return found if certain else _checked(transaction, where, found)


def matching_documents(
    transaction: Transaction, where: Filter, after: str = ""
) -> Iterator[tuple[str, DocumentEntry]]:
    """The documents that a filter means, in the order of their ids' bytes, those behind `after`;
    where one of its keys is indexed, of no others is anything read."""
    if not where.conditions.keys() & set(declared_keys(transaction)):
        for name, entry in transaction.documents(after):
            if where.matches(transaction.metadata(name, entry.version)):
                yield name, entry
        return
    names = {transaction.owner(number) for number in matching(transaction, where).tolist()}
    for name in sorted(names, key=str.encode):
        found = transaction.document(name) if name.encode() > after.encode() else None
        if found is not None:
            yield name, found


def _scan(transaction: Transaction, where: Filter) -> Ids:
    ids: list[int] = []
    for name, entry in transaction.documents():
        if where.matches(transaction.metadata(name, entry.version)):
            ids.extend(entry.references)
    return np.array(sorted(ids), np.int64)


def _checked(transaction: Transaction, where: Filter, candidates: Ids) -> Ids:
    known: dict[str, bool] = {}
    kept = []
    for number in candidates.tolist():
        name = transaction.owner(number)
        if name not in known:
            known[name] = where.matches(transaction.metadata(name))
        if known[name]:
            kept.append(number)
    return np.array(kept, np.int64)


class Matcher:
    """`matching`, with the last answers kept: who filters by something does so again and again."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[object, int, bytes], Ids] = OrderedDict()
        self._guard = Lock()

    def __call__(self, transaction: Transaction, where: Filter) -> Ids:
        """See `matching`."""
        key = (*transaction.state, where.key)
        with self._guard:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        found = matching(transaction, where)
        with self._guard:
            self._kept[key] = found
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return found
