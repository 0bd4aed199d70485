from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memdb.errors import CorruptRecordError, InvalidInputError
from memdb.filters.language import parse
from memdb.filters.order import OTHER, index_key
from memdb.filters.planning import ASK, NO, YES, known
from memdb.filters.postings import BLOCK, Postings, check_key_name
from memdb.storage.record_layout import POSTINGS, seal, unseal
from memdb.storage.transaction import Transaction

#: Of one document each: 1 is 1.0, and the last four are not indexed by their value.
VALUES = [None, True, 1, 1.0, 2.5, "", "en", "en\0", 2**60, "a" * 401, ["en"], {"a": 1}]
CONDITIONS = [
    *(
        {"$eq": wanted}
        for wanted in (None, True, 1, "en", "en\0", 2.0**60, 2**60, ["en"], {"a": 1})
    ),
    {"$in": ["en", 1, None, ["en"], "no"]},
    {"$in": []},
    {"$gte": 1},
    {"$gt": 1, "$lt": 2**70},
    {"$gte": "", "$lt": "en"},
    {"$gt": "en"},
]


class Table:
    """An LMDB table; what `write` does is undone at its end."""

    def __init__(self, path: Path) -> None:
        self.environment = lmdb.open(str(path), max_dbs=1, map_size=1 << 28)
        self.handle = self.environment.open_db(POSTINGS.encode())

    @contextmanager
    def write(self) -> Iterator[tuple[Postings, Any]]:
        inner = self.environment.begin(write=True, buffers=True, db=self.handle)
        try:
            yield Postings(Transaction(inner, {POSTINGS: self.handle})), inner
        finally:
            inner.abort()


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Table]:
    made = Table(tmp_path_factory.mktemp("postings"))
    yield made
    made.environment.close()


def every(postings: Postings) -> dict[tuple[str, bytes], list[int]]:
    return {(name, value): ids.tolist() for name, value, ids in postings.items()}


def blocks(inner: Any) -> list[tuple[bytes, list[int]]]:
    """Keys and ids of all blocks, in order."""
    return [
        (bytes(key), np.frombuffer(unseal(POSTINGS, key, record)[1], "<i8").tolist())
        for key, record in inner.cursor()
    ]


def found(postings: Postings, name: str, wanted: Any) -> tuple[list[int], list[int]]:
    told = known(parse({name: wanted}), postings, [name])
    sure, unsure = told.of(YES), told.of(ASK)
    assert told.rest == NO
    assert sure.dtype == unsure.dtype == np.int64
    return sure.tolist(), unsure.tolist()


#: What documents' references look like: a few together, many in a row, or spread over others.
IDS = st.builds(
    lambda first, count, step: range(first, first + count * step, step),
    st.integers(1, 1500),
    st.one_of(st.integers(1, 6), st.integers(200, 700)),
    st.sampled_from([1, 1, 2, 3, 7]),
)
#: References and their new value; the value None of the pair's last part takes them out.
OPERATIONS = st.tuples(st.sampled_from(["lang", "läng"]), IDS, st.integers(-1, len(VALUES) - 1))


@settings(max_examples=60)
@given(st.lists(OPERATIONS, min_size=1, max_size=14))
def test_postings_follow_a_dict_of_sets(
    table: Table, operations: list[tuple[str, range, int]]
) -> None:
    model: dict[str, dict[int, int]] = {"lang": {}, "läng": {}}  # id -> number of its value
    with table.write() as (postings, inner):
        for name, ids, new in operations:
            before: dict[int, list[int]] = defaultdict(list)
            for number in ids:
                if number in model[name]:
                    before[model[name].pop(number)].append(number)
            for old, gone in before.items():
                postings.remove(name, VALUES[old], gone)
            if new >= 0:
                postings.add(name, VALUES[new], ids)
                model[name].update(dict.fromkeys(ids, new))

        sets: dict[tuple[str, bytes], list[int]] = defaultdict(list)
        for name, entries in model.items():
            for number, value in sorted(entries.items()):
                sets[name, index_key(VALUES[value]) or OTHER].append(number)
        assert every(postings) == sets
        assert all(1 <= len(ids) <= BLOCK for _, ids in blocks(inner))
        assert postings.count() == len(blocks(inner))
        for name, entries in model.items():
            rest = sets.get((name, OTHER), [])
            for wanted in CONDITIONS:
                asked = parse({name: wanted})
                matching = [i for i in sorted(entries) if asked.matches({name: VALUES[entries[i]]})]
                sure, unsure = found(postings, name, wanted)
                assert sure == [i for i in matching if i not in rest]
                assert unsure in ([], rest)
                assert set(matching) <= {*sure, *unsure}


@given(st.lists(st.tuples(st.booleans(), IDS), max_size=12))
def test_one_value_follows_a_set(table: Table, operations: list[tuple[bool, range]]) -> None:
    """Other than documents' references, ids are added twice and taken out where they are not."""
    model: set[int] = set()
    with table.write() as (postings, _):
        postings.add("a", 1, [5])
        postings.add("c", 1, [5])
        for adds, ids in operations:
            if adds:
                postings.add("b", 1, ids)
                model |= set(ids)
            else:
                postings.remove("b", 1, ids)
                model -= set(ids)
            assert found(postings, "b", 1) == (sorted(model), [])
        assert found(postings, "a", 1) == found(postings, "c", 1) == ([5], [])


@pytest.mark.parametrize("size", [1, 3, BLOCK, 1000])
def test_what_is_appended_fills_blocks(table: Table, size: int) -> None:
    with table.write() as (postings, inner):
        for first in range(1, 1001, size):
            postings.add("lang", "en", range(first, min(first + size, 1001)))
        assert [len(ids) for _, ids in blocks(inner)] == [256, 256, 256, 232]


@pytest.mark.parametrize("ids", [range(1000, 0, -1), [i * 7919 % 1000 + 1 for i in range(1000)]])
def test_blocks_stay_few_in_any_order(table: Table, ids: Sequence[int]) -> None:
    with table.write() as (postings, inner):
        for number in ids:
            postings.add("lang", "en", [number])
        assert found(postings, "lang", "en") == (list(range(1, 1001)), [])
        assert len(blocks(inner)) <= 8


def test_a_full_block_is_split_in_halves(table: Table) -> None:
    with table.write() as (postings, inner):
        postings.add("lang", "en", range(2, 2 * BLOCK, 2))
        postings.add("lang", "en", [101])
        assert [len(ids) for _, ids in blocks(inner)] == [256]
        postings.add("lang", "en", [103])
        assert [len(ids) for _, ids in blocks(inner)] == [129, 128]
        postings.add("lang", "en", range(3, 101, 2))  # 49 more
        assert [len(ids) for _, ids in blocks(inner)] == [178, 128]
        postings.add("lang", "en", range(1_000, 1_200))
        assert [len(ids) for _, ids in blocks(inner)] == [178, 256, 72]


def test_a_block_keeps_its_key_until_it_is_empty(table: Table) -> None:
    with table.write() as (postings, inner):
        postings.add("lang", "en", range(1, 2 * BLOCK + 1))
        (first, _), (second, _) = blocks(inner)
        assert second[-8:] == (BLOCK + 1).to_bytes(8)
        postings.remove("lang", "en", [1, BLOCK + 1])
        assert [key for key, _ in blocks(inner)] == [first, second]
        postings.remove("lang", "en", range(1, BLOCK + 1))
        assert [key for key, _ in blocks(inner)] == [second]
        postings.add("lang", "en", [7])  # below every block that is left
        assert found(postings, "lang", "en") == ([7, *range(BLOCK + 2, 2 * BLOCK + 1)], [])
        postings.remove("lang", "en", range(1, 1000))
        assert blocks(inner) == []


def test_a_million_ids(table: Table) -> None:
    with table.write() as (postings, _):
        postings.add("lang", "en", range(1, 1_000_001))
        postings.add("lang", "de", [1_000_001])
        told = known(parse({"lang": "en"}), postings, ["lang"])
        assert (told.answers == YES).all()
        np.testing.assert_array_equal(told.ids, np.arange(1, 1_000_001))


def test_drop_forgets_one_key_alone(table: Table) -> None:
    with table.write() as (postings, _):
        for name in ("a", "aa", "b", "z" * 64):
            for value in VALUES:
                postings.add(name, value, range(1, 400))
        before = every(postings)
        for name in ("aa", "z" * 64, "unknown", "a"):
            postings.drop(name)
            before = {key: ids for key, ids in before.items() if key[0] != name}
            assert every(postings) == before
        assert {name for name, _ in before} == {"b"}


def test_discard_finds_ids_wherever_they_are(table: Table) -> None:
    with table.write() as (postings, _):
        postings.add("a", "x", range(1, 1000))
        postings.add("a", ["y"], [1000])
        postings.add("b", 3, range(1, 1001, 2))
        postings.discard([1000, 999, 500, 3, 2000])
        gone = {1000, 999, 500, 3}
        assert every(postings) == {
            ("a", index_key("x")): sorted(set(range(1, 1000)) - gone),
            ("b", index_key(3)): sorted(set(range(1, 1001, 2)) - gone),
        }


def test_the_longest_keys_fit(table: Table) -> None:
    name = "ä" * 32
    check_key_name(name)
    values = ["a" * 400, "\0" * 200, "a" * 401, "\0" * 300]
    with table.write() as (postings, _):
        for number, value in enumerate(values, 1):
            postings.add(name, value, [number])
        assert found(postings, name, "a" * 400) == ([1], [3, 4])
        assert found(postings, name, "a" * 1000) == ([], [3, 4])
        assert found(postings, name, {"$lt": "a" * 1000}) == ([1, 2], [3, 4])
        assert found(postings, name, {"$gt": "\0" * 1000}) == ([1], [3, 4])


@pytest.mark.parametrize("name", ["", "a" * 65, "ä" * 33, "\ud800", 3, None])
def test_names_that_cannot_be_indexed(name: Any) -> None:
    with pytest.raises(InvalidInputError, match="metadata key"):
        check_key_name(name)


# --- damage ---------------------------------------------------------------------------------------

KEY = b"\x04lang" + (index_key("en") or b"") + bytes(8)


def uses(postings: Postings) -> list[Any]:
    """Every way to read a block of lang: en."""
    return [
        lambda: found(postings, "lang", "en"),
        lambda: list(postings.items()),
        lambda: postings.add("lang", "en", [4]),
        lambda: postings.remove("lang", "en", [3]),
        lambda: postings.discard([3]),
    ]


def test_every_flipped_byte_is_noticed(table: Table) -> None:
    with table.write() as (postings, inner):
        postings.add("lang", "en", [1, 2, 3, 500])
        good = bytes(inner.get(KEY))
        for at in range(len(good)):
            for mask in (1, 0x80, 0xFF):
                bad = good[:at] + bytes([good[at] ^ mask]) + good[at + 1 :]
                inner.put(KEY, bad)
                for use in uses(postings):
                    with pytest.raises(CorruptRecordError, match="postings"):
                        use()
        inner.put(KEY, good)
        for use in uses(postings):
            use()


@pytest.mark.parametrize("name", ["lang", "lanh"])
def test_a_block_under_another_key_is_noticed(table: Table, name: str) -> None:
    with table.write() as (postings, inner):
        postings.add(name, "de", [1, 2, 3])
        ((_, record),) = [(bytes(key), bytes(value)) for key, value in inner.cursor()]
        inner.put(KEY, record)
        for use in uses(postings):
            with pytest.raises(CorruptRecordError, match="checksum"):
                use()


@pytest.mark.parametrize(
    ("bound", "payload", "problem"),
    [
        (0, b"", "0 bytes"),
        (0, bytes(7), "7 bytes"),
        (0, np.arange(BLOCK + 1, dtype="<i8").tobytes(), f"not 1 to {BLOCK} ids"),
        (0, np.array([2, 1], "<i8").tobytes(), "do not ascend"),
        (0, np.array([1, 1], "<i8").tobytes(), "do not ascend"),
        (0, np.array([-1, 1], "<i8").tobytes(), "below the bound"),
        (2, np.array([1, 3], "<i8").tobytes(), "below the bound"),
    ],
)
def test_blocks_that_are_sealed_and_wrong(
    table: Table, bound: int, payload: bytes, problem: str
) -> None:
    key = KEY[:-8] + bound.to_bytes(8)
    with table.write() as (postings, inner):
        inner.put(key, seal(POSTINGS, key, 1, payload))
        for use in uses(postings):
            with pytest.raises(CorruptRecordError, match=problem):
                use()


def test_blocks_that_overlap(table: Table) -> None:
    with table.write() as (postings, inner):
        for bound, ids in ((0, [1, 3, 9]), (9, [10])):
            key = KEY[:-8] + bound.to_bytes(8)
            inner.put(key, seal(POSTINGS, key, 1, np.array(ids, "<i8").tobytes()))
        for use in uses(postings):
            with pytest.raises(CorruptRecordError, match="reaches into"):
                use()


@pytest.mark.parametrize("bound", [b"", bytes(7), bytes(6) + b"\2\0\0", b"\xff" * 9])
def test_a_key_of_a_wrong_length_is_noticed_before_a_write(table: Table, bound: bytes) -> None:
    key = KEY[:-8] + bound
    with table.write() as (postings, inner):
        inner.put(key, seal(POSTINGS, key, 1, np.array([7], "<i8").tobytes()))
        with pytest.raises(CorruptRecordError, match="wrong length"):
            postings.add("lang", "en", [1])


@pytest.mark.parametrize(
    ("key", "problem"),
    [
        (b"\x04lang", "too short"),
        (b"\x04lang" + bytes(8), "holds no value"),
        (b"\x7flang\x01" + bytes(8), "holds no value"),
        (b"\0\x01" + bytes(8), "0 bytes of UTF-8"),
        (b"\x41" + b"a" * 65 + b"\x01" + bytes(8), "65 bytes of UTF-8"),
        (b"\x01\xff\x01" + bytes(8), "utf-8"),
        (bytes(8), "too short"),
    ],
)
def test_keys_that_no_writer_makes(table: Table, key: bytes, problem: str) -> None:
    with table.write() as (postings, inner):
        inner.put(key, seal(POSTINGS, key, 1, np.array([2**62], "<i8").tobytes()))
        with pytest.raises(CorruptRecordError, match=problem):
            list(postings.items())
