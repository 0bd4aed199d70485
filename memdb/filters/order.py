"""The order in which the metadata index holds values, as bytes (storage_format.md, Keys of values),
and which range of it an operator means."""

from __future__ import annotations

import struct
from typing import Any

MAX_STRING = 400  # bytes of an indexed string, its zero bytes escaped; LMDB keys end at 511
OTHER = b"\x7f"  # stands in the index for every value that has no key of its own
_NULL, _FALSE, _TRUE, _NUMBER, _STRING, _END = (bytes([tag]) for tag in range(1, 7))
#: All values that have a key of their own; and all others.
EVERY, OTHERS = (_NULL, _END), (OTHER, bytes([OTHER[0] + 1]))
_LONGEST = 1 + MAX_STRING + 2
_EXACT = 2**53  # from here on float64 skips integers
_FLOAT, _BITS = struct.Struct(">d"), struct.Struct(">Q")

#: From a first key to below a last one.
Range = tuple[bytes, bytes]


def index_key(value: object) -> bytes | None:
    """Bytes in the order of the values, the same for equal values, none a prefix of another's.

    null, false, true, numbers and strings come in this order. None for what the index keeps
    together as `OTHER`: integers beyond ±2**53, strings of more than 400 bytes, arrays, objects.

    Args:
        value: JSON, as metadata may hold it.
    """
    if value is None:
        return _NULL
    if isinstance(value, bool):
        return _TRUE if value else _FALSE
    if isinstance(value, float) or (isinstance(value, int) and abs(value) <= _EXACT):
        return _number_key(float(value))
    if isinstance(value, str) and len(key := _string_key(value)) <= _LONGEST:
        return key
    return None


def ranges(name: str, operand: Any) -> list[Range]:
    """Where the values lie that an operator means, ascending, without overlap. A value with an
    `index_key` is meant if and only if its key is in one of them.

    Args:
        name: `$eq`, `$in`, `$gt`, `$gte`, `$lt` or `$lte`.
        operand: what it compares with.
    """
    if name == "$in":
        return sorted({_cuts(item) for item in operand})
    below, above = _cuts(operand)
    if name == "$eq":
        return [(below, above)]
    start, end = (_STRING, _END) if isinstance(operand, str) else (_NUMBER, _STRING)
    return [
        {"$gt": (above, end), "$gte": (below, end), "$lt": (start, below), "$lte": (start, above)}[
            name
        ]
    ]


def _cuts(value: object) -> tuple[bytes, bytes]:
    """Two bounds that need not be keys: of the indexed values of its type, those less than `value`
    lie below the first, those greater from the second on, and its equal, if any, between them."""
    if isinstance(value, str):
        key = _string_key(value)
        if len(key) > _LONGEST:
            # One byte more than any key has orders them all, and LMDB does not take them longer.
            return key[: _LONGEST + 1], key[: _LONGEST + 1]
        return key, _next(key)
    if isinstance(value, int) and not isinstance(value, bool):
        return _integer_cuts(value)
    found = index_key(value)
    return (b"", b"") if found is None else (found, _next(found))


def _integer_cuts(value: int) -> tuple[bytes, bytes]:
    """The cuts of any integer: the nearest float64 may be greater, less, or out of reach."""
    try:
        nearest = float(value)
    except OverflowError:
        return (_NUMBER, _NUMBER) if value < 0 else (_STRING, _STRING)
    key = _number_key(nearest)
    return key if nearest >= value else _next(key), key if nearest > value else _next(key)


def _number_key(number: float) -> bytes:
    (bits,) = _BITS.unpack(_FLOAT.pack(number + 0.0))  # -0.0 + 0.0 is 0.0
    # IEEE 754 orders as sign and magnitude: turn the negative ones round, put the others above.
    return _NUMBER + _BITS.pack(bits ^ (0xFFFFFFFFFFFFFFFF if bits >> 63 else 1 << 63))


def _string_key(text: str) -> bytes:
    # With a single zero at its end, the key of "a" would begin that of "a\0".
    return _STRING + text.encode().replace(b"\0", b"\0\xff") + b"\0\0"


def _next(key: bytes) -> bytes:
    """The first bytes behind all that begin with `key`, of the same length."""
    return (int.from_bytes(key) + 1).to_bytes(len(key))
