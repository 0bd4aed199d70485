"""The files beside the data, and what replaces a generation, are as storage_format.md says."""

from __future__ import annotations

import fcntl
import re
import shutil
import struct
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest

from memdb import (
    ExplicitMemory,
    FormatError,
    MemDB,
    MemoryShape,
    StorageError,
    UnknownDocumentError,
    rewrite,
)
from memdb.care import backup, compact, migrate, repair, restore
from memdb.index import Searcher
from memdb.keywords import remove_index
from memdb.storage.store import Store
from memdb.storage.usage import read_usage as memdb_reads_usage
from memdb.storage.usage import write_usage
from memdb.types.canonical import json_payload
from tests.storage_format.databases import (
    DIMENSION,
    LONG,
    FakeEmbedder,
    FakeWriter,
    create,
    described,
    description,
    edit_file,
    few_are_enough,
    filled,
    grown,
    names_in,
    read_copy,
    set_setting,
    shape_of,
)
from tests.storage_format.document import blocks, names, section
from tests.storage_format.reader import (
    FORGOTTEN,
    INTEGER_KEYS,
    REMEMBERED,
    TABLES,
    Database,
    broken,
    follow,
    read_database,
    read_index,
    read_usage,
    seal,
)


def test_an_independent_reader_reads_the_index_file_and_catches_up(tmp_path: Path) -> None:
    path = tmp_path / "a.memdb"
    with filled(path) as db:
        built = db.build_index()
        assert built is not None
        database = read_copy(path, tmp_path / "copy")
        file = read_index(path / "gen-000001" / "index.faiss", database)
        said = dict(file.description)
        assert re.fullmatch("[0-9a-f]{16}", said.pop("checksum"))
        assert said.pop("head") > 0
        assert said == {**asdict(built), "spread": list(built.spread)}
        assert file.ids == set(database.references())
        assert len(file.ids) == 80

        db.insert("One more.", id="more")
        db.delete("d1")
        db.update("d2", text="Another text.")
        later = read_copy(path, tmp_path / "copy")
        assert file.ids != set(later.references())
        caught_up, change = follow(file.ids, said["change"], later)
        assert caught_up == set(later.references())
        hits = db.retrieve_batch([np.ones(DIMENSION, np.float32)], 100, memories=False)[0].hits
        assert {hit.id for hit in hits} == caught_up
        assert change == later.setting("counters")["last_change"]


def places_in(content: bytes) -> int:
    """Where an index file's table of ids and places begins."""
    said = description(content)
    return int(said["head"] + said["references"] * (2 * said["dimension"] + 8))


INVALID: dict[str, Callable[[bytes], bytes]] = {
    "magic": lambda c: c[:-1] + b"X",
    "json": lambda c: c.replace(b'"nprobe"', b'"mprobe"'),
    "length": lambda c: c[:-24] + struct.pack("<Q", len(c)) + c[-16:],
    "vectors": lambda c: c[:1000] + bytes([c[1000] ^ 1]) + c[1001:],
    "cut": lambda c: c[:-1],
    "empty": lambda _: b"",
    "database": lambda c: described(c, {**description(c), "database": 32 * "0"}),
    "change": lambda c: described(c, {**description(c), "change": 10**6}),
    "another number": lambda c: described(c, {**description(c), "change": 3}),
    "seal": lambda c: described(c, {**description(c), "seal": 16 * "0"}),
    "no seal": lambda c: described(c, {k: v for k, v in description(c).items() if k != "seal"}),
    "references": lambda c: described(c, {**description(c), "references": 1}),
    "lists": lambda c: described(c, {**description(c), "lists": 1}),
    "head": lambda c: described(c, {**description(c), "head": description(c)["head"] - 1}),
    "spread": lambda c: described(c, {**description(c), "spread": [0.1] * 39}),
    "no spread": lambda c: described(c, {**description(c), "spread": [0.1] * 39 + [0]}),
    "places": lambda c: c[: places_in(c)] + bytes([c[places_in(c)] ^ 1]) + c[places_in(c) + 1 :],
    "earlier": lambda c: c[:-8] + b"memdbidx",
    "field": lambda c: described(c, {k: v for k, v in description(c).items() if k != "lists"}),
}


def base_of(path: Path) -> Any:
    """The index file that memdb searches, if any."""
    store = Store(path)
    try:
        with Searcher(store, DIMENSION).pin() as pinned:
            return pinned.view.base
    finally:
        store.close()


def test_a_valid_index_file_is_used_and_may_say_more(tmp_path: Path, indexed: Path) -> None:
    path = shutil.copytree(indexed, tmp_path / "a.memdb")
    file = path / "gen-000001" / "index.faiss"
    content = file.read_bytes()
    file.write_bytes(described(content, {**description(content), "more": [1]}))
    assert len(read_index(file, read_database(path)).ids) == 80
    assert base_of(path) is not None


@pytest.mark.parametrize("case", INVALID)
def test_an_index_file_that_is_not_valid_is_passed_over(
    tmp_path: Path, indexed: Path, case: str
) -> None:
    path = shutil.copytree(indexed, tmp_path / "a.memdb")
    file = path / "gen-000001" / "index.faiss"
    file.write_bytes(INVALID[case](file.read_bytes()))
    database = read_database(path)
    with pytest.raises((AssertionError, KeyError, struct.error)):
        read_index(file, database)
    assert base_of(path) is None
    with MemDB.open(path) as db:
        hits = db.retrieve_batch([np.ones(DIMENSION, np.float32)], 100, memories=False)[0].hits
        assert {hit.id for hit in hits} == set(database.references())


def test_every_file_of_a_generation_is_in_the_document(tmp_path: Path) -> None:
    path = tmp_path / "a.memdb"
    with filled(path) as db:
        db.build_index()
        db.retrieve(np.ones(DIMENSION, np.float32))
        db.query("One", mode="keyword")
        remove_index(path / "gen-000001")
        db.query("One", mode="keyword")
    with few_are_enough("klt8"):
        grown(tmp_path / "b.memdb", "float32", "klt8").close()
    listed = names("Folder", columns=2)
    first = listed.index("data.mdb")
    folder, generation = listed[:first], listed[first:]
    assert names_in(path) | {"CURRENT.new", "namespaces/"} == {
        n.replace("gen-NNNNNN/", "gen-000001") for n in folder
    }
    found = names_in(path / "gen-000001") | names_in(tmp_path / "b.memdb" / "gen-000001")
    assert ", ".join(sorted(found)) == ", ".join(sorted(generation[:-2]))
    assert generation[-2:] == ["index.faiss.new`, `usage.N.new", "aside-NNNNNN.jsonl"]


def test_files_beside_the_data_may_be_deleted(tmp_path: Path, indexed: Path) -> None:
    path = shutil.copytree(indexed, tmp_path / "a.memdb")
    for file in (path / "gen-000001").iterdir():
        if file.name != "data.mdb":
            file.unlink()
    (path / "LOCK").unlink()
    with MemDB.open(path) as db:
        db.delete("d1")
        assert len(db.retrieve(np.ones(DIMENSION, np.float32), 100).hits) == 79
    assert broken(read_database(path)) == set()


def test_usage_is_read_and_written_as_the_document_says(tmp_path: Path) -> None:
    path = tmp_path / "a.memdb"
    with create(path, "float32", "int8") as db:
        first = db.insert("One.", id="a").references[0]
        second = db.insert("Two.", id="b").references[0]
        query = db.embedder.embed(["Two."])[0]
        db.retrieve(query, 1)
        db.retrieve(query, 2)
        counted = {first: 1, second: 2}
    assert read_usage((path / "gen-000001" / "usage").read_bytes()) == counted

    (stated,) = blocks("A usage file", "hex")
    content = bytes.fromhex(re.sub(r"#.*", "", stated))
    write_usage(tmp_path, Counter({513: 1, 1: 2}))
    assert (tmp_path / "usage").read_bytes() == content
    assert list(read_usage(content).items()) == [(1, 2), (513, 1)]
    for damaged in (content[:-1], content[:16], b"", b"X" + content[1:], content[:-1] + b"\1"):
        assert read_usage(damaged) == {}
        (tmp_path / "usage").write_bytes(damaged)
        assert memdb_reads_usage(tmp_path) == Counter()


def derived_from_records(database: Database) -> dict[str, Any]:
    """All that a replacement of the generation keeps."""
    kept = {name: table for name, table in database.records.items() if name != "changes"}
    kept["settings"] = {
        key: record
        for key, record in database.records["settings"].items()
        if key not in (b"counters", b"format", b"index")
    }
    return {**kept, "postings": database.postings()}


def test_compaction_replaces_the_generation_and_empties_the_log(tmp_path: Path) -> None:
    path = tmp_path / "a.memdb"
    with filled(path) as db:
        db.build_index()
        db.insert("A secret.", id="secret", metadata={"é": "hidden"})
        db.retrieve(db.embedder.embed(["A secret."])[0], 3)
    before = read_database(path)
    used = read_usage((path / "gen-000001" / "usage").read_bytes())
    with MemDB.open(path) as db:
        (secret,) = db.get("secret").references
        assert secret in used
        db.delete("secret")
    middle = read_database(path)
    (path / "gen-000007").mkdir()  # a left-over
    compact(path)

    after = read_database(path)
    assert after.generation == "gen-000008"
    assert names_in(path) == {"CURRENT", "LOCK", "gen-000008"}
    assert broken(after) == set()
    assert after.setting("format") == before.setting("format")
    assert after.changes() == {}
    counters = middle.setting("counters")
    cut = after.setting("counters")
    assert re.fullmatch("[0-9a-f]{16}", name := cut.pop("trimmed_seal"))
    assert after.name(counters["last_change"]) == name
    assert cut == {**counters, "trimmed": counters["last_change"]}
    assert after.setting("index") == before.setting("index")
    assert derived_from_records(after) == derived_from_records(middle)
    generation = path / "gen-000008"
    assert read_index(generation / "index.faiss", after).ids == set(after.references())
    assert read_usage((generation / "usage").read_bytes()) == {
        reference: count for reference, count in used.items() if reference != secret
    }

    found = follow({1, 2}, counters["last_change"] - 1, after)  # the log is cut: begin anew
    assert found == (set(after.references()), counters["last_change"])
    assert follow({7}, counters["last_change"], after)[0] == {7}  # nothing came since


def test_what_was_deleted_is_not_in_the_folder_after_a_compaction(tmp_path: Path) -> None:
    path, text = tmp_path / "a.memdb", "Zanzibar."

    def holds() -> bool:
        return any(text.encode() in file.read_bytes() for file in path.rglob("*") if file.is_file())

    with create(path, "float32", "int8") as db:
        db.insert(LONG, id="a")
        db.insert(text, id="b", metadata={"year": text})
        db.delete("b")
    assert holds()
    compact(path)
    assert not holds()


def test_a_backup_is_the_same_database_and_a_restored_one_another(tmp_path: Path) -> None:
    path, copy = tmp_path / "a.memdb", tmp_path / "backup"
    with filled(path) as db:
        db.build_index()
        db.retrieve(np.ones(DIMENSION, np.float32))
    original = read_database(path)
    backup(path, copy)
    assert names_in(copy) == {"CURRENT", "LOCK", "gen-000001"}
    assert names_in(copy / "gen-000001") == {"data.mdb", "index.faiss"}
    copied = read_database(copy)
    assert copied.records == original.records
    assert read_index(copy / "gen-000001" / "index.faiss", copied).ids == set(copied.references())

    with MemDB.open(path) as db:
        db.delete("d1")
    restore(copy, path)
    restored = read_database(path)
    assert restored.generation == "gen-000002"
    assert restored.setting("format")["version"] == 2
    assert restored.setting("format")["id"] != original.setting("format")["id"]
    assert derived_from_records(restored) == derived_from_records(original)
    assert broken(restored) == set()
    assert restored.changes() == {}
    generation = path / "gen-000002"
    assert read_index(generation / "index.faiss", restored).ids == set(restored.references())
    assert "usage" not in names_in(generation)


def test_a_writer_waits_for_write_lock_and_a_reader_does_not(tmp_path: Path) -> None:
    path = tmp_path / "a.memdb"
    with create(path, "float32", "int8") as db, ThreadPoolExecutor(1) as thread:
        db.insert("One.", id="a")
        with (path / "gen-000001" / "write.lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            writing = thread.submit(db.delete, "a")
            with pytest.raises(TimeoutError):
                writing.result(timeout=0.3)
            assert db.get("a").text == "One."
        writing.result(timeout=30)
        with pytest.raises(UnknownDocumentError):
            db.get("a")


def test_an_open_database_goes_over_to_the_next_generation_but_to_no_other_database(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.memdb"
    with create(path, "float32", "int8") as db:
        db.insert("One.", id="a")
        backup(path, tmp_path / "backup")
        with db.snapshot() as snapshot:
            compact(path)
            db.insert("Two.", id="b")
            assert [document.id for document in snapshot.documents()] == ["a"]
        database = read_copy(path, tmp_path / "copy")
        assert database.generation == "gen-000002"
        assert set(database.documents()) == {"a", "b"}

        restore(tmp_path / "backup", path)
        for use in (lambda: db.get("a"), lambda: db.delete("a")):
            with pytest.raises(StorageError, match="replaced"):
                use()
    assert set(read_database(path).documents()) == {"a"}


def write_version_1(folder: Path, database: Database) -> None:
    """A database as the document says that version 1 had it."""
    (folder / "gen-000001").mkdir(parents=True)
    (folder / "CURRENT").write_text("gen-000001\n")
    (folder / "LOCK").touch()
    settings = dict(database.records["settings"])
    del settings[b"index"]
    counters = {k: v for k, v in database.setting("counters").items() if k != "trimmed"}
    for name, value in (
        ("format", {**database.setting("format"), "version": 1}),
        ("counters", counters),
    ):
        settings[name.encode()] = seal("settings", name.encode(), 1, json_payload(value))
    environment = lmdb.open(str(folder / "gen-000001"), max_dbs=16, map_size=1 << 30)
    for table in TABLES - {"postings"}:
        handle = environment.open_db(table.encode(), integerkey=table in INTEGER_KEYS)
        records = settings if table == "settings" else database.records[table]
        with environment.begin(write=True) as transaction:
            for key, record in records.items():
                transaction.put(key, record, db=handle)
    environment.close()


def test_migration_changes_what_the_document_says(tmp_path: Path, sound: Database) -> None:
    path = tmp_path / "a.memdb"
    write_version_1(path, sound)
    with pytest.raises(FormatError, match="version 1"):
        MemDB.open(path)
    assert migrate(path) == (1, 2)
    migrated = read_database(path)
    assert migrated.generation == "gen-000002"
    assert broken(migrated) == set()
    assert migrated.setting("format") == sound.setting("format")
    last = sound.setting("counters")["last_change"]
    cut = {"trimmed": last, "trimmed_seal": migrated.name(last)}
    assert migrated.setting("counters") == {**sound.setting("counters"), **cut}
    (stated,) = re.findall(r"`index` is\s+`(.*?)`", section("Version 1"))
    assert migrated.records["settings"][b"index"] == seal("settings", b"index", 1, stated.encode())
    assert last > 0
    assert migrated.changes() == migrated.postings() == {}
    without = {**derived_from_records(sound), "postings": {}}
    assert derived_from_records(migrated) == without


def test_repair_forgets_a_damaged_memory_and_a_damaged_log(tmp_path: Path) -> None:
    path = tmp_path / "a.memdb"
    with create(path, "float32", "int8") as db:
        (reference,) = db.insert("Short.", id="a").references
        db.insert("Other.", id="b")
    key = struct.pack("<Q", reference)

    def damage(table: str) -> Callable[[Any, Any], None]:
        def change(transaction: Any, tables: Any) -> None:
            record = bytearray(transaction.get(key, db=tables[table]))
            record[-1] ^= 1
            transaction.put(key, bytes(record), db=tables[table])

        return change

    edit_file(path, damage("memories"))
    repair(path)
    repaired = read_database(path)
    assert broken(repaired) == set()
    assert repaired.changes()[3] == [(FORGOTTEN, reference)]
    with MemDB.open(path, embedder=FakeEmbedder(), writer=FakeWriter(shape_of("float32"))) as db:
        assert db.warm() == 1
    warm = read_database(path)
    assert broken(warm) == set()
    assert warm.changes()[4] == [(REMEMBERED, reference)]

    edit_file(path, damage("changes"))
    repair(path)
    anew = read_database(path)
    assert broken(anew) == set()
    assert anew.setting("counters")["last_change"] == anew.setting("counters")["trimmed"] == 5
    assert follow({7}, 4, anew) == (set(anew.references()), 5)


class Interrupted(Exception):  # noqa: N818
    pass


@pytest.mark.parametrize("length", [8, 6])
def test_an_interrupted_rewrite_is_what_the_document_says(tmp_path: Path, length: int) -> None:
    path, recut = tmp_path / "a.memdb", length < 8
    with create(path, "float32", "int8", durability="off") as db:
        for n in range(20):
            db.insert(LONG if n % 2 else "Short.", id=f"{n:02}", metadata={"year": n}, cold=n == 0)
    before = read_database(path)
    new = replace(shape_of("float32"), model="m2", reference_length=length)

    class Stopping(FakeWriter):
        batches = 1

        def write(self, texts: Sequence[str]) -> list[ExplicitMemory]:
            self.batches -= 1 / (7 if recut else 1)
            if self.batches < -1e-9:
                raise Interrupted
            return super().write(texts)

    with pytest.raises(Interrupted):
        rewrite(path, Stopping(new), embedder=FakeEmbedder)
    middle = read_database(path)
    assert broken(middle) == set()
    assert middle.setting("rewriting") == {"after": "07", "recut": recut}
    assert MemoryShape.from_json(middle.shape) == new
    old = {i for i, memory in middle.memories().items() if memory is None}
    owners = {i: name for i, (_, _, _, name, _) in middle.references().items()}
    assert {owners[i] for i in old} == {f"{n:02}" for n in range(8, 20)}
    if recut:
        damaged = replace(middle, records={**middle.records})
        damaged.records["settings"] = dict(middle.records["settings"])
        set_setting(damaged, "rewriting", {"after": "99", "recut": True})
        assert broken(damaged) == {9}

    rewrite(path, FakeWriter(new), embedder=FakeEmbedder)
    after = read_database(path)
    assert broken(after) == set()
    assert b"rewriting" not in after.records["settings"]
    assert None not in after.memories().values()
    documents = {name: version for name, (version, *_) in after.documents().items()}
    assert set(documents.values()) == {2 if recut else 1}
    assert (after.documents() == before.documents()) == (not recut)
    assert not set(after.documents()["00"][3]) & set(after.memories())
