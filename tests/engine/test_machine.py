"""Hypothesis drives the public API in any order and compares with a dict."""

from __future__ import annotations

import json
import operator
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from numpy.typing import NDArray

import memdb
from memdb import (
    Batch,
    ConflictError,
    Document,
    DocumentExistsError,
    MemDB,
    MissingPartError,
    Snapshot,
    StoredDocument,
    UnknownDocumentError,
)
from memdb.index import policy
from tests.engine.helpers import make_memory, make_shape, same_memory

DIMENSION = 4
SHAPE = make_shape()


@dataclass(frozen=True)
class Known:
    """What the model knows of a document; embedding and memory follow from numbers. A memory of
    None: it is cold."""

    version: int
    text: str
    metadata: dict[str, Any]
    embedding: int
    memory: int | None

    @property
    def vector(self) -> NDArray[np.float32]:
        return vector(self.embedding)


Model = dict[str, Known]


def vector(number: int) -> NDArray[np.float32]:
    """A vector of length 1; of two numbers never the same."""
    drawn = np.random.default_rng(number).standard_normal(DIMENSION)
    return (drawn / np.linalg.norm(drawn)).astype(np.float32)


# --- filters, said once more ----------------------------------------------------------------------


def means(where: Mapping[str, Any], metadata: Mapping[str, Any]) -> bool:
    """Whether a filter means a document, as docs and JSON have it."""
    return all(
        key in metadata and all(holds(test, metadata[key], given) for test, given in tests.items())
        for key, wanted in where.items()
        for tests in [wanted if isinstance(wanted, dict) else {"$eq": wanted}]
    )


def holds(test: str, value: Any, given: Any) -> bool:
    """An array is meant as a whole, or by one of its elements."""
    return any(meets(test, one, given) for one in [value, *(value if type(value) is list else [])])


def meets(test: str, value: Any, given: Any) -> bool:
    compare = {"$gt": operator.gt, "$gte": operator.ge, "$lt": operator.lt, "$lte": operator.le}
    match test:
        case "$eq":
            return kind(value) == kind(given) and value == given
        case "$in":
            return any(meets("$eq", value, item) for item in given)
        case _:
            comparable = kind(value) == kind(given) and kind(value) in ("number", "string")
            return comparable and compare[test](value, given)


def kind(value: Any) -> str:
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, (int, float)):
        return "number"
    return "string" if isinstance(value, str) else type(value).__name__


KEYS = ("year", "kind", "tag")
VALUES = st.one_of(
    st.integers(0, 3),
    st.sampled_from([1.0, 2.5, -1, "a", "b", "", None, True, False, [1, "a"], 2**60]),
)
METADATA = st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=3)
CONDITIONS = st.one_of(
    VALUES,
    st.fixed_dictionaries({"$in": st.lists(VALUES, max_size=3)}),
    st.fixed_dictionaries({"$eq": VALUES}),
    st.dictionaries(
        st.sampled_from(["$gt", "$gte", "$lt", "$lte"]),
        st.one_of(st.integers(-1, 3), st.sampled_from([1.5, "a", "aa"])),
        min_size=1,
        max_size=2,
    ),
)
FILTERS = st.one_of(
    st.none(),
    st.dictionaries(st.sampled_from([*KEYS, "missing"]), CONDITIONS, min_size=1, max_size=2),
)
NAMES = st.sampled_from([f"name-{n:02}" for n in range(10)] + ["ä", "z" * 480])
TEXTS = st.sampled_from(["The harbour is old.", "Ships come.", " spaces ", "港は古い。"])
CONTENTS = st.tuples(NAMES, TEXTS, METADATA, st.booleans())
SIZES = st.sampled_from([1, 2, 3, 5, 100])


# --- the machine ----------------------------------------------------------------------------------


class Machine(RuleBasedStateMachine):
    """One database with exact search, and a dict."""

    #: How the database is made.
    options: dict[str, Any] = {"index": "exact"}  # noqa: RUF012
    #: Whether the k nearest are found without fail; else only that k are, with their right scores.
    exact = True
    #: Documents that are there from the beginning.
    preloaded = 6

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.path = self.folder / "db"
        self.model: Model = {}
        self.number = 0
        self.copies = 0
        self.held: list[tuple[AbstractContextManager[Snapshot], Snapshot, Model]] = []

    @initialize(keys=st.lists(st.sampled_from(KEYS), max_size=2, unique=True))
    def create(self, keys: list[str]) -> None:
        self.database = MemDB.create(
            self.path,
            shape=SHAPE,
            dimension=DIMENSION,
            codec="exact",
            keys=keys,
            recall=1.0,
            **self.options,
        )
        self._load([(f"name-{n:02}", f"{n}", {"year": n % 4}, True) for n in range(self.preloaded)])

    def teardown(self) -> None:
        try:
            if hasattr(self, "database"):
                for held, _, _ in self.held:
                    held.__exit__(None, None, None)
                self.count()
                self.database.close()
                assert memdb.verify(self.path) == []
        finally:
            shutil.rmtree(self.folder)

    # --- write ---

    def _numbers(self, warm: bool) -> tuple[int, int | None]:
        """For a new embedding and a new memory."""
        self.number += 1
        return self.number, self.number if warm else None

    @rule(content=CONTENTS)
    def insert(self, content: tuple[str, str, dict[str, Any], bool]) -> None:
        name, text, metadata, warm = content
        embedding, memory = self._numbers(warm)

        def call() -> StoredDocument:
            return self.database.insert(
                text,
                id=name,
                metadata=metadata,
                embeddings=vector(embedding)[None],
                memories=None if memory is None else [make_memory(SHAPE, memory)],
            )

        if name in self.model:
            with pytest.raises(DocumentExistsError):
                call()
        else:
            self.model[name] = Known(1, text, metadata, embedding, memory)
            self._check_document(call(), name, self.model)

    @rule(content=CONTENTS, labelled=st.booleans(), versioned=st.sampled_from([None, 0, 1]))
    def update_content(
        self,
        content: tuple[str, str, dict[str, Any], bool],
        labelled: bool,
        versioned: int | None,
    ) -> None:
        name, text, metadata, warm = content
        embedding, memory = self._numbers(warm)
        given: dict[str, Any] = {
            "text": text,
            "embeddings": vector(embedding)[None],
            "memories": None if memory is None else [make_memory(SHAPE, memory)],
        }
        if labelled:
            given["metadata"] = metadata

        def changed(old: Known) -> Known:
            new = metadata if labelled else old.metadata
            return Known(old.version + 1, text, new, embedding, memory)

        self._update(name, versioned, given, changed)

    @rule(name=NAMES, metadata=METADATA, versioned=st.sampled_from([None, 0, 1]))
    def update_metadata(self, name: str, metadata: dict[str, Any], versioned: int | None) -> None:
        def changed(old: Known) -> Known:
            if same_json(old.metadata, metadata):
                return old
            return replace(old, version=old.version + 1, metadata=metadata)

        self._update(name, versioned, {"metadata": metadata}, changed)

    def _update(
        self,
        name: str,
        versioned: int | None,
        given: dict[str, Any],
        changed: Callable[[Known], Known],
    ) -> None:
        """Update; `versioned`: None, or by how much the version asked for is wrong."""
        old = self.model.get(name)
        if versioned is not None:
            given = {**given, "if_version": (old.version if old else 1) + versioned}
        if old is None:
            with pytest.raises(UnknownDocumentError):
                self.database.update(name, **given)
        elif versioned:
            with pytest.raises(ConflictError):
                self.database.update(name, **given)
        else:
            self.model[name] = changed(old)
            self._check_document(self.database.update(name, **given), name, self.model)

    @rule(name=NAMES)
    def update_without_an_embedding(self, name: str) -> None:
        with pytest.raises(MissingPartError if name in self.model else UnknownDocumentError):
            self.database.update(name, text="Nobody embeds this.")

    @rule(
        names=st.lists(NAMES, min_size=1, max_size=3), versioned=st.sampled_from([None, None, 1, 9])
    )
    def delete(self, names: list[str], versioned: int | None) -> None:
        if not set(names) <= self.model.keys():
            with pytest.raises(UnknownDocumentError):
                self.database.delete(*names)
        elif versioned and any(self.model[name].version != versioned for name in names):
            with pytest.raises(ConflictError):
                self.database.delete(*names, if_version=versioned)
        else:
            self.database.delete(*names, if_version=versioned)
            for name in set(names):
                del self.model[name]

    @rule(first=st.integers(0, 80), last=st.integers(0, 80))
    def delete_many(self, first: int, last: int) -> None:
        names = sorted(self.model)[first:last]
        self.database.delete(*names)
        for name in names:
            del self.model[name]

    @rule(contents=st.lists(st.lists(CONTENTS, min_size=1, max_size=4), min_size=1, max_size=2))
    def load(self, contents: list[list[tuple[str, str, dict[str, Any], bool]]]) -> None:
        self._load(*contents)

    def _load(self, *contents: list[tuple[str, str, dict[str, Any], bool]]) -> None:
        batches = []
        due = [0, 0, 0]
        renewed = 0
        for content in contents:
            if not content:
                continue
            numbers = [self._numbers(warm) for _, _, _, warm in content]
            batches.append(
                Batch(
                    [Document(text, name, metadata) for name, text, metadata, _ in content],
                    np.array([vector(embedding) for embedding, _ in numbers]),
                    [None if m is None else make_memory(SHAPE, m) for _, m in numbers],
                )
            )
            for (name, text, metadata, _), (embedding, memory) in zip(
                content, numbers, strict=True
            ):
                old = self.model.get(name)
                if old is None:
                    due[0] += 1
                elif old.text == text and same_json(old.metadata, metadata):
                    renewed += 1  # its embedding is another; a memory that did not come stays
                    memory = old.memory if memory is None else memory
                else:
                    due[1] += 1
                version = 1 if old is None else old.version + 1
                self.model[name] = Known(version, text, metadata, embedding, memory)
        report = self.database.load(batches)
        assert [report.inserted, report.updated, report.unchanged] == due
        assert report.renewed == renewed
        assert report.references == due[0] + due[1] + renewed

    # --- care ---

    @rule(
        durability=st.sampled_from(["full", "normal", "off"]),
        cache_bytes=st.sampled_from([0, 4000]),
    )
    def reopen(self, durability: Any, cache_bytes: int) -> None:
        while self.held:
            self.end_snapshot()
        self.database.close()
        self.database = MemDB.open(self.path, durability=durability, cache_bytes=cache_bytes)

    @precondition(lambda self: self._is_full())
    @rule()
    def compact(self) -> None:
        memdb.compact(self.path)

    @precondition(lambda self: self._is_full())
    @rule()
    def verify(self) -> None:
        assert memdb.verify(self.path) == []

    @precondition(lambda self: self._is_full())
    @rule()
    def backup(self) -> None:
        self.copies += 1
        copy = self.folder / f"copy-{self.copies}"
        memdb.backup(self.path, copy)
        assert memdb.verify(copy) == []
        with MemDB.open(copy) as database:
            self._check_documents(list(database.documents()), self.model)

    def _is_full(self) -> bool:
        """What opens the database by its path opens it with full durability."""
        return self.database._store.durability == "full"

    @rule(names=st.lists(st.sampled_from(KEYS), max_size=2))
    def declare_keys(self, names: list[str]) -> None:
        self.database.declare_keys(*names)

    @rule(kind=st.sampled_from([None, "exact", "ivf", "auto"]))
    def build_index(self, kind: Any) -> None:
        info = self.database.build_index(kind=None if self.exact else kind)
        assert info is None or info.references == len(self.model)

    # --- read ---

    @rule(k=SIZES, where=FILTERS, number=st.integers(-5, -1).map(abs))
    def retrieve(self, k: int, where: dict[str, Any] | None, number: int) -> None:
        self._check_retrieve(self.database, self.model, k, where, number)

    @rule(where=FILTERS)
    def list_documents(self, where: dict[str, Any] | None) -> None:
        self._check_list(self.database, self.model, where)

    @rule(name=NAMES)
    def get(self, name: str) -> None:
        self._check_get(self.database, self.model, name)

    @precondition(lambda self: len(self.held) < 3)
    @rule()
    def begin_snapshot(self) -> None:
        held = self.database.snapshot()
        self.held.append((held, held.__enter__(), dict(self.model)))

    @precondition(lambda self: self.held)
    @rule()
    def end_snapshot(self) -> None:
        held, _, _ = self.held.pop(0)
        held.__exit__(None, None, None)

    @precondition(lambda self: self.held)
    @rule(k=SIZES, where=FILTERS, number=st.integers(1, 5), name=NAMES)
    def read_snapshots(self, k: int, where: dict[str, Any] | None, number: int, name: str) -> None:
        for _, snapshot, model in self.held:
            self._check_retrieve(snapshot, model, k, where, number)
            self._check_list(snapshot, model, where)
            self._check_get(snapshot, model, name)

    @rule()
    def count(self) -> None:
        """Not after each step: reading may be what makes the next step go well."""
        self._check_documents(list(self.database.documents()), self.model)
        stats = self.database.stats()
        assert stats["documents"] == stats["references"] == len(self.model)
        warm = sum(known.memory is not None for known in self.model.values())
        assert (stats["memories"], stats["cold"]) == (warm, len(self.model) - warm)

    # --- compare ---

    def _check_document(self, document: StoredDocument, name: str, model: Model) -> None:
        known = model[name]
        assert (document.id, document.version) == (name, known.version)
        assert document.text == known.text
        assert same_json(document.metadata, known.metadata)
        assert len(document.references) == 1
        assert document.warm == (known.memory is not None)

    def _check_documents(self, documents: list[StoredDocument], model: Model) -> None:
        assert [document.id for document in documents] == sorted(model, key=str.encode)
        for document in documents:
            self._check_document(document, document.id, model)

    def _check_list(
        self, source: MemDB | Snapshot, model: Model, where: dict[str, Any] | None
    ) -> None:
        meant = {n: known for n, known in model.items() if means(where or {}, known.metadata)}
        self._check_documents(list(source.documents(where)), meant)

    def _check_get(self, source: MemDB | Snapshot, model: Model, name: str) -> None:
        if name in model:
            self._check_document(source.get(name), name, model)
        else:
            with pytest.raises(UnknownDocumentError):
                source.get(name)

    def _check_retrieve(
        self,
        source: MemDB | Snapshot,
        model: Model,
        k: int,
        where: dict[str, Any] | None,
        number: int,
    ) -> None:
        query = vector(10**6 + number)
        meant = {n: known for n, known in model.items() if means(where or {}, known.metadata)}
        scores = {name: float(query @ known.vector) for name, known in meant.items()}
        hits = source.retrieve(query, k, where=where).hits
        names = [hit.reference.document_id for hit in hits]
        nearest = sorted(scores, key=lambda name: -scores[name])[:k]
        # A filter leaves so few that they are compared one by one, whatever the index.
        if self.exact or where is not None:
            assert names == nearest
        else:
            assert len(set(names)) == len(names) == len(nearest)
            assert set(names) <= meant.keys()
        assert [hit.score for hit in hits] == pytest.approx(
            [scores[name] for name in names], abs=2e-3
        )
        assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
        for hit, name in zip(hits, names, strict=True):
            known = meant[name]
            assert hit.reference.text == known.text
            assert same_json(hit.metadata, known.metadata)
            if known.memory is None:
                assert hit.memory is None
            else:
                assert hit.memory is not None
                assert same_memory(hit.memory, make_memory(SHAPE, known.memory))


def same_json(one: object, other: object) -> bool:
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


class IvfMachine(Machine):
    """A database that has an index file nearly always."""

    options = {"index": "ivf"}  # noqa: RUF012
    exact = False
    preloaded = 80


class TinyMachine(Machine):
    """A database that builds an index file, in the background too, for the fewest documents."""

    options = {"index": "auto"}  # noqa: RUF012
    exact = False


def explore(machine: type[Machine], examples: int, steps: int) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_a_database_with_exact_search_does_what_a_dict_does() -> None:
    explore(Machine, 50, 40)


def test_a_database_with_an_index_file_does_what_a_dict_does() -> None:
    explore(IvfMachine, 12, 40)


def test_a_database_that_builds_again_and_again_does_what_a_dict_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(policy, "EXACT_BELOW", 6)
    monkeypatch.setattr(policy, "_SMALLEST_IVF", 4)
    explore(TinyMachine, 20, 40)


@pytest.mark.slow
@pytest.mark.parametrize("machine", [Machine, IvfMachine])
def test_a_database_does_what_a_dict_does_for_long(machine: type[Machine]) -> None:
    explore(machine, 150, 100)
