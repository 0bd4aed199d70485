"""What memdb computes faster by a few lines of C. Without this package it does so in torch."""

from __future__ import annotations

import ctypes
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

__all__ = ["API", "attend", "supported"]

#: How the functions here are called: another number when that changes.
API = 1


def _library() -> ctypes.CDLL:
    folder = Path(__file__).parent
    for suffix in EXTENSION_SUFFIXES:
        if (path := folder / f"_attend{suffix}").exists():
            return ctypes.CDLL(str(path))
    raise ImportError(f"there is no built library in {folder}")


_pointer, _number = ctypes.c_void_p, ctypes.c_int64
_loaded = _library()
_attend = _loaded.attend
_attend.argtypes = [_pointer] * 5 + [_number] * 6 + [ctypes.c_float, _pointer]


def supported() -> bool:
    """Whether this processor has what the library was built for (AVX2 and FMA on x86)."""
    return bool(_loaded.attend_supported())


def attend(
    query: int,
    keys: int,
    values: int,
    mask: int,
    filled: int | None,
    rows: int,
    group: int,
    length: int,
    size: int,
    begin: int,
    end: int,
    scale: float,
    out: int,
) -> None:
    """softmax(query keys^T * scale + mask) values, for one token. All arrays are float32 and
    C-contiguous, and are given by their addresses.

    Args:
        query: (rows, group, length): a row is a kv head of a sequence, with its query heads.
        keys: (rows, size, length).
        values: likewise.
        mask: (rows, size), added to scores. Each row needs one place at least that is not -inf.
        filled: (rows,) int64: how many places before `begin` each row attends to; None: to none.
        rows: see above.
        group: likewise.
        length: of a key, a multiple of 8.
        size: places that there is room for.
        begin: the first place that all rows attend to,
        end: and behind the last one; there is one at least.
        scale: factor of scores.
        out: (rows, group, length), written.

    Raises:
        MemoryError: there is none left for the scores.
    """
    given = query, keys, values, mask, filled
    if _attend(*given, rows, group, length, size, begin, end, scale, out):
        raise MemoryError
