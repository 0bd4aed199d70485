"""One database in many processes at once: writers, readers, a compaction now and then."""

from __future__ import annotations

import multiprocessing
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import memdb
from memdb import Batch, ConflictError, Document, ExplicitMemory, MemDB, StorageError
from memdb.care import generations
from memdb.index import searcher
from memdb.ingest.recording import delete
from memdb.storage import environment
from memdb.storage import store as store_module
from memdb.storage.folder import current_generation
from memdb.storage.store import Store
from tests.engine.helpers import child, make_memory, make_shape, same_memory, time_limit

SPAWN = multiprocessing.get_context("spawn")
DIMENSION = 8
SHAPE = make_shape()


@cache
def vector(seed: int) -> NDArray[np.float32]:
    drawn = np.random.default_rng(seed).standard_normal(DIMENSION).astype(np.float32)
    return drawn / np.linalg.norm(drawn)


@cache
def memory(seed: int) -> ExplicitMemory:
    return make_memory(SHAPE, seed)


def content(seed: int, **metadata: Any) -> dict[str, Any]:
    """Text, metadata, embedding and memory that belong together."""
    return {
        "text": f"{seed}",
        "metadata": {"seed": seed, **metadata},
        "embeddings": vector(seed)[None],
        "memories": [memory(seed)],
    }


def batch(seeds: dict[str, int], **metadata: Any) -> Batch:
    """Documents by id, each of the content of a seed."""
    return Batch(
        [Document(f"{s}", name, {"seed": s, **metadata}) for name, s in seeds.items()],
        np.array([vector(seed) for seed in seeds.values()]),
        [memory(seed) for seed in seeds.values()],
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A closed database of 80 documents with an index file, and a few to be counted in."""
    path = tmp_path / "db"
    with MemDB.create(
        path, shape=SHAPE, dimension=DIMENSION, codec="exact", keys=["pair"], index="ivf"
    ) as database:
        database.load([batch({f"base-{n:02}": n for n in range(80)})])
        for seed, name in enumerate(["own-0", "own-1", "shared"], 100):
            database.insert(id=name, **content(seed, n=0))
        database.build_index()
    return path


@pytest.fixture
def other() -> Iterator[ProcessPoolExecutor]:
    """Another process, which runs functions; it has begun already."""
    with ProcessPoolExecutor(1, mp_context=SPAWN) as pool:
        pool.submit(time.time).result()
        yield pool


# --- two writers and four readers -----------------------------------------------------------------


@dataclass
class Written:
    """What a writer did.

    Attributes:
        own: increments of the document that it alone changes.
        shared: of the one that both change.
        pairs: seeds of the pairs that are there now, by number.
        conflicts: how often the other writer was faster.
    """

    own: int = 0
    shared: int = 0
    pairs: dict[int, int] = field(default_factory=dict)
    conflicts: int = 0


def write(path: Path, name: int, seconds: float) -> Written:
    """A writer process."""
    chance = random.Random(name)
    done = Written()
    end = time.monotonic() + seconds
    with MemDB.open(path) as database:
        while time.monotonic() < end:
            increment(database, f"own-{name}", chance.randrange(10**9))
            done.own += 1
            while True:
                try:
                    increment(database, "shared", chance.choice([None, chance.randrange(10**9)]))
                    break
                except ConflictError:
                    done.conflicts += 1
            done.shared += 1
            number = chance.randrange(8)
            names = pair(name, number)
            if number in done.pairs and chance.random() < 0.5:
                database.delete(*names)
                del done.pairs[number]
            else:
                seed = chance.randrange(10**9)
                database.load([batch({names[0]: seed, names[1]: seed + 1}, pair=number)])
                done.pairs[number] = seed
            care = chance.random()
            if care < 0.02:
                memdb.compact(path)
            elif care < 0.04:
                database.build_index()
    return done


def increment(database: MemDB, name: str, seed: int | None) -> None:
    """Read, add, write, unless another writer did so meanwhile; with a new text, or without."""
    document = database.get(name)
    n = document.metadata["n"] + 1
    if seed is None:
        metadata = {**document.metadata, "n": n}
        database.update(name, metadata=metadata, if_version=document.version)
    else:
        database.update(name, **content(seed, n=n), if_version=document.version)


def pair(writer: int, number: int) -> tuple[str, str]:
    """Ids of two documents that are written and deleted together."""
    return f"pair-{writer}-{number}-a", f"pair-{writer}-{number}-b"


def read(path: Path, name: int, seconds: float) -> int:
    """A reader process; returns how many snapshots it looked at."""
    chance = random.Random(name)
    looked = change = counted = 0
    end = time.monotonic() + seconds
    with MemDB.open(path) as database:
        while time.monotonic() < end:
            with database.snapshot() as snapshot:
                assert snapshot.change >= change
                change = snapshot.change
                documents = {document.id: document for document in snapshot.documents()}
                for names in (pair(writer, number) for writer in range(2) for number in range(8)):
                    one, two = (documents.get(name) for name in names)
                    assert (one is None) == (two is None)
                    if one is not None and two is not None:
                        assert one.version == two.version
                        assert one.metadata["seed"] + 1 == two.metadata["seed"]
                n = documents["shared"].metadata["n"]
                assert n >= counted
                assert n + 1 == documents["shared"].version
                counted = n

                query = vector(chance.randrange(10**9))
                hits = snapshot.retrieve(query, len(documents) + 10).hits
                assert sorted(hit.reference.document_id for hit in hits) == sorted(documents)
                for hit in hits:
                    seed = hit.metadata["seed"]
                    assert hit.metadata == documents[hit.reference.document_id].metadata
                    assert hit.reference.text == f"{seed}"
                    assert abs(hit.score - float(query @ vector(seed))) < 2e-3
                    assert hit.memory is not None
                    assert same_memory(hit.memory, memory(seed))
                number = chance.randrange(8)
                found = snapshot.retrieve(query, 100, where={"pair": number}).hits
                assert sorted(hit.reference.document_id for hit in found) == sorted(
                    name for name, d in documents.items() if d.metadata.get("pair") == number
                )
                assert {document.id: document for document in snapshot.documents()} == documents
            looked += 1
    return looked


def run_writers_and_readers(path: Path, seconds: float) -> None:
    with time_limit(int(seconds) + 100), ProcessPoolExecutor(6, mp_context=SPAWN) as pool:
        writers = [pool.submit(write, path, name, seconds) for name in range(2)]
        readers = [pool.submit(read, path, name, seconds) for name in range(4)]
        looked = [future.result() for future in readers]
        written = [future.result() for future in writers]
    assert min(looked) > 2
    assert memdb.verify(path) == []
    with MemDB.open(path) as database:
        for name, done in enumerate(written):
            assert database.get(f"own-{name}").metadata["n"] == done.own
            assert done.own > 2
        assert database.get("shared").metadata["n"] == sum(done.shared for done in written)
        documents = {
            document.id: document.metadata["seed"]
            for document in database.documents()
            if document.id.startswith("pair-")
        }
        assert documents == {
            pair(writer, number)[which]: seed + which
            for writer, done in enumerate(written)
            for number, seed in done.pairs.items()
            for which in range(2)
        }
    assert read(path, 0, 0.01) == 1


def test_two_writers_and_four_readers_see_no_error_and_lose_no_update(path: Path) -> None:
    run_writers_and_readers(path, 6)


@pytest.mark.slow
def test_two_writers_and_four_readers_for_a_minute(path: Path) -> None:
    run_writers_and_readers(path, 60)


# --- compaction beside others ---------------------------------------------------------------------


def inserted(path: Path, name: str, seed: int) -> None:
    with MemDB.open(path) as database:
        database.insert(id=name, **content(seed))


def deleted(path: Path, name: str) -> None:
    with MemDB.open(path) as database:
        database.delete(name)


def found(source: Any) -> list[str]:
    """Ids of all documents, by the index."""
    return sorted(hit.reference.document_id for hit in source.retrieve(vector(0), 500).hits)


def listed(source: Any) -> list[str]:
    return [document.id for document in source.documents()]


def test_a_snapshot_outlives_a_compaction_and_what_others_write_after_it(
    path: Path, other: ProcessPoolExecutor
) -> None:
    with MemDB.open(path) as database, MemDB.open(path) as idle:
        before = listed(database)
        with database.snapshot() as old:
            for turn in range(2):
                other.submit(inserted, path, f"new-{turn}", 200 + turn).result()
                other.submit(memdb.compact, path).result()
                other.submit(deleted, path, f"base-0{turn}").result()
                with database.snapshot() as new:
                    changed = sorted({*listed(new), "base-00", "base-01"} - {"new-0", "new-1"})
                    assert changed == before
                    assert found(new) == listed(new)
                    assert f"new-{turn}" in listed(new)
                    assert f"base-0{turn}" not in listed(new)
                assert listed(old) == found(old) == before
                assert old.get("base-00").text == "0"
                (hit,) = old.retrieve(vector(0), 1).hits
                assert hit.memory is not None
                assert same_memory(hit.memory, memory(0))
        database.update("new-0", metadata={"seed": 200, "late": True})
        # Opened before both compactions, and not used till now:
        assert idle.get("new-0").metadata["late"]
        assert found(idle) == listed(idle) == found(database)
    assert memdb.verify(path) == []
    assert [entry.name for entry in path.iterdir() if entry.name.startswith("gen-")] == [
        "gen-000003"
    ]


def test_an_index_is_built_in_the_new_generation_by_who_opened_the_old_one(
    path: Path, other: ProcessPoolExecutor
) -> None:
    with MemDB.open(path) as database:
        other.submit(memdb.compact, path).result()
        info = database.build_index()
        assert info is not None
        assert info.references == 83
        assert found(database) == listed(database)


def test_a_compaction_that_waited_for_another_one_follows_it(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one is done after this one opened the database, and before it keeps writers out."""
    waited = generations.sole_writer

    @contextmanager
    def late(folder: Path, *timeout: float) -> Iterator[Path]:
        monkeypatch.setattr(generations, "sole_writer", waited)
        memdb.compact(path)
        with waited(folder, *timeout) as generation:
            yield generation

    with MemDB.open(path) as database:
        names = listed(database)
    monkeypatch.setattr(generations, "sole_writer", late)
    memdb.compact(path)
    assert current_generation(path).name == "gen-000003"
    with MemDB.open(path) as database:
        assert listed(database) == found(database) == names
    assert memdb.verify(path) == []


CALLS: dict[str, Callable[[Path, Path], object]] = {
    "open": lambda path, _: MemDB.open(path).close(),
    "read-only": lambda path, _: MemDB.open(path, read_only=True).close(),
    "create": lambda path, _: MemDB.create(path, shape=SHAPE, dimension=DIMENSION),
    "verify": lambda path, _: memdb.verify(path),
    "repair": lambda path, _: memdb.repair(path),
    "compact": lambda path, _: memdb.compact(path),
    "migrate": lambda path, _: memdb.migrate(path),
    "backup": lambda path, to: memdb.backup(path, to / "copy"),
    "restore": lambda path, to: memdb.restore(to / "whole", path),
    "import": lambda path, to: memdb.import_database(to / "out", path),
    "namespace": lambda path, _: memdb.create_namespace(path, "new"),
    "namespaces": lambda path, _: memdb.list_namespaces(path),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_compaction_between_reading_the_name_and_looking_for_the_folder_is_no_error(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    memdb.backup(path, tmp_path / "whole")
    with MemDB.open(path) as database:
        database.export(tmp_path / "out")
        names = listed(database)
    read = Path.read_text
    turns = iter(range(1, 4))

    def late(file: Path, *more: Any, **other: Any) -> str:
        text = read(file, *more, **other)
        if file == path / "CURRENT" and next(turns, None):
            with monkeypatch.context() as patch:
                patch.setattr(Path, "read_text", read)
                memdb.compact(path)
        return text

    monkeypatch.setattr(Path, "read_text", late)
    with nullcontext() if name != "create" else pytest.raises(memdb.DatabaseExistsError):
        CALLS[name](path, tmp_path)
    monkeypatch.undo()
    with MemDB.open(path) as database:
        assert listed(database) == names
    assert memdb.verify(path) == []


def test_an_index_that_goes_with_its_generation_is_built_in_the_next(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = searcher.write_index

    def late(*arguments: Any) -> None:
        monkeypatch.undo()
        write(*arguments)
        memdb.compact(path)

    with MemDB.open(path) as database:
        monkeypatch.setattr(searcher, "write_index", late)
        assert database.build_index(kind="ivf") is not None
        assert database.stats()["index"]["kind"] == "ivf"
        assert found(database) == listed(database)


def test_a_write_follows_a_compaction_that_another_thread_followed_first(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = store_module.only_writer

    def late(generation: Path, *more: Any, **other: Any) -> Any:
        monkeypatch.undo()
        memdb.compact(path)
        assert database.count() == 83
        return lock(generation, *more, **other)

    with MemDB.open(path) as database:
        monkeypatch.setattr(store_module, "only_writer", late)
        database.delete("base-00")
        assert database.count() == 82
    assert memdb.verify(path) == []


def test_a_generation_that_goes_while_it_is_opened_is_an_error_of_memdb(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a namespace is dropped just then."""
    size = environment.map_size

    def late(*arguments: Any) -> int:
        raise FileNotFoundError(2, "No such file or directory", "data.mdb")

    monkeypatch.setattr(environment, "map_size", late)
    with pytest.raises(StorageError, match=r"cannot open.*No such file"):
        MemDB.open(path)
    monkeypatch.setattr(environment, "map_size", size)
    MemDB.open(path).close()


def test_a_folder_whose_generation_is_gone_is_told_so(path: Path) -> None:
    (path / "CURRENT").write_text("gen-000009\n")
    for call in (MemDB.open, memdb.verify, memdb.compact, memdb.migrate):
        with time_limit(5), pytest.raises(memdb.NotADatabaseError, match="names 'gen-000009'"):
            call(path)


def test_a_compaction_waits_for_a_writer(path: Path, other: ProcessPoolExecutor) -> None:
    store = Store(path)
    try:
        old = current_generation(path)
        with store.write() as transaction:
            compaction = other.submit(memdb.compact, path)
            assert wait([compaction], timeout=1).not_done
            entry = transaction.document("base-07")
            assert entry is not None
            delete(transaction, "base-07", entry)
        with time_limit():
            compaction.result()
    finally:
        store.close()
    assert current_generation(path) != old
    with MemDB.open(path) as database:
        assert "base-07" not in listed(database)
        assert found(database) == listed(database)
    assert memdb.verify(path) == []


def compact_slowly(path: Path, parent: Connection) -> None:
    """A process that compacts, and waits for its parent in the midst of it."""
    asked = False

    def progress(what: str, done: int, total: int) -> None:
        nonlocal asked
        if what == "copying memories" and not asked:
            asked = True
            parent.send(what)
            parent.recv()

    memdb.compact(path, progress=progress)


def test_a_writer_waits_for_a_compaction_and_a_reader_does_not(path: Path) -> None:
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=compact_slowly, args=(path, theirs))
    with MemDB.open(path) as database, time_limit(60):
        old = current_generation(path)
        process.start()
        assert ours.recv() == "copying memories"
        writer = threading.Thread(
            target=lambda: database.insert(id="late", **content(300)), daemon=True
        )
        writer.start()
        assert found(database) == listed(database)
        with MemDB.open(path) as late:
            assert found(late) == listed(database)
        writer.join(timeout=0.5)
        assert writer.is_alive()
        ours.send("go on")
        writer.join()
        process.join()
        assert process.exitcode == 0
        assert current_generation(path) != old
        assert "late" in listed(database)
        assert found(database) == listed(database)
    assert memdb.verify(path) == []


def compact_often(path: Path, times: int) -> None:
    for _ in range(times):
        memdb.compact(path)


def test_what_looks_at_the_whole_database_goes_on_beside_compactions(
    path: Path, tmp_path: Path, other: ProcessPoolExecutor
) -> None:
    turn = 0
    with MemDB.open(path) as database, time_limit(120):
        due = listed(database)
        compactions = other.submit(compact_often, path, 12)
        while not compactions.done():
            turn += 1
            assert memdb.verify(path) == []
            memdb.backup(path, tmp_path / f"copy-{turn}")
            for _ in range(50):
                assert database.stats()["documents"] == len(due)
                assert found(database) == due
        compactions.result()
        assert listed(database) == due
    assert memdb.verify(tmp_path / f"copy-{turn}") == []


# --- readers --------------------------------------------------------------------------------------


def hold_a_snapshot(path: Path, parent: Connection) -> None:
    with MemDB.open(path) as database, database.snapshot() as snapshot:
        parent.send(snapshot.change)
        signal.pause()


def test_a_killed_reader_does_not_keep_space_from_being_used_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one that lives does: else this would prove nothing."""
    file = current_generation(path) / "data.mdb"
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=hold_a_snapshot, args=(path, theirs))
    monkeypatch.setattr(environment, "_CLEAR_EVERY", 0.0)
    with MemDB.open(path, durability="off") as database:

        def rewrite() -> int:
            """How much the file grows by 200 times 20 kB that take each other's place."""
            before = file.stat().st_size
            for n in range(200):
                database.update("shared", text=f"{n} " * 5000, embeddings=vector(1)[None])
            return file.stat().st_size - before

        rewrite()
        assert rewrite() < 500_000
        process.start()
        ours.recv()
        assert rewrite() > 3_000_000
        process.kill()
        process.join()
        assert rewrite() < 500_000


def test_more_readers_than_lmdb_has_room_for_by_default(path: Path) -> None:
    count = 150
    together = threading.Barrier(count)
    results: list[list[str]] = []
    with MemDB.open(path) as database:
        due = listed(database)

        def look() -> None:
            with database.snapshot() as snapshot:
                together.wait(60)  # all hold one now
                results.append(found(snapshot))

        threads = [threading.Thread(target=look, daemon=True) for _ in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == [due] * count

        with ExitStack() as stack:

            def take_all() -> None:
                for _ in range(2000):
                    stack.enter_context(database.snapshot())

            with pytest.raises(StorageError, match=r"(?i)reader"):
                take_all()
            database.delete("base-00")  # a writer needs no place
        assert found(database) == [name for name in due if name != "base-00"]


# --- forks ----------------------------------------------------------------------------------------

FORKED = """
import os, sys
from pathlib import Path
from memdb import ForkedProcessError, MemDB
from tests.engine.test_many_processes import SPAWN, batch, content, deleted, found, vector

if __name__ == "__main__":
    path = Path(sys.argv[1])
    database = MemDB.open(path)
    held = database.snapshot()
    snapshot = held.__enter__()

    def use_snapshot():
        with database.snapshot() as new:
            new.get("shared")

    uses = {
        "get": lambda: database.get("shared"),
        "retrieve": lambda: database.retrieve(vector(0)),
        "documents": lambda: list(database.documents()),
        "insert": lambda: database.insert(id="a", **content(500)),
        "update": lambda: database.update("shared", metadata={}),
        "delete": lambda: database.delete("shared"),
        "load": lambda: database.load([batch({"a": 500})]),
        "build_index": lambda: database.build_index(),
        "declare_keys": lambda: database.declare_keys("x"),
        "snapshot": use_snapshot,
        "snapshot from before": lambda: snapshot.get("shared"),
        "search in a snapshot from before": lambda: snapshot.retrieve(vector(0)),
    }
    pid = os.fork()
    if pid == 0:
        failed = 0
        for name, use in uses.items():
            try:
                use()
                print(name, "was not refused", file=sys.stderr, flush=True)
                failed = 1
            except ForkedProcessError as error:
                assert "spawn" in str(error)
            except BaseException as error:
                print(name, repr(error), file=sys.stderr, flush=True)
                failed = 1
        os._exit(failed)
    status = os.waitpid(pid, 0)[1]
    spawned = SPAWN.Process(target=deleted, args=(path, "base-00"))
    spawned.start()
    spawned.join()
    assert spawned.exitcode == 0
    assert "base-00" in found(snapshot) and "base-00" not in found(database)
    held.__exit__(None, None, None)
    database.close()
    sys.exit(os.waitstatus_to_exitcode(status))
"""


def test_a_forked_process_is_refused_reads_writes_and_snapshots_and_a_spawned_one_is_not(
    path: Path,
) -> None:
    result = child(FORKED, path)
    assert result.returncode == 0, result.stderr
