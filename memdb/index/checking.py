"""Whether an index file is one of a state's, and holds what the state does."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from memdb.errors import CorruptRecordError
from memdb.index.ann import AnnIndex, Ids, IndexInfo, Vectors
from memdb.storage.record_layout import DELETED, EMBEDDINGS, INSERTED
from memdb.storage.transaction import Transaction

_SHARE, _LEAST = 2.0**-10, 2.0**-23  # by which a float16 may be off: twice its rounding
_TOLD = 3  # ids of those that are wrong


def is_of_this_past(info: IndexInfo, transaction: Transaction) -> bool:
    """Whether the change up to which an index is built is the database's own: one that its state
    goes back to, not one of the same number that a power cut undid.

    Raises:
        CorruptRecordError: the record of that change is damaged.
    """
    return transaction.change_seal(info.change) == info.seal


def differences(index: AnnIndex, transaction: Transaction) -> Iterator[str]:
    """In words, how an index file of this database's past differs from the embeddings. Those that
    are damaged themselves are left out.

    Raises:
        CorruptRecordError: the change log is damaged behind the index's change.
    """
    came: set[int] = set()
    gone: set[int] = set()
    for change in transaction.changes(index.info.change):
        came.update(change["reference"][change["what"] == INSERTED].tolist())
        gone.update(change["reference"][change["what"] == DELETED].tolist())
    there = transaction.numbers(EMBEDDINGS)
    due = np.setdiff1d(there, _array(came), assume_unique=True)
    found = []
    wrong: list[int] = []
    for ids, vectors in index.vectors():
        found.append(ids)
        known = np.isin(ids, due)
        wrong += _unlike(ids[known], vectors[known], transaction)
    held = np.concatenate([*found, _array(())])
    strangers = np.setdiff1d(held, np.concatenate([due, _array(gone)]))
    yield from _told("it holds {} that the database did not", strangers)
    yield from _told("it lacks {}", np.setdiff1d(due, held))
    once, times = np.unique(held, return_counts=True)
    yield from _told("it holds {} more than once", once[times > 1])
    yield from _told("its vectors of {} are not those of the embeddings", _array(wrong))


def _unlike(ids: Ids, vectors: Vectors, transaction: Transaction) -> list[int]:
    """Those whose vector is not that of their embedding, to float16."""
    if not len(ids):  # all of a cluster may be gone
        return []
    try:
        due = transaction.embeddings_of(ids)
    except CorruptRecordError:  # one is: each by itself
        if len(ids) == 1:
            return []
        parts = (_unlike(ids[n : n + 1], vectors[n : n + 1], transaction) for n in range(len(ids)))
        return [number for part in parts for number in part]
    if due.shape != vectors.shape:
        return []
    off = np.abs(vectors - due) > _SHARE * np.abs(due) + _LEAST
    wrong: list[int] = ids[off.any(axis=1)].tolist()
    return wrong


def _told(what: str, ids: Ids) -> Iterator[str]:
    if len(ids):
        some = ", ".join(map(str, ids[:_TOLD].tolist()))
        more = f" and {len(ids) - _TOLD} more" if len(ids) > _TOLD else ""
        yield what.format(f"reference{'s' * (len(ids) > 1)} {some}{more}")


def _array(numbers: object) -> NDArray[np.int64]:
    return np.array(sorted(numbers), np.int64)  # type: ignore[call-overload]
