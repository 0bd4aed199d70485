"""Namespaces: collections of their own in one database."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest

import memdb
from memdb import (
    DatabaseExistsError,
    InvalidInputError,
    MemDB,
    NotADatabaseError,
    StorageError,
    UnknownNamespaceError,
)
from memdb.care import whole
from memdb.codecs import FAMILIES
from tests.engine.fitted import make_like, roped_shape
from tests.engine.helpers import TokenWriter, WordEmbedder, child, unit


@pytest.fixture
def path(tmp_path: Path, bare_template: Path) -> Path:
    return Path(shutil.copytree(bare_template, tmp_path / "db"))


def ids(database: MemDB) -> list[str]:
    return [document.id for document in database.documents()]


def found(database: MemDB) -> list[str]:
    hits = database.retrieve(np.array([1, 0], np.float32), 10).hits
    return [hit.reference.document_id for hit in hits]


def test_each_has_its_own_documents_and_ids(path: Path) -> None:
    with MemDB.open(path) as db, db.namespace("a") as a, db.namespace("b") as b:
        for n, one in enumerate((db, a, b)):
            one.insert(f"text {n}", id="same", embeddings=unit(1, n))
        a.insert("more", id="more", embeddings=unit(1, 9))
        assert [one.get("same").text for one in (db, a, b)] == ["text 0", "text 1", "text 2"]
        assert (ids(db), ids(a), ids(b)) == (["same"], ["more", "same"], ["same"])
        assert (found(db), found(b)) == (["same"], ["same"])
        assert sorted(found(a)) == ["more", "same"]
        assert db.namespaces() == ["a", "b"] == memdb.list_namespaces(path)
        a.delete("same")
        assert (ids(db), ids(a), ids(b)) == (["same"], ["more"], ["same"])
    with MemDB.open(path) as db, db.namespace("a") as a:  # and it is there the next time
        assert ids(a) == ["more"]


def test_it_takes_over_what_the_database_was_made_with(tmp_path: Path) -> None:
    parts: dict[str, Any] = {"embedder": WordEmbedder(), "writer": TokenWriter()}
    with MemDB.create(tmp_path / "db", keys=["year"], **parts) as db, db.namespace("x") as one:
        assert one.shape == db.shape
        assert one.settings == db.settings
        assert one.stats()["index"]["keys"] == ["year"]
        assert one.embedder is db.embedder
        assert one.writer is db.writer
        stored = one.insert("The harbour is old.", metadata={"year": 1874})
        assert stored.warm == len(stored.references) == 1
        assert one.retrieve("harbour", where={"year": 1874}).memories[0].pairs


def test_a_fitted_codec_is_there_from_the_first_memory_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FAMILIES["klt8"], "enough", 12)
    shape = roped_shape()
    path = tmp_path / "db"
    with MemDB.create(path, shape=shape, dimension=2, codec="klt8") as db:
        for n in range(12):
            db.insert(f"{n}", embeddings=unit(1, n), memories=[make_like(shape, n, 40)])
        db.recode("klt8")
        fitted = db.stats()["memory"]["fitted"]
        with db.namespace("x") as one:
            assert one.stats()["memory"] == db.stats()["memory"]
            one.insert("a", embeddings=unit(1, 1), memories=[make_like(shape, 3, 40)])
            (codec,) = one.stats()["memory_bytes"]["codecs"]
            assert codec == fitted
    assert memdb.verify(path) == []


def test_dropped_it_is_gone_for_all_at_once(path: Path) -> None:
    with MemDB.open(path) as db, MemDB.open(path) as other:
        one = db.namespace("x")
        one.insert("text", id="a", embeddings=unit(1, 1))
        elsewhere = other.namespace("x")
        other.drop_namespace("x")
        assert db.namespaces() == []
        for held in (one, elsewhere):
            with pytest.raises(StorageError, match="was deleted, moved or replaced"):
                held.get("a")
            held.close()
        with pytest.raises(UnknownNamespaceError, match="has no namespace 'x'; there is none yet"):
            db.drop_namespace("x")
        with db.namespace("x") as anew:  # nothing of the old one is in it
            assert ids(anew) == []
    assert [entry.name for entry in (path / "namespaces").iterdir()] == ["x"]


@pytest.mark.parametrize(
    "name", ["a", "Aa", "../up", ".", "..", "港", "a b", "%41", "é" * 40, "CON", "x/y", "\0"]
)
def test_any_text_is_a_name(path: Path, name: str) -> None:
    memdb.create_namespace(path, name)
    memdb.create_namespace(path, name)  # a second time it is there
    assert memdb.list_namespaces(path) == [name]
    (folder,) = (path / "namespaces").iterdir()
    assert folder.name == folder.name.lower()
    assert len(folder.name) <= 255
    memdb.drop_namespace(path, name)
    assert memdb.list_namespaces(path) == []


@pytest.mark.parametrize("name", ["", "é" * 41, "\ud800", None, 7, b"a"])
def test_what_cannot_be_a_name_is_refused(path: Path, name: Any) -> None:
    for call in (memdb.create_namespace, memdb.drop_namespace, memdb.existing_namespace):
        with pytest.raises(InvalidInputError, match="namespace"):
            call(path, name)
    assert not (path / "namespaces").exists()


def test_a_namespace_has_none_of_its_own(path: Path) -> None:
    with MemDB.open(path) as db, db.namespace("x") as one:
        with pytest.raises(InvalidInputError, match="is a namespace, which has none"):
            one.namespace("y")
        assert one.namespaces() == []


def test_without_a_database_there_are_none(tmp_path: Path) -> None:
    for call in (memdb.list_namespaces, lambda path: memdb.create_namespace(path, "x")):
        with pytest.raises(NotADatabaseError):
            call(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_what_else_lies_there_is_no_namespace(path: Path) -> None:
    memdb.create_namespace(path, "x")
    there = path / "namespaces"
    for name in ("UPPER", "half", "%zz", ".gone"):
        (there / name).mkdir()
    (there / "file").touch()
    (there / "half" / "LOCK").touch()
    assert memdb.list_namespaces(path) == ["x"]


MADE_BY_MANY = """
import sys
import numpy as np
from memdb import MemDB
with MemDB.open(sys.argv[1]) as db, db.namespace("x") as one:
    one.insert(sys.argv[2], id=sys.argv[2], embeddings=np.ones((1, 2), np.float32))
"""


def test_processes_that_make_it_at_once_share_it(path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda n: child(MADE_BY_MANY, path, str(n)), range(4)))
    assert [result.returncode for result in results] == [0] * 4, results[0].stderr
    with MemDB.open(path) as db, db.namespace("x") as one:
        assert ids(one) == ["0", "1", "2", "3"]


# --- care -----------------------------------------------------------------------------------------


@pytest.fixture
def filled(path: Path) -> Path:
    with MemDB.open(path) as db, db.namespace("x") as one, db.namespace("y") as other:
        for n, each in enumerate((db, one, other)):
            each.insert("a " * 2000, id=f"d{n}", embeddings=unit(1, n))
    return path


def damage(database: Path) -> None:
    """Turn a byte of its first reference, as a bad disk would."""
    (generation,) = database.glob("gen-*")
    with lmdb.open(str(generation), max_dbs=16) as environment:
        table = environment.open_db(b"references", integerkey=True)
        with environment.begin(write=True) as transaction:
            record = bytearray(transaction.get((1).to_bytes(8, "little"), db=table))
            record[-1] ^= 1
            transaction.put((1).to_bytes(8, "little"), bytes(record), db=table)


def contents(path: Path) -> dict[str, list[str]]:
    with MemDB.open(path) as db:
        there = {"": ids(db)}
        for name in db.namespaces():
            with db.namespace(name) as one:
                there[name] = ids(one)
    return there


def test_verify_and_repair_look_into_each(filled: Path) -> None:
    assert memdb.verify(filled) == []
    damage(filled / "namespaces" / "y")
    problems = memdb.verify(filled)
    assert {problem.namespace for problem in problems} == {"y"}
    assert str(problems[0]).startswith("namespace 'y': ")
    report = memdb.repair(filled, drop=True)
    assert report.dropped == ["y: d2"]
    assert report.left == memdb.verify(filled) == []
    assert contents(filled) == {"": ["d0"], "x": ["d1"], "y": []}


def test_a_backup_holds_them_and_restore_brings_them_back(filled: Path, tmp_path: Path) -> None:
    before = contents(filled)
    memdb.backup(filled, tmp_path / "copy")
    assert contents(tmp_path / "copy") == before
    with MemDB.open(filled) as db:
        db.drop_namespace("x")
        with db.namespace("y") as other, db.namespace("z"):
            other.delete("d2")
    assert contents(filled) == {"": ["d0"], "y": [], "z": []}
    memdb.restore(tmp_path / "copy", filled)
    assert contents(filled) == before
    assert memdb.verify(filled) == []


def test_a_damaged_namespace_of_a_backup_restores_nothing(filled: Path, tmp_path: Path) -> None:
    memdb.backup(filled, tmp_path / "copy")
    with MemDB.open(filled) as db:
        db.insert("since", id="since", embeddings=unit(1, 5))
    damage(tmp_path / "copy" / "namespaces" / "x")
    with pytest.raises(StorageError, match="nothing was restored"):
        memdb.restore(tmp_path / "copy", filled)
    assert contents(filled)[""] == ["d0", "since"]


def test_a_backup_that_fails_leaves_nothing(filled: Path, tmp_path: Path) -> None:
    (filled / "namespaces" / "y" / "LOCK").chmod(0)
    (generation,) = (filled / "namespaces" / "y").glob("gen-*")
    (generation / "data.mdb").write_bytes(b"no database" * 1000)
    with pytest.raises(memdb.MemDBError):
        memdb.backup(filled, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_compact_gives_the_space_of_each_back(filled: Path) -> None:
    with MemDB.open(filled) as db, db.namespace("x") as one:
        one.update("d1", text="the word zanzibar", embeddings=unit(1, 1))
        one.delete("d1")
    memdb.compact(filled)
    for file in (filled / "namespaces" / "x").rglob("*"):
        assert not file.is_file() or b"zanzibar" not in file.read_bytes()
    assert contents(filled) == {"": ["d0"], "x": [], "y": ["d2"]}


CARE: dict[str, Callable[[Path, Path], object]] = {
    "verify": lambda path, _: memdb.verify(path),
    "repair": lambda path, _: memdb.repair(path).left,
    "compact": lambda path, _: memdb.compact(path),
    "migrate": lambda path, _: memdb.migrate(path),
    "backup": lambda path, to: memdb.backup(path, to / "copy"),
}


@pytest.mark.parametrize("made_anew", ["", "before", "after"])
@pytest.mark.parametrize("name", CARE)
def test_one_that_is_dropped_meanwhile_is_passed_over(
    filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, made_anew: str
) -> None:
    unless_dropped = whole._unless_dropped

    @contextmanager
    def late(folder: Path) -> Iterator[None]:
        def drop() -> None:
            memdb.drop_namespace(filled, "x")
            if made_anew:  # by somebody who is not done
                folder.mkdir()

        if folder.name == "x" and made_anew == "before":
            drop()
        with unless_dropped(folder):
            if folder.name == "x" and made_anew != "before":
                drop()
            yield

    monkeypatch.setattr(whole, "_unless_dropped", late)
    outcome = CARE[name](filled, tmp_path)
    if name in ("verify", "repair"):
        assert outcome == []
    assert contents(filled) == {"": ["d0"], "y": ["d2"]}
    if name == "backup":
        assert contents(tmp_path / "copy") == {"": ["d0"], "y": ["d2"]}


def test_one_that_is_dropped_while_they_are_listed_is_not_listed(
    filled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Path.read_text

    def late(file: Path, *more: Any, **other: Any) -> str:
        if file == filled / "namespaces" / "x" / "CURRENT":
            monkeypatch.undo()
            memdb.drop_namespace(filled, "x")
        return read(file, *more, **other)

    monkeypatch.setattr(Path, "read_text", late)
    assert memdb.list_namespaces(filled) == ["y"]
    (filled / "namespaces" / "y" / "CURRENT").write_text("nothing")
    with pytest.raises(NotADatabaseError, match="namespaces/y"):  # damage is told
        memdb.list_namespaces(filled)


def test_what_a_killed_drop_left_goes_with_a_compaction(filled: Path) -> None:
    """It holds what was deleted."""
    gone = filled / "namespaces" / ".0123456789abcdef"
    (filled / "namespaces" / "x").rename(gone)
    assert contents(filled) == {"": ["d0"], "y": ["d2"]}
    memdb.compact(filled)
    assert not gone.exists()
    assert contents(filled) == {"": ["d0"], "y": ["d2"]}


def test_they_are_of_the_database_that_is_open_wherever_the_process_goes(
    filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "elsewhere" / filled.name
    shutil.copytree(filled, other)
    monkeypatch.chdir(filled.parent)
    with MemDB.open(filled.name) as db:
        monkeypatch.chdir(other.parent)  # where another one has the same name
        db.drop_namespace("x")
        with db.namespace("new") as one:
            assert len(one) == 0
        with db.namespace("y") as one:
            assert ids(one) == ["d2"]
        assert db.namespaces() == ["new", "y"]
    assert contents(other) == {"": ["d0"], "x": ["d1"], "y": ["d2"]}
    assert contents(filled) == {"": ["d0"], "new": [], "y": ["d2"]}


def test_they_are_of_the_database_that_is_open_whatever_lies_there_now(
    filled: Path, tmp_path: Path
) -> None:
    with MemDB.open(filled) as db:
        filled.rename(tmp_path / "moved")
        shutil.copytree(tmp_path / "moved", filled)
        calls: list[Callable[[], object]] = [
            lambda: db.drop_namespace("x"),
            lambda: db.namespace("x"),
            lambda: db.namespace("new"),
            db.namespaces,
        ]
        for call in calls:
            with pytest.raises(StorageError, match="deleted, moved or replaced"):
                call()
    assert contents(filled) == {"": ["d0"], "x": ["d1"], "y": ["d2"]}


def test_where_there_are_some_there_is_a_database(filled: Path) -> None:
    with pytest.raises(DatabaseExistsError):
        MemDB.create(filled, shape=roped_shape(), dimension=2)
    (filled / "CURRENT").unlink()  # else a new database would have the old ones
    with pytest.raises(StorageError, match="holds 'namespaces'"):
        MemDB.create(filled, shape=roped_shape(), dimension=2)


def test_a_rewrite_reaches_each(tmp_path: Path) -> None:
    path = tmp_path / "db"
    with MemDB.create(path, embedder=WordEmbedder(), writer=TokenWriter()) as db:
        db.insert("The harbour is old.", id="a")
        with db.namespace("x") as one:
            one.insert("Ships come from far.", id="b")
    other = TokenWriter(12)
    report = memdb.rewrite(path, other, embedder=WordEmbedder)
    assert (report.documents, report.memories) == (2, 2)
    with MemDB.open(path, embedder=WordEmbedder(), writer=other) as db, db.namespace("x") as one:
        assert one.shape == db.shape == other.shape
        assert one.get("b").warm == 1
