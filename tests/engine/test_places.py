"""Where it runs: read-only media, forked children, many databases, systems that lack a call."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import memdb
from memdb import (
    BusyError,
    Document,
    DocumentBatch,
    InvalidInputError,
    MemDB,
    StorageError,
)
from memdb.storage import lmdb_file
from memdb.storage.pages import damaged_pages
from tests.engine.helpers import (
    ROOT,
    TokenWriter,
    WordEmbedder,
    child,
    command,
    make_shape,
    time_limit,
    unit,
    write_corpus,
)


def opened(path: Path, **options: Any) -> MemDB:
    return MemDB.open(path, embedder=WordEmbedder(), writer=TokenWriter(), **options)


def ids(database: Any) -> list[str]:
    return [document.id for document in database.documents()]


def state(path: Path) -> dict[str, tuple[int, bytes]]:
    """All that is in a folder."""
    return {
        str(file.relative_to(path)): (file.stat().st_mtime_ns, file.read_bytes())
        for file in path.rglob("*")
        if file.is_file()
    }


# --- read-only ------------------------------------------------------------------------------------


@pytest.fixture
def full(full_template: Path, tmp_path: Path) -> Path:
    """A database with a writer: one warm reference and one cold."""
    path = tmp_path / "medium" / "full"
    shutil.copytree(full_template, path)
    with opened(path) as database:
        database.insert("The harbour of Veldmoor is old.", id="warm")
        database.insert("Ships from many countries come.", id="cold", cold=True)
        with database.namespace("other") as other:
            other.insert("A lighthouse.", id="light")
    return path


@pytest.fixture
def read_only(full: Path) -> Iterator[Path]:
    """The same on a medium that cannot be written."""
    medium = full.parent
    for options in (["--bind", str(medium)], ["-o", "remount,ro,bind"]):
        mounted = subprocess.run(
            ["mount", *options, str(medium)], capture_output=True, text=True, check=False
        )
        if mounted.returncode:
            pytest.skip(f"nothing can be mounted here: {mounted.stderr.strip()}")
    yield full
    subprocess.run(["umount", "--lazy", str(medium)], check=True)


WRITES: dict[str, Callable[[MemDB, Path], object]] = {
    "insert": lambda database, _: database.insert("x"),
    "update": lambda database, _: database.update("warm", metadata={"x": 1}),
    "update nothing": lambda database, _: database.update("warm"),
    "delete": lambda database, _: database.delete("warm"),
    "ingest": lambda database, here: database.ingest(
        write_corpus(here / "corpus.jsonl", [{"text": "x"}])
    ),
    "load": lambda database, _: database.load([]),
    "warm": lambda database, _: database.warm(),
    "warm_batches": lambda database, _: database.warm_batches([]),
    "recode": lambda database, _: database.recode("int8"),
    "declare_keys": lambda database, _: database.declare_keys("x"),
    "record_calibration": lambda database, _: database.record_calibration(None),
    "build_index": lambda database, _: database.build_index(),
    "index_if_due": lambda database, _: database.index_if_due(),
    "drop_namespace": lambda database, _: database.drop_namespace("other"),
    "insert into a namespace": lambda database, _: database.namespace("other").insert("x"),
}


def require_only_reading(database: MemDB, here: Path) -> None:
    """All that reads works, and what writes is refused."""
    for call in WRITES.values():
        with pytest.raises(StorageError, match="opened with read_only=True"):
            call(database, here)
    assert ids(database) == ["cold", "warm"]
    assert database.get("warm").warm == 1
    found = database.retrieve("ships countries", 2)
    assert [hit.reference.document_id for hit in found.hits] == ["cold", "warm"]
    assert [hit.memory is None for hit in found.hits] == [True, False]
    assert found.written == 0
    assert database.query("harbour").hits[0].metadata == {}
    with database.snapshot() as snapshot:
        assert ids(snapshot) == ["cold", "warm"]
        assert snapshot.retrieve("ships countries", 1).hits[0].memory is None
    assert database.stats()["cold"] == 1
    with database.namespace("other") as other:
        assert ids(other) == ["light"]
    with pytest.raises(memdb.UnknownNamespaceError):
        database.namespace("new")
    assert database.usage() == {}
    assert database.export(here / "export") == 2


def test_a_medium_that_cannot_be_written_is_read(read_only: Path, tmp_path: Path) -> None:
    before = state(read_only)
    with opened(read_only, read_only=True) as database:
        require_only_reading(database, tmp_path)
    assert memdb.verify(read_only) == []
    assert memdb.backup(read_only, tmp_path / "copy") > 0
    memdb.restore(read_only, tmp_path / "restored")
    for copy in (tmp_path / "copy", tmp_path / "restored"):
        with MemDB.open(copy) as database:
            assert ids(database) == ["cold", "warm"]
    assert state(read_only) == before


def test_writing_to_a_medium_that_cannot_be_written_is_an_error_with_the_way_out(
    read_only: Path,
) -> None:
    with pytest.raises(StorageError, match="read_only=True"):
        MemDB.open(read_only)
    for call in (memdb.compact, memdb.repair, memdb.migrate):
        with pytest.raises(StorageError, match=re.escape(str(read_only))):
            call(read_only)
    with MemDB.open(read_only, read_only=True) as database:
        with pytest.raises(InvalidInputError, match="only to be read"):
            MemDB.open(read_only)
        assert ids(database) == ["cold", "warm"]


@pytest.mark.parametrize("gone", ["LOCK", "gen-000001/lock.mdb", "gen-000001/write.lock", "all"])
def test_files_of_locks_may_be_missing_on_a_medium_that_cannot_be_written(
    full: Path, tmp_path: Path, gone: str
) -> None:
    every = ["LOCK", "gen-000001/lock.mdb", "gen-000001/write.lock"]
    for name in every if gone == "all" else [gone]:
        (full / name).unlink()
    medium = str(full.parent)
    for options in (["--bind", medium], ["-o", "remount,ro,bind"]):
        if subprocess.run(["mount", *options, medium], capture_output=True, check=False).returncode:
            pytest.skip("nothing can be mounted here")
    try:
        with opened(full, read_only=True) as database:
            require_only_reading(database, tmp_path)
        assert memdb.verify(full) == []
    finally:
        subprocess.run(["umount", "--lazy", medium], check=True)


HOLDS_A_SNAPSHOT = """
import sys
import memdb
with memdb.MemDB.open(sys.argv[1], read_only=True) as database, database.snapshot() as snapshot:
    print("reads", flush=True)
    sys.stdin.readline()
    print(*(document.id for document in snapshot.documents()), flush=True)
"""


def test_who_reads_a_medium_that_others_write_keeps_them_out_while_it_reads(
    full: Path, tmp_path: Path
) -> None:
    """A volume that one container may write and another may not, say."""
    place = tmp_path / "seen from elsewhere"
    place.mkdir()
    for options in (["--bind", str(full)], ["-o", "remount,ro,bind"]):
        asked = ["mount", *options, str(place)]
        if subprocess.run(asked, capture_output=True, check=False).returncode:
            pytest.skip("nothing can be mounted here")
    try:
        reader = subprocess.Popen(
            command(HOLDS_A_SNAPSHOT, place),
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert reader.stdout
        assert reader.stdout.readline() == "reads\n"
        with opened(full, busy_timeout=0.05) as database:
            with pytest.raises(BusyError, match="cannot write"):
                database.insert("x", id="x")
            assert reader.communicate("\n")[0] == "cold warm\n"
            database.insert("x", id="x")
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_read_only_writes_nothing_where_it_could(full: Path, tmp_path: Path) -> None:
    before = state(full)
    with opened(full, read_only=True) as database:
        require_only_reading(database, tmp_path)
    after = state(full)
    for name in ("gen-000001/data.mdb", "CURRENT", "gen-000001/write.lock"):
        assert after[name] == before[name]
    assert after.keys() == before.keys()


def test_read_only_builds_no_index_and_searches_the_one_that_there_is(tmp_path: Path) -> None:
    path = tmp_path / "db"
    vectors = np.random.default_rng(0).standard_normal((3000, 8)).astype(np.float32)
    documents = [Document(f"{n}", f"{n}") for n in range(len(vectors))]
    with MemDB.create(path, shape=make_shape(), dimension=8, index="ivf") as database:
        database.load([DocumentBatch(documents, vectors)])
    with MemDB.open(path, read_only=True) as database:
        first = [hit.id for hit in database.retrieve(vectors[7], 5).hits]
        assert not database._searcher.state()["building"]
    assert not (path / "gen-000001" / "index.faiss").exists()
    with MemDB.open(path) as database:
        assert database.build_index() is not None
    with MemDB.open(path, read_only=True) as database:
        assert [hit.id for hit in database.retrieve(vectors[7], 5).hits] == first
        assert database.stats()["index"]["kind"] == "ivf"


def test_read_only_follows_what_others_write(full: Path) -> None:
    with MemDB.open(full, read_only=True) as reader:
        with opened(full) as writer:  # in the same process, too
            writer.insert("x", id="x")
            assert "x" in ids(reader)
        memdb.compact(full)
        deletes = "import sys, memdb; memdb.MemDB.open(sys.argv[1]).delete('x')"
        assert child(deletes, full).returncode == 0
        assert ids(reader) == ["cold", "warm"]


def test_a_user_who_may_only_read_reads(full: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can become another user")
    script = """
    import os, sys
    import memdb
    with memdb.MemDB.open(sys.argv[1]) as database:  # the other may not read Python's own files
        database.get("warm")
    assert memdb.verify(sys.argv[1]) == []
    os.setgid(65534)
    os.setuid(65534)
    with memdb.MemDB.open(sys.argv[1], read_only=True) as database:
        assert database.get("warm").warm == 1
    assert memdb.verify(sys.argv[1]) == []
    try:
        memdb.MemDB.open(sys.argv[1])
    except memdb.StorageError as error:
        assert "read_only=True" in str(error)
    else:
        raise AssertionError("was not refused")
    """
    for folder in (full, *full.parents[:5]):
        folder.chmod(folder.stat().st_mode | 0o055)
    result = child(script, full)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("wrong", [1, None, "yes"])
def test_read_only_is_true_or_false(full: Path, wrong: Any) -> None:
    with pytest.raises(InvalidInputError, match="read_only"):
        MemDB.open(full, read_only=wrong)


def test_a_file_that_is_cut_short_is_not_mended_by_who_only_reads(read_only: Path) -> None:
    medium = str(read_only.parent)
    subprocess.run(["mount", "-o", "remount,rw,bind", medium], check=True)
    file = read_only / "gen-000001" / "data.mdb"
    os.truncate(file, file.stat().st_size - 4096)
    subprocess.run(["mount", "-o", "remount,ro,bind", medium], check=True)
    with pytest.raises(StorageError, match="cut short"):
        MemDB.open(read_only, read_only=True)


# --- forks ----------------------------------------------------------------------------------------

FORKED = """
import os, sys, threading
import numpy as np
import memdb
from memdb import Document, DocumentBatch, ForkedProcessError, MemDB
from tests.engine.helpers import unit
path = sys.argv[1]
def in_child(job):
    pid = os.fork()
    if pid == 0:
        try:
            job()
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
def ids(database):
    return [document.id for document in database.documents()]
database = MemDB.open(path)
"""


def forked(script: str, path: Path) -> None:
    with time_limit(60):
        result = child(FORKED + script, path)
    assert result.returncode == 0, result.stderr


@pytest.fixture
def path(bare_template: Path, tmp_path: Path) -> Path:
    path = tmp_path / "db"
    shutil.copytree(bare_template, path)
    with MemDB.open(path, durability="off") as database:
        for n in range(20):
            database.insert(f"{n} " * 1000, id=f"d{n:02}", embeddings=unit(1, 0))
    return path


def test_a_forked_child_opens_for_itself_and_the_parents_snapshot_stays(path: Path) -> None:
    forked(
        """
def uses():
    for _ in range(2):
        with MemDB.open(path) as mine:
            mine.delete("d00")
            for n in range(1, 20):
                mine.update(f"d{n:02}", text=os.urandom(2000).hex(), embeddings=unit(1, 0))
            with mine.snapshot() as snapshot:
                assert len(ids(snapshot)) == 19
            assert mine.retrieve(np.float32([1, 0]), 3).hits
            mine.insert("again", id="d00", embeddings=unit(1, 0))
    in_child(lambda: MemDB.open(path).get("d01"))  # and so does its child
    memdb.compact(path)
    assert memdb.verify(path) == []
with database.snapshot() as snapshot:
    before = {document.id: document.text for document in snapshot.documents()}
    in_child(uses)
    assert {document.id: document.text for document in snapshot.documents()} == before
assert database.get("d00").text == "again"
database.insert("x", id="x", embeddings=unit(1, 0))
database.close()
""",
        path,
    )


def test_a_child_that_leaves_a_snapshot_of_its_parent_leaves_it_to_the_parent(path: Path) -> None:
    forked(
        """
snapshot = database.snapshot()
held = snapshot.__enter__()
before = {document.id: document.text for document in held.documents()}
def leaves():
    snapshot.__exit__(None, None, None)
    database.close()
    with MemDB.open(path) as mine:
        for _ in range(3):
            for n in range(20):
                mine.update(f"d{n:02}", text=os.urandom(2000).hex(), embeddings=unit(1, 0))
in_child(leaves)
pid = os.fork()
if pid == 0:
    sys.exit()  # all objects go
os.waitpid(pid, 0)
in_child(leaves)
assert {document.id: document.text for document in held.documents()} == before
snapshot.__exit__(None, None, None)
""",
        path,
    )


def test_a_child_that_leaves_a_write_of_its_parent_ends_nothing(path: Path) -> None:
    forked(
        """
for fails in (False, True):
    write = database._store.write()
    transaction = write.__enter__()
    transaction.put_setting(f"outer {fails}", 1)
    def leaves():
        try:
            if fails:
                write.__exit__(ValueError, ValueError(), None)
            else:
                write.__exit__(None, None, None)
        except ForkedProcessError:
            return
        raise AssertionError("was not refused")
    in_child(leaves)
    write.__exit__(None, None, None)
    with database._store.read() as reading:
        assert reading.setting(f"outer {fails}") == 1
""",
        path,
    )


def test_a_child_is_refused_at_once_also_where_a_thread_of_its_parent_was_busy(
    path: Path,
) -> None:
    forked(
        """
def refused():
    for use in (lambda: database.get("d00"), lambda: database.retrieve(np.float32([1, 0])),
                lambda: database.insert("x", embeddings=unit(1, 0)), lambda: database.stats()):
        try:
            use()
        except ForkedProcessError as error:
            assert "Open it anew" in str(error)
        else:
            raise AssertionError("was not refused")
    database.close()
    assert len(ids(MemDB.open(path))) == 20
from memdb.storage.environment import Environment
with database._store._guard, database._searcher._guard, Environment._guard:
    in_child(refused)
assert len(ids(database)) == 20
""",
        path,
    )


def test_a_child_searches_an_index_and_builds_one(tmp_path: Path) -> None:
    """FAISS's threads are not there after a fork."""
    path = tmp_path / "db"
    vectors = np.random.default_rng(0).standard_normal((3000, 8)).astype(np.float32)
    documents = [Document(f"{n}", f"{n}") for n in range(len(vectors))]
    with MemDB.create(path, shape=make_shape(), dimension=8, index="ivf") as database:
        database.load([DocumentBatch(documents, vectors)])
    forked(
        """
import faiss
faiss.omp_set_num_threads(2)
assert database.build_index() is not None
queries = np.random.default_rng(1).standard_normal((200, 8)).astype(np.float32)
def found(database):
    return [[hit.id for hit in one.hits] for one in database.retrieve_batch(list(queries))]
due = found(database)
def searches():
    with MemDB.open(path) as mine:
        assert found(mine) == due
        assert mine.build_index() is not None
in_child(searches)
""",
        path,
    )


# --- many databases, and maps that grow -----------------------------------------------------------


def test_hundreds_of_databases_are_open_in_one_process(bare_template: Path, tmp_path: Path) -> None:
    """Address space for 1 TiB each would be there for 127; the rest would get next to none."""
    script = """
    import resource, shutil, sys
    from pathlib import Path
    from memdb import MemDB
    from tests.engine.helpers import unit
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    here, template = Path(sys.argv[1]), sys.argv[2]
    count = min(300, (hard - 100) // 6)
    opened = []
    for n in range(count):
        shutil.copytree(template, here / str(n))
        opened.append(MemDB.open(here / str(n), durability="off"))
    for database in opened[-1], opened[0]:
        database.insert("x", id="x", embeddings=unit(1, 0))
        assert database.get("x").text == "x"
    sizes = [database._store._environment._file.sizes()[1] for database in opened]
    assert min(sizes) >= 1 << 35, min(sizes)
    """
    result = child(script, tmp_path, bare_template)
    assert result.returncode == 0, result.stderr


@pytest.fixture
def small_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lmdb_file, "_LARGE_MAP", 1 << 20)


def fill(database: MemDB, first: int, count: int, size: int = 40_000) -> None:
    for n in range(first, first + count):
        text = np.random.default_rng(n).bytes(size // 2).hex()
        database.insert(text, id=f"{n:04}", embeddings=unit(1, 0))


def map_size(database: MemDB) -> int:
    return database._store._environment._file.sizes()[1]


@pytest.fixture
def bare(bare_template: Path, tmp_path: Path) -> Path:
    path = tmp_path / "bare"
    shutil.copytree(bare_template, path)
    return path


@pytest.mark.usefixtures("small_maps")
def test_a_map_grows_with_what_is_written(bare: Path) -> None:
    with MemDB.open(bare, durability="off") as database:
        before = map_size(database)
        fill(database, 0, 150)
        assert map_size(database) > before
        assert ids(database) == [f"{n:04}" for n in range(150)]
    assert memdb.verify(bare) == []
    memdb.compact(bare)
    assert memdb.verify(bare) == []


@pytest.mark.usefixtures("small_maps")
def test_a_write_that_is_larger_than_the_map_says_to_run_it_again_and_then_succeeds(
    bare: Path,
) -> None:
    with MemDB.open(bare, durability="off") as database:
        fill(database, 0, 1)

        def write() -> None:
            fill_at_once = np.random.default_rng(0).bytes(4 << 20).hex()
            database.update("0000", text=fill_at_once, embeddings=unit(1, 0))

        with pytest.raises(StorageError, match="Run it again"):
            write()
        assert database.get("0000").version == 1
        for _ in range(3):
            try:
                write()
                break
            except StorageError:
                continue
        assert database.get("0000").version == 2
    assert memdb.verify(bare) == []


@pytest.mark.usefixtures("small_maps")
def test_a_map_does_not_grow_under_a_snapshot_which_is_named_and_stays(bare: Path) -> None:
    with MemDB.open(bare, durability="off", busy_timeout=0.05) as database:
        fill(database, 0, 5, 4000)
        with database.snapshot() as snapshot:
            before = {document.id: document.text for document in snapshot.documents()}
            with pytest.raises(BusyError, match="end your snapshots"):
                fill(database, 5, 100)
            there = ids(database)
            assert {d.id: d.text for d in snapshot.documents()} == before
            assert snapshot.retrieve(np.float32([1, 0]), 3).hits
        assert len(there) > 5
        fill(database, len(there), 100)
        assert len(ids(database)) == len(there) + 100
    assert memdb.verify(bare) == []


@pytest.mark.usefixtures("small_maps")
def test_a_write_waits_for_snapshots_of_other_threads_to_end(bare: Path) -> None:
    with MemDB.open(bare, durability="off") as database:
        done = threading.Event()
        begun = threading.Event()

        def read() -> None:
            with database.snapshot() as snapshot:
                begun.set()
                while not database._store._environment._growing and not done.wait(0.01):
                    assert ids(snapshot) == []
                assert ids(snapshot) == []

        thread = threading.Thread(target=read)
        thread.start()
        begun.wait(20)
        fill(database, 0, 100)
        done.set()
        thread.join(20)
        assert len(ids(database)) == 100


@pytest.mark.usefixtures("small_maps")
def test_a_map_grows_while_others_read_all_the_time(bare: Path) -> None:
    with MemDB.open(bare, durability="off") as database:
        stop = threading.Event()
        errors: list[BaseException] = []

        def read() -> None:
            try:
                while not stop.is_set():
                    found = ids(database)
                    assert found == [f"{n:04}" for n in range(len(found))]
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=read) for _ in range(3)]
        for thread in threads:
            thread.start()
        try:
            fill(database, 0, 120)
        finally:
            stop.set()
            for thread in threads:
                thread.join(20)
        assert errors == []
        assert map_size(database) > 1 << 22


FILLS = """
import sys
from pathlib import Path
from memdb import MemDB
from tests.engine.test_places import fill
with MemDB.open(sys.argv[1], durability="off") as database:
    fill(database, *map(int, sys.argv[2:]))
"""


@pytest.mark.usefixtures("small_maps")
def test_what_another_process_wrote_beyond_the_map_is_read_and_written_on(bare: Path) -> None:
    with MemDB.open(bare, durability="off", busy_timeout=0.05) as database:
        assert ids(database) == []
        assert child(FILLS, bare, 0, 10, 400_000).returncode == 0
        assert len(ids(database)) == 10  # a reader follows
        assert child(FILLS, bare, 10, 20, 400_000).returncode == 0
        database.delete("0000")  # and a writer
        with database.snapshot() as snapshot:
            before = ids(snapshot)
            assert child(FILLS, bare, 30, 120, 1_200_000).returncode == 0
            with pytest.raises(BusyError, match="end your snapshots"):
                ids(database)
            assert ids(snapshot) == before
        assert len(ids(database)) == 149
    with MemDB.open(bare, read_only=True) as database:
        assert len(ids(database)) == 149


# --- systems that lack a call ---------------------------------------------------------------------


def test_a_system_without_posix_fallocate_and_locks_of_open_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As macOS."""
    monkeypatch.delattr(os, "posix_fallocate")
    monkeypatch.delattr(fcntl, "F_OFD_SETLK", raising=False)
    path = tmp_path / "db"
    with MemDB.create(path, shape=make_shape(), dimension=2, codec="exact") as database:
        database.insert("one", id="a", embeddings=unit(1, 0))
        lock = path / "gen-000001" / "lock.mdb"
        assert lock.stat().st_size >= 64 * 1024
        assert lock.stat().st_blocks * 512 >= lock.stat().st_size  # no holes
        with database.snapshot() as snapshot:
            script = (
                "import sys, memdb; memdb.MemDB.open(sys.argv[1]).update('a', metadata={'x':1})"
            )
            assert child(script, path).returncode == 0
            assert snapshot.get("a").text == "one"
    memdb.compact(path)
    memdb.backup(path, tmp_path / "copy")
    assert memdb.verify(path) == memdb.verify(tmp_path / "copy") == []
    file = path / "gen-000002" / "data.mdb"
    size = file.stat().st_size
    os.truncate(file, size - 4096)
    with suppress(memdb.MemDBError), MemDB.open(path) as database:  # it may hold nothing, too
        list(database.documents())
    assert file.stat().st_size == size


def test_the_disk_is_waited_for_by_the_call_that_the_system_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from memdb.storage.durable import write_file

    waited: list[int] = []
    monkeypatch.setattr(os, "fsync", waited.append)
    write_file(tmp_path / "a", b"x")
    assert len(waited) == 1
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", fcntl.F_GETFL, raising=False)
    write_file(tmp_path / "a", b"x")
    assert len(waited) == 1
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 9999, raising=False)  # a disk that does not know it
    write_file(tmp_path / "a", b"x")
    assert len(waited) == 2


# --- a stranger's file ----------------------------------------------------------------------------


def test_a_walk_over_pages_takes_no_more_memory_than_a_sound_file_needs(bare: Path) -> None:
    """A file with holes costs nothing, and may be as long as it likes."""
    file = bare / "gen-000001" / "data.mdb"
    pages = 1 << 29
    with file.open("r+b") as data:
        for meta in (0, 4096):
            data.seek(meta + 16 + 24 + 2 * 48)
            data.write(struct.pack("<Q", pages - 1))
        data.truncate(pages * 4096)
    with time_limit(30):
        assert any("memory" in problem for problem in damaged_pages(file.parent))
        assert any("memory" in str(problem) for problem in memdb.verify(bare))


def test_lists_of_free_pages_that_are_listed_again_and_again_are_not_believed(bare: Path) -> None:
    """Each may be large, and many may name the same pages."""
    with MemDB.open(bare, durability="off") as database:
        fill(database, 0, 40, 100_000)
        database.delete(*ids(database))
        fill(database, 0, 1)
    from memdb.storage import pages

    assert damaged_pages(bare / "gen-000001") == []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pages, "_LEAST", 1)
        patch.setattr(pages, "_SHARE", 1 << 40)
        assert any("memory" in problem for problem in damaged_pages(bare / "gen-000001"))
