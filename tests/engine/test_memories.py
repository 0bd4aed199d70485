"""A document's references with their memories, as they are stored."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from memdb import CorruptRecordError, MemDB, StorageError, UnknownDocumentError
from memdb.storage.record_layout import MEMORIES, integer_key
from tests.engine.helpers import PAGE, TokenWriter, WordEmbedder, raw, same_memory


@pytest.fixture
def db(tmp_path: Path, full_template: Path) -> Iterator[MemDB]:
    """A database with an embedder and a writer; 16 tokens a reference."""
    path = shutil.copytree(full_template, tmp_path / "db")
    with MemDB.open(path, embedder=WordEmbedder(), writer=TokenWriter()) as database:
        yield database


def test_references_come_in_order_with_what_is_stored(db: MemDB) -> None:
    document = db.insert(PAGE, id="page")
    found = db.memories("page")
    assert tuple(reference.id for reference, _ in found) == document.references
    assert [reference.ordinal for reference, _ in found] == list(range(len(found)))
    assert "".join(reference.text for reference, _ in found) == PAGE
    assert len(found) > 3
    expected = TokenWriter().write([reference.content for reference, _ in found])
    for (_, stored), memory in zip(found, expected, strict=True):
        assert stored is not None
        coded = stored.coded()
        assert coded.codec == "int8"
        np.testing.assert_array_equal(coded.positions, memory.positions)
        np.testing.assert_array_equal(coded.counts, np.diff(memory.offsets))
    hit = db.retrieve(found[1][0].content, 1).hits[0]
    assert hit.memory is not None
    assert found[1][1] is not None
    assert same_memory(found[1][1].memory, hit.memory)


def test_what_is_cold_has_none_and_stays_cold(db: MemDB) -> None:
    db.insert(PAGE, id="page", cold=True)
    assert {stored for _, stored in db.memories("page")} == {None}
    with db.snapshot() as before:
        db.warm(["page"])
        assert {stored for _, stored in before.memories("page")} == {None}
    assert None not in [stored for _, stored in db.memories("page")]
    assert db.usage() == {}


def test_no_document_no_memories(db: MemDB) -> None:
    for name in ("nobody", ""):
        with pytest.raises(UnknownDocumentError, match="document"):
            db.memories(name)
    db.close()
    with pytest.raises(StorageError, match="is closed"):
        db.memories("nobody")


def test_a_damaged_memory_is_named_when_it_is_looked_into(tmp_path: Path, db: MemDB) -> None:
    (number,) = db.insert("The harbour.", id="a").references
    db.close()
    with raw(tmp_path / "db") as (environment, tables), environment.begin(write=True) as t:
        key, table = integer_key(number), tables[MEMORIES]
        record = bytearray(t.get(key, db=table))
        record[-1] ^= 1
        t.put(key, bytes(record), db=table)
    with MemDB.open(tmp_path / "db") as again:
        ((reference, stored),) = again.memories("a")
        assert reference.content == "The harbour."
        assert stored is not None
        with pytest.raises(CorruptRecordError, match="'memories'"):
            stored.coded()
