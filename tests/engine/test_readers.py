"""Who reads is protected for as long as it reads, whatever the process does besides."""

from __future__ import annotations

import fcntl
import hashlib
import re
import shutil
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

import memdb
from memdb import BusyError, MemDB
from tests.engine.helpers import ROOT, child, command, unit

#: Another process that looks for readers that died, and then writes over all that nobody reads.
REWRITES = """
import os, sys
import memdb
from tests.engine.helpers import unit
with memdb.MemDB.open(sys.argv[1], durability="off") as database:
    for _ in range(2):
        for n in range(20):
            database.update(f"d{n}", text=os.urandom(3000).hex(), embeddings=unit(1, 0))
"""


@pytest.fixture
def path(bare_template: Path, tmp_path: Path) -> Path:
    path = tmp_path / "db"
    shutil.copytree(bare_template, path)
    with MemDB.open(path, durability="off") as database:
        for n in range(20):
            database.insert(f"{n} " * 2000, id=f"d{n}", embeddings=unit(1, 0))
    return path


def copied(path: Path) -> None:
    shutil.copytree(path, path.parent / "a copy")


def hashed(path: Path) -> None:
    for file in path.rglob("*"):
        if file.is_file():
            hashlib.sha256(file.read_bytes())


def opened_and_closed(path: Path) -> None:
    MemDB.open(path).close()


def migrated(path: Path) -> None:
    with pytest.raises(BusyError, match="open in this process"):
        memdb.migrate(path)


def backed_up(path: Path) -> None:
    memdb.backup(path, path.parent / "a backup")


def restored_from(path: Path) -> None:
    memdb.restore(path, path.parent / "restored")


def verified(path: Path) -> None:
    assert memdb.verify(path) == []


def repaired(path: Path) -> None:
    memdb.repair(path)


def compacted(path: Path) -> None:
    memdb.compact(path)


USES = (
    copied,
    hashed,
    opened_and_closed,
    migrated,
    backed_up,
    restored_from,
    verified,
    repaired,
    compacted,
)


@pytest.mark.skipif(not hasattr(fcntl, "F_OFD_SETLK"), reason="this system has no such locks")
@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
def test_a_snapshot_stays_what_it_was_whatever_reads_the_folder_in_its_process(
    path: Path, use: Callable[[Path], None]
) -> None:
    with MemDB.open(path) as database, database.snapshot() as snapshot:
        before = {document.id: document.text for document in snapshot.documents()}
        use(path)
        result = child(REWRITES, path)
        assert result.returncode == 0, result.stderr
        assert {document.id: document.text for document in snapshot.documents()} == before


@pytest.mark.skipif(not hasattr(fcntl, "F_OFD_SETLK"), reason="this system has no such locks")
def test_a_snapshot_that_begins_afterwards_is_protected_too(path: Path) -> None:
    with MemDB.open(path) as database:
        hashed(path)
        with database.snapshot() as snapshot:
            hashed(path)
            before = {document.id: document.text for document in snapshot.documents()}
            assert child(REWRITES, path).returncode == 0
            assert {document.id: document.text for document in snapshot.documents()} == before


def test_a_file_of_locks_may_be_deleted_while_nobody_has_the_database_open(path: Path) -> None:
    for name in ("lock.mdb", "write.lock"):
        (path / "gen-000001" / name).unlink()
    with MemDB.open(path) as database, database.snapshot() as snapshot:
        before = {document.id: document.text for document in snapshot.documents()}
        assert child(REWRITES, path).returncode == 0
        assert {document.id: document.text for document in snapshot.documents()} == before


def test_migrate_of_an_open_database_is_refused_and_of_a_closed_one_has_nothing_to_do(
    path: Path, tmp_path: Path
) -> None:
    link = tmp_path / "another name"
    link.symlink_to(path)
    with MemDB.open(path):
        for name in (path, link):
            with pytest.raises(BusyError, match=re.escape(str(name))):
                memdb.migrate(name)
    assert memdb.migrate(path) == (2, 2)


def test_too_many_readers_is_an_error_that_says_the_way_out(path: Path) -> None:
    with MemDB.open(path) as database:
        with ExitStack() as stack:

            def take_all() -> None:
                for _ in range(2000):
                    stack.enter_context(database.snapshot())

            with pytest.raises(BusyError, match=r"reads under way.*1024.*End some"):
                take_all()
            with pytest.raises(BusyError, match="End some"):
                database.get("d1")
            other = child("import sys, memdb; memdb.MemDB.open(sys.argv[1])", path)
            assert "BusyError" in other.stderr
            assert "End some" in other.stderr
        assert database.get("d1").version == 1


# --- processes of one number ----------------------------------------------------------------------

IN_A_CONTAINER = """
import os, sys
import memdb
print(os.getpid(), flush=True)
try:
    database = memdb.MemDB.open(sys.argv[1])
except memdb.BusyError as error:
    print(error, flush=True)
    sys.exit(3)
with database.snapshot() as snapshot:
    print("reads", flush=True)
    sys.stdin.readline()
    print(len(list(snapshot.documents())), flush=True)
database.close()
"""


class Container:
    """A process in a process namespace of its own, where its number is 1."""

    def __init__(self, path: Path) -> None:
        self._process = subprocess.Popen(
            [*["unshare", "--pid", "--fork", "--kill-child"], *command(IN_A_CONTAINER, path)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        if self.line() != "1":
            self.kill()
            pytest.skip("no process namespace can be made here")

    def line(self) -> str:
        assert self._process.stdout
        return self._process.stdout.readline().strip()

    def go_on(self) -> None:
        assert self._process.stdin
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def end(self) -> int:
        return self._process.wait()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.fixture
def unshared() -> None:
    if shutil.which("unshare") is None:
        pytest.skip("there is no unshare")
    tried = subprocess.run(["unshare", "--pid", "--fork", "true"], check=False, capture_output=True)
    if tried.returncode:
        pytest.skip("no process namespace can be made here")


@pytest.mark.usefixtures("unshared")
def test_two_containers_whose_processes_have_one_number_are_told_apart_or_refused(
    path: Path,
) -> None:
    first = Container(path)
    assert first.line() == "reads"
    second = Container(path)
    assert "process namespace" in second.line()
    assert second.end() == 3
    result = child(REWRITES, path)  # of another number: it sees the reader that lives
    assert result.returncode == 0, result.stderr
    first.go_on()
    assert first.line() == "20"
    assert first.end() == 0
    third = Container(path)
    assert third.line() == "reads"
    third.go_on()
    assert third.end() == 0


@pytest.mark.usefixtures("unshared")
def test_what_a_killed_process_of_the_same_number_read_is_given_back(path: Path) -> None:
    with MemDB.open(path) as database:  # so that the table of readers stays
        first = Container(path)
        assert first.line() == "reads"
        assert len(listed(database)) == 1
        first.kill()
        assert len(listed(database)) == 1
        second = Container(path)
        assert second.line() == "reads"
        assert len(listed(database)) == 1  # its own
        second.go_on()
        assert second.end() == 0
        assert listed(database) == []


def listed(database: MemDB) -> list[str]:
    """The readers in LMDB's table."""
    inner = database._store._environment._file.inner
    return [line for line in inner.readers().splitlines()[1:] if line.strip()]
