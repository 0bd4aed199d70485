"""Small promises of storage_format.md: who holds `LOCK` when, what is durable, when an index begins
anew, what metadata may be."""

from __future__ import annotations

import fcntl
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memdb import (
    CorruptRecordError,
    DatabaseExistsError,
    FormatError,
    InvalidInputError,
    MemDB,
    NotADatabaseError,
)
from memdb.index import Searcher
from memdb.storage.environment import Environment
from memdb.storage.folder import new_database, opening
from memdb.storage.record_layout import CHANGES, EMBEDDINGS, FORMAT_VERSION, REFERENCES, integer_key
from memdb.storage.store import Store
from memdb.storage.transaction import Transaction
from memdb.types.checks import MAX_DEPTH, check_metadata
from tests.engine.helpers import make_shape, raw, time_limit, unit


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A closed database of three documents, each one change and one reference."""
    path = tmp_path / "db"
    with MemDB.create(path, shape=make_shape(), dimension=2) as database:
        for n in range(1, 4):
            database.insert("text", id=f"{4 - n}", embeddings=unit(1, n))  # ids fall, numbers rise
    return path


@pytest.fixture(autouse=True)
def no_test_hangs() -> Iterator[None]:
    with time_limit():
        yield


@contextmanager
def in_thread(work: Callable[[], object]) -> Iterator[threading.Thread]:
    """`work` in a thread that has ended, without an error, when this ends."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield thread
    thread.join()
    if failures:
        raise failures[0]


def is_locked(folder: Path, how: int = fcntl.LOCK_EX) -> bool:
    """Whether somebody's lock stands in the way of this one."""
    with (folder / "LOCK").open() as file:
        try:
            fcntl.flock(file, how | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


# --- the lock -------------------------------------------------------------------------------------


def test_the_lock_is_held_while_a_generation_is_opened_and_no_longer(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a compaction need not wait until everybody has closed the database."""
    seen = []
    acquire = Environment.acquire

    def watch(*arguments: Any, **options: Any) -> Environment:
        seen.append((is_locked(path), is_locked(path, fcntl.LOCK_SH)))
        return acquire(*arguments, **options)

    monkeypatch.setattr(Environment, "acquire", watch)
    with MemDB.open(path):
        assert seen == [(True, False)]
        assert not is_locked(path)


def test_a_database_that_is_refused_is_not_locked(path: Path) -> None:
    with raw(path) as (environment, tables), environment.begin(write=True) as transaction:
        Transaction(transaction, tables).put_setting("format", {"version": FORMAT_VERSION + 1})
    with pytest.raises(FormatError):
        MemDB.open(path)
    assert not is_locked(path)


def test_what_current_said_before_the_lock_does_not_count(path: Path) -> None:
    """Another process replaces the generation while this one waits for the lock."""
    opened = []

    def open_and_close() -> None:
        with MemDB.open(path) as database:
            opened.append((database._store.generation.name, len(list(database.documents()))))

    with (path / "LOCK").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with in_thread(open_and_close) as thread:
            time.sleep(0.1)
            assert thread.is_alive()
            (path / "gen-000001").rename(path / "gen-000002")
            (path / "CURRENT").write_text("gen-000002\n")
            fcntl.flock(lock, fcntl.LOCK_UN)
    assert opened == [("gen-000002", 3)]


def test_a_creation_that_fails_while_one_waits_to_open(path: Path) -> None:
    """`CURRENT` may be there for a moment, until the folder turns out not to be durable."""
    with (path / "LOCK").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)

        def refused() -> None:
            with pytest.raises(NotADatabaseError, match="there is no database at"):
                MemDB.open(path)

        with in_thread(refused) as thread:
            time.sleep(0.1)
            assert thread.is_alive()
            (path / "CURRENT").unlink()
            shutil.rmtree(path / "gen-000001")
            fcntl.flock(lock, fcntl.LOCK_UN)
    assert not is_locked(path)


@pytest.mark.parametrize("names", [(), ("LOCK",), ("LOCK", "CURRENT.new")])
def test_a_folder_of_a_failed_creation_is_no_database_yet(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    folder = tmp_path / "db"
    folder.mkdir()
    for name in names:
        (folder / name).touch()
    with pytest.raises(NotADatabaseError, match=r"there is no database at .*memdb init"):
        MemDB.open(folder)
    assert sorted(entry.name for entry in folder.iterdir()) == sorted(names)
    MemDB.create(folder, shape=make_shape(), dimension=2).close()


@pytest.mark.parametrize("names", [("letter.txt",), ("LOCK", "gen-000001"), ("CURRENT",)])
def test_opening_what_is_no_database_makes_nothing_in_it(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(NotADatabaseError, match="is no memdb database"):
        opening(tmp_path).__enter__()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted(names)


def test_a_copy_without_its_lock_is_a_whole_database(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    (copy / "gen-000001").mkdir(parents=True)
    for name in ("CURRENT", "gen-000001/data.mdb"):
        shutil.copy(path / name, copy / name)
    with MemDB.open(copy) as database, MemDB.open(path) as original:
        assert database.stats()["id"] == original.stats()["id"]
        assert len(list(database.documents())) == 3


def test_a_creation_that_fails_hands_over_to_the_one_that_waits(tmp_path: Path) -> None:
    folder = tmp_path / "db"
    inside, leave = threading.Event(), threading.Event()

    def second() -> None:
        with new_database(folder) as generation:
            assert list(generation.iterdir()) == []
            inside.set()
            assert leave.wait(10)

    def fail() -> None:
        with new_database(folder) as generation, in_thread(second) as thread:
            (generation / "data.mdb").touch()
            time.sleep(0.1)
            assert thread.is_alive()
            assert not inside.is_set()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert inside.wait(10)
    assert is_locked(folder)  # whoever comes third finds the lock that the second one holds
    leave.set()
    while not (folder / "CURRENT").exists() or is_locked(folder):
        time.sleep(0.01)
    with pytest.raises(DatabaseExistsError), new_database(folder):
        pass


def test_the_folders_that_are_made_are_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []
    fsync = os.fsync

    def watch(handle: int) -> None:
        synced.append(Path(f"/proc/self/fd/{handle}").readlink())
        fsync(handle)

    monkeypatch.setattr(os, "fsync", watch)
    folder = tmp_path / "a" / "b" / "db"
    MemDB.create(folder, shape=make_shape(), dimension=2).close()
    order = [tmp_path / "a" / "b", folder / "gen-000001", folder / "CURRENT.new", folder]
    assert [place for place in synced if place in order] == order
    assert {tmp_path, tmp_path / "a"} <= set(synced)
    synced.clear()
    (tmp_path / "there").mkdir()
    MemDB.create(tmp_path / "there", shape=make_shape(), dimension=2).close()
    assert synced[0] == tmp_path


@pytest.mark.parametrize("identity", [None, 7, "", "0" * 31, "0" * 33, "G" * 32, "0" * 32 + "\n"])
def test_a_database_without_an_id_is_refused(path: Path, identity: object) -> None:
    with raw(path) as (environment, tables), environment.begin(write=True) as transaction:
        setting = {"version": FORMAT_VERSION, "id": identity}
        Transaction(transaction, tables).put_setting("format", setting)
    with pytest.raises(FormatError, match="has no id of 32 hexadecimal digits"):
        MemDB.open(path)


# --- the index ------------------------------------------------------------------------------------


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    store = Store(path)
    yield store
    store.close()


def test_all_embeddings_come_in_the_order_of_their_ids(store: Store) -> None:
    with store.read() as transaction:
        batches = list(transaction.embeddings(size=2))
        assert [ids.tolist() for ids, _ in batches] == [[1, 2], [3]]
        found = {n: row for ids, rows in batches for n, row in zip(ids.tolist(), rows, strict=True)}
        for number, vector in found.items():
            assert vector.dtype == np.float32
            np.testing.assert_array_equal(vector, transaction.embedding(number))
    assert found[2][1] == pytest.approx(2 / 5**0.5)  # the vectors outlive the transaction


def test_a_first_search_reads_no_documents(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Transaction, "documents")
    monkeypatch.delattr(Transaction, "embedding")
    assert search(Searcher(store, 2)) == {1, 2, 3}


def search(searcher: Searcher) -> set[int]:
    with searcher.pin() as pinned:
        _, ids = pinned.search(unit(1, 0), 9)
        return {int(number) for number in ids[0] if number >= 0}


def put_raw(store: Store, table: str, number: int, record: bytes | None) -> None:
    """Change a record of an open store behind its back."""
    with store.write() as transaction:
        if record is None:
            transaction.delete_record(table, integer_key(number))
        else:
            place = {"db": transaction._tables[table]}
            transaction._inner.put(integer_key(number), record, **place)


def test_an_embedding_that_is_missing_is_named(store: Store) -> None:
    put_raw(store, EMBEDDINGS, 2, None)
    searcher = Searcher(store, 2)
    for _ in range(2):
        with pytest.raises(CorruptRecordError, match=r"record 2 of table 'embeddings'.*missing"):
            search(searcher)


@pytest.mark.parametrize("missing", [4, 5, 6])
def test_an_index_begins_anew_where_the_log_has_a_gap(
    store: Store, path: Path, missing: int
) -> None:
    searcher = Searcher(store, 2)
    assert search(searcher) == {1, 2, 3}
    with MemDB.open(path) as database:
        database.delete("1")
        database.insert("more", embeddings=unit(1, 1))
        database.insert("yet more", embeddings=unit(1, 2))
    put_raw(store, CHANGES, missing, None)
    assert search(searcher) == {1, 2, 4, 5}
    assert search(searcher) == {1, 2, 4, 5}


def test_an_index_of_a_later_state_begins_anew(store: Store) -> None:
    """As after an older copy was put in the database's place."""
    searcher = Searcher(store, 2)
    assert search(searcher) == {1, 2, 3}
    with store.write() as transaction:
        counters: dict[str, Any] = transaction.setting("counters")
        transaction.put_setting("counters", {**counters, "last_change": 1})
        for number in (2, 3):
            for table in (CHANGES, EMBEDDINGS, REFERENCES):
                transaction.delete_record(table, integer_key(number))
    assert search(searcher) == {1}


# --- metadata -------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [1, 1.5, True, None, (1, 2), b"a"])
def test_keys_that_are_no_strings_are_refused_at_any_depth(key: object) -> None:
    for metadata in ({key: 0}, {"a": {key: 0}}, {"a": [[{"b": ({key: 0},)}]]}, {"a": 1, key: 0}):
        with pytest.raises(InvalidInputError, match="'metadata' cannot be kept as JSON") as caught:
            check_metadata(metadata)
        assert repr(key) in str(caught.value)


def test_metadata_that_holds_itself_is_refused() -> None:
    metadata: dict[str, Any] = {}
    metadata["a"] = [metadata]
    with pytest.raises(InvalidInputError, match=f"nested more than {MAX_DEPTH} deep"):
        check_metadata(metadata)
