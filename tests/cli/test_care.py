"""Looking after a database from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import lmdb
import numpy as np
import pytest
from safetensors.numpy import save_file

from memdb import MemDB
from tests.cli.conftest import Run, rows
from tests.engine.helpers import make_memory, make_shape, unit
from tests.engine.test_waiting import WRITES as WRITING
from tests.engine.test_waiting import another_process


@pytest.fixture
def db(tmp_path: Path) -> Path:
    """A database without parts, of six documents; every other one has a memory."""
    path = tmp_path / "db"
    shape = make_shape()
    with MemDB.create(path, shape=shape, dimension=2, keys=["year"]) as database:
        for n in range(6):
            database.insert(
                f"Text number {n}.",
                id=f"doc-{n}",
                metadata={"year": 1990 + n, "kind": "note" if n % 2 else "fact"},
                embeddings=unit(1, n),
                memories=[make_memory(shape, n)] if n % 2 else None,
            )
    return path


def damage(path: Path, table: str, key: bytes) -> None:
    """Turn a byte of a record, as a bad disk would."""
    (generation,) = path.glob("gen-*")
    with lmdb.open(str(generation), max_dbs=16) as environment:
        handle = environment.open_db(table.encode(), integerkey=len(key) == 8)
        with environment.begin(write=True) as transaction:
            record = bytearray(transaction.get(key, db=handle))
            record[-1] ^= 1
            transaction.put(key, bytes(record), db=handle)


def documents(run: Run, *options: str) -> list[tuple[str, str, int]]:
    listed = rows(run("list", "--json", *options))
    return [(row["id"], row["text"], row["warm"]) for row in listed]


def test_verify_says_what_is_wrong_and_repair_mends_it(run: Run, db: Path) -> None:
    assert run("verify").stdout == "nothing is wrong\n"
    assert run("verify", "--json").stdout == ""
    assert run("repair").stdout == "nothing was wrong\n"
    damage(db, "memories", (2).to_bytes(8, "little"))
    result = run("verify", code=1)
    assert "memories, record 2 (document 'doc-1'): its checksum does not match" in result.stdout
    assert "1 problem; `memdb repair" in result.stderr
    (row,) = rows(run("verify", "--json", code=1))
    assert (row["table"], row["key"], row["document"]) == ("memories", "2", "doc-1")
    told = run("repair").stdout
    assert "mended: the memory of reference 2" in told
    assert "put aside: memories, record 2\n" in told
    (file,) = db.glob("gen-*/aside-*.jsonl")
    assert f"they are in '{file}'; `memdb compact` removes it" in told
    run("verify")
    assert documents(run)[1] == ("doc-1", "Text number 1.", 0)


def test_what_is_lost_is_named_and_deleted_only_when_asked(run: Run, db: Path) -> None:
    damage(db, "references", (3).to_bytes(8, "little"))
    result = run("repair", code=1)
    assert "left: references, record 3 (document 'doc-2')" in result.stdout
    assert "--drop-damaged deletes their documents" in result.stderr
    told = run("repair", "--drop-damaged", "--aside", str(db.parent / "kept")).stdout
    assert "deleted: document 'doc-2'" in told
    assert f"they are in '{db.parent / 'kept' / 'aside-000001.jsonl'}'\n" in told
    assert "put aside: references, record 3" in told
    run("verify")
    assert [name for name, _, _ in documents(run)] == [f"doc-{n}" for n in (0, 1, 3, 4, 5)]


def test_compact_gives_space_back(run: Run, db: Path) -> None:
    before = documents(run)
    run("delete", "doc-0")
    assert "bytes before" in run("compact").stdout
    assert documents(run) == before[1:]
    run("verify")
    assert [entry.name for entry in db.glob("gen-*")] == ["gen-000002"]


def test_a_backup_comes_back(run: Run, db: Path, tmp_path: Path) -> None:
    before = documents(run)
    assert "bytes written to 'copy'" in run("backup", "copy").stdout
    run("verify", "--db", "copy")
    run("delete", "doc-0")
    run("restore", "copy", code=1, input="n\n")
    assert documents(run) == before[1:]
    run("restore", "copy", "--yes")
    assert documents(run) == before
    run("restore", "copy", "--db", "another")
    assert documents(run, "--db", "another") == before
    assert "there is already a database" in run("backup", "copy", code=2).stderr
    assert "no database at 'nowhere'" in run("restore", "nowhere", "--yes", code=2).stderr
    damage(tmp_path / "copy", "memories", (2).to_bytes(8, "little"))
    refused = run("restore", "copy", "--yes", code=2).stderr
    assert "is damaged" in refused
    assert "nothing was restored" in refused
    assert documents(run) == before


@pytest.mark.parametrize("options", [(), ("--arrays",)])
def test_an_export_comes_back_as_the_same_database(
    run: Run, db: Path, options: tuple[str, ...]
) -> None:
    before = rows(run("list", "--json"))
    assert "6 documents written to 'files'" in run("export", "files", *options).stdout
    assert "is not empty" in run("export", "files", code=2).stderr
    result = run("import", "files", "--db", "new")
    assert "6 inserted, 0 updated, 0 unchanged; 6 references and 3 memories" in result.stdout
    assert "6 unchanged; 0 references" in run("import", "files", "--db", "new").stdout
    assert rows(run("list", "--json", "--db", "new")) == before
    run("verify", "--db", "new")
    assert "year" in run("stats", "--db", "new").stdout
    assert "is no export" in run("import", "new", code=2).stderr


def test_arrays_that_were_computed_elsewhere_come_in(run: Run, db: Path, tmp_path: Path) -> None:
    folder = tmp_path / "arrays"
    folder.mkdir()
    lines = [{"id": f"new-{n}", "text": f"New {n}."} for n in range(3)]
    (folder / "part-00001.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tensors = {"embeddings": np.eye(3, 2, dtype=np.float32) + np.float32(0.1)}
    save_file(tensors, folder / "part-00001.safetensors")
    manifest = {
        "format": "memdb-export", "version": 1, "parts": 1, "documents": 3, "references": 3
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert "3 inserted" in run("import", "arrays").stdout
    assert len(documents(run)) == 9
    run("verify")
    refused = run("import", "arrays", "--db", "new", code=2)
    assert "make one with `memdb init`" in refused.stderr
    assert not (tmp_path / "new").exists()


def test_an_index_of_another_kind(run: Run, db: Path) -> None:
    assert "search is exact" in run("index").stdout
    assert "indexed: kind" in run("index", "--key", "kind").stdout
    assert "metadata keys: year, kind" in run("stats").stdout
    with MemDB.open(db) as database:
        for n in range(100):
            database.insert(f"More {n}.", id=f"more-{n}", embeddings=unit(n + 1, 1))
    result = run("index", "--kind", "ivf", "--recall", "0.9")
    assert "106 references in" in result.stdout
    assert "106 references in" in run("stats").stdout
    assert "recall" in run("index", "--recall", "1.5", code=2).stderr
    assert "metadata key" in run("index", "--key", "x" * 65, code=2).stderr
    run("verify")


@pytest.mark.parametrize(
    ("conditions", "found"),
    [
        (["year>=1994"], [4, 5]),
        (["year>1994"], [5]),
        (["year<1992"], [0, 1]),
        (["year<=1992", "year>1990"], [1, 2]),
        (["year in [1991, 1995, 7]"], [1, 5]),
        (["kind=fact", "year>=1991"], [2, 4]),
        (["kind>=g"], [1, 3, 5]),
        (['{"$or": [{"year": 1990}, {"year": {"$gt": 1994}}]}'], [0, 5]),
        (['{"$or": [{"year": 1990}, {"year": {"$gt": 1994}}]}', "kind=note"], [5]),
        (["year>1990", ' {"$not": {"kind": "note"}}', '{"year": {"$nin": [1994]}}'], [2]),
        (['{"gone": {"$exists": false}, "year": {"$in": [1992, 1993]}}'], [2, 3]),
        (["{}"], [0, 1, 2, 3, 4, 5]),
        (["kind="], []),
        (['kind!=""'], [0, 1, 2, 3, 4, 5]),
        (["kind!="], None),
        (["kind>= "], None),
        (["year in "], None),
        (['{"year": 1990} x'], None),
        (['{"year": 1990, "year": 1991}'], None),
        (['{"year": {"$gte": 1990, "$gte": 1991}}'], None),
        (['{"year": {"$foo": 1}}'], None),
        (['{"$or": []}'], None),
        (["{'year': 1990}"], None),
        (['{"year": NaN}'], None),
        (["{"], None),
        (['{"a":' * 20_000], None),
        (["kind=fact", "kind=note"], None),
        (["year in 5"], None),
        (["year"], None),
        (["=5"], None),
    ],
)
def test_conditions_on_metadata(
    run: Run, db: Path, conditions: list[str], found: list[int] | None
) -> None:
    options = [word for condition in conditions for word in ("--where", condition)]
    if found is None:
        assert "Error" in run("list", *options, code=2).stderr
    else:
        assert [name for name, _, _ in documents(run, *options)] == [f"doc-{n}" for n in found]


def test_a_filter_in_json_that_is_wrong_says_where(run: Run, db: Path) -> None:
    for command in (("list",), ("delete", "--yes")):
        message = run(*command, "--where", '{"year": 1990,}', code=2).stderr
        assert "filter in JSON" in message
        assert "line 1 column 15" in message
        message = run(*command, "--where", '{"year": 1990, "year": 1991}', code=2).stderr
        assert "the name 'year' is there twice" in message
    assert len(documents(run)) == 6


@pytest.mark.parametrize("where", ["{}", '{"$or": [{}]}', '{"year": {"$nin": []}}'])
def test_a_filter_that_says_nothing_deletes_nothing(run: Run, db: Path, where: str) -> None:
    message = run("delete", "--where", where, "--yes", code=2).stderr
    assert "this filter means every document" in message
    assert len(documents(run)) == 6


def test_what_a_filter_in_json_means_is_deleted(run: Run, db: Path) -> None:
    where = '{"$or": [{"year": 1990}, {"year": {"$gt": 1993}}]}'
    message = run("delete", "--where", where, code=2).stderr
    assert "3 documents found; --yes deletes what is found" in message
    assert len(documents(run)) == 6
    assert (
        "at version 1, not 2"
        in run("delete", "--where", where, "--yes", "--if-version", "2", code=2).stderr
    )
    gone = rows(run("delete", "--where", where, "--where", "kind=fact", "--yes", "--json"))
    assert gone == [{"deleted": "doc-0"}, {"deleted": "doc-4"}]
    assert [name for name, _, _ in documents(run)] == ["doc-1", "doc-2", "doc-3", "doc-5"]
    assert run("delete", "--where", where, "--where", "kind=fact", "--yes").stdout.startswith("0 ")


WRITES: list[list[str]] = [
    ["delete", "doc-1"],
    ["delete", "--where", "year=1990", "--yes"],
    ["index", "--key", "kind"],
    ["index", "--kind", "exact"],
    ["recode", "--codec", "exact"],
    ["compact"],
    ["migrate"],
    ["verify"],
    ["backup", "copy"],
    ["restore", "whole", "--yes"],
    ["import", "out"],
    ["namespace", "create", "new"],
    ["repair"],
    ["calibrate", "--reset"],
]


@pytest.mark.parametrize("command", WRITES, ids=" ".join)
def test_a_command_waits_for_a_writer_as_long_as_it_is_told(
    run: Run, db: Path, command: list[str]
) -> None:
    run("backup", "whole")
    run("export", "out")
    before = documents(run)
    with another_process(WRITING, db):
        message = run(*command, "--busy-timeout", "0.05", code=2).stderr
        assert "is writing, and was not done after 0.05 s" in message
        message = run(*command, "--busy-timeout", "-1", code=2).stderr
        assert "--busy-timeout" in message
        run(*command, "--busy-timeout", "nan", code=2)
    assert documents(run) == before
    run(*command, "--busy-timeout", "10")


def test_what_is_read_alone_changes_no_file(run: Run, db: Path, tmp_path: Path) -> None:
    files = {file for file in db.rglob("*") if file.is_file()} - {*db.rglob("lock.mdb")}
    before = {file: file.read_bytes() for file in files}
    times = {file: file.stat().st_mtime_ns for file in before}
    for command in (
        ["get", "doc-1"],
        ["list", "--where", "year>1990"],
        ["stats", "--json"],
        ["export", "out"],
        ["query", "number", "--mode", "keyword"],
    ):
        run(*command, "--read-only")
    assert {file: file.stat().st_mtime_ns for file in before} == times
    assert {file: file.read_bytes() for file in before} == before


def test_what_there_is_no_database_for(run: Run) -> None:
    for command in ("verify", "compact", "migrate", "index", "repair"):
        assert "there is no database at" in run(command, code=2).stderr
    assert "there is no database at" in run("export", "x", code=2).stderr
    assert "there is no database at" in run("backup", "x", code=2).stderr
    assert "is no export" in run("import", "x", code=2).stderr


def test_a_database_that_is_up_to_date(run: Run, db: Path) -> None:
    assert run("migrate").stdout == "it has format version 2 already\n"


def test_namespaces_from_the_command_line(run: Run, db: Path) -> None:
    assert run("namespace", "list").stdout == ""
    result = run("list", "--namespace", "alice", code=2)
    assert "has no namespace 'alice'; there is none yet. `memdb namespace create`" in result.stderr
    assert run("namespace", "create", "alice").stdout.strip().endswith("namespaces/alice")
    assert rows(run("namespace", "list", "--json")) == [{"namespace": "alice"}]
    assert documents(run, "--namespace", "alice") == []
    assert len(documents(run)) == 6
    assert rows(run("stats", "--json", "--namespace", "alice"))[0]["documents"] == 0
    assert run("delete", "doc-1", "--namespace", "alice", code=2).stderr
    assert len(documents(run)) == 6
    assert run("verify").stdout == "nothing is wrong\n"
    assert "is gone" in run("namespace", "drop", "alice", "--yes").stdout
    assert run("namespace", "drop", "alice", "--yes", code=2).stderr
    assert not list((db / "namespaces").iterdir())
