"""A folder that one process works in at a time."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from memdb import InvalidInputError, StorageError


@contextmanager
def held(lock: Path, busy: str) -> Iterator[None]:
    """Hold a lock file; the system lets go of it when the process ends, however it ends.

    Args:
        lock: the file; made if it is missing.
        busy: what to say if another process holds it.

    Raises:
        InvalidInputError: saying `busy`.
        StorageError: the file cannot be made.
    """
    try:
        file = lock.open("w")
    except OSError as error:
        raise StorageError(f"cannot write '{lock}': {error.strerror or error}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InvalidInputError(busy) from error
        yield
