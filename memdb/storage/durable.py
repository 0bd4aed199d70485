"""Writing so that it stays."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

_ZEROS = bytes(1 << 16)


def sync(path: Path) -> None:
    """Wait until a file or a folder is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        flush(handle)
    finally:
        os.close(handle)


def write_file(path: Path, data: bytes | bytearray) -> None:
    """Write a file, and wait until its bytes are on disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        flush(file.fileno())


def flush(handle: int) -> None:
    """Wait until an open file is on disk. (On macOS `fsync` waits for the drive alone, which may
    keep what it got in a cache of its own.)"""
    whole = getattr(fcntl, "F_FULLFSYNC", None)
    if whole is not None:
        try:
            fcntl.fcntl(handle, whole)
        except OSError:  # a file system that does not know it
            pass
        else:
            return
    os.fsync(handle)


def lengthen(handle: int, size: int) -> None:
    """Make an open file at least `size` bytes long, and have the disk's space for what is new, so
    that a map of it can be written on a full disk. What is there stays.

    Raises:
        OSError: the disk is full.
    """
    there = os.fstat(handle).st_size
    if hasattr(os, "posix_fallocate"):
        # From the start: what is there may have holes, too.
        os.posix_fallocate(handle, 0, size)
        return
    # macOS has no such call. Zeros take space, which a longer length alone does not.
    while there < size:
        there += os.pwrite(handle, _ZEROS[: size - there], there)


def reach(handle: int, size: int) -> None:
    """Make an open file at least `size` bytes long; what is new reads as zeros, and may have no
    space on the disk.

    Raises:
        OSError: the disk is full, or no file can be so long.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, size - 1, 1)  # never shortens
    elif os.fstat(handle).st_size < size:
        os.pwrite(handle, b"\0", size - 1)
