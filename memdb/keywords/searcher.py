"""The keyword index of one open database, kept in step with the store's change log.

It is made when it is first asked for, and from then on each search brings it to the state that it
searches. Where its file cannot be written, what the file lacks is indexed in RAM.
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from memdb.errors import CorruptRecordError, MissingPartError
from memdb.keywords.about import FILE, TABLE, About, Refused, Size
from memdb.keywords.matched import Ids, Matched, Scores
from memdb.keywords.words import query_words
from memdb.protocols import Progress, no_progress
from memdb.storage.record_layout import INSERTED, REFERENCES
from memdb.storage.store import Store
from memdb.storage.transaction import Transaction

if TYPE_CHECKING:
    from memdb.keywords.word_index import WordIndex

T = TypeVar("T")

_log = logging.getLogger("memdb")

_LOCK = "keywords.lock"
_DEAD = 4096  # references that are gone which an index keeps at least
_TOLD_EVERY = 1000  # references


class Keywords:
    """Keyword search over exactly what one read transaction sees, whoever wrote it."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._guard = Lock()
        self._free: list[WordIndex] = []  # open, and in nobody's use
        self._told = False  # that the file cannot be written
        self._tail: tuple[object, WordIndex, Size] | None = None  # and of which state it is
        self._tail_guard = Lock()  # held while the tail is searched

    def search(
        self,
        transaction: Transaction,
        text: str,
        allowed: Ids | None = None,
        progress: Progress = no_progress,
    ) -> Matched:
        """The references that have words of a text.

        Args:
            transaction: the state to search.
            text: any; what is no letter or digit only parts words.
            allowed: ids that may be found, ascending; default: all.
            progress: told of the building, where the index has to be built.

        Raises:
            CorruptRecordError: a reference is damaged.
            MissingPartError: this Python's SQLite has no full-text search.
            BusyError: another process writes the index, and is not done in `busy_timeout`.
        """
        words = query_words(text)
        if not words or (allowed is not None and not len(allowed)):
            return Matched()
        text_of = partial(_text_of, transaction)

        def searched(index: WordIndex | None, about: About | None) -> Matched:
            parts = []
            if index is not None and about is not None:
                parts.append(index.search(words, about.size, text_of, allowed))
            if about is None or transaction.last_change() not in _range(about):
                parts.append(self._in_tail(transaction, index, about, words, allowed, progress))
            return Matched.joined(parts)

        return self._in_step(transaction, progress, searched)

    def build(self, transaction: Transaction, progress: Progress = no_progress) -> None:
        """Make the index, or bring it in step; errors as of `search`."""
        self._in_step(transaction, progress, lambda *_: None)

    def state(self, transaction: Transaction) -> dict[str, object] | None:
        """What `MemDB.stats` says of it; None if nobody has asked for it yet."""
        if not self.exists(transaction):
            return None
        with suppress(CorruptRecordError), self._taken(transaction.generation) as index:
            if index is not None and index.path is not None:
                about = index.begin()
                size = index.path.stat().st_size
                rows, change = (about.rows, about.change) if about else (0, 0)
                return {"references": rows, "change": change, "bytes": size}
        return {"references": 0, "change": 0, "bytes": 0}

    def exists(self, transaction: Transaction) -> bool:
        """Whether it was asked for."""
        return _path(transaction.generation).exists()

    def close(self) -> None:
        """Give the file back."""
        with self._guard:
            indexes, self._free = self._free, []
        for index in indexes:
            index.close()
        with self._tail_guard:
            if self._tail is not None:
                self._tail[1].close()
            self._tail = None

    # --- the file ---

    def _in_step(
        self,
        transaction: Transaction,
        progress: Progress,
        use: Callable[[WordIndex | None, About | None], T],
    ) -> T:
        """What `use` makes of the index file, which is in a read transaction of its own and has all
        references of a state that it can have, and of what it says of itself; it is given None
        where there is no file to be had. A file that turns out to be damaged is built anew once."""
        again = False
        while True:
            with self._taken(transaction.generation) as index:
                try:
                    about = None if index is None else self._brought(index, transaction, progress)
                    return use(None if about is None else index, about)
                except CorruptRecordError as error:
                    if again or index is None or error.table != TABLE:
                        raise
                    again = True
                    _log.warning("the keyword index is damaged, and is built anew: %s", error)
                    self._throw_away(index)

    def _brought(
        self, index: WordIndex, transaction: Transaction, progress: Progress
    ) -> About | None:
        """Bring an index to a state, and begin a read transaction in it; None if it is not to be
        had for that state."""
        try:
            about = self._right(index.begin(), transaction)
            if about is not None and not _is_due(about, transaction):
                return about
            index.end()
            about = self._right(index.begin(write=True), transaction)  # another may have done it
            if about is None or _is_due(about, transaction):
                about = self._written(index, about, transaction, progress)
                transaction.sync()  # an index that outlived its state would be believed
                index.commit(about)
        except Refused as refused:
            self._tell(refused)
        index.end()
        try:
            return self._right(index.begin(), transaction)
        except Refused:
            return None

    def _tell(self, refused: Exception) -> None:
        if not self._told:
            self._told = True
            _log.warning("the keyword index is kept in RAM: %s", refused)

    def _right(self, about: About | None, transaction: Transaction) -> About | None:
        """What an index says of itself, if it is one of this database's past."""
        if about is None or about.database != self._store.id:
            return None
        if about.change <= transaction.last_change():
            seal = transaction.change_seal(about.change)
        else:  # of a later state than this one: another transaction sees whether it is of its past
            with self._store.read() as now:
                if now.generation != transaction.generation:
                    return None
                seal = now.change_seal(about.change)
        return about if about.seal == seal else None

    def _written(
        self,
        index: WordIndex,
        about: About | None,
        transaction: Transaction,
        progress: Progress,
    ) -> About:
        """Write what an index lacks of a state, or all of it."""
        change = transaction.last_change()
        seal = transaction.change_seal(change) or ""
        inserted = None
        if about is not None and not _is_mostly_gone(about, transaction):
            inserted = _inserted(transaction, about.change)
        if about is None or inserted is None:
            numbers = transaction.numbers(REFERENCES).tolist()
            index.clear()
            words = index.add(_texts(transaction, numbers, progress))
            index.optimize()
            return About(self._store.id, change, change, seal, len(numbers), words)
        numbers = [number for number in inserted if transaction.has_reference(number)]
        words = about.words + index.add(_texts(transaction, numbers, progress))
        # A state in between may have what is gone by now: it is left to the tail.
        since = about.since if len(numbers) == len(inserted) else change
        rows = about.rows + len(numbers)
        return replace(about, since=since, change=change, seal=seal, rows=rows, words=words)

    @contextmanager
    def _taken(self, generation: Path) -> Iterator[WordIndex | None]:
        """A connection to the file, out of any transaction; None where it cannot be opened."""
        path = _path(generation)
        index: WordIndex | None = None
        while index is None:
            with self._guard:
                if not self._free:
                    break
                index = self._free.pop()
            if index.path != path or not index.in_place:
                index.close()
                index = None
        if index is None:
            index = self._opened(path)
        try:
            yield index
        finally:
            if index is not None:
                index.end()
                with self._guard:
                    self._free.append(index)

    def _opened(self, path: Path) -> WordIndex | None:
        try:
            from memdb.keywords.word_index import WordIndex
        except ImportError as error:
            raise MissingPartError(
                f"keyword search needs SQLite, and this Python has none ({error}). Use another "
                "Python, or search by vectors."
            ) from error
        timeout = self._store.busy_timeout
        if not self._store.read_only:
            try:
                return WordIndex(path, timeout)
            except CorruptRecordError as error:
                _log.warning("the keyword index is damaged, and is built anew: %s", error)
                with suppress(OSError):
                    _remove(path, None)
                    return WordIndex(path, timeout)
                return None
            except Refused as refused:
                if path.parent.exists():  # else a snapshot outlived its generation
                    self._tell(refused)
        if path.exists() and not path.with_name(path.name + "-wal").exists():
            with suppress(Refused, CorruptRecordError):
                return WordIndex(path, timeout, frozen=True)
        return None

    def _throw_away(self, index: WordIndex) -> None:
        """Remove a damaged file, unless another process has put one in its place."""
        assert index.path is not None
        index.end()
        with suppress(OSError):
            _remove(index.path, index.stamp)

    # --- the tail ---

    def _in_tail(
        self,
        transaction: Transaction,
        index: WordIndex | None,
        about: About | None,
        words: list[str],
        allowed: Ids | None,
        progress: Progress,
    ) -> tuple[Ids, Scores]:
        """Search what a state has and the file has not."""
        from memdb.keywords.word_index import WordIndex

        key = transaction.state, None if about is None else (about.since, about.change)
        with self._tail_guard:
            if self._tail is None or self._tail[0] != key:
                if self._tail is not None:
                    self._tail[1].close()
                    self._tail = None
                there = np.zeros(0, np.int64) if index is None else index.ids()
                numbers = np.setdiff1d(transaction.numbers(REFERENCES), there, assume_unique=True)
                tail = WordIndex(None)
                total = tail.add(_texts(transaction, numbers.tolist(), progress))
                self._tail = key, tail, Size(len(numbers), total)
            _, tail, size = self._tail
            return tail.search(words, size, partial(_text_of, transaction), allowed)


def _path(generation: Path) -> Path:
    return generation / FILE


def _range(about: About) -> range:
    """The changes whose states an index has all references of."""
    return range(about.since, about.change + 1)


def _is_due(about: About, transaction: Transaction) -> bool:
    """Whether an index is to be written before a state is searched."""
    change = transaction.last_change()
    if about.change == change:
        return _is_mostly_gone(about, transaction)
    return about.change < change


def _is_mostly_gone(about: About, transaction: Transaction) -> bool:
    """Whether more references of an index are gone than are there."""
    living = transaction.count(REFERENCES)
    return about.rows - living > max(_DEAD, living)


def _inserted(transaction: Transaction, after: int) -> list[int] | None:
    """References that came behind a change; None if the log does not reach back to it."""
    found: list[int] = []
    number = after
    for changes in transaction.changes(after):
        number += 1
        found.extend(changes["reference"][changes["what"] == INSERTED].tolist())
    return found if number == transaction.last_change() else None


def _text_of(transaction: Transaction, number: int) -> str | None:
    """A reference's text, if it is there and whole."""
    try:
        return transaction.reference(number).text
    except CorruptRecordError:
        return None


def _texts(
    transaction: Transaction, numbers: list[int], progress: Progress
) -> Iterable[tuple[int, str]]:
    for done, number in enumerate(numbers):
        if done % _TOLD_EVERY == 0 and len(numbers) > _TOLD_EVERY:
            progress("indexing words", done, len(numbers))
        yield number, transaction.reference(number).text
    if len(numbers) > _TOLD_EVERY:
        progress("indexing words", len(numbers), len(numbers))


def remove_index(generation: Path) -> None:
    """Remove a generation's index; the next search that asks for words makes it anew."""
    _remove(_path(generation), None)


def _remove(path: Path, stamp: tuple[int, int] | None) -> None:
    """Remove an index file with what SQLite keeps beside it; with a stamp, only that file."""
    lock = os.open(path.with_name(_LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            file = path.stat()
            if stamp is None or stamp == (file.st_dev, file.st_ino):
                for end in ("", "-wal", "-shm"):
                    path.with_name(path.name + end).unlink(missing_ok=True)
    finally:
        os.close(lock)
