"""The codec takes over: once enough memories are there it is fitted to them, and those that were
written before are recoded; in the background, so that no write and no retrieval waits for it."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from memdb.background import Task, one_at_a_time
from memdb.care.recode import recode
from memdb.memories.codec_choice import CodecChoice
from memdb.protocols import Progress, no_progress
from memdb.storage.store import Store
from memdb.types.shape import MemoryShape

_LOCK = "codec.lock"


class Takeover:
    """The taking over in one open database. What was interrupted goes on when it is opened again:
    that it is due is seen in the records."""

    def __init__(self, store: Store, shape: MemoryShape, codec_choice: CodecChoice) -> None:
        self._store = store
        self._shape = shape
        self._codec_choice = codec_choice
        self._task = Task("fitting the codec and recoding", store.folder, store.id, self._work)
        codec_choice.when_due = lambda: self._task.start(again=True)

    def look(self) -> None:
        """Begin what is due."""
        with suppress(Exception):  # what cannot be read is told to who wants it
            self._codec_choice.look()

    def finish(self, progress: Progress = no_progress) -> None:
        """Have done what is due, also where it failed a short time ago, and wait for it. Errors are
        not raised: what memories are written with is right in any case."""
        with suppress(Exception):
            if self._codec_choice.is_due():
                self._task.start(now=True)
        self._task.wait(progress)

    def cancel(self) -> None:
        """Give up what goes on; it may begin again."""
        self._task.cancel()

    def close(self) -> None:
        """Give up what goes on."""
        self._task.close()

    def state(self) -> dict[str, Any]:
        """See `Task.state`."""
        return self._task.state()

    def _work(self, progress: Progress) -> None:
        while True:
            with self._store.read() as transaction:
                folder = transaction.generation
            try:
                with one_at_a_time(folder / _LOCK, progress):
                    return self._done_alone(progress)
            except FileNotFoundError:
                if folder.exists():  # else a compaction put another generation in its place
                    raise

    def _done_alone(self, progress: Progress) -> None:
        choice = self._codec_choice
        choice.fit_if_due(progress)
        with self._store.read() as transaction:
            choice.refresh(transaction)
            behind = choice.is_recoding(transaction)
        if behind or choice.left:
            try:
                recode(self._store, self._shape, choice, progress)
            except BaseException:
                choice.left = True  # the next write begins it again
                raise
