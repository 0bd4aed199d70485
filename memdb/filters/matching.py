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
from memdb.filters.planning import ASK, NO, YES, Known, known
from memdb.filters.postings import Postings
from memdb.storage.record_layout import DOCUMENTS, REFERENCES, DocumentEntry
from memdb.storage.transaction import Transaction

Ids = NDArray[np.int64]
Seals = NDArray[np.uint64]

_KEPT = 32  # answers of `Matcher`
_MANY = 8  # a scan is quicker than to read the metadata of every 8th document


def matching(transaction: Transaction, where: Filter) -> Ids:
    """Ids of the references whose documents a filter means, (n,) ascending.

    What the index of declared metadata keys tells is not read again; where it leaves most documents
    open, all metadata is read.
    """
    return Matcher()(transaction, where)


def matching_documents(
    transaction: Transaction, where: Filter, after: str = ""
) -> Iterator[tuple[str, DocumentEntry]]:
    """The documents that a filter means, in the order of their ids' bytes, those behind `after`;
    of others than these no text and, where the index tells, no metadata is read."""
    told = known(where, Postings(transaction), declared_keys(transaction))
    if told.rest != NO:
        for name, entry in transaction.documents(after):
            if where.matches(transaction.metadata(name, entry.version)):
                yield name, entry
        return
    answers = {transaction.owner(number): answer for number, answer in _pairs(told)}
    for name in sorted(answers, key=str.encode):
        if name.encode() <= after.encode():
            continue
        found = transaction.document(name)
        if found is not None and (
            answers[name] == YES or where.matches(transaction.metadata(name, found.version))
        ):
            yield name, found


def _pairs(told: Known) -> Iterator[tuple[int, int]]:
    return zip(told.ids.tolist(), told.answers.tolist(), strict=True)


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
        told = known(where, Postings(transaction), declared_keys(transaction))
        if told.rest == ASK:
            return self._scan(transaction, where)
        sure, asked = told.of(YES), told.of(ASK)
        if told.rest == YES:
            every = transaction.numbers(REFERENCES)
            sure = np.setdiff1d(every, told.ids, assume_unique=True)
        if not len(asked):
            return sure
        if len(asked) * _MANY > transaction.count(DOCUMENTS):
            meant = np.intersect1d(asked, self._scan(transaction, where), assume_unique=True)
        else:
            meant = _checked(transaction, where, asked)
        return np.union1d(sure, meant)

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


def _checked(transaction: Transaction, where: Filter, candidates: Ids) -> Ids:
    meant: dict[str, bool] = {}
    kept = []
    for number in candidates.tolist():
        name = transaction.owner(number)
        if name not in meant:
            meant[name] = where.matches(transaction.metadata(name))
        if meant[name]:
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
