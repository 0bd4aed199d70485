"""How often each reference's memory was retrieved: what `warm --top` goes by.

Counts are collected in RAM and added to a file beside the data now and then, by a thread that ends
with that, and at the end: a kill costs the last of them, a damaged file all of them, and neither
anything else.
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

Entries = NDArray[np.void]


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
        self._flushing: threading.Thread | None = None

    def count(self, references: Iterable[int], folder: Path) -> None:
        """Count a use of each; `folder` is the generation they are in. It never waits for the
        disk."""
        if not self._keep:
            return
        with self._guard:
            self._new.extend(references)
            late = time.monotonic() - self._flushed > _FLUSH_EVERY
            due = late or len(self._new) > _FLUSH_AT
            if not due or (self._flushing is not None and self._flushing.is_alive()):
                return
            self._flushed = time.monotonic()
            self._flushing = threading.Thread(
                target=self._flush, args=(folder,), name="memdb-usage"
            )
            self._flushing.start()

    def flush(self, folder: Path) -> None:
        """Add what was counted to the file; a disk that refuses costs the counts alone."""
        if self._flushing is not None:
            self._flushing.join()
        self._flush(folder)

    def _flush(self, folder: Path) -> None:
        with self._guard:
            self._flushed = time.monotonic()
            if not self._new:
                return
            new, self._new = self._new, []
        try:
            _add(folder, np.array(new, np.int64))
        except BusyError:  # another process adds, or was stopped while it did
            with self._guard:
                self._new = new + self._new
        except OSError:
            return

    def counts(self, folder: Path) -> Counter[int]:
        """How often each reference was used, by id."""
        if self._flushing is not None:
            self._flushing.join()
        with self._guard:
            new = Counter(self._new)
        new.update(read_usage(folder))
        return new


def read_usage(folder: Path) -> Counter[int]:
    """The counts in a generation's file; none if it is missing or damaged. OSError if it cannot be
    read: who took that for none would write over it."""
    return Counter(dict(_entries(folder).tolist()))


def write_usage(folder: Path, counts: Counter[int]) -> None:
    """Put the counts in the place of those in the file."""
    items = sorted((reference, min(count, _MOST)) for reference, count in counts.items())
    _write(folder, np.array(items, _ENTRY))


def _entries(folder: Path) -> Entries:
    """What the file holds, as it is there; nothing if it is missing or damaged."""
    try:
        content = (folder / FILE).read_bytes()
    except FileNotFoundError:
        return np.empty(0, _ENTRY)
    right = content[:8] == _MAGIC and content[8:16] == _digest(memoryview(content)[16:])
    if not right or (len(content) - 16) % _ENTRY.itemsize:
        return np.empty(0, _ENTRY)
    return np.frombuffer(content, _ENTRY, offset=16)


def _write(folder: Path, entries: Entries) -> None:
    new = folder / f"{FILE}.{os.getpid()}.new"
    with new.open("wb") as file:
        file.write(_MAGIC + _digest(entries.data.cast("B") if len(entries) else b""))
        file.write(entries.tobytes())
    new.rename(folder / FILE)


def _add(folder: Path, used: NDArray[np.int64]) -> None:
    handle, pid = os.open(folder, os.O_RDONLY | os.O_CLOEXEC), os.getpid()
    try:
        # Among processes that add; nobody else locks it.
        locks.take(handle, "write", _WAIT, lambda: f"cannot count uses in '{folder}'")
        _write(folder, _sum(_entries(folder), used))
    finally:
        locks.give_back(handle, pid)


def _sum(entries: Entries, used: NDArray[np.int64]) -> Entries:
    """The entries, by ascending id, once each of some ids was used once more."""
    if (entries["reference"][1:] <= entries["reference"][:-1]).any():  # nobody writes them so
        entries = np.array(sorted(dict(entries.tolist()).items()), _ENTRY)
    ids, times = np.unique(used, return_counts=True)
    known = np.isin(ids, entries["reference"], assume_unique=True)
    summed = np.concatenate([entries, np.zeros(np.count_nonzero(~known), _ENTRY)])
    summed["reference"][len(entries) :] = ids[~known]
    summed = summed[np.argsort(summed["reference"], kind="stable")]
    places = np.searchsorted(summed["reference"], ids)
    counts = summed["count"][places]
    summed["count"][places] = counts + np.minimum(
        times.astype(np.uint64), np.uint64(_MOST) - counts
    )
    return summed


def _digest(entries: bytes | memoryview) -> bytes:
    return xxhash.xxh3_64_intdigest(entries).to_bytes(8, "little")
