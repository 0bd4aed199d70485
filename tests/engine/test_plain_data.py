"""What comes out of a database is plain data: pickled, iterated, shown on a line, and typed."""

from __future__ import annotations

import copy
import json
import multiprocessing
import pickle
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest

import memdb
from memdb import (
    CacheStats,
    Change,
    CorruptRecordError,
    Document,
    DocumentBatch,
    ExplicitMemory,
    Hit,
    IndexStats,
    Levels,
    MemDB,
    MemoryBatch,
    MemoryBytes,
    MissingPartError,
    Piece,
    Problem,
    Recipe,
    Reference,
    Repair,
    Retrieval,
    Rope,
    Scaled,
    Stats,
    StoredDocument,
    pack,
    pack_coded,
)
from tests.engine.helpers import (
    PAGE,
    TokenWriter,
    WordEmbedder,
    make_memory,
    make_shape,
    raw,
    same_memory,
    unit,
)

SHAPE = make_shape()


@pytest.fixture
def full(tmp_path: Path, full_template: Path) -> Iterator[MemDB]:
    """A database with an embedder, a writer and their tokenizer; 16 tokens a reference."""
    path = shutil.copytree(full_template, tmp_path / "full")
    with MemDB.open(path, embedder=WordEmbedder(), writer=TokenWriter()) as database:
        yield database


@pytest.fixture
def bare(tmp_path: Path, bare_template: Path) -> Iterator[MemDB]:
    """A database without parts: every text is one reference, embeddings have 2 numbers."""
    with MemDB.open(shutil.copytree(bare_template, tmp_path / "bare")) as database:
        yield database


# --- a retrieval ----------------------------------------------------------------------------------


def test_a_retrieval_is_a_sequence_of_its_hits(full: MemDB) -> None:
    full.insert(PAGE, id="page", metadata={"kind": "tale"})
    found = full.query("the keeper of the lighthouse", 3)
    assert len(found) == 3
    assert list(found) == found.hits
    assert found[0] is found.hits[0]
    assert found[-1] is found.hits[2]
    assert found[:2] == found.hits[:2]
    with pytest.raises(IndexError):
        found[3]
    hit = found[0]
    assert (hit.text, hit.document_id) == (hit.reference.text, "page")
    assert hit.metadata == {"kind": "tale"}
    nothing = full.query("lighthouse", where={"kind": "fact"})
    assert (len(nothing), list(nothing), bool(nothing)) == (0, [], False)


@pytest.mark.parametrize("codec", ["exact", "int8", "rotated3"])
@pytest.mark.parametrize("touched", [True, False])
def test_a_pickled_retrieval_outlives_its_database(
    tmp_path: Path, codec: str, touched: bool
) -> None:
    with MemDB.create(
        tmp_path / "db", embedder=WordEmbedder(), writer=TokenWriter(), codec=codec
    ) as database:
        shape = database.shape
        database.insert(PAGE, id="page", metadata={"n": [1, {"x": None}]})
        found = database.retrieve("the keeper of the lighthouse", 3)
        if touched:
            assert found[0].metadata
            assert found.memories
        again = pickle.loads(pickle.dumps(found))
        packed = pack(found.stored, shape)
    shutil.rmtree(tmp_path / "db")
    assert (again.query, again.written, len(again)) == (found.query, 0, 3)
    for mine, other in zip(again, found, strict=True):
        assert (mine.id, mine.score, mine.text, mine.metadata) == (
            other.id, other.score, other.text, other.metadata,
        )  # fmt: skip
        assert mine.reference == other.reference
        assert same_memory(mine.memory, other.memory)
        assert bytes(mine.stored.payload) == bytes(other.stored.payload)
        assert mine.stored.is_kept is False
    repacked = pack(again.stored, shape)
    assert repacked.layers.keys() == packed.layers.keys()
    for layer in packed.layers:
        assert np.array_equal(repacked.layers[layer].keys, packed.layers[layer].keys)
        assert np.array_equal(repacked.layers[layer].values, packed.layers[layer].values)
    with pytest.raises(MissingPartError, match="`memory` has it"):
        again[0].stored.coded()
    assert pickle.loads(pickle.dumps(again))[0].text == found[0].text  # and once more


def _said(hits: list[Hit]) -> list[tuple[str, str, float, int]]:
    return [
        (hit.document_id, hit.text, hit.score, hit.memory.pairs if hit.memory else -1)
        for hit in hits
    ]


def test_hits_go_to_other_processes_and_come_back(full: MemDB) -> None:
    full.insert(PAGE, id="page")
    full.insert("A whale.", id="cold", cold=True)
    found = [full.retrieve("lighthouse keeper", 2), full.query("whale", 1)]
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as processes:
        done = list(processes.map(_said, [one.hits for one in found]))
        (back,) = processes.map(copy.copy, [found[0][0]])
    assert done == [_said(one.hits) for one in found]
    assert (back.id, back.text) == (found[0][0].id, found[0][0].text)


def test_a_damaged_memory_is_not_pickled_as_if_it_were_whole(
    tmp_path: Path, bare_template: Path
) -> None:
    path = shutil.copytree(bare_template, tmp_path / "db")
    with MemDB.open(path) as database:
        database.insert("x", embeddings=unit(1, 0), memories=[make_memory(SHAPE, 1)])
    with raw(path) as (environment, tables), environment.begin(write=True) as transaction:
        key, record = next(iter(transaction.cursor(tables["memories"])))
        transaction.put(key, record[:-1] + bytes([record[-1] ^ 1]), db=tables["memories"])
    with MemDB.open(path) as database:
        found = database.retrieve(unit(1, 0)[0])
        with pytest.raises(CorruptRecordError, match="memories"):
            pickle.dumps(found)


# --- on a line ------------------------------------------------------------------------------------


LONG = "Many\nlines “and” 'quotes' of \u2028 text \0 and more. " * 50
NAME = "ä" * 200
_VECTORS = np.zeros((500, 4), np.float32)
CODED = pack_coded([make_memory(SHAPE, n) for n in range(50)], SHAPE)
RECIPE = Recipe((), np.zeros((6, 13, 64), np.float32), None, np.zeros(3, np.int64))
SHOWN = {
    "Document": Document(LONG, NAME, {"n": [0] * 500}),
    "StoredDocument": StoredDocument(NAME, 3, LONG, {"n": [0] * 500}, tuple(range(500)), 7),
    "Reference": Reference(2**62, 3, NAME, 5, 128, LONG),
    "Piece": Piece(LONG, 128),
    "Change": Change(2**40, "remembered", 2**62, NAME),
    "Rope": Rope(1e6, "longrope", {"factor": [0.1] * 500}),
    "MemoryShape": make_shape(
        model="f" * 64, layers=tuple(range(60)), rope=(Rope(1e6, "x", {"f": [1] * 90}),) * 60
    ),
    "ExplicitMemory": make_memory(SHAPE, 1),
    "MemoryBatch": MemoryBatch.of([make_memory(SHAPE, n) for n in range(50)] + [None], SHAPE),
    "DocumentBatch": DocumentBatch([Document(LONG)] * 500, _VECTORS),
    "PackedMemories": pack([make_memory(SHAPE, n) for n in range(50)], SHAPE),
    "PackedLayer": pack([make_memory(SHAPE, n) for n in range(50)], SHAPE).layers[0],
    "CodedMemories": CODED,
    "CodedLayer": CODED.layers[0],
    "CodedGroup": CODED.groups[0],
    "Levels": Levels(np.zeros((12, 500), np.uint8), RECIPE),
    "Recipe": RECIPE,
    "Scaled": Scaled(_VECTORS),
    "Repair": Repair([LONG] * 50, [NAME] * 50, [Problem("memories", "1", LONG)] * 50),
    "CacheStats": CacheStats(*[2**40] * 5),
    "Retrieval of nothing": Retrieval(LONG),
}


def is_a_line(said: str, name: str) -> bool:
    return said.startswith(name.split()[0] + "(") and said.isprintable() and len(said) <= 140


@pytest.mark.parametrize("name", SHOWN)
def test_what_is_handed_out_is_shown_on_a_line(name: str) -> None:
    said = repr(SHOWN[name])
    assert is_a_line(said, name), said
    assert "array" not in said


def test_an_open_database_and_what_it_finds_are_shown_on_a_line(full: MemDB) -> None:
    full.insert(PAGE, id="page", metadata={"long": LONG})
    found = full.retrieve("the keeper of the lighthouse", 3)
    with full.snapshot() as moment, full.transaction() as t:
        for one, name in (
            (found, "Retrieval"), (found[0], "Hit"), (found[0].stored, "StoredMemory"),
            (moment, "Snapshot"), (t, "WriteTransaction"), (full.get("page"), "StoredDocument"),
        ):  # fmt: skip
            assert is_a_line(repr(one), name), repr(one)
    assert "page" in repr(found[0])
    assert repr(full) == f"MemDB({str(full.path)!r})"
    full.close()
    assert repr(full) == f"MemDB({str(full.path)!r}, closed)"


def test_all_public_classes_with_arrays_or_texts_are_tested_here() -> None:
    """A new one is added to `SHOWN`, or it is one of those that are tested above."""
    above = {"Retrieval", "Hit", "StoredMemory", "Snapshot", "WriteTransaction", "MemDB"}
    for name in memdb.__all__:
        kind = getattr(memdb, name)
        annotations = getattr(kind, "__annotations__", {})
        holds = any("NDArray" in str(one) or str(one) == "str" for one in annotations.values())
        if holds and hasattr(kind, "__dataclass_fields__") and name not in above:
            exempt = {"Problem", "PassedOver", "IndexInfo", "RecodeReport", "Batch"}
            assert name in SHOWN or name in exempt, name


@pytest.mark.parametrize("text", ["", "short", "'", '"', "\n\t", "\U0001f40b" * 100, "a" * 30])
def test_a_text_that_fits_is_shown_whole(text: str) -> None:
    said = repr(Document(text))
    assert (repr(text) in said) == (len(text) <= 40)
    assert len(said) < 80


def test_a_damaged_hit_can_be_shown() -> None:
    assert repr(Hit(7, 0.5, (b"broken", b""))) == "Hit(damaged, id=7, score=0.5000)"


# --- figures --------------------------------------------------------------------------------------


def is_of(value: Any, kind: Any) -> bool:
    """Whether a value has the fields that a TypedDict names, and no others."""
    hints = get_type_hints(kind)
    required = kind.__required_keys__
    return required <= value.keys() <= hints.keys()


def test_stats_have_the_fields_that_are_named(full: MemDB, tmp_path: Path) -> None:
    def check(stats: Stats) -> None:
        assert is_of(stats, Stats)
        assert is_of(stats["index"], IndexStats)
        assert is_of(stats["memory_bytes"], MemoryBytes)
        assert json.loads(json.dumps(stats)) == stats

    check(full.stats())
    full.insert(PAGE, id="page")
    check(full.stats())
    assert full.stats()["documents"] == len(full) == 1
    with MemDB.create(tmp_path / "ivf", shape=SHAPE, dimension=2, index="ivf") as database:
        vectors = np.random.default_rng(0).standard_normal((100, 2)).astype(np.float32)
        database.insert_many([f"text {n}" for n in range(100)], embeddings=vectors)
        database.build_index()
        check(database.stats())
        assert database.stats()["index"].keys() == get_type_hints(IndexStats).keys()


def test_memories_of_no_database_are_still_memories() -> None:
    memory: ExplicitMemory = make_memory(SHAPE, 3)
    assert same_memory(pickle.loads(pickle.dumps(memory)), memory)


def test_an_open_database_is_no_plain_data_and_says_what_to_do(full: MemDB) -> None:
    for copied in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match=r"give other processes its path.*MemDB\.open"):
            copied(full)
