"""The index of one open database, kept in step with the store's change log."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from memdb.background import Cancelled, Task
from memdb.errors import CorruptRecordError, StorageError
from memdb.index.ann import FILE, AnnIndex, Ids, IndexInfo, Vectors, file_stamp, write_index
from memdb.index.build import build_index
from memdb.index.checking import is_of_this_past
from memdb.index.exact import exact_search
from memdb.index.policy import IndexPolicy, is_stale
from memdb.index.view import View
from memdb.protocols import Progress, no_progress
from memdb.storage import locks
from memdb.storage.record_layout import DELETED, INSERTED, REFERENCES
from memdb.storage.store import ReadTransaction, Store
from memdb.storage.transaction import Transaction

_LOCK = "index.lock"
_LOOK_EVERY = 1.0  # seconds between two looks for a new index file
_MANY = 1000  # hits


@dataclass
class Pinned:
    """A read transaction, and search over exactly what it sees."""

    transaction: Transaction
    view: View

    def search(self, queries: Vectors, k: int, allowed: Ids | None = None) -> tuple[Vectors, Ids]:
        """Scores and ids, each (queries, k), best first; id -1 where there are fewer.

        Args:
            queries: (n, dimension), each of length 1.
            k: at least 1.
            allowed: ids that may be found, ascending; default: all.
        """
        if k > _MANY:  # an index makes room for all k, however few there are
            k = min(k, max(1, self.transaction.count(REFERENCES)))
        try:
            return self.view.search(queries, k, allowed)
        except CorruptRecordError:  # the index file is damaged; the next view does without it
            return self._compare(queries, k, allowed)

    def _compare(self, queries: Vectors, k: int, allowed: Ids | None) -> tuple[Vectors, Ids]:
        """Exact search over the store's own vectors."""
        transaction = self.transaction
        numbers = transaction.numbers(REFERENCES) if allowed is None else allowed
        if not len(numbers):
            return np.zeros((len(queries), 0), np.float32), np.zeros((len(queries), 0), np.int64)
        return exact_search(queries, transaction.embeddings_of(numbers), numbers, k)


class Searcher:
    """Search over exactly what one read transaction sees, whoever wrote it."""

    def __init__(self, store: Store, dimension: int) -> None:
        self._store = store
        self._dimension = dimension
        self._view: View | None = None
        self._state: tuple[Path | None, int] = None, -1  # that the view is known to be right for
        self._looked = 0.0
        self._bad: object = None  # the stamp of a file that is damaged or of another database
        self._guard = threading.Lock()
        self._builder = Task("building the index", store.folder, store.id, self._build_due)

    def pin(self) -> _Pinning:
        """A read transaction and its view, in a `with` statement."""
        return _Pinning(self)

    def pinned(self, reading: ReadTransaction) -> Pinned:
        """The transaction, begun, and its view."""
        with self._guard:
            # The transaction begins under the guard, so the view never runs ahead of it.
            transaction = reading.__enter__()
            try:
                return Pinned(transaction, self._caught_up(transaction))
            except BaseException as error:
                reading.__exit__(type(error), error, error.__traceback__)
                raise

    def close(self) -> None:
        """Give up what is being built."""
        self._builder.close()

    def wait(self, progress: Progress = no_progress) -> None:
        """Wait for what is being built in the background."""
        self._builder.wait(progress)

    def state(self) -> dict[str, object]:
        """What `MemDB.stats` says of the index. It loads no vectors but those that changed."""
        with self._store.read() as transaction:
            policy = IndexPolicy.of(transaction)
            building = self._builder.state()
            state: dict[str, object] = {
                "kind": "exact",
                "keys": list(policy.keys),
                "building": building["running"],
                "failure": building["failure"],
            }
            index = self._previous(transaction.generation, transaction)
            if index is None:
                return state
            info, changed = index.info, self._changed(index, transaction)
            return {
                **state,
                "kind": "ivf",
                "references": info.references,
                "lists": info.lists,
                "nprobe": info.nprobe,
                "recall": info.recall,
                "changed": info.references if changed is None else changed,
                "bytes": index.stamp[2],
            }

    # --- keeping in step ---

    def _caught_up(self, transaction: Transaction) -> View:
        state, now = transaction.state, time.monotonic()
        view = self._view
        if view is not None and view.base is not None and view.base.damaged:
            self._bad, self._view = view.base.stamp, None
            view = None
        recent = now - self._looked < _LOOK_EVERY
        if view is not None and recent and state == self._state:
            return view
        last = transaction.last_change()
        generation = transaction.generation
        if generation != self._state[0]:
            view = None
        if view is None or not recent:
            self._looked = now
            view = self._newest(view, generation, transaction)
        try:
            if view is None or not (view := self._applied(view, transaction, last)):
                view = self._loaded(transaction, last)
        except BaseException:
            self._view = None  # half of it may be in the tail's room: begin anew
            raise
        self._view, self._state = view, state
        self._build_if_due(view, transaction)
        return view

    def _newest(self, view: View | None, generation: Path, transaction: Transaction) -> View | None:
        """The view of the newest index file, or the one in use if there is none that is newer."""
        try:
            stamp = file_stamp(generation / FILE)
        except OSError:
            return view
        if stamp == self._bad or (view is not None and view.base and view.base.stamp == stamp):
            return view
        try:
            base = self._opened(generation, transaction)
        except OSError:  # it may be read at the next look
            return view
        except CorruptRecordError:
            self._bad = stamp  # it costs a rebuild, never an error
            return view
        return view if base is None else View.empty(self._dimension, base)

    def _applied(self, view: View, transaction: Transaction, last: int) -> View | None:
        """The view after the changes up to `last`; None if the log has a gap there: the view is
        then of another past than the database's."""
        if view.change == last:
            return view
        changes = list(transaction.changes(view.change)) if view.change < last else []
        if len(changes) != last - view.change:
            return None
        inserted: set[int] = set()
        deleted: list[int] = []
        for change in changes:
            for what, reference in change.tolist():
                if what == INSERTED:
                    inserted.add(reference)
                elif what == DELETED:
                    if reference in inserted:
                        inserted.remove(reference)
                    else:
                        deleted.append(reference)
        ids = np.array(sorted(inserted), np.int64)
        vectors = transaction.embeddings_of(ids) if len(ids) else view.tail.vectors[:0]
        return view.after(last, deleted, ids, vectors)

    def _loaded(self, transaction: Transaction, last: int) -> View:
        """All vectors, to be compared one by one."""
        view = View.empty(self._dimension)
        batches = [(view.tail.ids, view.tail.vectors), *transaction.embeddings()]
        ids, vectors = (np.concatenate(parts) for parts in zip(*batches, strict=True))
        return view.after(last, [], ids, vectors)

    # --- building ---

    def build(
        self, progress: Progress = no_progress, *, anew: bool = False, if_due: bool = False
    ) -> IndexInfo | None:
        """Build the index file now; None if the policy wants none, or none that is newer.

        Args:
            progress: told of the work.
            anew: find the clusters anew, also where the old ones still fit.
            if_due: only if enough has changed since the last one.
        """
        if if_due:  # then what is built already will do
            self._builder.wait(progress)
        else:
            self._builder.cancel()
        info = self._build(progress, anew, if_due, lambda: False)
        self._builder.worked()
        self._looked = 0.0
        return info

    def _build(
        self, progress: Progress, anew: bool, if_due: bool, cancelled: Callable[[], bool]
    ) -> IndexInfo | None:
        while True:
            with self._store.read() as transaction:  # which follows a compaction
                folder = transaction.generation
            try:
                one = _one_at_a_time(folder, self._store.busy_timeout, cancelled)
                with one, self._store.read() as transaction:
                    if transaction.generation == folder:
                        return self._built(transaction, folder, progress, anew, if_due, cancelled)
            except OSError as error:
                if folder.exists():  # else a compaction put another generation in its place
                    raise StorageError(f"cannot write the index: {error}") from error

    def _built(
        self,
        transaction: Transaction,
        folder: Path,
        progress: Progress,
        anew: bool,
        if_due: bool,
        cancelled: Callable[[], bool],
    ) -> IndexInfo | None:
        policy = IndexPolicy.of(transaction)
        references = transaction.count(REFERENCES)
        if not policy.wants_file(references):
            (folder / FILE).unlink(missing_ok=True)
            return None
        previous = self._previous(folder, transaction)
        if if_due and previous is not None:
            changed = self._changed(previous, transaction)
            if changed is not None and not is_stale(previous.info.references, changed):
                return previous.info
        built, info = build_index(
            transaction,
            self._store.id,
            self._dimension,
            policy.recall,
            None if anew else previous,
            progress,
            cancelled,
        )
        transaction.sync()  # a file that outlived the state it was built from would be believed
        write_index(built, info, folder)
        if self._previous(folder, transaction) is None:  # else each search would build it anew
            if not folder.exists():
                raise FileNotFoundError(folder)  # a compaction put another generation in its place
            raise StorageError(f"the index in '{folder}' was written, and cannot be read")
        return info

    def _changed(self, index: AnnIndex, transaction: Transaction) -> int | None:
        """How many references came or went since an index was built; None: the log does not say."""
        view = View.empty(self._dimension, index)
        now = self._applied(view, transaction, transaction.last_change())
        return None if now is None else now.changed

    def _previous(self, folder: Path, transaction: Transaction) -> AnnIndex | None:
        """The index file there is, if one is to be had that is of this state's past."""
        try:
            return self._opened(folder, transaction)
        except (OSError, CorruptRecordError):  # search is right without
            return None

    def _opened(self, folder: Path, transaction: Transaction) -> AnnIndex | None:
        """The index file there is; None: it is right, but cannot be had for this state, which was
        before it, say.

        Raises:
            OSError: it cannot be read, or there is none.
            CorruptRecordError: it is damaged, or of another database or another past: of no use to
                any state that comes.
        """
        index = AnnIndex(folder / FILE)
        info = index.info
        if info.database != self._store.id or info.dimension != self._dimension:
            raise CorruptRecordError("index", FILE, "it is of another database")
        if index.stamp == self._bad:
            raise CorruptRecordError("index", FILE, "it was found damaged")
        try:
            of_this_past = is_of_this_past(info, transaction)
        except CorruptRecordError:  # the change log is: that is no fault of the index's
            return None
        if not of_this_past and info.change <= transaction.last_change():
            raise CorruptRecordError("index", FILE, "it is of another past")
        return index if of_this_past else None

    def _build_if_due(self, view: View, transaction: Transaction) -> None:
        """Build in the background what is due; searches go on over what there is."""
        if self._store.read_only:
            return
        built = 0 if view.base is None else view.base.info.references
        if not is_stale(built, view.changed):
            return
        if IndexPolicy.of(transaction).wants_file(transaction.count(REFERENCES)):
            self._builder.start()

    def _build_due(self, progress: Progress) -> None:
        self._build(progress, False, True, lambda: self._builder.cancelled)
        self._looked = 0.0


class _Pinning:
    """What `Searcher.pin` gives."""

    __slots__ = ("_reading", "_searcher")

    def __init__(self, searcher: Searcher) -> None:
        self._searcher = searcher
        self._reading = searcher._store.read()

    def __enter__(self) -> Pinned:
        return self._searcher.pinned(self._reading)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._reading.__exit__(kind, error, trace)


@contextmanager
def _one_at_a_time(folder: Path, timeout: float, cancelled: Callable[[], bool]) -> Iterator[None]:
    """Only one process builds; another one that wants to waits, and finds it done. `BusyError` if
    that is not in time."""
    lock, pid = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644), os.getpid()
    try:
        what = partial("cannot build the index of '{}'".format, folder.parent)
        if not locks.take(lock, "index", timeout, what, cancelled):
            raise Cancelled
        yield
    finally:
        locks.give_back(lock, pid)
