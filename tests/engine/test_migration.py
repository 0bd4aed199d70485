"""Databases of format version 1, which release 0.1 wrote, are brought up to date by `migrate`.

They are made here record by record, from what the description of that version says, without the
engine.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
import xxhash
import zstandard

import memdb
from memdb import FormatError, MemDB, NotADatabaseError, StorageError
from tests.engine.helpers import child, make_shape, tokenizer_json

ID = "00112233445566778899aabbccddeeff"
INTEGER_KEYS = {"references", "embeddings", "memories", "changes"}
TABLES = ("settings", "documents", "metadata", "references", "embeddings", "memories", "changes")
INSERTED, DELETED, REMEMBERED = 1, 2, 3
SHAPE = make_shape(layers=(1, 3), kv_heads=1, head_dim=2)
#: id: texts of the references, metadata, whether it is warm.
DOCUMENTS: dict[str, tuple[list[str], dict[str, Any], bool]] = {
    "née": (["Memory ", "is text."], {"year": 1874, "née": [1.5, None]}, True),
    "cold": (["Nothing yet."], {}, False),
    "sha256:ab": (["Three."], {"year": 1900}, True),
}
EMBEDDINGS = {1: (0.6, 0.8), 2: (1.0, 0.0), 3: (0.0, 1.0), 5: (-0.8, 0.6)}  # 4 was deleted
REFERENCES = {"née": (1, 2), "cold": (3,), "sha256:ab": (5,)}
VERSION = {"née": 2, "cold": 1, "sha256:ab": 1}  # the metadata of the first was changed


def canonical(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()


def sealed(table: str, key: bytes, version: int, payload: bytes) -> bytes:
    rest = struct.pack("<II", version, len(payload)) + payload
    covered = table.encode() + b"\0" + key + b"\0" + rest
    return struct.pack("<Q", xxhash.xxh3_64_intdigest(covered)) + rest


def memory(number: int) -> bytes:
    """Two pairs in the first row, one in the second, as `exact` stores them."""
    shape = xxhash.xxh3_64_intdigest(canonical(SHAPE.to_json()))
    vectors = struct.pack("<6f", *(number + n / 4 for n in range(6)))
    head = b"\5exact" + struct.pack("<QIII", shape, 3, len(vectors), len(vectors))
    return head + struct.pack("<2H", 2, 1) + bytes([0, 5, 7]) + vectors + vectors[::-1]


def settings(version: int) -> dict[str, Any]:
    return {
        "format": {"id": ID, "version": version},
        "shape": SHAPE.to_json(),
        "embedder": {"dimension": 2, "fingerprint": None, "name": None},
        "model": {"name": None},
        "memory": {"codec": "exact"},
        "counters": {"last_change": 4, "next_reference": 6},
    }


def records(version: int = 1) -> dict[tuple[str, bytes], tuple[int, bytes]]:
    """Version and payload of every record, by table and key."""
    found: dict[tuple[str, bytes], tuple[int, bytes]] = {
        ("settings", name.encode()): (1, canonical(value))
        for name, value in settings(version).items()
    }
    found["settings", b"tokenizer"] = 1, zstandard.compress(tokenizer_json().encode())
    for name, (texts, metadata, warm) in DOCUMENTS.items():
        key, payload = name.encode(), canonical(metadata)
        text_hash = hashlib.sha256("".join(texts).encode()).digest()
        content_hash = hashlib.sha256(text_hash + payload).digest()
        ids = struct.pack(f"<{len(texts)}q", *REFERENCES[name])
        found["documents", key] = VERSION[name], content_hash + text_hash + ids
        found["metadata", key] = VERSION[name], payload
        for ordinal, (number, text) in enumerate(zip(REFERENCES[name], texts, strict=True)):
            place = struct.pack("<IHH", ordinal, 3, len(key)) + key
            at = struct.pack("<Q", number)
            found["references", at] = 1, place + zstandard.compress(text.encode())
            found["embeddings", at] = 1, struct.pack("<2f", *EMBEDDINGS[number])
            if warm:
                found["memories", at] = 1, memory(number)
    log = (
        [(INSERTED, 1), (REMEMBERED, 1), (INSERTED, 2), (REMEMBERED, 2)],
        [(INSERTED, 3), (INSERTED, 4)],
        [(DELETED, 4)],
        [(INSERTED, 5), (REMEMBERED, 5)],
    )
    for number, entries in enumerate(log, 1):
        payload = b"".join(struct.pack("<Bq", *entry) for entry in entries)
        found["changes", struct.pack("<Q", number)] = 1, payload
    return found


def write_version_1(path: Path, version: int = 1) -> None:
    """A database of version 1, or one that says another."""
    generation = path / "gen-000001"
    generation.mkdir(parents=True)
    environment = lmdb.open(str(generation), max_dbs=7, map_size=1 << 24)
    tables = {n: environment.open_db(n.encode(), integerkey=n in INTEGER_KEYS) for n in TABLES}
    with environment.begin(write=True) as transaction:
        for (table, key), (number, payload) in records(version).items():
            transaction.put(key, sealed(table, key, number, payload), db=tables[table])
    environment.close()
    (path / "LOCK").write_bytes(b"")
    (path / "CURRENT").write_text("gen-000001\n", "ascii")


@pytest.fixture
def old(tmp_path: Path) -> Path:
    path = tmp_path / "old"
    write_version_1(path)
    return path


def files(path: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in path.rglob("*")
        if file.is_file() and not file.name.endswith((".lock", "lock.mdb", "LOCK"))
    }


def require_everything(path: Path) -> None:
    """The database of now has what the records say."""
    with MemDB.open(path) as database:
        assert database.stats()["id"] == ID
        assert database.shape == SHAPE
        assert database.settings["memory"] == {"codec": "exact"}
        assert [document.id for document in database.documents()] == ["cold", "née", "sha256:ab"]
        for name, (texts, metadata, warm) in DOCUMENTS.items():
            document = database.get(name)
            assert document.text == "".join(texts)
            assert document.metadata == metadata
            assert document.references == REFERENCES[name]
            assert document.version == VERSION[name]
            assert document.warm == len(texts) * warm
        hits = database.retrieve(np.array([0.6, 0.8]), 10).hits
        assert [hit.id for hit in hits] == [1, 3, 2, 5]
        np.testing.assert_allclose([hit.score for hit in hits], [1, 0.8, 0.6, 0], atol=1e-6)
        for hit in hits:
            if hit.id == 3:
                assert hit.memory is None
                continue
            assert hit.memory is not None
            assert hit.memory.offsets.tolist() == [0, 2, 3]
            assert hit.memory.positions.tolist() == [0, 5, 7]
            assert hit.memory.keys.ravel().tolist() == [hit.id + n / 4 for n in range(6)]
            assert hit.memory.values.tobytes() == hit.memory.keys.tobytes()[::-1]
        assert [d.id for d in database.documents({"year": {"$gt": 1880}})] == ["sha256:ab"]
        assert database.split("Memory is text.")
    assert memdb.verify(path) == []


def test_the_example_is_what_version_1_was(old: Path) -> None:
    assert len(records()) == 7 + 2 * 3 + 2 * 4 + 3 + 4
    environment = lmdb.open(str(old / "gen-000001"), max_dbs=16, readonly=True, lock=False)
    with environment.begin() as transaction:
        assert {key.decode() for key, _ in transaction.cursor()} == set(TABLES)
    environment.close()


@pytest.mark.parametrize(
    "call",
    [
        MemDB.open,
        memdb.verify,
        memdb.repair,
        memdb.compact,
        lambda path: memdb.backup(path, path.with_name("copy")),
        lambda path: memdb.restore(path, path.with_name("copy")),
    ],
    ids=["open", "verify", "repair", "compact", "backup", "restore"],
)
def test_version_1_is_refused_and_the_way_out_named(
    old: Path, call: Callable[[Path], object]
) -> None:
    before = files(old)
    with pytest.raises(FormatError, match=rf"version 1.*memdb migrate --db {old}"):
        call(old)
    assert files(old) == before


def test_a_migrated_database_has_everything(old: Path) -> None:
    assert memdb.migrate(old) == (1, 2)
    require_everything(old)
    assert {entry.name for entry in old.iterdir()} == {"CURRENT", "LOCK", "gen-000002"}


def test_a_migrated_database_can_be_written(old: Path) -> None:
    memdb.migrate(old)
    with MemDB.open(old) as database:
        database.declare_keys("year")
        new = database.insert("new", metadata={"year": 1900}, embeddings=np.ones((1, 2)))
        assert new.references == (6,)
        database.delete("cold")
        assert {d.id for d in database.documents({"year": 1900})} == {new.id, "sha256:ab"}
        assert len(database.retrieve(np.ones(2), 10, where={"year": 1900}).hits) == 2
        assert database.build_index(kind="ivf") is None
    assert memdb.verify(old) == []


def test_to_migrate_again_changes_nothing(old: Path) -> None:
    memdb.migrate(old)
    before = files(old)
    assert memdb.migrate(old) == (2, 2)
    assert files(old) == before
    require_everything(old)


def test_an_empty_database_is_migrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "tests.engine.test_migration.records",
        lambda version: {
            ("settings", name.encode()): (1, canonical(value))
            for name, value in {
                **settings(version),
                "counters": {"last_change": 0, "next_reference": 1},
            }.items()
        },
    )
    write_version_1(tmp_path / "empty")
    assert memdb.migrate(tmp_path / "empty") == (1, 2)
    assert memdb.verify(tmp_path / "empty") == []
    with MemDB.open(tmp_path / "empty") as database:
        assert list(database.documents()) == []


def test_an_error_before_the_swap_leaves_version_1_whole(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files(old)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("memdb.care.generations.reindex", fail)
        with pytest.raises(StorageError, match="No space left"):
            memdb.migrate(old)
    assert files(old) == before
    assert memdb.migrate(old) == (1, 2)
    require_everything(old)


def test_a_migration_that_was_killed_leaves_one_whole_version(tmp_path: Path) -> None:
    """The child kills itself before its n-th call to the system that names the database, for many
    n up to the last."""
    script = """
    import os, signal, sys
    from pathlib import Path
    import memdb
    from tests.engine.test_migration import write_version_1

    def kill(event, arguments):
        global left
        if str(path) in str(arguments):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    for step in range(1, 1000):
        path = Path(sys.argv[1]) / f"db-{step}"
        write_version_1(path)
        left = step
        pid = os.fork()
        if pid == 0:
            sys.addaudithook(kill)
            memdb.migrate(path)
            os._exit(0)
        status = os.waitpid(pid, 0)[1]
        print(*memdb.migrate(path))
        if status == 0:
            break
        assert os.WIFSIGNALED(status)
    print(step)
    """
    result = child(script, tmp_path)
    assert result.returncode == 0, result.stderr
    *fates, steps = result.stdout.splitlines()
    assert fates == sorted(fates)  # from one moment on it is version 2
    assert fates.count("1 2") > 5
    assert fates.count("2 2") > 1
    for step in range(1, int(steps) + 1):
        require_everything(tmp_path / f"db-{step}")


def test_a_database_that_release_1_has_open_is_refused(old: Path) -> None:
    before = files(old)
    with (old / "LOCK").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)  # as that release does for as long as it is open
        with pytest.raises(StorageError, match="open in another process"):
            memdb.migrate(old)
    assert files(old) == before
    assert memdb.migrate(old) == (1, 2)


@pytest.mark.parametrize("version", [3, 0, -1])
def test_a_version_that_nobody_knows_is_refused(tmp_path: Path, version: int) -> None:
    write_version_1(tmp_path / "future", version)
    before = files(tmp_path / "future")
    for call in (memdb.migrate, MemDB.open, memdb.verify):
        with pytest.raises(FormatError, match=f"format version {version}"):
            call(tmp_path / "future")
    assert files(tmp_path / "future") == before


def test_where_there_is_no_database_there_is_nothing_to_migrate(tmp_path: Path) -> None:
    with pytest.raises(NotADatabaseError):
        memdb.migrate(tmp_path / "missing")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADatabaseError):
        memdb.migrate(tmp_path / "file")


def test_what_is_damaged_is_not_migrated_as_if_it_were_whole(old: Path) -> None:
    """Records are copied as they are: `verify` finds afterwards what was damaged before."""
    environment = lmdb.open(str(old / "gen-000001"), max_dbs=7, map_size=1 << 24)
    table = environment.open_db(b"references", integerkey=True)
    key = struct.pack("<Q", 1)
    with environment.begin(write=True) as transaction:
        record = bytearray(transaction.get(key, db=table))
        record[-1] ^= 1
        transaction.put(key, bytes(record), db=table)
    environment.close()
    assert memdb.migrate(old) == (1, 2)
    assert [(p.table, p.key, p.document) for p in memdb.verify(old)] == [("references", "1", "née")]


@pytest.mark.parametrize("damage", ["file cut short", "not LMDB", "no settings"])
def test_a_file_that_is_damaged_is_a_clear_error(old: Path, damage: str) -> None:
    file = old / "gen-000001" / "data.mdb"
    if damage == "file cut short":
        script = """
        import sys
        import memdb
        try:
            memdb.migrate(sys.argv[1])
        except memdb.MemDBError as error:
            print("refused", error)
        """
        file.write_bytes(file.read_bytes()[: 3 * 4096])
        result = child(script, old)  # LMDB may end the process
        assert result.stdout.startswith("refused"), (result.returncode, result.stderr)
        return
    if damage == "not LMDB":
        file.write_bytes(b"?" * 40_000)
    else:
        file.unlink()
        lmdb.open(str(old / "gen-000001"), map_size=1 << 24).close()
    with pytest.raises(memdb.MemDBError):
        memdb.migrate(old)
