"""Locks between processes, and between threads: `flock(2)` on files, never waited for without end.

Who takes a file for itself writes into it which process it is, and for what: so who waits in vain
can say for whom. What stands there when the file is not locked means nothing.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Literal

from memdb.errors import BusyError, StorageError

#: Seconds that a call waits for a lock where nobody says how long.
BUSY_TIMEOUT = 30.0

#: For what a file is locked. `share` locks it together with others that do.
Purpose = Literal["share", "write", "alone", "replace", "index"]
_DOES = {
    "write": "is writing",
    "alone": "keeps writers out while it replaces or checks the data",
    "replace": "is making the database or replacing its data",
    "index": "is building the index",
}

_PAUSE = 0.0002, 0.002  # seconds between two looks: at first, and at most
_NOTE = 96  # bytes


class _Thread(threading.local):
    """Which files this thread has locked to write: (process, device, number)."""

    def __init__(self) -> None:
        self.writes: set[tuple[int, int, int]] = set()


_THIS_THREAD = _Thread()


def take(
    handle: int,
    purpose: Purpose,
    timeout: float,
    what: Callable[[], str],
    cancelled: Callable[[], bool] = lambda: False,
    end: float | None = None,
) -> bool:
    """Lock an open file; whoever called it gives it back with `give_back`.

    Args:
        handle: of the file.
        purpose: what for.
        timeout: seconds to wait; 0 tries once.
        what: says what cannot be done, for the error: "cannot write to 'my.memdb'".
        cancelled: looked at while it waits.
        end: until when, on the clock of `time.monotonic`, if some of the time is over already.

    Returns:
        Whether it is locked; False: it was cancelled.

    Raises:
        StorageError: this thread has it locked to write: to wait for itself would take for ever.
        BusyError: it is not free in time. It names who holds it.
        OSError: it cannot be locked.
    """
    if _THIS_THREAD.writes and _key(os.fstat(handle)) in _THIS_THREAD.writes:
        raise StorageError(
            f"{what()}: this thread is in the middle of another write to it (a `with` block, or a "
            "function that a write calls, such as `progress`). End that first"
        )
    how = fcntl.LOCK_NB | (fcntl.LOCK_SH if purpose == "share" else fcntl.LOCK_EX)
    if not _taken(handle, how):
        end = time.monotonic() + timeout if end is None else end
        pause, longest = _PAUSE
        while not _taken(handle, how):
            if cancelled():
                return False
            if time.monotonic() >= end:
                raise BusyError(
                    f"{what()}: {_holder(handle)}, and was not done after {timeout:g} s"
                )
            time.sleep(pause)
            pause = min(pause * 2, longest)
    if purpose != "share":
        _sign(handle, purpose)
    return True


def give_back(handle: int, pid: int) -> None:
    """Unlock an open file, and close it; `pid` is of the process that locked it. A child that was
    forked since shares the lock: there the file is only closed."""
    try:
        if pid == os.getpid():  # closing alone would leave it locked while such a child lives
            fcntl.flock(handle, fcntl.LOCK_UN)
    finally:
        os.close(handle)


class Writing:
    """Locks an open file to write while a `with` statement lasts, and closes it. While it waits for
    that, `waiting` is called now and then; what it raises ends the waiting.

    Raises: as `take`.
    """

    __slots__ = ("_handle", "_key", "_pid")

    def __init__(
        self,
        handle: int,
        purpose: Purpose,
        timeout: float,
        what: Callable[[], str],
        waiting: Callable[[], None] | None = None,
        end: float | None = None,
    ) -> None:
        self._handle = handle
        self._pid = os.getpid()
        try:
            take(handle, purpose, timeout, what, lambda: _tell(waiting), end)
            self._key = _key(os.fstat(handle))
        except BaseException:
            os.close(handle)
            raise
        _THIS_THREAD.writes.add(self._key)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        _THIS_THREAD.writes.discard(self._key)
        give_back(self._handle, self._pid)


def _tell(waiting: Callable[[], None] | None) -> bool:
    """Tell somebody of the waiting, who may end it by raising."""
    if waiting is not None:
        waiting()
    return False


def is_writing(folder: Path, name: str) -> bool:
    """Whether this thread has a file locked to write."""
    if not _THIS_THREAD.writes:
        return False
    try:
        file = (folder / name).stat()
    except OSError:
        return False
    return _key(file) in _THIS_THREAD.writes


def is_alone(path: Path) -> bool:
    """Whether somebody keeps a file locked for longer than a write takes."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        if _taken(handle, fcntl.LOCK_SH | fcntl.LOCK_NB):
            return False
        return is_signed(handle, "alone")
    except OSError:
        return False
    finally:
        os.close(handle)


def is_signed(handle: int, purpose: Purpose) -> bool:
    """Whether who has an open file locked said that it is for this."""
    return _signed(handle)[2] == purpose


def _key(file: os.stat_result) -> tuple[int, int, int]:
    return os.getpid(), file.st_dev, file.st_ino


def _taken(handle: int, how: int) -> bool:
    try:
        fcntl.flock(handle, how)
    except BlockingIOError:
        return False
    return True


def _sign(handle: int, purpose: Purpose) -> None:
    """Say who has the file, and for what. On a full disk it stays unsaid."""
    note = _note(os.getpid(), purpose)
    with suppress(OSError):
        if os.pread(handle, _NOTE, 0) != note:
            os.pwrite(handle, note, 0)


@lru_cache(8)
def _note(process: int, purpose: Purpose) -> bytes:
    text = f"{process} {purpose} {os.uname().nodename}"[: _NOTE - 1].ljust(_NOTE - 1) + "\n"
    return text.encode("ascii", "replace")


def _signed(handle: int) -> tuple[int, str, str]:
    """Process, machine and purpose of who signed; process 0 if nobody did."""
    try:
        process, purpose, machine = os.pread(handle, _NOTE, 0).decode("ascii").split()
        return int(process), machine, purpose
    except (OSError, ValueError):
        return 0, "", ""


def _holder(handle: int) -> str:
    """Who has the file, as far as it is known."""
    process, machine, purpose = _signed(handle)
    here = machine == os.uname().nodename
    if not process or (here and not _lives(process)):
        return "another process holds it"
    if here and process == os.getpid():
        name = "another thread of this process"
    else:
        name = f"process {process}" + ("" if here else f" of '{machine}'")
    return f"{name} {_DOES.get(purpose, 'holds it')}"


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # of another user
        return True
    return True
