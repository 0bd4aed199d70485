"""Weights in pages of 2 MB.

A token's pass reads all weights once, from one end to the other, and a processor that looks ahead
stops at the end of each page: in pages of 4 KB a step takes up to a quarter longer. Linux gives
larger ones to whoever asks. ONNX Runtime does not, so it is asked for what it allocated.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PAGE = 2 << 20
_WANTED, _NOW = 14, 25  # MADV_HUGEPAGE, MADV_COLLAPSE (Linux 6.1)

# Of a process's own memory: readable, writable, of no file.
_OWN = re.compile(r"([0-9a-f]+)-([0-9a-f]+) rw-p \S+ 00:00 0 +(\[heap\])?$")


@contextmanager
def in_huge_pages() -> Iterator[None]:
    """Put what is allocated within the `with`, and stays, into huge pages, where the system has
    such; else nothing happens. What was freed before goes back to the system first: it would lie
    in between, and loading a tokenizer leaves tens of megabytes."""
    _trim()
    before = _regions()
    yield
    for start, end in _added(before, _regions()):
        first, last = -(-start // _PAGE) * _PAGE, end // _PAGE * _PAGE
        if first < last:
            _advise(first, last - first)


def _trim() -> None:
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):  # not the GNU C library's
        return


def _regions() -> list[tuple[int, int]]:
    """Where the process's own memory lies, from low to high."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except OSError:  # another system
        return []
    found = (_OWN.match(line) for line in lines)
    return [(int(one[1], 16), int(one[2], 16)) for one in found if one]


def _added(
    before: list[tuple[int, int]], after: list[tuple[int, int]]
) -> Iterator[tuple[int, int]]:
    """What of some regions is not in others."""
    for start, end in after:
        for old_start, old_end in before:
            if old_end <= start or end <= old_start:
                continue
            if start < old_start:
                yield start, old_start
            start = max(start, old_end)
        if start < end:
            yield start, end


def _advise(start: int, length: int) -> None:
    try:
        madvise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return
    for advice in (_WANTED, _NOW):  # it may not be followed: then pages stay as they are
        madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), ctypes.c_int(advice))
