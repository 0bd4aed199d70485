"""A database as a collection of documents: many at once, by id, by metadata; and its change log."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import memdb
from memdb import (
    Change,
    ConflictError,
    Document,
    DocumentExistsError,
    ExplicitMemory,
    InvalidInputError,
    MemDB,
    MissingPartError,
    UnknownDocumentError,
    verify,
)
from memdb.filters import matching
from tests.engine.helpers import (
    PAGE,
    TokenWriter,
    WordEmbedder,
    make_memory,
    make_shape,
    same_memory,
    unit,
)

SHAPE = make_shape()
EAST, NORTH, WEST = unit(1, 0), unit(0, 1), unit(-1, 0)


@pytest.fixture
def bare(tmp_path: Path, bare_template: Path) -> Iterator[MemDB]:
    """A database without parts: every text is one reference, embeddings have 2 numbers."""
    with MemDB.open(shutil.copytree(bare_template, tmp_path / "bare")) as database:
        yield database


@pytest.fixture
def full(tmp_path: Path, full_template: Path) -> Iterator[MemDB]:
    """A database with an embedder, a writer and their tokenizer; 16 tokens a reference."""
    path = shutil.copytree(full_template, tmp_path / "full")
    with MemDB.open(path, embedder=WordEmbedder(), writer=TokenWriter()) as database:
        yield database


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MemDB]:
    """1,000 documents, more than a page of a walk; `year` is declared, `kind` is not."""
    path = tmp_path_factory.mktemp("many") / "db"
    with MemDB.create(path, shape=SHAPE, dimension=2, keys=["year"]) as database:
        database.insert_many(
            [
                Document(f"text {n}", f"{n:04}", {"year": n % 50, "kind": n % 3, "n": n})
                for n in range(1000)
            ],
            embeddings=np.concatenate([unit(n - 500, 1) for n in range(1000)]),
        )
        yield database


# --- many at once ---------------------------------------------------------------------------------


def test_documents_come_as_what_stands_for_them(full: MemDB) -> None:
    done = full.insert_many(
        [
            Document("The harbour.", "a", {"n": 1}),
            {"id": "b", "text": PAGE, "metadata": {"n": 2}},
            {"text": "A lighthouse.", "metadata": None},
            "A whale.",
        ]
    )
    assert done == [full.get(one.id) for one in done]
    assert [one.text for one in done] == ["The harbour.", PAGE, "A lighthouse.", "A whale."]
    assert [one.metadata for one in done] == [{"n": 1}, {"n": 2}, {}, {}]
    assert all(one.warm == len(one.references) > 0 for one in done)
    assert len(done[1].references) > 5
    assert full.stats()["changes"] == 1  # one write
    assert done[3] == full.upsert("A whale.")  # the same id as `insert` gives
    assert verify(full.path) == []


def test_many_are_the_same_as_each_alone(full: MemDB, tmp_path: Path) -> None:
    texts = [PAGE, *(PAGE[at : at + 150] for at in range(0, 400, 40))]
    full.insert_many([{"id": str(n), "text": text} for n, text in enumerate(texts)])
    with MemDB.create(tmp_path / "one", embedder=WordEmbedder(), writer=TokenWriter()) as one:
        for n, text in enumerate(texts):
            one.insert(text, id=str(n))
        assert list(full.documents()) == list(one.documents())
        for n in range(len(texts)):
            for (mine, memory), (other, its) in zip(
                full.memories(str(n)), one.memories(str(n)), strict=True
            ):
                assert mine == other
                assert memory is not None
                assert its is not None
                assert same_memory(memory.memory, its.memory)


@pytest.mark.parametrize("documents", [[], (), iter([])])
def test_none_at_all_is_no_write(full: MemDB, documents: Any) -> None:
    assert full.insert_many(documents) == []
    assert full.upsert_many(documents) == []
    assert full.stats()["changes"] == 0


@pytest.mark.parametrize(
    ("documents", "error", "says"),
    [
        ("A whale.", InvalidInputError, "documents must be several"),
        ({"text": "A whale."}, InvalidInputError, "documents must be several"),
        (Document("A whale."), InvalidInputError, "documents must be several"),
        (5, InvalidInputError, "documents must be several"),
        (None, InvalidInputError, "documents must be several"),
        (["A whale.", 5], InvalidInputError, "document 1: a document is"),
        (["A whale.", {"id": "x"}], InvalidInputError, "document 1: the field 'text' is missing"),
        (["A", {"text": "x", "txt": 1}], InvalidInputError, "document 1: unknown field 'txt'"),
        (["A whale.", "  "], InvalidInputError, "document 1: 'text' is empty"),
        (["A", {"text": "x", "id": 7}], InvalidInputError, "document 1: 'id' must be a string"),
        (["A", {"text": "x", "metadata": []}], InvalidInputError, "document 1: 'metadata' must"),
        (["A whale.", "A whale."], InvalidInputError, "document 1: the id .* is there twice"),
        (["A", {"text": "x", "id": "there"}], DocumentExistsError, "'there'"),
    ],
)
def test_what_is_wrong_is_named_by_its_place_and_nothing_is_written(
    full: MemDB, documents: Any, error: type[Exception], says: str
) -> None:
    full.insert("The harbour.", id="there")
    with pytest.raises(error, match=says):
        full.insert_many(documents)
    if error is InvalidInputError:
        with pytest.raises(error, match=says):
            full.upsert_many(documents)
    assert list(full) == ["there"]


def test_given_arrays_are_of_all_references_in_order(bare: MemDB) -> None:
    memories = [make_memory(SHAPE, 1), make_memory(SHAPE, 2)]
    with pytest.raises(InvalidInputError, match=r"shape \(2, 2\)"):
        bare.insert_many(["a", "b"], embeddings=EAST)
    with pytest.raises(InvalidInputError, match="1 memories for"):
        bare.insert_many(["a", "b"], embeddings=np.concatenate([EAST, WEST]), memories=memories[:1])
    with pytest.raises(MissingPartError):
        bare.insert_many(["a", "b"])
    assert len(bare) == 0
    bare.insert_many(["a", "b"], embeddings=np.concatenate([EAST, WEST]), memories=memories)
    (hit,) = bare.retrieve(WEST[0], 1)
    assert hit.text == "b"
    assert hit.memory is not None
    assert same_memory(hit.memory, memories[1])


def test_of_two_that_insert_the_same_one_has_written_nothing(full: MemDB) -> None:
    class Late(WordEmbedder):
        def embed(self, texts: Any, *, query: bool = False) -> NDArray[np.float32]:
            if "b" not in full:
                full.insert("A whale.", id="b")
            return super().embed(texts, query=query)

    with MemDB.open(full.path, embedder=Late()) as late, pytest.raises(DocumentExistsError):
        late.insert_many([{"id": "a", "text": "A storm."}, {"id": "b", "text": "A storm."}])
    assert list(full) == ["b"]


# --- upsert ---------------------------------------------------------------------------------------


def test_upsert_writes_what_is_given_whatever_was_there(full: MemDB) -> None:
    first = full.upsert("The harbour.", id="a", metadata={"n": 1})
    assert (first.version, first.metadata) == (1, {"n": 1})
    same = full.upsert("The harbour.", id="a", metadata={"n": 1})
    assert same == first == full.get("a")
    described = full.upsert("The harbour.", id="a", metadata={"n": 2})
    assert (described.version, described.metadata) == (2, {"n": 2})
    assert described.references == first.references  # and with them embeddings and memories
    emptied = full.upsert("The harbour.", id="a")
    assert (emptied.version, emptied.metadata) == (3, {})
    other = full.upsert("The town.", id="a", metadata={"n": 4})
    assert (other.version, other.metadata, other.warm) == (4, {"n": 4}, 1)
    assert other.references != first.references
    assert other == full.get("a")
    assert verify(full.path) == []


def test_upsert_of_many_does_to_each_what_is_due(full: MemDB) -> None:
    full.insert_many(
        [Document("One.", "same", {"n": 1}), Document("Two.", "described", {"n": 1}),
         Document("Three.", "replaced", {"n": 1})]
    )  # fmt: skip
    before = full.stats()["changes"]
    embedded: list[str] = []

    class Watched(WordEmbedder):
        def embed(self, texts: Any, *, query: bool = False) -> NDArray[np.float32]:
            embedded.extend(texts)
            return super().embed(texts, query=query)

    with MemDB.open(full.path, embedder=Watched(), writer=TokenWriter()) as database:
        done = database.upsert_many(
            [
                Document("New.", "new"),
                Document("One.", "same", {"n": 1}),
                Document("Two.", "described", {"n": 2}),
                Document("Drei.", "replaced", {"n": 1}),
            ]
        )
    assert embedded == ["New.", "Drei."]
    assert [one.version for one in done] == [1, 1, 2, 2]
    assert done == [full.get(one.id) for one in done]
    assert full.stats()["changes"] == before + 1
    assert verify(full.path) == []


def test_upsert_with_given_arrays_replaces_them(bare: MemDB) -> None:
    bare.upsert("text", id="a", embeddings=EAST)
    bare.upsert("text", id="a", embeddings=WEST, memories=[make_memory(SHAPE, 1)])
    assert bare.get("a").version == 2
    assert bare.retrieve(WEST[0], 1)[0].score == pytest.approx(1)
    assert bare.get("a").warm == 1


# --- by id ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 3, 600])
def test_ids_are_counted_known_and_given_in_order(bare: MemDB, count: int) -> None:
    names = [f"é{n}" if n % 2 else f"z{n}" for n in range(count)]
    bare.insert_many(
        [Document("text " + name, name) for name in names],
        embeddings=np.repeat(EAST, count, axis=0),
    )
    assert len(bare) == bare.count() == count
    assert list(bare) == sorted(names, key=str.encode)
    assert all(name in bare for name in names)
    assert "other" not in bare
    assert bare  # a database is there, however empty
    assert [one.id for one in bare.documents()] == list(bare)


@pytest.mark.parametrize("impossible", [5, None, "", "x" * 500, "a\0b", "\ud800", ["a"], b"a"])
def test_what_can_be_no_id_is_not_in_it(bare: MemDB, impossible: object) -> None:
    assert impossible not in bare
    with bare.snapshot() as moment:
        assert impossible not in moment
    with bare.transaction() as t:
        assert impossible not in t


def test_many_are_got_in_the_order_asked_for(bare: MemDB) -> None:
    for name in "abc":
        bare.insert(name, id=name, embeddings=EAST)
    assert [one.id for one in bare.get_many(["c", "a", "c"])] == ["c", "a", "c"]
    assert bare.get_many([]) == []
    assert bare.get_many(iter("ab")) == [bare.get("a"), bare.get("b")]
    with pytest.raises(UnknownDocumentError, match="'x', 'y'"):
        bare.get_many(["a", "x", "y"])
    with pytest.raises(InvalidInputError, match="ids must be several"):
        bare.get_many("abc")
    with pytest.raises(UnknownDocumentError, match="can have the id"):
        bare.get_many(["a", ""])


def test_a_snapshot_is_a_collection_of_its_moment(bare: MemDB) -> None:
    bare.insert("a", id="a", metadata={"n": 1}, embeddings=EAST)
    with bare.snapshot() as moment:
        bare.insert("b", id="b", metadata={"n": 1}, embeddings=EAST)
        bare.delete("a")
        assert (len(moment), list(moment), "a" in moment, "b" in moment) == (1, ["a"], True, False)
        assert moment.count({"n": 1}) == 1
        assert [one.id for one in moment.get_many(["a"])] == ["a"]
        assert [one.id for one in moment.documents({"n": 1}, limit=5)] == ["a"]
    assert list(bare) == ["b"]


# --- by metadata ----------------------------------------------------------------------------------


FILTERS = [None, {"year": 7}, {"year": {"$gte": 40}}, {"kind": 1}, {"year": 7, "kind": 1},
           {"year": 99}, {"kind": {"$in": [0, 1, 2]}}]  # fmt: skip


@pytest.mark.parametrize("where", FILTERS, ids=str)
@pytest.mark.parametrize("limit", [None, 0, 10, 257])
@pytest.mark.parametrize("after", [None, "0499", "0500x"])
def test_documents_are_the_same_as_all_that_match(
    many: MemDB, where: Any, limit: int | None, after: str | None
) -> None:
    def is_meant(n: int) -> bool:
        values = {"year": n % 50, "kind": n % 3}
        tests = {"$gte": lambda a, b: a >= b, "$in": lambda a, b: a in b}
        return all(
            all(tests[op](values[key], to) for op, to in wanted.items())
            if isinstance(wanted, dict)
            else values[key] == wanted
            for key, wanted in (where or {}).items()
        )

    due = [f"{n:04}" for n in range(1000) if is_meant(n) and f"{n:04}" > (after or "")][:limit]
    assert [one.id for one in many.documents(where, after=after, limit=limit)] == due
    if limit is None and after is None:
        assert many.count(where) == len(due)


def test_an_indexed_filter_reads_no_other_metadata(
    many: MemDB, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    real = matching.Transaction.metadata

    def metadata(self: Any, name: str, version: int | None = None) -> dict[str, Any]:
        read.append(name)
        return real(self, name, version)

    monkeypatch.setattr(matching.Transaction, "metadata", metadata)
    assert many.count({"year": 7}) == 20
    found = {one.id for one in many.documents({"year": 7})}
    assert set(read) <= found


def test_a_walk_sees_each_page_as_it_is_then(bare: MemDB) -> None:
    def vectors(count: int) -> NDArray[np.float32]:
        return np.repeat(EAST, count, axis=0)

    bare.insert_many(
        [Document(f"t {n}", f"{n:04}", {"n": 1}) for n in range(600)], embeddings=vectors(600)
    )
    for where in (None, {"n": 1}):
        walk = bare.documents(where)
        first = next(walk)
        assert first.id == min(bare)
        bare.delete("0300", "0599")
        bare.update("0400", metadata={"n": 2})
        rest = [one.id for one in walk]
        assert "0300" not in rest
        assert ("0400" in rest) == (where is None)
        bare.insert_many(
            [Document(f"t {n}", f"{n:04}", {"n": 1}) for n in (300, 599)], embeddings=vectors(2)
        )
        bare.update("0400", metadata={"n": 1})


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"limit": -1}, "limit must be"),
        ({"limit": 1.5}, "limit must be"),
        ({"limit": True}, "limit must be"),
        ({"limit": "5"}, "limit must be"),
        ({"after": 5}, "'id' must be a string"),
        ({"after": "x" * 500}, "500 bytes"),
    ],
)
def test_wrong_arguments_of_a_walk_are_told_at_once(
    many: MemDB, arguments: dict[str, Any], says: str
) -> None:
    with pytest.raises(InvalidInputError, match=says):
        many.documents(**arguments)
    assert len(list(many.documents(limit=np.int64(3)))) == 3  # type: ignore[arg-type]


@pytest.mark.parametrize("declared", [True, False])
def test_what_a_filter_means_is_deleted(bare: MemDB, declared: bool) -> None:
    if declared:
        bare.declare_keys("n")
    for number in range(10):
        bare.insert(f"t {number}", id=str(number), metadata={"n": number}, embeddings=EAST)
    assert bare.delete(where={"n": {"$gte": 7}}) == 3
    assert bare.delete(where={"n": {"$gte": 7}}) == 0
    assert bare.delete("0", "1", "0") == 2
    assert bare.delete() == 0
    assert list(bare) == list("23456")
    with pytest.raises(ConflictError, match="document '2' is at version 1"):
        bare.delete(where={"n": 2}, if_version=2)
    with pytest.raises(InvalidInputError, match="not by both"):
        bare.delete("2", where={"n": 3})
    with pytest.raises(InvalidInputError, match="means every document"):
        bare.delete(where={})
    for wrong in ("n", 5, {"n": {"$gt": []}}):
        with pytest.raises(InvalidInputError):
            bare.delete(where=wrong)  # type: ignore[arg-type]
    assert list(bare) == list("23456")
    assert bare.delete(*bare) == 5
    assert verify(bare.path) == []


#: Filters that say nothing, and what a user forgot to fill in.
EMPTY: list[dict[str, Any]] = [
    {},
    {"$and": [{}]},
    {"$or": [{}]},
    {"$or": [{"n": 1}, {}]},
    {"$and": [{}, {"$or": [{}, {"n": 1}]}]},
    {"$not": {"$not": {}}},
    {"$not": {"$or": [{"$not": {}}]}},
    {"$not": {"n": {"$in": []}}},
    {"n": {"$nin": []}},
    {"n": {"$nin": []}, "$and": [{"m": {"$nin": []}}]},
    {"$not": {"n": {"$in": [], "$gt": 3}}},
]
#: Filters that look like them, and ask something.
NOT_EMPTY: list[tuple[dict[str, Any], str]] = [
    ({"$not": {}}, ""),
    ({"$and": [{}, {"$not": {}}]}, ""),
    ({"n": {"$in": []}}, ""),
    ({"$or": [{"n": 1}, {"$not": {}}]}, "1"),
    ({"$and": [{"n": 1}, {}]}, "1"),
    ({"n": {"$nin": [], "$gte": 1}}, "12"),
    ({"n": {"$exists": True}}, "012"),
    ({"n": {"$ne": 5}}, "012"),
    ({"n": {}}, ""),
]


@pytest.mark.parametrize("declared", [False, True])
def test_a_filter_that_says_nothing_deletes_nothing(bare: MemDB, declared: bool) -> None:
    if declared:
        bare.declare_keys("n")
    for number in range(3):
        bare.insert(f"t {number}", id=str(number), metadata={"n": number}, embeddings=EAST)
    for where in EMPTY:
        with pytest.raises(InvalidInputError, match=r"means every document.*delete\(\*db\)"):
            bare.delete(where=where)
        with (
            pytest.raises(InvalidInputError, match="means every document"),
            bare.transaction() as t,
        ):
            t.delete(where=where)
        # To read all is no accident.
        assert bare.count(where) == len(list(bare.documents(where))) == 3, where
        assert len(bare.retrieve(EAST[0], where=where).hits) == 3
    for where, left in NOT_EMPTY:
        assert "".join(document.id for document in bare.documents(where)) == left, where
        with bare.snapshot() as snapshot:
            assert snapshot.count(where) == len(left)
    assert list(bare) == list("012")
    assert bare.delete(where={"n": {"$exists": True}}) == 3  # it may be all that there are


def test_what_meanwhile_is_no_longer_meant_stays(
    full: MemDB, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abc":
        full.insert(name, id=name, metadata={"n": 1})
    with MemDB.open(full.path) as other:
        real = other._meant

        def meant(where: Any) -> list[str]:
            found = real(where)
            full.update("a", metadata={"n": 2})
            full.delete("b")
            return found

        monkeypatch.setattr(other, "_meant", meant)
        assert other.delete(where={"n": 1}) == 1
    assert list(full) == ["a"]


# --- the change log -------------------------------------------------------------------------------


def test_changes_are_told_as_they_happened(full: MemDB) -> None:
    assert list(full.changes()) == []
    (a,) = full.insert("The harbour.", id="a", cold=True).references
    full.warm()
    (b,) = full.insert("A whale.", id="b").references
    full.update("a", metadata={"n": 1})  # of metadata alone the log says nothing
    full.delete("b")
    assert list(full.changes()) == [
        Change(1, "inserted", a, "a"),
        Change(2, "remembered", a, "a"),
        Change(3, "inserted", b, None),
        Change(3, "remembered", b, None),
        Change(4, "deleted", b, None),
    ]
    assert list(full.changes(since=3)) == [Change(4, "deleted", b, None)]
    assert list(full.changes(4)) == []
    assert dataclasses.asdict(next(full.changes())) == {
        "number": 1, "what": "inserted", "reference": a, "document_id": "a",
    }  # fmt: skip


def test_a_follower_that_begins_with_a_snapshot_has_what_is_there(bare: MemDB) -> None:
    rng = np.random.default_rng(0)
    bare.insert_many([f"first {n}" for n in range(5)], embeddings=np.repeat(EAST, 5, axis=0))
    with bare.snapshot() as moment:
        there = {number for one in moment.documents() for number in one.references}
        seen = moment.change
        assert list(moment.changes(seen)) == []
        for step in range(600):  # more than a page
            if step % 3 == 2:
                bare.delete(str(rng.choice(list(bare))))
            else:
                bare.insert(f"later {step}", embeddings=EAST)
        assert len(list(moment.changes())) == 5  # of its moment
    for change in bare.changes(since=seen):
        if change.what == "inserted":
            there.add(change.reference)
            assert change.document_id is None or change.document_id in bare
        elif change.what == "deleted":
            there.remove(change.reference)
    assert there == {number for one in bare.documents() for number in one.references}
    numbers = [change.number for change in bare.changes(since=seen)]
    assert numbers == list(range(seen + 1, seen + 601))


def test_changes_that_are_no_longer_kept_are_an_error(bare: MemDB) -> None:
    bare.insert("a", id="a", embeddings=EAST)
    bare.insert("b", id="b", embeddings=EAST)
    walk = bare.changes(1)
    memdb.compact(bare.path)
    with pytest.raises(InvalidInputError, match=r"since 1 .* 2 are no longer kept.*snapshot"):
        bare.changes(1)
    with pytest.raises(InvalidInputError, match="no longer kept"):
        next(walk)
    assert list(bare.changes(2)) == []
    bare.delete("a")
    assert [change.what for change in bare.changes(2)] == ["deleted"]
    with pytest.raises(InvalidInputError, match=r"since 9 .*newest change has number 3"):
        bare.changes(9)
    for wrong in (-1, 1.5, "1", None, True):
        with pytest.raises(InvalidInputError, match="since must be"):
            bare.changes(wrong)  # type: ignore[arg-type]


def test_a_writer_that_gives_too_few_memories_leaves_nothing(full: MemDB) -> None:
    class Breaks(TokenWriter):
        def write(self, texts: Any) -> list[ExplicitMemory]:
            return super().write(texts)[1:]

    with MemDB.open(full.path, embedder=WordEmbedder(), writer=Breaks()) as database:
        with pytest.raises(InvalidInputError, match="1 memories for a text of 2 references"):
            database.insert_many(["A whale.", "A storm."])
        assert len(database) == 0
