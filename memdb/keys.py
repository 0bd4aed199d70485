"""Metadata keys that are indexed for filters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from memdb.errors import InvalidInputError
from memdb.filters import OTHER, index_key
from memdb.layout import DOCUMENTS
from memdb.postings import check_key_name
from memdb.protocols import Progress
from memdb.store import Store
from memdb.transaction import Transaction

_TOLD_EVERY = 1000  # documents


def checked_keys(names: Sequence[str]) -> tuple[str, ...]:
    """The names, each once; `InvalidInputError` if one cannot be indexed."""
    if isinstance(names, str):
        raise InvalidInputError(f"keys are a list of names, got the text {names!r:.60}")
    for name in names:
        check_key_name(name)
    return tuple(dict.fromkeys(names))


def declare_keys(store: Store, names: tuple[str, ...], progress: Progress) -> None:
    """See `MemDB.declare_keys`."""
    with store.write() as transaction:
        new = tuple(name for name in names if name not in transaction.keys)
        if new:
            transaction.put_keys(transaction.keys + new)
            _index_all(transaction, new, progress)


def reindex(transaction: Transaction, progress: Progress) -> None:
    """Write the postings of all indexed keys anew, from the metadata."""
    transaction.drop_postings()
    _index_all(transaction, transaction.keys, progress)


def _index_all(transaction: Transaction, names: tuple[str, ...], progress: Progress) -> None:
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
        for (name, _), (value, references) in self._found.items():
            transaction.postings.add(name, value, references)
