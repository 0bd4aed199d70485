"""Taking turns: of several processes, and several objects of one, only one does a piece of work."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from memdb.protocols import Progress

_LOOK = 0.05  # seconds between two looks whether it is free


@contextmanager
def one_at_a_time(lock: Path, progress: Progress) -> Iterator[None]:
    """Hold a lock; who has to wait finds the work done when it is free.

    Args:
        lock: a file that is made if it is missing, and carries the lock.
        progress: told of the waiting; what it raises ends that.

    Raises:
        OSError: the file cannot be made.
    """
    handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                progress("waiting for another process", 0, 0)
                time.sleep(_LOOK)
        yield
    finally:
        os.close(handle)
