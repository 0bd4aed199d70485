"""Retrieval of what a function accepts."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from memdb import Hit, InvalidInputError, MemDB, Reference
from tests.engine.helpers import (
    TokenWriter,
    WordEmbedder,
    make_memory,
    make_shape,
    same_memory,
    unit,
)

SHAPE = make_shape()
MANY, DIMENSION = 300, 8
Accepts = Callable[[Reference], bool]


def vectors(count: int, seed: int = 0) -> NDArray[np.float32]:
    """Of length 1, (count, DIMENSION)."""
    found = np.random.default_rng(seed).standard_normal((count, DIMENSION)).astype(np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


@pytest.fixture(scope="module", params=["exact", "ivf", "ivf and a tail"])
def many(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """300 references, by each kind of index; each seventh is deleted, each has a memory."""
    path = tmp_path_factory.mktemp("many") / "db"
    kind = request.param
    index = kind.split()[0]
    built = {"exact": 0, "ivf": MANY, "ivf and a tail": 200}[kind]
    with MemDB.create(path, shape=SHAPE, dimension=DIMENSION, codec="exact", index=index) as db:
        for n, vector in enumerate(vectors(MANY)):
            if n == built and built:
                assert db.build_index() is not None
            db.insert(
                f"text {n}",
                id=str(n),
                metadata={"even": n % 2 == 0, "n": n},
                embeddings=vector[None],
                memories=[make_memory(SHAPE, n)],
            )
        if built == MANY:
            assert db.build_index() is not None
        db.delete(*(str(n) for n in range(0, MANY, 7)))
        assert db.stats()["index"]["kind"] == index
        yield db


@pytest.fixture
def full(tmp_path: Path, full_template: Path) -> Iterator[MemDB]:
    path = shutil.copytree(full_template, tmp_path / "full")
    with MemDB.open(path, embedder=WordEmbedder(), writer=TokenWriter()) as database:
        yield database


def number_of(reference: Reference) -> int:
    return int(reference.document_id)


def numbers(hits: list[Hit]) -> list[int]:
    return [number_of(hit.reference) for hit in hits]


class Asked:
    """An answer for each reference, and which were asked about."""

    def __init__(self, accepts: Callable[[int], bool]) -> None:
        self.accepts = accepts
        self.times: Counter[tuple[int, int]] = Counter()

    def of(self, query: int, reference: Reference) -> bool:
        number = number_of(reference)
        assert reference.text == f"text {number}"
        self.times[query, number] += 1
        return self.accepts(number)

    def alone(self, reference: Reference) -> bool:
        return self.of(0, reference)


ACCEPTS = {
    "all": lambda n: True,
    "most": lambda n: n % 10 != 3,
    "few": lambda n: n % 60 == 5,
    "one": lambda n: n == 41,
    "none": lambda n: False,
}


@pytest.mark.parametrize("where", [None, {"even": False}, {"n": {"$lt": 100}}], ids=str)
@pytest.mark.parametrize("k", [1, 5, 40, 2000])
@pytest.mark.parametrize("name", ACCEPTS)
def test_the_nearest_that_are_accepted_are_found(
    many: MemDB, name: str, k: int, where: dict[str, Any] | None
) -> None:
    asked = Asked(ACCEPTS[name])
    queries = vectors(4, seed=1)
    found = many.retrieve_batch(list(queries), k, where=where, accept=asked.of)
    there = [n for n in range(MANY) if n % 7]
    if where == {"even": False}:
        there = [n for n in there if n % 2]
    elif where:
        there = [n for n in there if n < 100]
    meant = [n for n in there if ACCEPTS[name](n)]
    for query, (vector, retrieval) in enumerate(zip(queries, found, strict=True)):
        scores = dict(enumerate((vectors(MANY) @ vector).tolist()))
        hits = retrieval.hits
        assert len(hits) == min(k, len(meant)) == len(set(numbers(hits)))
        assert set(numbers(hits)) <= set(meant)
        # An index file holds numbers as float16, and a search looks at some of its clusters alone;
        # a filter leaves so few that they are compared one by one.
        assert [hit.score for hit in hits] == pytest.approx(
            [scores[n] for n in numbers(hits)], abs=2e-3
        )
        assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
        best = sorted(meant, key=lambda n: -scores[n])[:k]
        if many.stats()["index"]["kind"] == "exact":
            assert numbers(hits) == best
        elif where:
            assert [hit.score for hit in hits] == pytest.approx([scores[n] for n in best], abs=1e-3)
        for hit in hits:
            assert hit.memory is not None
            assert same_memory(hit.memory, make_memory(SHAPE, number_of(hit.reference)))
        asked_about = {number for of, number in asked.times if of == query}
        assert set(numbers(hits)) <= asked_about <= set(there)
        if len(hits) < k:
            assert asked_about == set(there)
    assert set(asked.times.values()) <= {1}


def test_no_more_are_asked_about_than_it_takes(many: MemDB) -> None:
    query = vectors(1, seed=2)[0]
    asked = Asked(lambda n: True)
    usual = many.retrieve(query, 5)
    found = many.retrieve(query, 5, accept=asked.alone)
    assert [(hit.id, hit.score) for hit in found.hits] == [
        (hit.id, hit.score) for hit in usual.hits
    ]
    assert list(asked.times) == [(0, n) for n in numbers(usual.hits)]
    refused = number_of(usual.hits[0].reference)
    asked = Asked(lambda n: n != refused)
    found = many.retrieve(query, 5, accept=asked.alone)
    assert numbers(found.hits)[:4] == numbers(usual.hits)[1:]
    assert list(asked.times) == [(0, n) for n in [refused, *numbers(found.hits)]]


def test_a_batch_is_asked_for_each_query(many: MemDB) -> None:
    queries = list(vectors(3, seed=3))
    usual = many.retrieve_batch(queries, 3)
    best = [number_of(retrieval.hits[0].reference) for retrieval in usual]
    found = many.retrieve_batch(
        [queries[0], queries[0], queries[2]],
        3,
        accept=lambda query, reference: query != 1 or number_of(reference) != best[0],
    )
    assert numbers(found[0].hits) == numbers(usual[0].hits)
    assert numbers(found[1].hits)[:2] == numbers(usual[0].hits)[1:]
    assert numbers(found[2].hits) == numbers(usual[2].hits)


@pytest.mark.parametrize("memories", [True, False])
def test_any_truth_is_an_answer(many: MemDB, memories: bool) -> None:
    query = vectors(1, seed=4)[0]
    (found,) = many.retrieve_batch(
        [query],
        4,
        memories=memories,
        accept=lambda _, reference: np.bool_(number_of(reference) > 200),  # type: ignore
    )
    assert len(found.hits) == 4
    assert min(numbers(found.hits)) > 200
    assert len(found.memories) == (4 if memories else 0)


def test_a_snapshot_asks_about_what_it_sees(full: MemDB) -> None:
    full.insert("The harbour is old.", id="a")
    full.insert("The harbour is new.", id="b")
    with full.snapshot() as snapshot:
        full.update("a", text="The lighthouse is tall.")
        full.delete("b")
        full.insert("The harbour freezes.", id="c")
        texts: list[str] = []

        def accept(reference: Reference) -> bool:
            texts.append(reference.text)
            return reference.document_id == "a"

        (hit,) = snapshot.retrieve("harbour", 1, accept=accept).hits
        assert hit.reference.text == "The harbour is old."
        assert set(texts) <= {"The harbour is old.", "The harbour is new."}
        assert len(texts) == len(set(texts))
        assert snapshot.retrieve("harbour", 1, accept=lambda _: False).hits == []
    texts.clear()
    (hit,) = full.retrieve("harbour", 5, accept=accept).hits
    assert hit.reference.text == "The lighthouse is tall."
    assert sorted(texts) == ["The harbour freezes.", "The lighthouse is tall."]


def test_a_cold_start_writes_what_is_accepted_alone(full: MemDB) -> None:
    for name in "abcdef":
        full.insert(f"The harbour {name}.", id=name, cold=True)
    found = full.retrieve("harbour", 2, accept=lambda reference: reference.document_id in "bdf")
    assert {hit.reference.document_id for hit in found.hits} < set("bdf")
    assert found.written == len(found.memories) == 2
    warm = {name for name in "abcdef" if full.get(name).warm}
    assert warm == {hit.reference.document_id for hit in found.hits}
    again = full.retrieve("harbour", 5, accept=lambda reference: reference.document_id in "bdf")
    assert (len(again.hits), again.written) == (3, 1)
    assert full.stats()["memories"] == 3
    assert full.retrieve("harbour", 5, accept=lambda _: False).written == 0
    assert full.stats()["memories"] == 3


def test_what_is_refused_does_not_count_as_used(full: MemDB) -> None:
    for name in "abc":
        full.insert(f"The harbour {name}.", id=name, cold=True)
    with MemDB.open(full.path, embedder=WordEmbedder()) as database:
        for _ in range(2):
            database.retrieve("harbour", 1, accept=lambda reference: reference.document_id == "c")
    # The most used is warmed first.
    assert full.warm(top=1) == 1
    assert [full.get(name).warm for name in "abc"] == [0, 0, 1]


def test_memories_of_what_is_refused_are_not_read(many: MemDB) -> None:
    query = vectors(1, seed=5)[0]
    read: list[int] = []
    memory_store = many._memory_store
    wrapped = memory_store.wrapped
    memory_store.wrapped = lambda number, record: read.append(number) or wrapped(number, record)  # type: ignore
    try:
        found = many.retrieve(query, 3, accept=lambda reference: number_of(reference) % 2 == 0)
    finally:
        del memory_store.wrapped
    assert sorted(read) == sorted(hit.id for hit in found.hits)


def test_an_empty_database_asks_nothing(tmp_path: Path, bare_template: Path) -> None:
    with MemDB.open(shutil.copytree(bare_template, tmp_path / "bare")) as database:
        asked = Asked(lambda n: True)
        assert database.retrieve(unit(1, 0)[0], accept=asked.alone).hits == []
        assert database.retrieve_batch([], accept=asked.of) == []
        assert not asked.times


def test_what_accept_raises_comes_out(full: MemDB) -> None:
    full.insert("The harbour is old.", id="a", cold=True)

    def accept(reference: Reference) -> bool:
        raise KeyError(reference.text)

    with pytest.raises(KeyError, match="The harbour is old"):
        full.retrieve("harbour", accept=accept)
    assert full.get("a").warm == 0
    with pytest.raises(InvalidInputError, match="k must be"):
        full.retrieve("harbour", 0, accept=accept)
    assert len(full.retrieve("harbour").memories) == 1


def test_accept_may_read_the_database(full: MemDB) -> None:
    full.insert("The harbour is old.", id="a", metadata={"year": 1874})
    full.insert("The harbour is new.", id="b", metadata={"year": 1990})

    def accept(reference: Reference) -> bool:
        return bool(full.get(reference.document_id).metadata["year"] > 1900)

    (hit,) = full.retrieve("harbour", accept=accept).hits
    assert hit.reference.document_id == "b"
