"""Disks that are full or cannot be written, and the order in which writes reach them.

The full disk is a small tmpfs. What is done there is done in a child process: where memory that is
mapped from a file has no room on the disk, the system ends the process (SIGBUS), and no process of
memdb may end so. A kill does not test a power cut; that is what the traces are for: they show that
what a step relies on was on the disk before it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import memdb
from memdb import Batch, Document, MemDB, StorageError
from tests.engine.helpers import ROOT, child, command, make_memory, make_shape

SHAPE = make_shape()
DIMENSION = 32


def mounted(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk of its own, of 4 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    result = mounted("-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place))
    if result.returncode:
        pytest.skip(f"no file system can be mounted here: {result.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def enlarge(disk: Path) -> None:
    assert mounted("-o", "remount,size=64m", str(disk)).returncode == 0


def in_child(step: Callable[[Path], None], disk: Path) -> None:
    """Run a function of this module in another process; it must not end by a signal."""
    script = f"""
    import sys
    from pathlib import Path
    from tests.engine.test_disk import {step.__name__}
    {step.__name__}(Path(sys.argv[1]))
    """
    result = child(script, disk)
    assert result.returncode == 0, (result.returncode, result.stderr)


def vectors(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, DIMENSION)).astype(np.float32)


def insert(database: MemDB, n: int) -> None:
    text = f"{n} " + np.random.default_rng(n).bytes(400).hex()
    database.insert(text, id=f"doc-{n}", metadata={"n": n}, embeddings=vectors(1, n))


def batch(first: int, count: int) -> Batch:
    documents = [Document(f"text {n}", f"more-{n}") for n in range(first, first + count)]
    return Batch(documents, vectors(count, first), [make_memory(SHAPE, 1)] * count)


def create(disk: Path) -> Path:
    """A database of 100 documents; 40 of them were deleted, so that there are free pages."""
    path = disk / "db"
    with MemDB.create(path, shape=SHAPE, dimension=DIMENSION, index="ivf") as database:
        for n in range(140):
            insert(database, n)
        database.delete(*(f"doc-{n}" for n in range(100, 140)))
    return path


def fill(disk: Path, leave: int = 0) -> None:
    """Take all room but so many bytes."""
    with (disk / "ballast").open("wb", buffering=0) as file:
        room = os.statvfs(disk)
        size = room.f_bavail * room.f_frsize - leave
        while size > 0:
            try:
                size -= file.write(bytes(min(size, 4096)))
            except OSError:
                break


def require_whole(path: Path, documents: int) -> None:
    """The database opens, says what it should, and has no problems."""
    with MemDB.open(path) as database:
        found = list(database.documents())
        assert len(found) == documents
        assert {d.metadata["n"] for d in found if d.id.startswith("doc-")} >= set(range(100))
        hits = database.retrieve(np.ones(DIMENSION), 100_000).hits
        assert len({hit.reference.text for hit in hits}) == documents
    assert memdb.verify(path) == []


def refused(call: Callable[[], object], path: Path) -> None:
    """The call raises a `StorageError` that names the path."""
    with pytest.raises(StorageError) as caught:
        call()
    assert str(path) in str(caught.value)


# --- what is done on the full disk ----------------------------------------------------------------


def insert_until_full(disk: Path) -> None:
    path = disk / "db"
    kept = 100

    def go_on() -> None:
        nonlocal kept
        while kept < 100_000:
            insert(database, 1000 + kept)
            kept += 1

    with MemDB.open(path) as database:
        refused(go_on, path)
        assert kept > 100
        assert len(list(database.documents())) == kept
        refused(go_on, path)  # and again
        assert database.get("doc-7").metadata == {"n": 7}
    require_whole(path, kept)
    enlarge(disk)
    with MemDB.open(path) as database:
        database.delete(*(f"doc-{n}" for n in range(1100, 1000 + kept)))
    require_whole(path, 100)


def load_until_full(disk: Path) -> None:
    path = disk / "db"
    with MemDB.open(path) as database:
        refused(lambda: database.load([batch(0, 10_000)]), path)
    require_whole(path, 100)  # of one transaction all or nothing


def update_and_delete_when_full(disk: Path) -> None:
    """Either may find free pages to go to; neither loses anything if it does not."""
    path = disk / "db"
    fill(disk)
    with MemDB.open(path) as database:
        for n in range(100):
            before = database.get(f"doc-{n}")
            try:
                after = database.update(f"doc-{n}", metadata={"n": n, "more": "x" * 3000})
            except StorageError:
                assert database.get(f"doc-{n}") == before
            else:
                assert database.get(f"doc-{n}") == after
    require_whole(path, 100)


def build_index_when_full(disk: Path) -> None:
    path = disk / "db"
    with MemDB.open(path) as database:
        assert database.build_index() is not None
        built = database.stats()["index"]
        fill(disk, 8192)
        refused(database.build_index, path)
        assert database.stats()["index"] == built
    require_whole(path, 100)


def build_first_index_when_full(disk: Path) -> None:
    path = disk / "db"
    fill(disk, 8192)
    with MemDB.open(path) as database:
        refused(database.build_index, path)
        assert database.stats()["index"]["kind"] == "exact"
    require_whole(path, 100)


def compact_when_little_is_left(disk: Path) -> None:
    path = disk / "db"
    for leave in (90_000, 150_000):
        fill(disk, leave)
        refused(lambda: memdb.compact(path), path)
        assert {e.name for e in path.iterdir()} == {"CURRENT", "LOCK", "gen-000001"}
        require_whole(path, 100)


def compact_when_nothing_is_left(disk: Path) -> None:
    path = disk / "db"
    fill(disk)
    refused(lambda: memdb.compact(path), path)
    assert {e.name for e in path.iterdir()} == {"CURRENT", "LOCK", "gen-000001"}
    require_whole(path, 100)


def compact_when_the_index_does_not_fit(disk: Path) -> None:
    path = disk / "db"
    copy = disk / "copy"
    shutil.copytree(path, copy)
    memdb.compact(copy)
    index = next(copy.rglob("index.faiss")).stat().st_size
    used = sum(file.stat().st_blocks * 512 for file in copy.rglob("gen-000002/*"))
    shutil.rmtree(copy)
    fill(disk, used - index // 2)
    refused(lambda: memdb.compact(path), path)
    assert {e.name for e in path.iterdir()} == {"CURRENT", "LOCK", "gen-000001"}
    require_whole(path, 100)


def backup_when_full(disk: Path) -> None:
    path = disk / "db"
    for leave in (0, 30_000, 100_000):
        fill(disk, leave)
        refused(lambda: memdb.backup(path, disk / "copy"), disk)
        left = list((disk / "copy").iterdir()) if (disk / "copy").exists() else []
        assert [entry.name for entry in left] in ([], ["LOCK"])
        require_whole(path, 100)


def restore_when_full(disk: Path) -> None:
    path = disk / "db"
    source = disk.parent / "backup"  # on another disk
    memdb.backup(path, source)
    fill(disk, 30_000)
    refused(lambda: memdb.restore(source, path), path)
    require_whole(path, 100)
    refused(lambda: memdb.restore(source, disk / "new"), disk / "new")


def create_when_full(disk: Path) -> None:
    for leave in (0, 4096, 8192, 16384, 60_000):
        fill(disk, leave)
        new = disk / "new"
        refused(lambda: MemDB.create(new, shape=SHAPE, dimension=2), new)  # noqa: B023
        assert not new.exists() or {entry.name for entry in new.iterdir()} <= {"LOCK"}


def open_when_full(disk: Path) -> None:
    fill(disk)
    require_whole(disk / "db", 100)


def open_without_its_lock_file_when_full(disk: Path) -> None:
    """As after a restore from a copy of the folder that left `lock.mdb` out."""
    path = disk / "db"
    (path / "gen-000001" / "lock.mdb").unlink()
    fill(disk)
    with suppress(StorageError):
        require_whole(path, 100)


def many_readers_when_full(disk: Path) -> None:
    """Each takes a place in LMDB's table of readers, a file that is mapped."""
    with MemDB.open(disk / "db") as database, ExitStack() as stack:
        fill(disk)
        for _ in range(300):
            try:
                snapshot = stack.enter_context(database.snapshot())
            except StorageError:
                break
            assert snapshot.get("doc-7").metadata == {"n": 7}


def count_uses_when_full(disk: Path) -> None:
    path = disk / "db"
    with MemDB.open(path) as database:
        fill(disk)
        for n in range(20):
            database.retrieve(vectors(1, n)[0], 50)
    require_whole(path, 100)


STEPS = (
    insert_until_full,
    load_until_full,
    update_and_delete_when_full,
    build_index_when_full,
    build_first_index_when_full,
    compact_when_little_is_left,
    compact_when_nothing_is_left,
    compact_when_the_index_does_not_fit,
    backup_when_full,
    restore_when_full,
    open_when_full,
    open_without_its_lock_file_when_full,
    many_readers_when_full,
    count_uses_when_full,
)


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
def test_a_full_disk_is_a_clear_error_and_costs_nothing_that_was_acknowledged(
    disk: Path, step: Callable[[Path], None]
) -> None:
    path = create(disk)
    in_child(step, disk)
    (disk / "ballast").unlink(missing_ok=True)
    enlarge(disk)
    assert memdb.verify(path) == []
    with MemDB.open(path) as database:
        documents = {document.id for document in database.documents()}
        assert documents >= {f"doc-{n}" for n in range(100)}
        insert(database, 9999)
        assert database.build_index() is not None
    memdb.compact(path)
    assert memdb.backup(path, disk / "another copy") > 0
    assert memdb.verify(path) == memdb.verify(disk / "another copy") == []
    with MemDB.open(path) as database:
        assert {d.id for d in database.documents()} == documents | {"doc-9999"}


def test_no_database_is_made_on_a_full_disk(disk: Path) -> None:
    in_child(create_when_full, disk)
    enlarge(disk)
    MemDB.create(disk / "new", shape=SHAPE, dimension=2).close()


# --- a disk that cannot be written ----------------------------------------------------------------


READ_ONLY: dict[str, Callable[[Path], object]] = {
    "open": MemDB.open,
    "repair": memdb.repair,
    "compact": memdb.compact,
    "migrate": memdb.migrate,
    "restore": lambda path: memdb.restore(path.parents[1] / "other", path),
    "create": lambda path: MemDB.create(path / "new", shape=SHAPE, dimension=2),
    "backup to it": lambda path: memdb.backup(path.parents[1] / "other", path.parent / "new"),
    "restore to it": lambda path: memdb.restore(path.parents[1] / "other", path.parent / "new"),
}


@pytest.mark.parametrize("call", READ_ONLY.values(), ids=READ_ONLY)
def test_a_disk_that_is_read_only_is_a_clear_error_and_the_database_is_whole_after(
    disk: Path, call: Callable[[Path], object]
) -> None:
    path = create(disk)
    memdb.backup(path, disk.parent / "other")
    assert mounted("-o", "remount,ro", str(disk)).returncode == 0
    try:
        with pytest.raises(StorageError, match=re.escape(str(disk))):
            call(path)
    finally:
        assert mounted("-o", "remount,rw", str(disk)).returncode == 0
    require_whole(path, 100)
    with MemDB.open(path) as database:
        insert(database, 9999)
    require_whole(path, 101)


# --- the order in which writes reach the disk -----------------------------------------------------

TRACED = (
    "openat,write,pwrite64,pwritev,pwritev2,writev,ftruncate,fallocate,fsync,fdatasync,msync,"
    "sync_file_range,rename,renameat,renameat2,unlink,unlinkat,rmdir,mkdir,mkdirat"
)
_CALL = re.compile(r"^\d+ +(\w+)\((.*)\) += (-?\d+)")
_PATH = re.compile(r"^\d+<([^>]*)>")


@dataclass(frozen=True)
class Event:
    """A call to the system that succeeded.

    Attributes:
        call: `write`, `sync`, `rename`, `remove`, `make` or `mark`.
        path: the file, relative to the folder that is looked at; of a rename the new name.
        synced: of a write: the call came back when it was on the disk (O_DSYNC).
        at: of a write to `data.mdb`: whether it is to the meta pages.
    """

    call: str
    path: str
    synced: bool = False
    meta: bool = False


def trace(tmp_path: Path, script: str) -> list[Event]:
    """What a script does to the files under `tmp_path / "here"`, in order. `mark(name)` in it
    leaves an event in its place."""
    if shutil.which("strace") is None:
        pytest.skip("there is no strace")
    here = tmp_path / "here"
    here.mkdir(exist_ok=True)
    log = tmp_path / "trace"
    prelude = """
    import os, sys
    from pathlib import Path
    import numpy as np
    import memdb
    from memdb import MemDB
    from tests.engine.test_disk import DIMENSION, SHAPE, insert, vectors
    here = Path(sys.argv[1])
    def mark(name):
        os.mkdir(here / ("mark " + name))
    """
    options = ["strace", "-f", "-y", "-s", "0", "-o", str(log), "-e", f"trace={TRACED}"]
    result = subprocess.run(
        [*options, *command(prelude + script, here)], cwd=ROOT, capture_output=True, text=True
    )
    if "ptrace" in result.stderr:
        pytest.skip(f"nothing can be traced here: {result.stderr.strip()}")
    assert result.returncode == 0, result.stderr
    return list(events(joined(log.read_text("utf-8", "replace").splitlines()), here))


def joined(lines: list[str]) -> Iterator[str]:
    """Lines of strace, those of calls that another thread interrupted put together again, at the
    place where they came back."""
    begun: dict[str, str] = {}
    for line in lines:
        pid = line.split(" ", 1)[0]
        if line.endswith("<unfinished ...>"):
            begun[pid] = line.removesuffix("<unfinished ...>")
        elif " resumed>" in line:
            yield begun.pop(pid) + line.split(" resumed>", 1)[1]
        else:
            yield line


def events(lines: Iterator[str], here: Path) -> Iterator[Event]:
    durable: set[str] = set()  # open files that write through, as `fd<path>`

    def name(path: str) -> str:
        path = path.removesuffix(" (deleted)")
        return os.path.relpath(path, here) if path.startswith(str(here)) else ""

    for line in lines:
        match = _CALL.match(line)
        if match is None or match[3].startswith("-"):
            continue
        call, rest = match[1], match[2]
        quoted = re.findall(r'"([^"]*)"', rest)
        if call == "openat":
            handle = re.search(r"= (\d+<[^>]*>)", line)
            assert handle
            (durable.add if "O_DSYNC" in rest else durable.discard)(handle[1])
        elif call in ("write", "pwrite64", "pwritev", "pwritev2", "writev", "ftruncate"):
            file = _PATH.match(rest)
            if file and name(file[1]):
                offset = int(rest.rsplit(" ", 1)[1]) if call.startswith("pwrite") else 1 << 40
                yield Event(
                    "write",
                    name(file[1]),
                    rest.split(",", 1)[0] in durable,
                    file[1].endswith("data.mdb") and offset < 2 * 4096,
                )
        elif call in ("fsync", "fdatasync"):
            file = _PATH.match(rest)
            if file and name(file[1]):
                yield Event("sync", name(file[1]))
        elif call.startswith("rename") and name(quoted[1]):
            yield Event("rename", name(quoted[1]))
        elif call in ("unlink", "unlinkat", "rmdir"):
            # unlinkat(3</folder>, "name"): of a folder that is open
            folder = _PATH.match(rest)
            path = os.path.join(folder[1], quoted[0]) if folder else quoted[0]  # noqa: PTH118
            if name(path):
                yield Event("remove", name(path))
        elif call in ("mkdir", "mkdirat") and name(quoted[0]):
            made = name(quoted[0])
            yield Event("mark", made[5:]) if made.startswith("mark ") else Event("make", made)


def between(found: list[Event], first: str, last: str) -> list[Event]:
    places = [found.index(Event("mark", mark)) for mark in (first, last)]
    return found[places[0] + 1 : places[1]]


def place(found: list[Event], call: str, path: str) -> int:
    """Where an event is that happens once."""
    (at,) = (i for i, event in enumerate(found) if (event.call, event.path) == (call, path))
    return at


def require_durable(found: list[Event], path: str, before: int) -> None:
    """All that was written to a file was synced before an event."""
    written = [i for i, e in enumerate(found) if e.call == "write" and e.path == path]
    synced = [i for i, e in enumerate(found[:before]) if (e.call, e.path) == ("sync", path)]
    due = [i for i in written if not found[i].synced]
    assert written, path
    assert not due or (synced and max(due) < max(synced)), (path, due, synced, before)


def require_swap(found: list[Event], folder: str, generation: str) -> int:
    """`CURRENT` is replaced by a file that is on the disk, and that names a generation that is;
    afterwards the folder is synced. Returns where that is."""
    current = os.path.join(folder, "CURRENT")  # noqa: PTH118
    rename = place(found, "rename", current)
    require_durable(found, f"{current}.new", rename)
    require_durable(found, f"{folder}/{generation}/data.mdb", rename)
    assert Event("sync", f"{folder}/{generation}") in found[:rename]
    made = place(found, "make", f"{folder}/{generation}")
    synced = [i for i, e in enumerate(found) if (e.call, e.path) == ("sync", folder)]
    assert any(made < at for at in synced)
    after = [at for at in synced if at > rename]
    assert after, "the folder is not synced behind the rename"
    # What is in the generation is written before that is synced, and so before it is named.
    last = max(i for i, e in enumerate(found) if e.call == "sync" and e.path.endswith(generation))
    assert all(found[i].call != "write" for i in range(last, rename) if generation in found[i].path)
    return after[0]


CREATE = """
    path = here / "db"
    database = MemDB.create(path, shape=SHAPE, dimension=DIMENSION, index="ivf")
    for n in range(100):
        insert(database, n)
"""


def test_a_new_database_is_on_the_disk_before_it_is_one(tmp_path: Path) -> None:
    script = """
    mark("begin")
    MemDB.create(here / "above" / "db", shape=SHAPE, dimension=2).close()
    mark("end")
    """
    found = between(trace(tmp_path, script), "begin", "end")
    rename = place(found, "rename", "above/db/CURRENT")
    # The folders that were made are known to those above them.
    assert {Event("sync", "."), Event("sync", "above")} <= set(found[:rename])
    require_swap(found, "above/db", "gen-000001")


@pytest.mark.parametrize("durability", ["full", "normal", "off"])
def test_what_a_write_waits_for(tmp_path: Path, durability: str) -> None:
    script = f"""
    path = here / "db"
    MemDB.create(path, shape=SHAPE, dimension=DIMENSION).close()
    with MemDB.open(path, durability="{durability}") as database:
        for n in range(3):
            mark(f"insert {{n}}")
            insert(database, n)
        mark("update")
        database.update("doc-0", metadata={{"n": 5}})
        mark("delete")
        database.delete("doc-1")
        mark("end")
    """
    found = trace(tmp_path, script)
    marks = ["insert 0", "insert 1", "insert 2", "update", "delete", "end"]
    for first, last in pairwise(marks):
        data = [e for e in between(found, first, last) if e.path.endswith("data.mdb")]
        kinds = ["sync" if e.call == "sync" else "meta" if e.meta else "page" for e in data]
        # Pages, then the wait for them, then the meta page that makes them count.
        pages = kinds.count("page")
        assert pages > 0
        due = {"full": ["sync", "meta"], "normal": ["sync", "meta"], "off": ["meta"]}[durability]
        assert kinds == ["page"] * pages + due
        assert [e.synced for e in data if e.meta] == [durability == "full"]


def test_an_index_file_is_on_the_disk_before_it_takes_its_name(tmp_path: Path) -> None:
    script = """
    mark("begin")
    database.build_index()
    mark("end")
    """
    found = between(trace(tmp_path, CREATE + script), "begin", "end")
    generation = "db/gen-000001"
    rename = place(found, "rename", f"{generation}/index.faiss")
    require_durable(found, f"{generation}/index.faiss.new", rename)
    assert Event("sync", generation) in found[rename:]


@pytest.mark.parametrize("how", ["compact", "restore"])
def test_a_new_generation_is_on_the_disk_before_the_old_one_goes(tmp_path: Path, how: str) -> None:
    script = """
    database.retrieve(np.ones(DIMENSION), 5)
    database.close()
    memdb.backup(path, here / "copy")
    mark("begin")
    memdb.HOW
    mark("end")
    """
    call = {"compact": "compact(path)", "restore": "restore(here / 'copy', path)"}[how]
    found = between(trace(tmp_path, CREATE + script.replace("HOW", call)), "begin", "end")
    after = require_swap(found, "db", "gen-000002")
    new = "db/gen-000002"
    require_durable(found, f"{new}/index.faiss.new", place(found, "rename", "db/CURRENT"))
    removed = [i for i, e in enumerate(found) if e.call == "remove" and "gen-000001" in e.path]
    assert removed
    assert after < min(removed)
    assert not any(e.call == "write" and "gen-000001/data.mdb" in e.path for e in found)


def test_a_backup_is_on_the_disk_before_it_is_a_database(tmp_path: Path) -> None:
    script = """
    database.build_index()
    mark("begin")
    memdb.backup(path, here / "copy")
    mark("end")
    """
    found = between(trace(tmp_path, CREATE + script), "begin", "end")
    require_swap(found, "copy", "gen-000001")
    # The index is copied by a call that is no write (sendfile, copy_file_range).
    assert place(found, "sync", "copy/gen-000001/index.faiss") < place(
        found, "rename", "copy/CURRENT"
    )
    assert not any(e.call == "write" and e.path.startswith("db/") for e in found)


def test_a_migration_is_on_the_disk_before_the_old_version_goes(tmp_path: Path) -> None:
    from tests.engine.test_migration import write_version_1

    here = tmp_path / "here"
    here.mkdir()
    write_version_1(here / "db")
    script = """
    mark("begin")
    assert memdb.migrate(here / "db") == (1, 2)
    mark("end")
    """
    found = between(trace(tmp_path, script), "begin", "end")
    after = require_swap(found, "db", "gen-000002")
    removed = [i for i, e in enumerate(found) if e.call == "remove" and "gen-000001" in e.path]
    assert removed
    assert after < min(removed)
