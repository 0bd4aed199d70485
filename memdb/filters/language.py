"""Metadata filters: what they may say, and which documents they mean.

    filter     {member, ...}                             all must hold; {} means every document
    member     path: value                               the same as path: {"$eq": value}
               path: {operator: operand, ...}            all must hold
               "$and": [filter, ...]                     all must hold
               "$or": [filter, ...]                      one must hold
               "$not": filter                            it must not hold
    operator   "$eq": value     "$ne": value             is it, is it not
               "$in": [value, ...]  "$nin": [...]        is one of them, is none of them
               "$gt" "$gte" "$lt" "$lte": bound          a number or a string
               "$exists": true or false                  whether the path leads to anything

    {"lang": "en", "year": {"$gte": 1990, "$lt": 2000}, "author.name": {"$in": ["Ann", "Bo"]}}
    {"$or": [{"tags": "sea"}, {"$not": {"kind": "fact"}}]}

A value is JSON. An object that has a name with `$` at its beginning is read as operators, and all
its names must be; to compare with such an object, write `{"$eq": object}`. The names of members
with `$` are the three above and no others. Filters are nested at most 32 deep.

**Values.** Equality is JSON's: `true` is not 1, but 1 is 1.0, and `null` is a value like others.
Ranges compare numbers with numbers and strings with strings, by code point; a value of another type
is in no range.

**Arrays.** An operator holds for an array if it holds for the array as a whole or for one of its
elements: `{"tags": "sea"}` means `["sea", "salt"]`, and `{"tags": ["sea", "salt"]}` does, too. Each
operator may have an element of its own. `$ne` and `$nin` hold if `$eq` and `$in` do not: no element
is it.

**What is not there.** `$eq`, `$in`, the ranges and `{"$exists": true}` do not hold for a path that
leads nowhere; `$ne`, `$nin` and `{"$exists": false}` do. `$not` holds wherever its filter does not.

**Paths.** A path is the name of a metadata key. If the metadata has no such key, a dot leads into
an object: `author.name` is the key `name` of the object under `author`. A key that has dots itself
comes first: of several names that begin the path, in the metadata or in an object within it, the
longest counts. Where the path goes on and there is an array, it goes on in each of its elements
that is an object; the member holds if it does for one of the values found (so `$ne`: if no value is
equal). A key whose name begins with `$` cannot be asked for.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from memdb.errors import InvalidInputError
from memdb.filters import order
from memdb.types.canonical import json_payload, read_json
from memdb.types.checks import check_metadata

Where = Mapping[str, Any]

MAX_NESTED = 32  # filters within each other

_ORDER: dict[str, Callable[[Any, Any], bool]] = {
    "$gt": operator.gt,
    "$gte": operator.ge,
    "$lt": operator.lt,
    "$lte": operator.le,
}
_NEGATED = {"$ne": "$eq", "$nin": "$in"}
OPERATORS = ("$eq", "$ne", "$in", "$nin", *_ORDER, "$exists")
COMBINERS = ("$and", "$or", "$not")


class Node(ABC):
    """A part of a filter that holds for a document, or does not."""

    @abstractmethod
    def matches(self, metadata: Mapping[str, Any]) -> bool:
        """Whether it holds for a document with this metadata."""

    @property
    def constant(self) -> bool | None:
        """What it says of every document, if that is seen without looking at one."""
        return None


@dataclass(frozen=True)
class All(Node):
    """All parts hold."""

    parts: tuple[Node, ...]

    @property
    def constant(self) -> bool | None:
        """See `Node`."""
        found = {part.constant for part in self.parts}
        return False if False in found else None if None in found else True

    def matches(self, metadata: Mapping[str, Any]) -> bool:
        """See `Node`."""
        return all(part.matches(metadata) for part in self.parts)


@dataclass(frozen=True)
class One(Node):
    """One of the parts holds, or more."""

    parts: tuple[Node, ...]

    @property
    def constant(self) -> bool | None:
        """See `Node`."""
        found = {part.constant for part in self.parts}
        return True if True in found else None if None in found else False

    def matches(self, metadata: Mapping[str, Any]) -> bool:
        """See `Node`."""
        return any(part.matches(metadata) for part in self.parts)


@dataclass(frozen=True)
class Not(Node):
    """The part does not hold."""

    part: Node

    @property
    def constant(self) -> bool | None:
        """See `Node`."""
        inner = self.part.constant
        return None if inner is None else not inner

    def matches(self, metadata: Mapping[str, Any]) -> bool:
        """See `Node`."""
        return not self.part.matches(metadata)


@dataclass(frozen=True)
class Exists(Node):
    """A path leads to a value."""

    path: str

    def matches(self, metadata: Mapping[str, Any]) -> bool:
        """See `Node`."""
        return any(True for _ in values_at(metadata, self.path))


@dataclass(frozen=True)
class Condition(Node):
    """All tests hold for the values that a path leads to.

    Attributes:
        path: where the values are.
        tests: (operator, operand) pairs, of `$eq`, `$in` and the ranges; at least one.
    """

    path: str
    tests: tuple[tuple[str, Any], ...]

    @property
    def constant(self) -> bool | None:
        """See `Node`."""
        return False if ("$in", []) in self.tests else None

    def matches(self, metadata: Mapping[str, Any]) -> bool:
        """See `Node`."""
        found = [one for value in values_at(metadata, self.path) for one in _with_elements(value)]
        return bool(found) and all(
            any(_holds(name, value, operand) for value in found) for name, operand in self.tests
        )

    def ranges(self) -> list[order.Range]:
        """Where the index holds the values that match, ascending, without overlap. A value with an
        `index_key` matches if and only if its key is in one of them."""
        found = [order.EVERY]
        for name, operand in self.tests:
            found = [
                (low, high)
                for one in found
                for other in order.ranges(name, operand)
                if (low := max(one[0], other[0])) < (high := min(one[1], other[1]))
            ]
        return found


@dataclass(frozen=True)
class Filter:
    """A filter that `parse` understood. Equal, and of the same hash, where the bytes are.

    Attributes:
        key: canonical JSON of the filter.
        root: what it asks.
    """

    key: bytes
    root: Node = field(compare=False)

    def matches(self, metadata: Mapping[str, Any]) -> bool:
        """Whether a document with this metadata is meant."""
        return self.root.matches(metadata)

    @property
    def means_all(self) -> bool:
        """Whether it means every document, whatever there is: since it is empty, or of empty parts
        (`{"$or": [{}]}`, `{"key": {"$nin": []}}`)."""
        return self.root.constant is True


def parse(where: Where) -> Filter:
    """The filter that `where` describes; later changes to `where` do not reach it.

    Raises:
        InvalidInputError: saying which key's condition is wrong, and what would be right.
    """
    root = _filter(where, "a filter", MAX_NESTED)
    return Filter(json_payload(_plain(where)), root)


def values_at(metadata: Mapping[str, Any], path: str) -> Iterator[Any]:
    """What a path leads to; more than one value only through an array."""
    if path in metadata:
        yield metadata[path]
        return
    at = path.rfind(".")
    while at >= 0:
        if path[:at] in metadata:
            inner = metadata[path[:at]]
            for one in inner if isinstance(inner, (list, tuple)) else (inner,):
                if isinstance(one, Mapping):
                    yield from values_at(one, path[at + 1 :])
            return
        at = path.rfind(".", 0, at)


# --- reading a filter -----------------------------------------------------------------------------


def _filter(given: object, what: str, depth: int) -> Node:
    if not isinstance(given, Mapping):
        raise InvalidInputError(f"{what} must be an object, got {type(given).__name__}")
    if depth == 0:
        raise InvalidInputError(f"a filter is nested more than {MAX_NESTED} deep")
    parts = [part for name, wanted in given.items() for part in _member(name, wanted, depth)]
    return parts[0] if len(parts) == 1 else All(tuple(parts))


def _member(name: object, wanted: object, depth: int) -> list[Node]:
    if not isinstance(name, str):
        raise InvalidInputError(f"a filter names metadata keys, which are strings, not {name!r}")
    if name == "$not":
        return [Not(_filter(wanted, "what '$not' takes", depth - 1))]
    if name in COMBINERS:
        if not isinstance(wanted, (list, tuple)) or not wanted:
            raise InvalidInputError(
                f"{name!r} takes an array of at least one filter, got {wanted!r:.60}"
            )
        parts = tuple(_filter(one, f"each part of {name!r}", depth - 1) for one in wanted)
        return [All(parts) if name == "$and" else One(parts)]
    if name in OPERATORS:
        raise InvalidInputError(
            f"{name!r} stands in the condition of a metadata key: {{'key': {{{name!r}: ...}}}}"
        )
    if _is_operator(name):
        raise InvalidInputError(
            f"a filter has an unknown operator {name!r}; beside metadata keys there are "
            f"{', '.join(COMBINERS)}"
        )
    _json(name, name)
    if not isinstance(wanted, Mapping) or not any(map(_is_operator, wanted)):
        return [Condition(name, (("$eq", _json(name, wanted)),))]
    return _tests(name, wanted)


def _tests(name: str, wanted: Mapping[Any, object]) -> list[Node]:
    """The condition of a path, as operators."""
    tests: list[tuple[str, Any]] = []
    parts: list[Node] = []
    for test, given in wanted.items():
        operand = _operand(name, test, given)
        if test == "$exists":
            parts.append(Exists(name) if operand else Not(Exists(name)))
        elif test in _NEGATED:
            parts.append(Not(Condition(name, ((_NEGATED[test], operand),))))
        else:
            tests.append((test, operand))
    return [*([Condition(name, tuple(tests))] if tests else []), *parts]


def _is_operator(name: object) -> bool:
    return isinstance(name, str) and name.startswith("$")


def _operand(name: str, test: object, given: object) -> Any:
    if test in COMBINERS:
        raise InvalidInputError(
            f"the filter on {name!r}: {test!r} stands before whole filters: "
            + (f"{{{test!r}: {{{name!r}: ...}}}}" if test == "$not" else f"{{{test!r}: [...]}}")
        )
    if test not in OPERATORS:
        raise InvalidInputError(
            f"the filter on {name!r} has an unknown operator {test!r}; there are "
            f"{', '.join(OPERATORS)}. To compare with this object, write {{'$eq': ...}} around it"
        )
    operand = _json(name, given)
    if test in ("$in", "$nin") and not isinstance(operand, list):
        raise InvalidInputError(
            f"the filter on {name!r}: {test!r} takes an array of values, got {operand!r:.60}"
        )
    if test in _ORDER and not (_is_number(operand) or isinstance(operand, str)):
        raise InvalidInputError(
            f"the filter on {name!r}: {test!r} takes a number or a string, got {operand!r:.60}"
        )
    if test == "$exists" and not isinstance(operand, bool):
        raise InvalidInputError(
            f"the filter on {name!r}: '$exists' takes true or false, got {operand!r:.60}"
        )
    return operand


def _json(name: str, given: object) -> Any:
    """A copy, as it would come back from metadata."""
    try:
        check_metadata({name: given})
        return read_json(json_payload(_plain(given)))
    except (InvalidInputError, UnicodeEncodeError) as error:
        raise InvalidInputError(
            f"the filter on {name!r} compares with what no metadata can hold: {error}"
        ) from error


def _plain(given: object) -> Any:
    """The same with every object a dict, as the encoder wants them; what it holds was checked."""
    if isinstance(given, Mapping):
        return {name: _plain(value) for name, value in given.items()}
    if isinstance(given, (list, tuple)):
        return [_plain(value) for value in given]
    return given


# --- matching -------------------------------------------------------------------------------------


def _with_elements(value: Any) -> Iterator[Any]:
    yield value
    if isinstance(value, (list, tuple)):
        yield from value


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
