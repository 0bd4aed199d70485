"""What native libraries mean by an error: the bytes that they were given, or the machine."""

from __future__ import annotations

import errno
import os

_OF_THE_MACHINE = (
    errno.EIO,
    errno.EMFILE,
    errno.ENFILE,
    errno.EACCES,
    errno.EPERM,
    errno.ENODEV,
    errno.ESTALE,
)


def of_the_machine(error: Exception) -> MemoryError | OSError | None:
    """The error as Python has it, if a library that has one kind for all ran out of memory, or was
    refused by the system; None: it complains of the bytes.

    Args:
        error: of zstd, ISA-L or FAISS, which say in words alone what it was.
    """
    text = str(error)
    lower = text.lower()
    if "out of memory" in lower or "alloc" in lower or os.strerror(errno.ENOMEM).lower() in lower:
        return MemoryError(text)
    for code in _OF_THE_MACHINE:
        if os.strerror(code) in text:
            return OSError(code, text)
    return None
