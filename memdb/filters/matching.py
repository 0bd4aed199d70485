"""Which references a metadata filter means, in one transaction."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memdb.filters.declared import declared_keys
from memdb.filters.language import Filter
from memdb.filters.postings import Postings
from memdb.storage.record_layout import DOCUMENTS, DocumentEntry
from memdb.storage.transaction import Transaction

Ids = NDArray[np.int64]
Seals = NDArray[np.uint64]

_KEPT = 32  # answers of `Matcher`
_MANY = 8  # a scan is quicker than to read the metadata of every 8th document


def matching(transaction: Transaction, where: Filter) -> Ids:
    """Ids of the references whose documents a filter means, (n,) ascending.

    Where all its keys are indexed the postings tell; where one is, they leave few documents whose
    metadata has to be read; where none is, all metadata is.
    """
    return Matcher()(transaction, where)


@dataclass(frozen=True)
class _Scan:
    """What a filter means of all documents of one state.

    Attributes:
        documents: (n,) seals of their records: a document with one of these was looked at.
        matched: (m,) seals of the documents that are meant, once for each of their references.
        ids: (m,) the references.
    """

    documents: Seals
    matched: Seals
    ids: Ids


class Matcher:
    """`matching`, with the last answers kept: who filters by something does so again and again.

    After a write only the documents that it wrote are read. A document's record is another after
    each change, of its metadata too: so one with a seal that was seen is one that was looked at.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[object, int, bytes], Ids] = OrderedDict()
        self._scans: OrderedDict[tuple[Path | None, bytes], _Scan] = OrderedDict()
        self._documents: tuple[object, Seals] = None, np.empty(0, np.uint64)
        self._guard = Lock()

    def __call__(self, transaction: Transaction, where: Filter) -> Ids:
        """See `matching`. The array is the same for the same state and filter; nobody may change
        it."""
        key = (*transaction.state, where.key)
        with self._guard:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        found = self._found(transaction, where)
        with self._guard:
            found = self._kept.setdefault(key, found)
            _trim(self._kept)
        return found

    def _found(self, transaction: Transaction, where: Filter) -> Ids:
        candidates, certain = _candidates(transaction, where)
        if candidates is None:
            return self._scan(transaction, where)
        if certain:
            return candidates
        if len(candidates) * _MANY > transaction.count(DOCUMENTS):
            return np.intersect1d(candidates, self._scan(transaction, where), assume_unique=True)
        return _checked(transaction, where, candidates)

    def _scan(self, transaction: Transaction, where: Filter) -> Ids:
        place = transaction.state[0], where.key
        documents = self._seals(transaction)
        with self._guard:
            last = self._scans.get(place)
        if last is None:
            none = np.empty(0, np.uint64)
            last = _Scan(none, none, np.empty(0, np.int64))
        new, gone = _differences(last.documents, documents)
        matched: list[int] = []
        ids: list[int] = []
        for (name, entry), seal in zip(
            transaction.documents_at(new), documents[new].tolist(), strict=True
        ):
            if where.matches(transaction.metadata(name, entry.version)):
                ids.extend(entry.references)
                matched.extend([seal] * len(entry.references))
        left = ~np.isin(last.matched, gone)
        now = _Scan(
            documents,
            np.append(last.matched[left], np.array(matched, np.uint64)),
            np.append(last.ids[left], np.array(ids, np.int64)),
        )
        with self._guard:
            self._scans[place] = now
            self._scans.move_to_end(place)
            _trim(self._scans)
        return np.sort(now.ids)

    def _seals(self, transaction: Transaction) -> Seals:
        """Those of all documents, which all filters of a state share."""
        state, seals = self._documents
        if state != transaction.state:
            state, seals = transaction.state, transaction.seals(DOCUMENTS)
            self._documents = state, seals
        return seals


def _candidates(transaction: Transaction, where: Filter) -> tuple[Ids | None, bool]:
    """The references that a filter may mean, as far as postings tell, and whether it means them
    all; None: no postings tell."""
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
    return found, certain


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


def _differences(before: Seals, now: Seals) -> tuple[Ids, Seals]:
    """The places in `now` of what is not in `before`, and what is in `before` alone. Both are in
    the order of one table: so what is the same at their ends need not be looked for."""
    most = min(len(before), len(now))
    start = _same(before[:most], now[:most])
    end = _same(before[::-1][: most - start], now[::-1][: most - start])
    old, new = before[start : len(before) - end], now[start : len(now) - end]
    return start + np.flatnonzero(~np.isin(new, old)), old[~np.isin(old, new)]


def _same(one: Seals, other: Seals) -> int:
    """How many are the same, from the first on."""
    different = one != other
    return int(different.argmax()) if different.any() else len(one)


def _trim(kept: OrderedDict[Any, Any]) -> None:
    while len(kept) > _KEPT:
        kept.popitem(last=False)
