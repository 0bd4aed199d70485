"""The database on disk: its seals, its folder, and what comes of damage, limits and kills."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memdb import (
    CODECS,
    CorruptRecordError,
    DatabaseExistsError,
    FormatError,
    InvalidInputError,
    MemDB,
    NotADatabaseError,
    StorageError,
)
from memdb.codecs import decode_memory
from memdb.filters.postings import Postings
from memdb.ingest.recording import delete
from memdb.storage.record_layout import (
    CHANGES,
    DOCUMENTS,
    EMBEDDINGS,
    FORMAT_VERSION,
    INTEGER_TABLES,
    MEMORIES,
    METADATA,
    POSTINGS,
    REFERENCES,
    SETTINGS,
    TABLES,
    integer_key,
    read_changes,
    seal,
    unseal,
)
from memdb.storage.store import Store
from memdb.storage.transaction import Transaction
from memdb.types.canonical import json_payload
from tests.engine.helpers import (
    TokenWriter,
    WordEmbedder,
    child,
    make_memory,
    make_shape,
    raw,
    time_limit,
    unit,
)

SHAPE = make_shape()


def create(path: Path) -> MemDB:
    return MemDB.create(path, shape=SHAPE, dimension=2, keys=["n"])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "db"


@pytest.fixture(scope="session")
def filled_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("templates") / "filled"
    with create(path) as database:
        for n in range(3):
            database.insert(
                f"This is text number {n}.",
                id=f"doc-{n}",
                metadata={"n": n},
                embeddings=unit(1, n),
                memories=[make_memory(SHAPE, n)] if n else None,
            )
    return path


@pytest.fixture
def filled(path: Path, filled_template: Path) -> Path:
    """A closed database of three documents, two of them warm."""
    return Path(shutil.copytree(filled_template, path))


# --- seals ----------------------------------------------------------------------------------------

tables = st.sampled_from(TABLES)
versions = st.integers(0, 2**32 - 1)


@given(tables, st.binary(min_size=1), versions, st.binary())
def test_a_sealed_record_opens(table: str, key: bytes, version: int, payload: bytes) -> None:
    assert unseal(table, key, memoryview(seal(table, key, version, payload))) == (version, payload)


@given(st.binary(min_size=1, max_size=12), versions, st.binary(max_size=24))
def test_a_record_with_any_bit_turned_does_not_open(
    key: bytes, version: int, payload: bytes
) -> None:
    record = seal("memories", key, version, payload)
    for bit in range(len(record) * 8):
        damaged = bytearray(record)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptRecordError, match="checksum"):
            unseal("memories", key, memoryview(damaged))


@given(tables, tables, st.binary(min_size=1), st.binary(min_size=1), versions, st.binary())
def test_a_record_opens_only_where_it_was_sealed(
    table: str, other_table: str, key: bytes, other_key: bytes, version: int, payload: bytes
) -> None:
    record = memoryview(seal(table, key, version, payload))
    for where in {(other_table, key), (table, other_key), (other_table, other_key)}:
        if where != (table, key):
            with pytest.raises(CorruptRecordError):
                unseal(*where, record)


@given(st.binary(max_size=40), st.integers(1, 40))
def test_a_record_cut_short_does_not_open(payload: bytes, cut: int) -> None:
    record = seal("settings", b"x", 1, payload)
    with pytest.raises(CorruptRecordError):
        unseal("settings", b"x", memoryview(record[: max(0, len(record) - cut)]))
    with pytest.raises(CorruptRecordError):
        unseal("settings", b"x", memoryview(record + payload[:cut] + b"\0"))


# --- damage ---------------------------------------------------------------------------------------

READ: dict[str, Callable[[Transaction, bytes], object]] = {
    SETTINGS: lambda t, key: t.tokenizer() if key == b"tokenizer" else t.setting(key.decode()),
    DOCUMENTS: lambda t, key: (t.document(key.decode()), list(t.documents())),
    METADATA: lambda t, key: t.metadata(key.decode()),
    REFERENCES: lambda t, key: t.reference(int.from_bytes(key, "little")),
    EMBEDDINGS: lambda t, key: t.embedding(int.from_bytes(key, "little")),
    MEMORIES: lambda t, key: decode(t.payload(MEMORIES, key)),
    CHANGES: lambda t, key: list(t.changes(0)),
    POSTINGS: lambda t, key: list(Postings(t).items()),
}


def decode(payload: bytes) -> object:
    return decode_memory(payload, SHAPE, CODECS)


def records(environment: Any, handles: dict[str, Any]) -> list[tuple[str, bytes, bytes]]:
    with environment.begin() as transaction:
        return [
            (name, key, record)
            for name, handle in handles.items()
            for key, record in transaction.cursor(handle)
        ]


def test_every_turned_byte_of_every_record_is_noticed(filled: Path) -> None:
    seen = set()
    with raw(filled) as (environment, handles):
        for table, key, record in records(environment, handles):
            seen.add(table)
            for at in range(len(record)):
                damaged = bytearray(record)
                damaged[at] ^= 1 << at % 8
                inner = environment.begin(write=True, buffers=True)
                inner.put(key, bytes(damaged), db=handles[table])
                with pytest.raises(CorruptRecordError) as caught:
                    READ[table](Transaction(inner, handles), key)
                assert caught.value.table == table
                inner.abort()
            with environment.begin(buffers=True) as inner:
                READ[table](Transaction(inner, handles), key)  # and whole, it is read
    assert seen == set(TABLES)


def test_every_turned_byte_of_the_tokenizer_is_noticed(path: Path) -> None:
    MemDB.create(path, embedder=WordEmbedder(), writer=TokenWriter()).close()
    with raw(path) as (environment, handles):
        whole = {key: record for _, key, record in records(environment, handles)}[b"tokenizer"]
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 0x10
        with pytest.raises(CorruptRecordError):
            unseal(SETTINGS, b"tokenizer", memoryview(damaged))


def change(path: Path, table: str, key: bytes, record: bytes | None) -> bytes:
    """Put a record, or take it away; returns the one that was there."""
    with raw(path) as (environment, handles), environment.begin(write=True) as transaction:
        before = bytes(transaction.get(key, db=handles[table]))
        if record is None:
            transaction.delete(key, db=handles[table])
        else:
            transaction.put(key, record, db=handles[table])
        return before


def use_everything(path: Path) -> None:
    with MemDB.open(path) as database:
        assert len(list(database.documents())) == 3
        assert len(database.retrieve(np.ones(2), 3).memories) == 2


@pytest.mark.parametrize("table", [REFERENCES, EMBEDDINGS, MEMORIES])
def test_a_record_in_the_place_of_another_is_noticed(filled: Path, table: str) -> None:
    use_everything(filled)
    two, three = integer_key(2), integer_key(3)
    record = change(filled, table, two, b"")
    change(filled, table, two, record)
    change(filled, table, three, record)
    with pytest.raises(CorruptRecordError, match=f"record 3 of table '{table}' is damaged"):
        use_everything(filled)


def test_the_record_of_another_table_is_noticed(filled: Path) -> None:
    embedding = change(filled, EMBEDDINGS, integer_key(2), b"")
    change(filled, EMBEDDINGS, integer_key(2), embedding)
    change(filled, MEMORIES, integer_key(2), embedding)
    with pytest.raises(CorruptRecordError, match="record 2 of table 'memories'"):
        use_everything(filled)


@pytest.mark.parametrize("table", [DOCUMENTS, METADATA])
def test_the_record_of_another_document_is_noticed(filled: Path, table: str) -> None:
    record = change(filled, table, b"doc-0", b"")
    change(filled, table, b"doc-0", record)
    change(filled, table, b"doc-1", record)
    with pytest.raises(CorruptRecordError, match=f"record 'doc-1' of table '{table}'"):
        use_everything(filled)


@pytest.mark.parametrize("table", [DOCUMENTS, METADATA])
def test_an_older_version_of_a_record_is_noticed(filled: Path, table: str) -> None:
    old = change(filled, table, b"doc-1", b"")
    change(filled, table, b"doc-1", old)
    with MemDB.open(filled) as database:
        database.update("doc-1", metadata={"n": "new"})
        assert database.get("doc-1").metadata == {"n": "new"}
    change(filled, table, b"doc-1", old)
    with (
        MemDB.open(filled) as database,
        pytest.raises(CorruptRecordError, match=r"record 'doc-1' of table 'metadata'.*version"),
    ):
        database.get("doc-1")


def test_the_map_entry_of_references_that_are_gone_is_noticed(filled: Path) -> None:
    old = change(filled, DOCUMENTS, b"doc-1", b"")
    change(filled, DOCUMENTS, b"doc-1", old)
    with MemDB.open(filled) as database:
        database.update("doc-1", text="new text", embeddings=unit(1, 1))
    change(filled, DOCUMENTS, b"doc-1", old)
    with (
        MemDB.open(filled) as database,
        pytest.raises(CorruptRecordError, match=r"record 2 of table 'references'.*missing"),
    ):
        database.get("doc-1")


@pytest.mark.parametrize("table", [REFERENCES, EMBEDDINGS, METADATA])
def test_a_record_that_is_missing_is_noticed(filled: Path, table: str) -> None:
    change(filled, table, integer_key(2) if table in INTEGER_TABLES else b"doc-1", None)
    with pytest.raises(CorruptRecordError, match=f"table '{table}' is damaged: it is missing"):
        use_everything(filled)


def test_a_memory_that_is_missing_is_cold(filled: Path) -> None:
    change(filled, MEMORIES, integer_key(2), None)
    with MemDB.open(filled) as database:
        assert database.get("doc-1").warm == 0


def test_damage_in_one_document_leaves_the_others(filled: Path) -> None:
    change(filled, REFERENCES, integer_key(2), b"?" * 40)
    with MemDB.open(filled) as database:
        assert database.get("doc-0").text == "This is text number 0."
        assert database.get("doc-2").text == "This is text number 2."
        database.delete("doc-1")
        assert [document.id for document in database.documents()] == ["doc-0", "doc-2"]
        assert len(database.retrieve(np.ones(2), 3).hits) == 2


def test_a_file_cut_short_is_an_error_and_not_the_end_of_the_process(filled: Path) -> None:
    script = """
    import os, sys
    from pathlib import Path
    import numpy as np
    from memdb import MemDB, MemDBError
    path = Path(sys.argv[1])
    file = path / "gen-000001" / "data.mdb"
    whole = file.read_bytes()
    for size in [*range(0, len(whole), 4096), 1, 4097, len(whole) - 1]:
        file.write_bytes(whole[:size])
        try:
            with MemDB.open(path) as database:
                assert len(list(database.documents())) == 3
                assert len(database.retrieve(np.ones(2), 3).memories) == 2
            print("whole")  # the last pages may be free ones
        except MemDBError:
            print("error")
    """
    result = child(script, filled)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split().count("error") > 5


# --- create ---------------------------------------------------------------------------------------


def test_a_new_database_is_empty_and_can_be_opened_again(path: Path) -> None:
    with create(path) as database:
        assert list(database.documents()) == []
    with MemDB.open(path) as database:
        assert database.shape == SHAPE
        assert database.stats()["references"] == 0
    assert sorted(entry.name for entry in path.iterdir()) == ["CURRENT", "LOCK", "gen-000001"]


def test_each_database_has_an_id_of_its_own(path: Path, tmp_path: Path) -> None:
    with create(path) as one, create(tmp_path / "other") as other:
        first = one.stats()["id"]
        assert len({first, other.stats()["id"]}) == 2
        assert bytes.fromhex(first)
    with MemDB.open(path) as again:
        assert again.stats()["id"] == first
    shutil.rmtree(path)
    with create(path) as new:
        assert new.stats()["id"] != first


def test_create_makes_the_folders_above_and_takes_an_empty_one(tmp_path: Path) -> None:
    create(tmp_path / "a" / "b" / "db").close()
    (tmp_path / "empty").mkdir()
    create(tmp_path / "empty").close()


def test_create_refuses_a_place_where_a_database_is(filled: Path) -> None:
    with pytest.raises(DatabaseExistsError, match="already a database"):
        create(filled)
    use_everything(filled)


def test_create_refuses_a_database_that_is_open(path: Path) -> None:
    with (
        create(path),
        time_limit(),
        pytest.raises(DatabaseExistsError, match="already a database"),
    ):
        create(path)


def test_create_refuses_a_folder_with_something_else_in_it(path: Path) -> None:
    path.mkdir()
    (path / "thesis.txt").write_text("my only copy")
    with pytest.raises(StorageError, match=r"holds 'thesis\.txt'.*another path"):
        create(path)
    assert [entry.name for entry in path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("name", ["file", "file/db", "n" * 300])
def test_create_where_no_folder_can_be_says_so(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot make a database"):
        create(tmp_path / name)


def test_a_create_that_fails_leaves_nothing(path: Path) -> None:
    class Unwritable(TokenWriter):
        settings = {"budget": object()}  # noqa: RUF012

    for _ in range(2):
        with pytest.raises(InvalidInputError, match="not JSON serializable"):
            MemDB.create(path, writer=Unwritable(), dimension=2)
        assert not path.exists()
        with pytest.raises(NotADatabaseError, match="no database at"):
            MemDB.open(path)
    create(path).close()


def test_a_killed_create_is_no_hindrance_wherever_it_was_killed(tmp_path: Path) -> None:
    """The child kills itself before its n-th call to the system that names the database, for every
    n there is."""
    script = """
    import os, signal, sys
    from pathlib import Path
    from memdb import DatabaseExistsError, MemDB
    from tests.engine.helpers import make_shape, unit

    def kill(event, arguments):
        global left
        if str(path) in str(arguments):
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

    for step in range(1000):
        path = Path(sys.argv[1]) / f"db-{step}"
        left = step
        pid = os.fork()
        if pid == 0:
            sys.addaudithook(kill)
            MemDB.create(path, shape=make_shape(), dimension=2).close()
            os._exit(0)
        status = os.waitpid(pid, 0)[1]
        try:
            database = MemDB.create(path, shape=make_shape(), dimension=2)
            print("made anew")
        except DatabaseExistsError:
            database = MemDB.open(path)
            print("whole")
        with database:
            database.insert("text", embeddings=unit(1, 1))
        if status == 0:
            break
    """
    result = child(script, tmp_path)
    assert result.returncode == 0, result.stderr
    fates = result.stdout.splitlines()
    assert fates.count("made anew") > 5
    assert fates.count("whole") > 1
    assert fates == sorted(fates)  # from one moment on it is whole


def test_create_after_deleting_the_folder(path: Path) -> None:
    with create(path) as database:
        database.insert("text", id="old", embeddings=unit(1, 1))
    shutil.rmtree(path)
    with create(path) as database:
        assert list(database.documents()) == []
        database.insert("text", id="new", embeddings=unit(1, 1))
    with MemDB.open(path) as database:
        assert [document.id for document in database.documents()] == ["new"]


def test_create_after_deleting_the_folder_of_an_open_database(path: Path) -> None:
    old = create(path)
    old.insert("text", id="old", embeddings=unit(1, 1))
    shutil.rmtree(path)
    with create(path) as new:
        assert list(new.documents()) == []
        new.insert("text", id="new", embeddings=unit(1, 1))
        assert [hit.reference.document_id for hit in new.retrieve(np.ones(2)).hits] == ["new"]
        old.close()
        with MemDB.open(path) as again:
            assert [document.id for document in again.documents()] == ["new"]


# --- open -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["missing", "missing/db", "n" * 300])
def test_open_says_that_nothing_is_there(tmp_path: Path, name: str) -> None:
    with pytest.raises(NotADatabaseError, match=r"no database at '.*memdb init"):
        MemDB.open(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_open_refuses_a_file_and_a_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("?")
    for place in (tmp_path, tmp_path / "file"):
        with pytest.raises(NotADatabaseError, match="is no memdb database"):
            MemDB.open(place)


@pytest.mark.parametrize(
    "current", [b"", b"gen-000002\n", b"gen-1\n", b"../db/gen-000001\n", b"gen-000001\nx", b"\xff"]
)
def test_open_refuses_a_current_that_names_no_generation(filled: Path, current: bytes) -> None:
    (filled / "CURRENT").write_bytes(current)
    with pytest.raises(NotADatabaseError, match="is no memdb database: its file CURRENT"):
        MemDB.open(filled)


@pytest.mark.parametrize("content", [b"", b"?", b"\0" * 65536, os.urandom(65536)])
def test_open_refuses_a_data_file_of_something_else(filled: Path, content: bytes) -> None:
    (filled / "gen-000001" / "data.mdb").write_bytes(content)
    with pytest.raises(NotADatabaseError):
        MemDB.open(filled)


def test_open_refuses_an_lmdb_file_of_another_program(filled: Path) -> None:
    shutil.rmtree(filled / "gen-000001")
    with lmdb.open(str(filled / "gen-000001")) as environment, environment.begin(write=True) as t:
        t.put(b"key", b"value")
    with pytest.raises(NotADatabaseError, match="is no memdb database"):
        MemDB.open(filled)


def test_a_refused_database_can_be_opened_once_it_is_mended(filled: Path) -> None:
    file = filled / "gen-000001" / "data.mdb"
    whole = file.read_bytes()
    file.write_bytes(b"?" * len(whole))
    with pytest.raises(NotADatabaseError):
        MemDB.open(filled)
    file.write_bytes(whole)
    use_everything(filled)


@pytest.mark.parametrize("other_tables", [False, True])
def test_open_refuses_a_newer_format_and_says_which(filled: Path, other_tables: bool) -> None:
    newer = seal(SETTINGS, b"format", 1, json_payload({"version": FORMAT_VERSION + 1}))
    change(filled, SETTINGS, b"format", newer)
    if other_tables:
        with raw(filled) as (environment, handles), environment.begin(write=True) as transaction:
            transaction.drop(handles[MEMORIES])
    match = f"format version {FORMAT_VERSION + 1}; this release reads version {FORMAT_VERSION}"
    for _ in range(2):
        with pytest.raises(FormatError, match=match):
            MemDB.open(filled)


def test_open_names_a_damaged_setting(filled: Path) -> None:
    change(filled, SETTINGS, b"shape", b"?" * 40)
    for _ in range(2):
        with pytest.raises(CorruptRecordError, match="record 'shape' of table 'settings'"):
            MemDB.open(filled)


def test_a_database_may_be_copied_and_moved_while_closed(filled: Path, tmp_path: Path) -> None:
    shutil.copytree(filled, tmp_path / "copy")
    filled.rename(tmp_path / "moved")
    use_everything(tmp_path / "copy")
    use_everything(tmp_path / "moved")
    with MemDB.open(tmp_path / "copy") as copy, MemDB.open(tmp_path / "moved") as moved:
        copy.delete("doc-0")
        assert moved.get("doc-0").id == "doc-0"


def test_the_folder_of_the_process_may_change(
    tmp_path: Path, filled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(filled.parent)
    with MemDB.open(filled.name) as database:
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        file = filled / "gen-000001" / "data.mdb"
        assert database.stats()["bytes"]["file"] == file.stat().st_size
        database.insert("more", embeddings=unit(1, 1))


# --- transactions ---------------------------------------------------------------------------------


def test_a_transaction_that_fails_changes_nothing(filled: Path) -> None:
    def spoil(transaction: Transaction) -> None:
        transaction.next_references(5)
        delete(transaction, "doc-1", entry)
        assert transaction.document("doc-1") is None
        raise ZeroDivisionError

    store = Store(filled)
    try:
        with store.read() as transaction:
            before = transaction.setting("counters")
            entry = transaction.document("doc-1")
            assert entry is not None
        with pytest.raises(ZeroDivisionError), store.write() as transaction:
            spoil(transaction)
        with store.read() as transaction:
            assert transaction.setting("counters") == before
            assert transaction.document("doc-1") == entry
    finally:
        store.close()


def test_a_reader_sees_the_moment_it_began(filled: Path) -> None:
    store = Store(filled)
    try:
        with MemDB.open(filled) as database, store.read() as transaction:
            before = [name for name, _ in transaction.documents()]
            database.delete("doc-0")
            database.insert("new", embeddings=unit(1, 1))
            assert [name for name, _ in transaction.documents()] == before
            assert transaction.reference(1).text == "This is text number 0."
    finally:
        store.close()


def test_the_change_log_tells_what_happened_in_order(path: Path) -> None:
    with create(path) as database:
        database.insert("a", id="a", embeddings=unit(1, 1))  # reference 1
        database.insert("b", id="b", embeddings=unit(1, 1), memories=[make_memory(SHAPE, 1)])
        database.update("a", metadata={"x": 1})
        database.update("a", text="c", embeddings=unit(1, 1))  # reference 3
        database.delete("a", "b")
        assert database.stats()["changes"] == 4
    with raw(path) as (environment, handles), environment.begin(buffers=True) as inner:
        log = [
            (bytes(key), read_changes(unseal(CHANGES, key, record)[1]).tolist())
            for key, record in inner.cursor(handles[CHANGES])
        ]
    inserted, deleted, remembered, named = 1, 2, 3, 5
    assert [key for key, _ in log] == [integer_key(n) for n in (1, 2, 3, 4)]
    names = [entries.pop() for _, entries in log]
    assert [what for what, _ in names] == 4 * [named]
    assert len({bits for _, bits in names if bits < 0}) == 4
    assert [entries for _, entries in log] == [
        [(inserted, 1)],
        [(inserted, 2), (remembered, 2)],
        [(deleted, 1), (inserted, 3)],
        [(deleted, 3), (deleted, 2)],
    ]


# --- limits ---------------------------------------------------------------------------------------


def test_a_full_disk_is_an_error_and_nothing_half_written_stays(filled: Path) -> None:
    """A limit on the size of files stands for the full disk."""
    script = """
    import os, resource, sys
    import numpy as np
    from pathlib import Path
    from memdb import MemDB, StorageError
    from tests.engine.helpers import make_shape, unit

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    path = Path(sys.argv[1])
    new = path.parent / "new"
    for size in (0, 100, 8192, 20480):
        limit(size)
        try:
            MemDB.create(new, shape=make_shape(), dimension=2)
            sys.exit(f"create with {size} bytes")
        except StorageError:
            assert not new.exists(), size

    with MemDB.open(path) as database:
        limit((path / "gen-000001" / "data.mdb").stat().st_size + 40000)
        kept = 0
        try:
            while kept < 1000:
                database.insert(os.urandom(2000).hex(), id=f"more-{kept}", embeddings=unit(1, 1))
                kept += 1
        except StorageError as error:
            print(error)
        assert 0 < kept < 1000
        assert database.stats()["documents"] == len(list(database.documents())) == 3 + kept
        assert len(database.retrieve(np.ones(2), 1000).hits) == 3 + kept
        limit(resource.RLIM_INFINITY)
        database.insert("there is room again", id=f"more-{kept}", embeddings=unit(1, 1))
    with MemDB.open(path) as database:
        assert len(list(database.documents())) == 4 + kept
    """
    result = child(script, filled)
    assert result.returncode == 0, result.stderr
    assert str(filled) in result.stdout


@pytest.mark.parametrize("room", [200, 600, 3000])
def test_little_address_space_is_enough(filled: Path, room: int) -> None:
    script = """
    import resource, sys
    from pathlib import Path
    import numpy as np
    from memdb import MemDB
    from tests.engine.helpers import make_shape, unit

    path, room = Path(sys.argv[1]), int(sys.argv[2]) << 20
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + room, used + room))
    with MemDB.open(path) as database:
        database.insert("more", id="more", embeddings=unit(1, 0))
        assert database.retrieve(unit(1, 0)[0], 1).hits
        database.delete("more")
    MemDB.create(path.parent / "new", shape=make_shape(), dimension=2).close()
    """
    result = child(script, filled, room)
    assert result.returncode == 0, result.stderr
    use_everything(filled)


def test_too_little_address_space_is_an_error_of_storage(filled: Path) -> None:
    script = """
    import resource, sys
    from pathlib import Path
    from memdb import MemDB, StorageError

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (30 << 20), used + (30 << 20)))
    try:
        MemDB.open(sys.argv[1])
    except StorageError as error:
        print("refused:", error)
    """
    result = child(script, filled)
    assert result.stdout.startswith("refused: "), result.stderr
