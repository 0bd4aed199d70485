"""One kind of background work of one open database.

It is done in a thread that is there only while there is something to do. It never raises into
what a caller asked for: a failure is said once by `logging` (logger `memdb`), shown in
`MemDB.stats`, and the work is tried again after a pause. It ends with `close`, and with the
interpreter: a thread that comes back from native code when there is no interpreter any more ends
the process with a signal.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from memdb.errors import MemDBError
from memdb.protocols import Progress, no_progress

_log = logging.getLogger("memdb")

_FIRST_PAUSE, _LONGEST_PAUSE = 60.0, 3600.0  # seconds after a failure; twice as long each time
_LOOK = 0.05  # seconds between two looks of who waits


class Cancelled(Exception):  # noqa: N818 (no error: somebody wants it to stop)
    """The work was given up."""


@dataclass(frozen=True)
class _Failure:
    """Why the work was not done.

    Attributes:
        error: of the last attempt.
        times: attempts that failed, one after the other.
        again: when it is tried again, by `time.monotonic`.
    """

    error: str
    times: int
    again: float


class Task:
    """Background work: one thread at a time, none while there is nothing to do.

    Args:
        what: names it in the log, as in "building the index".
        folder: of the database, for the log.
        database: its id.
        work: does what is due, and nothing where nothing is. It calls the `Progress` that it is
            given often: that raises `Cancelled` once the work is to be given up.

    Attributes:
        cancelled: whether it is to be given up.
    """

    #: Of the whole process: to open a database once more is no reason to try once more.
    _failures: ClassVar[dict[tuple[str, str, Path], _Failure]] = {}
    _all: ClassVar[weakref.WeakSet[Task]] = weakref.WeakSet()
    _all_guard: ClassVar[threading.Lock] = threading.Lock()
    _exiting: ClassVar[bool] = False

    def __init__(
        self, what: str, folder: Path, database: str, work: Callable[[Progress], None]
    ) -> None:
        self.cancelled = False
        self._what = what
        self._folder = folder
        self._key = what, database, folder
        self._work = work
        self._guard = threading.Lock()
        self._thread: threading.Thread | None = None  # the last one
        self._running = False
        self._once_more = False
        self._closed = False
        self._stage = "", 0, 0
        with Task._all_guard:
            Task._all.add(self)

    def start(self, *, again: bool = False, now: bool = False) -> None:
        """Begin, unless it goes on already, or failed a short time ago. Never raises.

        Args:
            again: if it goes on already, do it once more then: there is more to do.
            now: also if it failed a short time ago.
        """
        with self._guard:
            if self._closed or Task._exiting:
                return
            if self._running:
                self._once_more |= again
                return
            failure = self._failures.get(self._key)
            if failure is not None and time.monotonic() < failure.again and not now:
                return
            self.cancelled = self._once_more = False
            self._stage = "", 0, 0
            # A daemon: else the interpreter would wait for its end before anybody could hurry it.
            thread = threading.Thread(target=self._run, name=f"memdb {self._what}", daemon=True)
            self._running = True
            try:
                thread.start()
            except RuntimeError as error:  # the system has no more, or the interpreter ends
                self._running = False
                self._failed(error)
            else:
                self._thread = thread

    def wait(self, progress: Progress = no_progress) -> None:
        """Wait until nothing goes on, and be told of it."""
        told = "", 0, 0
        while self._running:
            if self._thread is not None:
                self._thread.join(_LOOK)
            stage = self._stage
            if stage != told and stage[0]:
                told = stage
                progress(*stage)

    def cancel(self) -> None:
        """Have it given up, and wait for that. It may be started again."""
        with self._guard:
            self.cancelled = True
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def close(self) -> None:
        """As `cancel`, for good."""
        with self._guard:
            self._closed = True
        self.cancel()

    def worked(self) -> None:
        """Forget that it failed: somebody has done it."""
        failure = self._failures.pop(self._key, None)
        if failure is not None:
            _log.info("%s: %s works again", self._folder, self._what)

    def state(self) -> dict[str, Any]:
        """What goes on, as JSON values: `running`, whether it is at work; `failure`, None or an
        object of `error` (a text), `times` (attempts that failed) and `again_in` (seconds until
        it may be tried again)."""
        failure = self._failures.get(self._key)
        return {
            "running": self._running,
            "failure": failure
            and {
                "error": failure.error,
                "times": failure.times,
                "again_in": round(max(0.0, failure.again - time.monotonic()), 1),
            },
        }

    # --- in the thread ---

    def _run(self) -> None:
        while True:
            done = self._attempt()
            with self._guard:
                if self.cancelled or not (done and self._once_more):
                    self._running = False
                    return
                self._once_more = False

    def _attempt(self) -> bool:
        began = time.monotonic()
        try:
            self._work(self._progress)
        except Cancelled:
            return False
        except Exception as error:
            if not self.cancelled:  # else it was told to stop, and what it worked on is closed
                self._failed(error)
            return False
        self.worked()
        _log.debug("%s: %s took %.1f s", self._folder, self._what, time.monotonic() - began)
        return True

    def _progress(self, stage: str, done: int, total: int) -> None:
        if self.cancelled:
            raise Cancelled
        self._stage = stage, done, total

    def _failed(self, error: Exception) -> None:
        before = self._failures.get(self._key)
        times = 1 if before is None else before.times + 1
        pause = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2.0 ** (times - 1))
        said = f"{error}" or type(error).__name__
        self._failures[self._key] = _Failure(said, times, time.monotonic() + pause)
        if before is None:  # once: whoever looks finds the rest in `stats`
            _log.warning(
                "%s: %s failed: %s. Nothing is lost by it. It is tried again in the background, "
                "after a pause; `stats` shows how it goes",
                self._folder,
                self._what,
                said,
                exc_info=None if isinstance(error, (OSError, MemDBError)) else error,
            )

    # --- the ends of a process ---

    @classmethod
    def _end_all(cls) -> None:
        """Before the interpreter goes: no thread of ours may come back when it is gone."""
        cls._exiting = True
        with cls._all_guard:
            tasks = list(cls._all)
        for task in tasks:
            with task._guard:
                task._closed = task.cancelled = True
        for task in tasks:
            while (thread := task._thread) is not None and thread.is_alive():
                try:
                    thread.join()
                except KeyboardInterrupt:  # it is on its way
                    continue

    @classmethod
    def _forget_all(cls) -> None:
        """In a child after a fork: it has none of its parent's threads, but locks as they were."""
        cls._all_guard = threading.Lock()
        for task in list(cls._all):
            task._guard = threading.Lock()
            task._thread = None
            task._running = False
            task._closed = True


atexit.register(Task._end_all)
os.register_at_fork(after_in_child=Task._forget_all)
