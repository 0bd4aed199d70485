"""Metadata keys that are indexed for filters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from memdb.errors import CorruptRecordError
from memdb.filters.order import OTHER, index_key
from memdb.filters.postings import Postings, check_key_name
from memdb.protocols import Progress
from memdb.storage.record_layout import DOCUMENTS, POSTINGS
from memdb.storage.store import Store
from memdb.storage.transaction import Transaction
from memdb.types.arguments import some

_TOLD_EVERY = 1000  # documents


def checked_keys(names: Sequence[str]) -> tuple[str, ...]:
    """The names, each once; `InvalidInputError` if one cannot be indexed."""
    names = list(some(names, "keys", "names"))
    for name in names:
        check_key_name(name)
    return tuple(dict.fromkeys(names))


def declared_keys(transaction: Transaction) -> tuple[str, ...]:
    """The metadata keys that are indexed."""
    return tuple(transaction.required_setting("index")["keys"])


def declare_keys(store: Store, names: tuple[str, ...], progress: Progress) -> None:
    """See `MemDB.declare_keys`."""
    with store.write() as transaction:
        index = transaction.required_setting("index")
        new = [name for name in names if name not in index["keys"]]
        if new:
            transaction.put_setting("index", {**index, "keys": index["keys"] + new})
            _index_all(transaction, new, progress)


def undeclare_keys(store: Store, names: tuple[str, ...]) -> None:
    """See `MemDB.undeclare_keys`."""
    with store.write() as transaction:
        index = transaction.required_setting("index")
        gone = [name for name in index["keys"] if name in names]
        if gone:
            left = [name for name in index["keys"] if name not in gone]
            transaction.put_setting("index", {**index, "keys": left})
            for name in gone:
                Postings(transaction).drop(name)


def reindex(transaction: Transaction, progress: Progress) -> None:
    """Write the postings of all indexed keys anew, from the metadata."""
    transaction.empty(POSTINGS)
    _index_all(transaction, declared_keys(transaction), progress)


def withdraw(transaction: Transaction, name: str, references: Sequence[int]) -> None:
    """Take a document's references out of the index, before its metadata goes."""
    keys = declared_keys(transaction)
    if not keys:
        return
    postings = Postings(transaction)
    try:
        metadata = transaction.metadata(name)
    except CorruptRecordError:  # then what it was indexed under is not known
        postings.discard(references)
        return
    for key in keys:
        if key in metadata:
            postings.remove(key, metadata[key], references)


def _index_all(transaction: Transaction, names: Sequence[str], progress: Progress) -> None:
    total = transaction.count(DOCUMENTS)
    grouped = Grouped(names)
    for done, (name, entry) in enumerate(transaction.documents()):
        grouped.add(transaction.metadata(name, entry.version), entry.references)
        if done % _TOLD_EVERY == 0:
            progress("indexing metadata", done, total)
    grouped.write(transaction)
    progress("indexing metadata", total, total)


class Grouped:
    """References by the values of their documents' metadata, to be indexed together: a block of
    postings is then written once, and not for each reference."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = tuple(names)
        self._found: dict[tuple[str, bytes], tuple[Any, list[int]]] = {}

    def add(self, metadata: Mapping[str, Any], references: Iterable[int]) -> None:
        """Collect a document's."""
        for name in self._names:
            if name in metadata:
                value = metadata[name]
                group = self._found.setdefault((name, index_key(value) or OTHER), (value, []))
                group[1].extend(references)

    def ids(self) -> dict[tuple[str, bytes], list[int]]:
        """What was collected: references by key and `index_key` of the value, or `OTHER`."""
        return {place: references for place, (_, references) in self._found.items()}

    def write(self, transaction: Transaction) -> None:
        """Index what was collected."""
        postings = Postings(transaction)
        for (name, _), (value, references) in self._found.items():
            postings.add(name, value, references)
