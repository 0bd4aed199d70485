"""What was deleted or replaced is gone from the folder after `compact`.

The bytes as they are stored are looked for in every file of the folder: before, where they have to
be found, and after, where they must not be. Open snapshots and backups are copies of their own, and
what the disk does with blocks that it gets back is the disk's matter.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest

import memdb
from memdb import Document, ExplicitMemory, MemDB
from memdb.filters.order import index_key
from memdb.storage.record_layout import (
    CHANGES,
    DOCUMENTS,
    EMBEDDINGS,
    MEMORIES,
    METADATA,
    REFERENCES,
    integer_key,
    unseal,
)
from memdb.storage.usage import read_usage
from tests.engine.helpers import make_memory, make_shape, raw

SHAPE = make_shape("bfloat16")
DIMENSION = 8
COUNT = 120
DELETED = tuple(range(3, COUNT, 4))  # in the middle of pages full of others
UPDATED = tuple(range(5, COUNT, 8))
STAYS = tuple(n for n in range(COUNT) if n not in DELETED and n not in UPDATED)


def word(n: int, what: str) -> str:
    """A word that occurs once, of letters that do not compress."""
    return f"{what}-{np.random.default_rng(n + 1000 * len(what)).bytes(12).hex()}"


def vector(n: int) -> np.ndarray:
    return np.random.default_rng(n).standard_normal((1, DIMENSION)).astype(np.float32)


def document(n: int) -> Document:
    text = " ".join(f"This is sentence {i} of {word(n * 10 + i, 'text')}." for i in range(10))
    metadata = {
        "indexed": word(n, "indexed"),
        "other": {"deep": [word(n, "undeclared")]},
        "year": 1_000_000 + n,
    }
    return Document(text, word(n, "id"), metadata)


def memory(n: int) -> ExplicitMemory:
    return make_memory(SHAPE, n, 12)


def fill(path: Path) -> None:
    with MemDB.create(
        path,
        shape=SHAPE,
        dimension=DIMENSION,
        index="ivf",
        recall=0.5,
        codec="exact",
        keys=["indexed", "year"],
    ) as database:
        for n in range(COUNT):
            one = document(n)
            database.insert(
                one.text,
                id=one.id,
                metadata=one.metadata,
                embeddings=vector(n),
                memories=[memory(n)],
            )
        assert database.build_index() is not None
        for n in range(COUNT):
            database.retrieve(vector(n)[0], 1)


def generation(path: Path) -> Path:
    return path / (path / "CURRENT").read_text().strip()


def everything(path: Path) -> bytes:
    """All bytes of all files of the folder."""
    return b"\0".join(file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file())


def stored(path: Path) -> dict[int, dict[str, bytes]]:
    """For each document by number, what of it is stored, by what it is."""
    found: dict[int, dict[str, bytes]] = {}
    with raw(path) as (environment, tables), environment.begin() as inner:

        def payload(table: str, key: bytes) -> bytes:
            record = inner.get(key, db=tables[table])
            assert record is not None
            return bytes(unseal(table, key, memoryview(record))[1])

        for n in range(COUNT):
            one = document(n)
            assert one.id is not None
            name = one.id.encode()
            entry = payload(DOCUMENTS, name)
            (reference,) = struct.unpack("<q", entry[64:])
            key = integer_key(reference)
            embedding = payload(EMBEDDINGS, key)
            halves = np.frombuffer(embedding, "<f4").astype("<f2").tobytes()
            kept = memory(n)
            place = payload(REFERENCES, key)
            changes = payload(CHANGES, integer_key(n + 1))
            assert struct.pack("<q", reference) in changes
            found[n] = {
                "id": name,
                "content hash": entry[:32],
                "text hash": entry[32:64],
                "metadata": payload(METADATA, name),
                "an indexed value": word(n, "indexed").encode(),
                "a value in the postings": index_key(1_000_000 + n) or b"",
                "a value that is not indexed": word(n, "undeclared").encode(),
                "text": place[8 + len(name) :],
                "the middle of the text": place[-60:-20],
                "embedding": embedding,
                "embedding in the index": halves,
                "memory": payload(MEMORIES, key),
                "keys": kept.keys.tobytes(),
                "values": kept.values.tobytes(),
                "change": inner.get(integer_key(n + 1), db=tables[CHANGES])[:8],  # its checksum
            }
            assert all(found[n].values())
    return found


def where_found(parts: dict[str, bytes], content: bytes) -> set[str]:
    return {what for what, part in parts.items() if part in content}


ALL = {
    "id",
    "content hash",
    "text hash",
    "metadata",
    "an indexed value",
    "a value in the postings",
    "a value that is not indexed",
    "text",
    "the middle of the text",
    "embedding",
    "embedding in the index",
    "memory",
    "keys",
    "values",
    "change",
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "db"
    fill(path)
    return path


def delete_and_update(path: Path) -> None:
    with MemDB.open(path) as database:
        for n in DELETED:
            database.delete(word(n, "id"))
        for n in UPDATED:
            database.update(
                word(n, "id"),
                text=f"A new text, {word(n, 'new')}.",
                metadata={"indexed": "new"},
                embeddings=-vector(n),
                memories=[make_memory(SHAPE, 5000 + n, 12)],
            )


def test_what_was_deleted_or_replaced_is_in_no_file_after_a_compaction(path: Path) -> None:
    parts = stored(path)
    before = everything(path)
    for n in range(COUNT):
        assert where_found(parts[n], before) == ALL, n

    delete_and_update(path)
    # Until then it may be found: in free pages, in the index, in the change log.
    left = everything(path)
    for n in DELETED:
        assert {"text", "embedding", "change", "embedding in the index"} & where_found(
            parts[n], left
        )

    memdb.compact(path)
    after = everything(path)
    for n in DELETED:
        assert where_found(parts[n], after) == set(), n
    for n in UPDATED:
        assert where_found(parts[n], after) == {"id"}, n
        assert word(n, "new").encode() in after
    for n in STAYS:
        assert where_found(parts[n], after) == ALL - {"change"}, n
    assert {"gen-000002", "CURRENT", "LOCK"} == {entry.name for entry in path.iterdir()}

    with MemDB.open(path) as database:
        for n in range(300):
            database.insert(f"unrelated {n}", embeddings=vector(9000 + n))
        database.build_index()
        for n in STAYS[:20]:
            database.retrieve(vector(n)[0], 3)
    after = everything(path)
    for n in DELETED:
        assert where_found(parts[n], after) == set(), n
    for n in UPDATED:
        assert where_found(parts[n], after) == {"id"}, n
    assert memdb.verify(path) == []


def test_what_stays_reads_the_same_after_a_compaction(path: Path) -> None:
    delete_and_update(path)
    memdb.compact(path)
    with MemDB.open(path) as database:
        assert database.stats()["index"]["kind"] == "ivf"
        for n in STAYS:
            one = document(n)
            found = database.get(word(n, "id"))
            assert (found.text, found.metadata, found.warm) == (one.text, one.metadata, 1)
            assert [d.id for d in database.documents({"year": 1_000_000 + n})] == [one.id]
        for n in DELETED:
            assert list(database.documents({"indexed": word(n, "indexed")})) == []


def test_uses_of_deleted_references_are_not_kept(path: Path) -> None:
    used = read_usage(generation(path))
    with MemDB.open(path) as database:
        gone = {r for n in DELETED for r in database.get(word(n, "id")).references}
    assert gone & used.keys()
    delete_and_update(path)
    assert gone & read_usage(generation(path)).keys()
    memdb.compact(path)
    after = read_usage(generation(path))
    assert not gone & after.keys()
    assert after
    assert all(used[number] == count for number, count in after.items())


def test_a_metadata_key_that_was_replaced_is_gone(path: Path) -> None:
    """The names of keys are data, too."""
    with MemDB.open(path) as database:
        database.update(word(0, "id"), metadata={"a-very-secret-name": "a-very-secret-value"})
        assert b"a-very-secret-name" in everything(path)
        database.update(word(0, "id"), metadata={})
    memdb.compact(path)
    assert b"a-very-secret" not in everything(path)
    assert b"a-very-secret" not in json.dumps([str(p) for p in path.rglob("*")]).encode()


def test_a_compaction_while_others_read_removes_it_from_the_folder_all_the_same(
    path: Path,
) -> None:
    parts = stored(path)
    with MemDB.open(path) as database, database.snapshot() as snapshot:
        for n in DELETED:
            database.delete(word(n, "id"))
        memdb.compact(path)
        after = everything(path)
        for n in DELETED:
            assert where_found(parts[n], after) == set(), n
            assert snapshot.get(word(n, "id")).text == document(n).text  # its own copy
        assert database.stats()["documents"] == COUNT - len(DELETED)


def test_nothing_of_a_database_of_which_all_was_deleted_is_left(path: Path) -> None:
    parts = stored(path)
    with MemDB.open(path) as database:
        database.delete(*(word(n, "id") for n in range(COUNT)))
    memdb.compact(path)
    after = everything(path)
    for n in range(COUNT):
        assert where_found(parts[n], after) == set(), n
    assert not (generation(path) / "index.faiss").exists()
    assert memdb.verify(path) == []


def test_a_restored_backup_holds_nothing_that_was_deleted_before_it_was_made(
    path: Path, tmp_path: Path
) -> None:
    """A backup takes over whole pages, with what is left in them; what is restored from it is
    written record by record."""
    parts = stored(path)
    delete_and_update(path)
    memdb.backup(path, tmp_path / "copy")
    memdb.restore(tmp_path / "copy", tmp_path / "new")
    after = everything(tmp_path / "new")
    for n in DELETED:
        assert where_found(parts[n], after) == set(), n
    for n in STAYS:
        assert where_found(parts[n], after) == ALL - {"change"}, n
