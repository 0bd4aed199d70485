"""Filters of any form, against a second reading of the language; and the metadata index against
both."""

from __future__ import annotations

import operator
import shutil
from collections.abc import Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import memdb
from memdb import Document, DocumentBatch, InvalidInputError, MemDB
from memdb.filters.language import parse
from memdb.filters.matching import matching, matching_documents
from memdb.filters.planning import NO, known
from memdb.filters.postings import Postings
from memdb.storage.transaction import Transaction

# --- the language, said once more -----------------------------------------------------------------


def means(where: Mapping[str, Any], metadata: Mapping[str, Any]) -> bool:
    """Whether a filter means a document: as the docs say it, slowly."""
    return all(member(name, wanted, metadata) for name, wanted in where.items())


def member(name: str, wanted: Any, metadata: Mapping[str, Any]) -> bool:
    match name:
        case "$and":
            return all(means(one, metadata) for one in wanted)
        case "$or":
            return any(means(one, metadata) for one in wanted)
        case "$not":
            return not means(wanted, metadata)
    operators = isinstance(wanted, dict) and any(key.startswith("$") for key in wanted)
    found = follow(metadata, name)
    return all(
        holds(test, found, given)
        for test, given in (wanted if operators else {"$eq": wanted}).items()
    )


def follow(there: Mapping[str, Any], path: str) -> list[Any]:
    """The values that a path leads to."""
    steps = path.split(".")
    for end in range(len(steps), 0, -1):
        name, rest = ".".join(steps[:end]), ".".join(steps[end:])
        if name in there:
            if end == len(steps):
                return [there[name]]
            inner = there[name] if isinstance(there[name], list) else [there[name]]
            return [found for one in inner if isinstance(one, dict) for found in follow(one, rest)]
    return []


def holds(test: str, found: list[Any], given: Any) -> bool:
    compare = {"$gt": operator.gt, "$gte": operator.ge, "$lt": operator.lt, "$lte": operator.le}
    each = [one for value in found for one in (value, *(value if type(value) is list else ()))]
    match test:
        case "$exists":
            return bool(found) is given
        case "$ne":
            return not holds("$eq", found, given)
        case "$nin":
            return not holds("$in", found, given)
        case "$in":
            return any(holds("$eq", found, one) for one in given)
        case "$eq":
            return any(repr(typed(one)) == repr(typed(given)) for one in each)
        case _:
            return any(
                kind(one) == kind(given) in ("number", "string") and compare[test](one, given)
                for one in each
            )


def kind(value: Any) -> str:
    if isinstance(value, bool):
        return "boolean"
    return "number" if isinstance(value, (int, float)) else {str: "string"}.get(type(value), "?")


def typed(value: Any) -> Any:
    """The same repr where the JSON is the same."""
    if isinstance(value, dict):
        return {name: typed(value[name]) for name in sorted(value)}
    if isinstance(value, list):
        return [typed(one) for one in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


# --- what is drawn --------------------------------------------------------------------------------

NAMES = ("a", "b", "a.b", "a.b.c", "b.a")
SCALARS = st.one_of(
    st.integers(0, 3),
    st.sampled_from([1.0, 2.5, -1, "x", "y", "", None, True, False, 2**60, "x" * 401]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["a", "b", "c", "b.c"]), inner, max_size=2),
    ),
    max_leaves=5,
)
METADATA = st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=4)
BOUNDS = st.sampled_from([0, 1, 1.5, 2, 2**60, "", "x", "xx"])
CONDITIONS = st.one_of(
    VALUES,
    st.dictionaries(
        st.sampled_from(
            ["$eq", "$ne", "$in", "$nin", "$gt", "$gte", "$lt", "$lte", "$exists"],
        ),
        st.none(),
        min_size=1,
        max_size=2,
    ).flatmap(
        lambda names: st.fixed_dictionaries(
            {
                name: st.lists(VALUES, max_size=3)
                if name in ("$in", "$nin")
                else st.booleans()
                if name == "$exists"
                else VALUES
                if name in ("$eq", "$ne")
                else BOUNDS
                for name in names
            }
        )
    ),
)
FILTERS: st.SearchStrategy[dict[str, Any]] = st.recursive(
    st.dictionaries(st.sampled_from(NAMES), CONDITIONS, max_size=2),
    lambda inner: st.one_of(
        st.fixed_dictionaries({"$and": st.lists(inner, min_size=1, max_size=3)}),
        st.fixed_dictionaries({"$or": st.lists(inner, min_size=1, max_size=3)}),
        st.fixed_dictionaries({"$not": inner}),
        st.tuples(inner, inner).map(lambda pair: {**pair[0], **pair[1]}),
    ),
    max_leaves=5,
)


# --- what filters mean ----------------------------------------------------------------------------


@settings(max_examples=400)
@given(FILTERS, METADATA)
def test_a_filter_means_what_the_docs_say(where: dict[str, Any], metadata: dict[str, Any]) -> None:
    assert parse(where).matches(metadata) == means(where, metadata)


MISSING: dict[str, Any] = {"kind": "fact"}
TAGGED = {"tags": ["sea", "salt", 3], "grid": [[1, 2], [3]], "none": []}
DEEP = {
    "author": {"name": "Ann", "age": 40, "homes": [{"town": "A"}, {"town": "B"}, "C"]},
    "a.b": 1,
    "a": {"b": 2, "c": 3, "b.c": 4},
}


@pytest.mark.parametrize(
    ("metadata", "where", "meant"),
    [
        # what is not there
        (MISSING, {"year": {"$ne": 3}}, True),
        (MISSING, {"year": {"$nin": [3]}}, True),
        (MISSING, {"year": {"$ne": None}}, True),
        (MISSING, {"year": {"$eq": None}}, False),
        (MISSING, {"year": {"$exists": False}}, True),
        (MISSING, {"year": {"$exists": True}}, False),
        (MISSING, {"kind": {"$exists": True}}, True),
        ({"year": None}, {"year": {"$exists": True}}, True),
        ({"year": None}, {"year": {"$ne": None}}, False),
        (MISSING, {"$not": {"year": 3}}, True),
        (MISSING, {"$not": {"year": {"$ne": 3}}}, False),
        (MISSING, {"year": {"$in": []}}, False),
        (MISSING, {"year": {"$nin": []}}, True),
        (MISSING, {"year": {"$exists": True, "$ne": 3}}, False),
        # together
        (MISSING, {"$or": [{"year": 3}, {"kind": "fact"}]}, True),
        (MISSING, {"$and": [{"year": {"$ne": 3}}, {"kind": "fact"}]}, True),
        (MISSING, {"$and": [{"year": 3}, {"kind": "fact"}]}, False),
        (MISSING, {"kind": "rule", "$or": [{}]}, False),
        (MISSING, {"$not": {}}, False),
        (MISSING, {"kind": {"$in": ["fact"], "$ne": "fact"}}, False),
        # arrays
        (TAGGED, {"tags": "sea"}, True),
        (TAGGED, {"tags": "pepper"}, False),
        (TAGGED, {"tags": ["sea", "salt", 3]}, True),
        (TAGGED, {"tags": ["salt", "sea", 3]}, False),
        (TAGGED, {"tags": ["sea"]}, False),
        (TAGGED, {"tags": {"$in": ["pepper", "salt"]}}, True),
        (TAGGED, {"tags": {"$nin": ["pepper", "salt"]}}, False),
        (TAGGED, {"tags": {"$ne": "sea"}}, False),
        (TAGGED, {"tags": {"$ne": "pepper"}}, True),
        (TAGGED, {"tags": {"$gt": 2}}, True),
        (TAGGED, {"tags": {"$gt": 2, "$lt": "b"}}, False),
        (TAGGED, {"tags": {"$gt": 2, "$lt": "sb"}}, True),  # each has an element of its own
        (TAGGED, {"grid": [3]}, True),
        (TAGGED, {"grid": 3}, False),  # elements of elements are not
        (TAGGED, {"none": []}, True),
        (TAGGED, {"none": {"$exists": True}}, True),
        (TAGGED, {"none": {"$gt": 0}}, False),
        # paths
        (DEEP, {"author.name": "Ann"}, True),
        (DEEP, {"author.age": {"$gte": 40}}, True),
        (DEEP, {"author.town": {"$exists": False}}, True),
        (DEEP, {"author.name.first": {"$exists": False}}, True),
        (DEEP, {"author.homes.town": "B"}, True),
        (DEEP, {"author.homes.town": {"$ne": "B"}}, False),
        (DEEP, {"author.homes.town": {"$nin": ["C"]}}, True),
        (DEEP, {"a.b": 1}, True),  # a key that has the dot comes first
        (DEEP, {"a.b": 2}, False),
        (DEEP, {"a.c": 3}, True),
        (DEEP, {"a.b.c": {"$exists": False}}, True),  # `a.b` is longer than `a`
        ({"a": {"b.c": 4, "b": {"c": 5}}}, {"a.b.c": 4}, True),
        ({"": {"": 1}}, {".": 1}, True),
        ({"a": 1}, {"a.": {"$exists": False}}, True),
    ],
)
def test_each_rule_by_an_example(
    metadata: dict[str, Any], where: dict[str, Any], meant: bool
) -> None:
    assert parse(where).matches(metadata) is meant
    assert means(where, metadata) is meant
    assert parse({"$not": where}).matches(metadata) is not meant


def test_numbers_of_numpy_are_numbers() -> None:
    found = parse({"year": {"$gte": np.int64(3), "$in": [np.float32(4.5)]}, "is": np.True_})
    assert found.key == b'{"is":true,"year":{"$gte":3,"$in":[4.5]}}'
    assert found.matches({"year": 4.5, "is": True})
    with pytest.raises(InvalidInputError, match="'year'"):
        parse({"year": np.array([1, 2])})


def test_mappings_that_are_no_dicts_are_objects() -> None:
    class Frozen(Mapping[str, Any]):
        def __init__(self, **values: Any) -> None:
            self._values = values

        def __getitem__(self, name: str) -> Any:
            return self._values[name]

        def __iter__(self) -> Iterator[str]:
            return iter(self._values)

        def __len__(self) -> int:
            return len(self._values)

    where = Frozen(**{"$not": Frozen(year=Frozen(**{"$gte": 3}))})
    assert parse(where).matches({"year": 2})
    assert parse(where) == parse({"$not": {"year": {"$gte": 3}}})


# --- the index ------------------------------------------------------------------------------------

INDEXED = st.sets(st.sampled_from(NAMES))


@pytest.fixture(scope="module")
def database(bare_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MemDB]:
    path = tmp_path_factory.mktemp("trees") / "db"
    shutil.copytree(bare_template, path)
    with MemDB.open(path, durability="off") as opened:
        yield opened


@settings(max_examples=120)
@given(st.lists(METADATA, max_size=7), INDEXED, st.lists(FILTERS, min_size=1, max_size=4))
def test_the_index_finds_what_a_scan_finds(
    database: MemDB,
    documents: list[dict[str, Any]],
    indexed: set[str],
    filters: list[dict[str, Any]],
) -> None:
    database.delete(*(document.id for document in database.documents()))
    database.undeclare_keys(*NAMES)
    names = count()
    half = len(documents) // 2
    for at, some in ((0, documents[:half]), (1, documents[half:])):  # declared between the two
        if some:
            texts = [Document("text", f"{next(names)}", metadata) for metadata in some]
            database.load([DocumentBatch(texts, np.ones((len(some), 2), np.float32))])
        if at == 0:
            database.declare_keys(*sorted(indexed))
    every = list(database.documents())
    with database._store.read() as transaction:
        for where in filters:
            meant = [one for one in every if means(where, one.metadata)]
            chosen = parse(where)
            numbers = sorted(number for one in meant for number in one.references)
            assert matching(transaction, chosen).tolist() == numbers
            for after in ("", "2"):
                found = [name for name, _ in matching_documents(transaction, chosen, after)]
                assert found == [one.id for one in meant if one.id > after]
    for where in filters:
        meant_ids = {one.id for one in every if means(where, one.metadata)}
        hits = database.retrieve(np.ones(2), 20, where=where).hits
        assert {hit.reference.document_id for hit in hits} == meant_ids


class Counted(Transaction):
    """A transaction that says how often metadata was read."""

    reads = 0

    def metadata(self, name: str, version: int | None = None) -> dict[str, Any]:
        self.reads += 1
        return super().metadata(name, version)


@pytest.mark.parametrize(
    ("where", "reads"),
    [
        ({"year": 3}, 0),
        ({"year": {"$ne": 3}}, 0),
        ({"year": {"$nin": [1, 2]}}, 0),
        ({"year": {"$exists": True}}, 0),
        ({"year": {"$exists": False}}, 0),
        ({"$not": {"year": {"$gte": 3}}}, 0),
        ({"$or": [{"year": 3}, {"kind": "b"}, {"missing": 1}]}, 0),
        ({"$and": [{"year": 3}, {"$not": {"kind": "b"}}]}, 0),
        ({"year": 3, "free": 1}, 5),  # of those alone that the index leaves
        ({"$or": [{"year": 3}, {"free": 1}]}, 100),
        ({"year": 3, "$or": [{"free": 1}, {"free": 2}]}, 5),
        ({"$and": [{"$not": {"year": 3}}, {"free": 1}]}, 100),
        ({"tags": "x"}, 10),  # arrays are not in the index by their elements
        ({"year": 4, "tags": "x"}, 0),
        ({"$or": [{"year": 4}, {"tags": "x"}]}, 10),
        ({"author.name": "Ann"}, 5),  # who has an object there
        ({"author.age": 3}, 100),  # its own name is not declared
    ],
)
def test_the_index_spares_reading_metadata(
    tmp_path: Path, bare_template: Path, where: dict[str, Any], reads: int
) -> None:
    path = tmp_path / "db"
    shutil.copytree(bare_template, path)
    with MemDB.open(path, durability="off") as database:
        database.declare_keys("year", "kind", "missing", "tags", "author", "author.name")
        documents = [
            Document(
                "text",
                f"{n:03}",
                {
                    "year": n % 20,
                    "kind": "ab"[n % 2],
                    "free": n % 3,
                    **({"tags": ["x", n]} if n % 10 == 3 else {}),
                    **({"author": {"name": "Ann"}} if n % 20 == 7 else {}),
                },
            )
            for n in range(100)
        ]
        database.load([DocumentBatch(documents, np.ones((100, 2), np.float32))])
        with database._store.read() as inner:
            transaction = Counted(inner._inner, inner._tables, inner._environment)
            found = matching(transaction, parse(where))
            assert transaction.reads == reads
            meant = [d for d in database.documents() if means(where, d.metadata)]
            assert found.tolist() == [number for d in meant for number in d.references]


def test_many_alternatives_take_no_longer_than_they_should(tmp_path: Path) -> None:
    environment = lmdb.open(str(tmp_path), max_dbs=1, map_size=1 << 26)
    handle = environment.open_db(b"postings")
    with environment.begin(write=True, buffers=True) as inner:
        postings = Postings(Transaction(inner, {"postings": handle}))
        for n in range(3000):
            postings.add("n", n, [n + 1])
        where = {"$or": [{"n": n} for n in range(0, 3000, 2)]}
        told = known(parse(where), postings, ["n"])
        assert told.rest == NO
        assert told.ids.tolist() == list(range(1, 3001, 2))
    environment.close()


# --- declared keys --------------------------------------------------------------------------------


def test_a_key_that_is_undeclared_is_gone_from_the_index(
    tmp_path: Path, bare_template: Path
) -> None:
    path = tmp_path / "db"
    shutil.copytree(bare_template, path)
    with MemDB.open(path, durability="off") as database:
        database.declare_keys("year", "kind", "years")
        for n in range(6):
            database.insert(
                "text",
                id=str(n),
                metadata={"year": n % 2, "kind": "a", "years": 1},
                embeddings=np.ones((1, 2), np.float32),
            )
        database.undeclare_keys("year", "never")
        assert database.stats()["index"]["keys"] == ["kind", "years"]
        with database._store.read() as transaction:
            assert {name for name, _, _ in Postings(transaction).items()} == {"kind", "years"}
        assert len(database.retrieve(np.ones(2), 9, where={"year": 1}).hits) == 3
        assert memdb.verify(path) == []
        database.insert(
            "text", id="6", metadata={"year": 1}, embeddings=np.ones((1, 2), np.float32)
        )
        database.delete("1")
        database.declare_keys("year")
        assert len(database.retrieve(np.ones(2), 9, where={"year": 1}).hits) == 3
    assert memdb.verify(path) == []
