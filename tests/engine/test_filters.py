from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from memdb.errors import InvalidInputError
from memdb.filters.language import Condition, parse
from memdb.filters.order import OTHER, index_key

EDGE = 2**53
NUMBERS = st.one_of(
    st.integers(-3, 3),
    st.integers(EDGE - 2, EDGE + 3),
    st.integers(-EDGE - 3, 2 - EDGE),
    st.sampled_from([-0.0, 0.5, 5e-324, 2.0**53, 2.0**60, 2**60, 2**60 + 1, -(2**60), -(2.0**60)]),
    st.sampled_from([10**400, -(10**400), 1.7976931348623157e308, int(1.7976931348623157e308) + 1]),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
)
#: Near each other, near the 400 bytes that are indexed, and past them.
STRINGS = st.one_of(
    st.text(st.sampled_from("a\0\x01\xff\ud7ff\ue000\U0001f600"), max_size=4),
    st.builds(
        lambda start, size, end: start + "a" * size + end,
        st.sampled_from(["", "\0", "b"]),
        st.integers(396, 403),
        st.text(st.sampled_from("\0ab\xff"), max_size=3),
    ),
    st.integers(198, 203).map(lambda size: "\0" * size),
    st.text(max_size=8),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, STRINGS)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["a", "$gt", "b"]), inner, max_size=2),
    ),
    max_leaves=4,
)
BOUNDS = st.one_of(NUMBERS, STRINGS)


@st.composite
def questions(draw: Any) -> tuple[Any, dict[str, Any]]:
    """A value, and tests of which some are about values like it."""
    value = draw(VALUES)
    operands = st.one_of(VALUES, st.just(value))
    bounds = BOUNDS
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        bounds = st.one_of(NUMBERS, st.just(value))
    elif isinstance(value, str):
        bounds = st.one_of(STRINGS, st.just(value))
    every = {
        "$eq": operands,
        "$in": st.lists(operands, max_size=4),
        **dict.fromkeys(["$gt", "$gte", "$lt", "$lte"], bounds),
    }
    names = draw(st.lists(st.sampled_from(list(every)), min_size=1, max_size=2, unique=True))
    return value, {name: draw(every[name]) for name in names}


def typed(value: Any) -> Any:
    """Equal where the JSON is, and ordered within a type."""
    if isinstance(value, bool):
        return "boolean", value
    if isinstance(value, (int, float)):
        return "number", Fraction(value)
    if isinstance(value, str):
        return "string", [ord(character) for character in value]
    if isinstance(value, list):
        return "array", [typed(item) for item in value]
    if isinstance(value, dict):
        return "object", sorted((name, typed(item)) for name, item in value.items())
    return ("null",)


def expected(value: Any, tests: dict[str, Any]) -> bool:
    candidates = [value, *value] if isinstance(value, list) else [value]
    return all(
        any(meets(one, name, operand) for one in candidates) for name, operand in tests.items()
    )


def meets(value: Any, name: str, operand: Any) -> bool:
    mine = typed(value)
    if name == "$in":
        return any(mine == typed(item) for item in operand)
    other = typed(operand)
    ordered = mine[0] == other[0] and mine[0] in ("number", "string")
    return {
        "$eq": mine == other,
        "$gt": ordered and mine > other,
        "$gte": ordered and mine >= other,
        "$lt": ordered and mine < other,
        "$lte": ordered and mine <= other,
    }[name]


def condition(tests: Any) -> Condition:
    found = parse({"key": tests}).root
    assert isinstance(found, Condition)
    return found


@given(questions())
def test_operators_mean_what_they_say(question: tuple[Any, dict[str, Any]]) -> None:
    value, tests = question
    assert parse({"key": tests}).matches({"key": value, "more": 1}) == expected(value, tests)


@given(VALUES, VALUES)
def test_a_plain_value_means_equality(value: Any, wanted: Any) -> None:
    if any(isinstance(one, dict) and "$gt" in one for one in (value, wanted)):
        return  # an operator
    assert parse({"key": wanted}).matches({"key": value}) == expected(value, {"$eq": wanted})
    assert parse({"key": wanted}).matches({"key": wanted})


@pytest.mark.parametrize(
    ("value", "wanted", "same"),
    [
        (True, 1, False),
        (1, True, False),
        (0, False, False),
        (1, 1.0, True),
        (-0.0, 0, True),
        ([1], [True], False),
        ((1, 2), [1, 2], True),
        ({"a": {"b": 1.0}}, {"a": {"b": 1}}, True),
        ({"a": 1}, {}, False),
        ({"$gt": 1}, {"$eq": {"$gt": 1}}, True),
        ({"$gt": 1, "a": 2}, {"$eq": {"a": 2, "$gt": 1}}, True),
        ("1", 1, False),
        (2.0**60, 2**60, True),
        (2.0**60, 2**60 + 1, False),
    ],
)
def test_equality_is_that_of_json(value: Any, wanted: Any, same: bool) -> None:
    assert parse({"key": wanted}).matches({"key": value}) is same


def test_a_missing_key_matches_nothing() -> None:
    for wanted in (None, False, {"$eq": None}, {"$in": [None]}, {"$lt": 3}, {"$gte": ""}):
        assert not parse({"key": wanted}).matches({"other": None})
    assert parse({}).matches({})


def test_all_keys_must_match() -> None:
    found = parse({"lang": "en", "year": {"$gte": 1990, "$lt": 2000}})
    assert found.matches({"lang": "en", "year": 1995.5})
    assert not found.matches({"lang": "de", "year": 1995})
    assert not found.matches({"lang": "en", "year": 2000})
    assert not found.matches({"lang": "en", "year": "1995"})


@settings(max_examples=300)
@given(questions())
@example((2.0**60, {"$gt": 2**60 - 1}))
@example((2.0**60, {"$gte": 2**60 + 1}))
@example((2.0**60, {"$lte": 2**60, "$gte": 2**60}))
@example((1.0, {"$lt": 10**400, "$gt": -(10**400)}))
@example((1.0, {"$gt": 10**400}))
@example(("a" * 400, {"$lt": "a" * 401}))
@example(("a" * 400, {"$gt": "a" * 400 + "\0"}))
@example(("a" * 400, {"$gte": "a" * 400}))
@example(("a" * 399 + "b", {"$gt": "a" * 500}))
@example(("a", {"$lt": "a\0"}))
def test_the_index_holds_what_matches_in_the_ranges(question: tuple[Any, dict[str, Any]]) -> None:
    value, tests = question
    asked = condition(tests)
    ranges = asked.ranges()
    assert all(low < high for low, high in ranges)
    assert all(one[1] <= other[0] for one, other in pairwise(ranges))
    assert all(len(bound) <= 404 and bound < OTHER for low, high in ranges for bound in (low, high))
    key = index_key(value)
    if key is not None:
        assert any(low <= key < high for low, high in ranges) == asked.matches({"key": value})


@given(st.lists(SCALARS, max_size=6), BOUNDS)
def test_each_indexed_member_has_its_range(members: list[Any], least: Any) -> None:
    keys = {index_key(member) for member in members if index_key(member) is not None}
    ranges = condition({"$in": members}).ranges()
    assert ranges == sorted(ranges)
    for key in keys:
        assert sum(low <= key < high for low, high in ranges) == 1
    few = condition({"$gte": least, "$in": members}).ranges()
    assert few == condition({"$in": members, "$gte": least}).ranges()
    assert few == [one for one in ranges if one in few]


@given(SCALARS, SCALARS)
@example("a", "a\0")
@example("", "\0")
@example(True, 1)
@example(-0.0, 0)
@example(1, 1.0)
@example(-1.5, -1)
def test_index_keys_are_in_the_order_of_the_values(one: Any, other: Any) -> None:
    mine, theirs = index_key(one), index_key(other)
    if mine is None or theirs is None:
        return
    a, b = typed(one), typed(other)
    if a[0] == b[0]:
        assert (mine < theirs) == (a < b)
        assert (mine == theirs) == (a == b)
    else:
        rank = ["null", "boolean", "number", "string"].index
        assert (mine < theirs) == (rank(a[0]) < rank(b[0]))
    assert mine == theirs or not mine.startswith(theirs)
    assert len(mine) <= 403
    assert mine < OTHER


@pytest.mark.parametrize(
    ("value", "indexed"),
    [
        (2**53, True),
        (-(2**53), True),
        (2**53 + 1, False),
        (-(2**53) - 1, False),
        (1e300, True),
        ("ä" * 200, True),
        ("ä" * 200 + "a", False),
        ("\0" * 200, True),
        ("\0" * 201, False),
        ([], False),
        ({}, False),
    ],
)
def test_what_is_indexed(value: Any, indexed: bool) -> None:
    assert (index_key(value) is not None) is indexed


def test_index_keys_are_bytes_that_stay() -> None:
    # They are on disk: what changes here changes the format.
    assert index_key(None) == b"\x01"
    assert index_key(False) == b"\x02"
    assert index_key(True) == b"\x03"
    assert index_key(1) == bytes.fromhex("04bff0000000000000")
    assert index_key(-1) == bytes.fromhex("04400fffffffffffff")
    assert index_key("a\0ä") == b"\x05a\0\xff\xc3\xa4\0\0"


DEEP: list[Any] = []
for _ in range(70):
    DEEP = [DEEP]
NESTED: dict[str, Any] = {"year": 1}
for _ in range(40):
    NESTED = {"$not": NESTED}


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (
            {"year": {"$ge": 3}},
            r"'year'.*'\$ge'.*\$eq, \$ne, \$in, \$nin, .*\$lte, \$exists",
        ),
        ({"year": {"$gte": 3, "$not": 4}}, r"'year'.*'\$not'"),
        ({"year": {"$not": {"$gt": 4}}}, r"'year'.*'\$not' stands before whole filters"),
        ({"year": {"$or": [1, 2]}}, r"'year'.*'\$or' stands before whole filters"),
        ({"year": {"$gte": 3, "lt": 4}}, r"'year'.*unknown operator 'lt'"),
        ({"year": {"$nin": 3}}, r"'year'.*'\$nin' takes an array of values, got 3"),
        ({"year": {"$exists": 1}}, r"'year'.*'\$exists' takes true or false, got 1"),
        ({"year": {"$exists": None}}, r"'year'.*'\$exists' takes true or false"),
        ({"$foo": 1}, r"unknown operator '\$foo'.*\$and, \$or, \$not"),
        ({"$gt": 3}, r"'\$gt' stands in the condition of a metadata key"),
        ({"$exists": "year"}, r"'\$exists' stands in the condition"),
        ({"$or": {"year": 3}}, r"'\$or' takes an array of at least one filter"),
        ({"$and": []}, r"'\$and' takes an array of at least one filter"),
        ({"$or": "year"}, r"'\$or' takes an array of at least one filter"),
        ({"$or": [{"year": 3}, 5]}, r"each part of '\$or' must be an object, got int"),
        ({"$not": [{"year": 3}]}, r"what '\$not' takes must be an object, got list"),
        ({"$not": {"$and": [{"year": {"$foo": 1}}]}}, r"'year'.*unknown operator '\$foo'"),
        (NESTED, "nested more than 32 deep"),
        ([], "must be an object, got list"),
        ("", "must be an object, got str"),
        (0, "must be an object, got int"),
        (False, "must be an object, got bool"),
        ({"year": {"$in": "1990"}}, r"'year'.*'\$in' takes an array.*'1990'"),
        ({"year": {"$in": {"$in": []}}}, r"'year'.*'\$in' takes an array"),
        ({"year": {"$gt": None}}, r"'year'.*'\$gt' takes a number or a string, got None"),
        ({"year": {"$lt": True}}, r"'year'.*'\$lt' takes a number or a string, got True"),
        ({"year": {"$lte": [1]}}, r"'year'.*'\$lte' takes a number or a string"),
        ({"year": {"$gte": float("nan")}}, r"'year'.*[Oo]ut of range float"),
        ({"year": float("inf")}, r"'year'.*[Oo]ut of range float"),
        ({"year": {"$in": [1, float("nan")]}}, r"'year'.*[Oo]ut of range float"),
        ({"year": b"1990"}, r"'year'.*bytes"),
        ({"year": {1: 2}}, r"'year'.*its key 1 is no string"),
        ({"year": "\ud800"}, r"'year'.*surrogates"),
        ({"\ud800": 1}, "surrogates"),
        ({"year": DEEP}, r"'year'.*nested more than 64 deep"),
        ({1990: "year"}, r"strings, not 1990"),
        ([("year", 1990)], r"must be an object, got list"),
    ],
)
def test_a_filter_that_means_nothing_is_refused(where: Any, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        parse(where)


def test_filters_are_known_by_their_canonical_json() -> None:
    one, other = parse({"a": 1, "b": {"$in": (2, 3)}}), parse({"b": {"$in": [2, 3]}, "a": 1})
    assert one == other
    assert hash(one) == hash(other)
    assert one.key == b'{"a":1,"b":{"$in":[2,3]}}'
    assert one != parse({"a": True, "b": {"$in": [2, 3]}})


def test_a_filter_does_not_change_with_what_it_was_made_of() -> None:
    where: dict[str, Any] = {"tags": ["a"], "kind": {"$in": ["x"]}}
    found = parse(where)
    where["tags"].append("b")
    where["kind"]["$in"].append("y")
    assert found.matches({"tags": ["a"], "kind": "x"})
    assert not found.matches({"tags": ["a"], "kind": "y"})
