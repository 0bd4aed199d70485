"""Metadata filters: which documents a filter means, and where the metadata index holds them.

A filter names metadata keys, and each key's condition must hold; a key that a document lacks
matches nothing. A condition is a JSON value, which the metadata must equal, or an object of
operators, all of which must hold:

    {"lang": "en", "year": {"$gte": 1990, "$lt": 2000}, "kind": {"$in": ["fact", "rule"]}}

Equality is JSON's: `true` is not 1, but 1 is 1.0. Ranges compare numbers with numbers and strings
with strings, by code point; a value of another type is in no range. To compare with an object whose
names all begin with `$`, write `{"$eq": object}`.
"""

from __future__ import annotations

import operator
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from memdb.errors import InvalidInputError
from memdb.types.canonical import json_payload, read_json
from memdb.types.checks import check_metadata

Where = Mapping[str, Any]

_ORDER: dict[str, Callable[[Any, Any], bool]] = {
    "$gt": operator.gt,
    "$gte": operator.ge,
    "$lt": operator.lt,
    "$lte": operator.le,
}
OPERATORS = ("$eq", "$in", *_ORDER)

MAX_STRING = 400  # bytes of an indexed string, its zero bytes escaped; LMDB keys end at 511
OTHER = b"\x7f"  # stands in the index for every value that has no key of its own
_NULL, _FALSE, _TRUE, _NUMBER, _STRING, _END = (bytes([tag]) for tag in range(1, 7))
_LONGEST = 1 + MAX_STRING + 2
_EXACT = 2**53  # from here on float64 skips integers
_FLOAT, _BITS = struct.Struct(">d"), struct.Struct(">Q")


@dataclass(frozen=True, eq=False)
class Condition:
    """What is asked of one metadata key.

    Attributes:
        tests: (operator, operand) pairs; all must hold.
    """

    tests: tuple[tuple[str, Any], ...]

    def matches(self, value: object) -> bool:
        """Whether a JSON value fulfils all tests."""
        return all(_holds(name, value, operand) for name, operand in self.tests)

    def ranges(self) -> list[tuple[bytes, bytes]]:
        """Where the index holds what matches: (first key, key behind the last), ascending, without
        overlap. A value with an `index_key` matches if and only if its key is in one of them."""
        found = [(_NULL, _END)]
        for name, operand in self.tests:
            found = [
                (low, high)
                for one in found
                for other in _ranges(name, operand)
                if (low := max(one[0], other[0])) < (high := min(one[1], other[1]))
            ]
        return found

    def reaches_other(self) -> bool:
        """Whether a value without an `index_key` may match; False is certain."""
        return not any(
            (name == "$eq" and _only_indexed(operand))
            or (name == "$in" and all(map(_only_indexed, operand)))
            for name, operand in self.tests
        )


@dataclass(frozen=True)
class Filter:
    """A filter that `parse` understood. Equal, and of the same hash, where the bytes are.

    Attributes:
        key: canonical JSON of the filter.
        conditions: what is asked, by metadata key.
    """

    key: bytes
    conditions: Mapping[str, Condition] = field(compare=False)

    def matches(self, metadata: Mapping[str, Any]) -> bool:
        """Whether a document with this metadata is meant."""
        return all(
            name in metadata and condition.matches(metadata[name])
            for name, condition in self.conditions.items()
        )


def parse(where: Where) -> Filter:
    """The filter that `where` describes; later changes to `where` do not reach it.

    Raises:
        InvalidInputError: saying which key's condition is wrong, and what would be right.
    """
    if not isinstance(where, Mapping):
        raise InvalidInputError(f"a filter must be an object, got {type(where).__name__}")
    conditions = {name: _condition(name, wanted) for name, wanted in where.items()}
    return Filter(json_payload(dict(where)), conditions)


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


# --- reading a filter -----------------------------------------------------------------------------


def _condition(name: object, wanted: object) -> Condition:
    if not isinstance(name, str):
        raise InvalidInputError(f"a filter names metadata keys, which are strings, not {name!r}")
    if not isinstance(wanted, dict) or not wanted or not all(map(_is_operator, wanted)):
        return Condition((("$eq", _json(name, wanted)),))
    return Condition(tuple((test, _operand(name, test, wanted[test])) for test in wanted))


def _is_operator(name: object) -> bool:
    return isinstance(name, str) and name.startswith("$")


def _operand(name: str, test: str, given: object) -> Any:
    if test not in OPERATORS:
        raise InvalidInputError(
            f"the filter on {name!r} has an unknown operator {test!r}; there are "
            f"{', '.join(OPERATORS)}. To compare with this object, write {{'$eq': ...}} around it"
        )
    operand = _json(name, given)
    if test == "$in" and not isinstance(operand, list):
        raise InvalidInputError(
            f"the filter on {name!r}: '$in' takes an array of values, got {operand!r:.60}"
        )
    if test in _ORDER and not (_is_number(operand) or isinstance(operand, str)):
        raise InvalidInputError(
            f"the filter on {name!r}: {test!r} takes a number or a string, got {operand!r:.60}"
        )
    return operand


def _json(name: str, given: object) -> Any:
    """A copy, as it would come back from metadata."""
    try:
        check_metadata({name: given})
    except InvalidInputError as error:
        raise InvalidInputError(
            f"the filter on {name!r} compares with what no metadata can hold: {error}"
        ) from error
    return read_json(json_payload(given))


# --- matching -------------------------------------------------------------------------------------


def _holds(name: str, value: object, operand: Any) -> bool:
    if name == "$eq":
        return _same(value, operand)
    if name == "$in":
        return any(_same(value, item) for item in operand)
    comparable = (_is_number(value) and _is_number(operand)) or (
        isinstance(value, str) and isinstance(operand, str)
    )
    return comparable and _ORDER[name](value, operand)


def _same(one: object, other: object) -> bool:
    """Whether they are the same JSON: to Python `1 == True`, to JSON a number is no boolean."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    return isinstance(one, bool) == isinstance(other, bool) and one == other


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


# --- finding in the index -------------------------------------------------------------------------


def _ranges(name: str, operand: Any) -> list[tuple[bytes, bytes]]:
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


def _only_indexed(operand: object) -> bool:
    """Whether everything that equals it has an index key: 2.0**60 has one, 2**60 has none."""
    huge = isinstance(operand, float) and abs(operand) > _EXACT
    return index_key(operand) is not None and not huge


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
