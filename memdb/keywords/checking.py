"""Whether the keyword index holds the words that the references have."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import xxhash

from memdb.errors import CorruptRecordError
from memdb.keywords.about import FILE, Refused
from memdb.keywords.words import words_of
from memdb.storage.record_layout import INSERTED, REFERENCES
from memdb.storage.transaction import Transaction

_TOLD = 3  # ids of those that are wrong
_MASK = (1 << 64) - 1


def keyword_problems(transaction: Transaction, database: str, timeout: float) -> Iterator[str]:
    """In words, what is wrong with the keyword index that a state finds; nothing where there is
    none, or one that no search would use. References that are damaged themselves are left out.

    Args:
        transaction: the state.
        database: the database's id.
        timeout: seconds to wait for another process that writes the index.

    Raises:
        CorruptRecordError: the change log is damaged.
        StorageError: the file cannot be read, or another process writes it.
    """
    path: Path = transaction.generation / FILE
    if not path.exists():
        return
    from memdb.keywords.word_index import WordIndex

    try:
        try:
            index = WordIndex(path, timeout)
        except Refused:  # of a medium that cannot be written
            if path.with_name(path.name + "-wal").exists():
                raise
            index = WordIndex(path, timeout, frozen=True)
    except CorruptRecordError as error:
        yield error.problem
        return
    try:
        if index.begin() is None:  # it is just being made, say
            return
        index.end()
        index.check()
        about = index.begin()
        if about is None or about.database != database or about.change > transaction.last_change():
            return
        if transaction.change_seal(about.change) != about.seal:
            return
        sums: dict[int, int] = defaultdict(int)
        for word, number in index.all_words():
            sums[number] += _digest(word)
        held = index.ids()
    except CorruptRecordError as error:
        yield error.problem
        return
    finally:
        index.close()
    came = [
        number
        for change in transaction.changes(about.change)
        for number in change["reference"][change["what"] == INSERTED].tolist()
    ]
    there = transaction.numbers(REFERENCES)
    due = np.setdiff1d(there, np.array(sorted(came), np.int64), assume_unique=True)
    yield from _told("it lacks {}", np.setdiff1d(due, held).tolist())
    both = np.intersect1d(due, held)
    yield from _told(
        "its words of {} are not those of the text",
        [number for number in both.tolist() if _differs(transaction, number, sums[number])],
    )


def _differs(transaction: Transaction, number: int, held: int) -> bool:
    try:
        words = words_of(transaction.reference(number).text)
    except CorruptRecordError:  # which is told of the reference
        return False
    return sum(map(_digest, words)) & _MASK != held & _MASK


@cache
def _digest(word: str) -> int:
    return xxhash.xxh3_64_intdigest(word.encode())


def _told(what: str, ids: list[int]) -> Iterator[str]:
    if ids:
        more = f" and {len(ids) - _TOLD} more" if len(ids) > _TOLD else ""
        some = ", ".join(map(str, ids[:_TOLD])) + more
        yield what.format(f"reference{'s' * (len(ids) > 1)} {some}")
