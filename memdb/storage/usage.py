"""How often each reference's memory was retrieved: what `warm --top` goes by.

Counts are collected in RAM and added to a file beside the data now and then, and at the end: a
kill costs the last of them, a damaged file all of them, and neither anything else.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from memdb.errors import BusyError
from memdb.storage import locks

FILE = "usage"
_MAGIC = b"memdbuse"
_ENTRY = np.dtype([("reference", "<i8"), ("count", "<u8")])
_MOST = 2**64 - 1
_FLUSH_EVERY = 30.0  # seconds
_FLUSH_AT = 100_000  # uses
_WAIT = 0.5  # seconds for another process that flushes


class Usage:
    """The counts of one open database.

    Args:
        keep: whether uses are counted; not in one that is open to be read alone.
    """

    def __init__(self, *, keep: bool = True) -> None:
        self._keep = keep
        self._new: list[int] = []
        self._flushed = time.monotonic()
        self._guard = threading.Lock()

    def count(self, references: Iterable[int], folder: Path) -> None:
        """Count a use of each; `folder` is the generation they are in."""
        if not self._keep:
            return
        with self._guard:
            self._new.extend(references)
            late = time.monotonic() - self._flushed > _FLUSH_EVERY
            due = late or len(self._new) > _FLUSH_AT
        if due:
            self.flush(folder)

    def flush(self, folder: Path) -> None:
        """Add what was counted to the file; a disk that refuses costs the counts alone."""
        with self._guard:
            self._flushed = time.monotonic()
            if not self._new:
                return
            new, self._new = self._new, []
        try:
            _add(folder, Counter(new))
        except BusyError:  # another process adds, or was stopped while it did
            with self._guard:
                self._new = new + self._new
        except OSError:
            return

    def counts(self, folder: Path) -> Counter[int]:
        """How often each reference was used, by id."""
        with self._guard:
            new = Counter(self._new)
        new.update(read_usage(folder))
        return new


def read_usage(folder: Path) -> Counter[int]:
    """The counts in a generation's file; none if it is missing or damaged. OSError if it cannot be
    read: who took that for none would write over it."""
    try:
        content = (folder / FILE).read_bytes()
    except FileNotFoundError:
        return Counter()
    entries = content[16:]
    right = content[:8] == _MAGIC and content[8:16] == _digest(entries)
    if not right or len(entries) % _ENTRY.itemsize:
        return Counter()
    return Counter(dict(np.frombuffer(entries, _ENTRY).tolist()))


def write_usage(folder: Path, counts: Counter[int]) -> None:
    """Put the counts in the place of those in the file."""
    items = sorted((reference, min(count, _MOST)) for reference, count in counts.items())
    entries: NDArray[np.void] = np.array(items, _ENTRY)
    new = folder / f"{FILE}.{os.getpid()}.new"
    new.write_bytes(_MAGIC + _digest(entries.tobytes()) + entries.tobytes())
    new.rename(folder / FILE)


def _add(folder: Path, new: Counter[int]) -> None:
    handle, pid = os.open(folder, os.O_RDONLY | os.O_CLOEXEC), os.getpid()
    try:
        # Among processes that add; nobody else locks it.
        locks.take(handle, "write", _WAIT, lambda: f"cannot count uses in '{folder}'")
        counts = read_usage(folder)
        counts.update(new)
        write_usage(folder, counts)
    finally:
        locks.give_back(handle, pid)


def _digest(entries: bytes) -> bytes:
    return xxhash.xxh3_64_intdigest(entries).to_bytes(8, "little")
