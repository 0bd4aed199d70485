"""Files into a database: what a second run does, what goes, and what is refused."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from memdb import Files, InvalidInputError, MemDB
from tests.engine.helpers import TokenWriter, WordEmbedder, child
from tests.engine.test_ingest import FailingEmbedder
from tests.files.made import NOTEBOOK, PAGE, pdf, write_docx, write_json, write_parquet


@pytest.fixture
def database(tmp_path: Path) -> Iterator[MemDB]:
    with MemDB.create(tmp_path / "db", embedder=WordEmbedder(), writer=TokenWriter()) as database:
        yield database


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a file of every kind."""
    root = tmp_path / "docs"
    (root / "tables").mkdir(parents=True)
    (root / "a.md").write_text("# Harbour\n\nThe harbour is old.\n")
    (root / "b.txt").write_text("Ships come to it.")
    (root / "c.html").write_text(PAGE)
    (root / "d.rst").write_text("Dues\n====\n\nPaid at once.\n")
    (root / "e.py").write_text("def dues():\n    return 3\n")
    (root / "f.pdf").write_bytes(pdf("The town has a wall."))
    write_docx(root / "g.docx")
    write_json(root / "h.ipynb", NOTEBOOK)
    (root / "tables" / "i.csv").write_text("id,text\nx,First row.\ny,Second row.\n")
    (root / "tables" / "j.tsv").write_text("text\tn\nOnly row.\t5\n")
    write_json(root / "tables" / "k.json", [{"text": "Of an array."}])
    (root / "tables" / "l.jsonl").write_text('{"id": "line", "text": "A line."}\n')
    write_parquet(root / "tables" / "m.parquet", [{"text": "Of Parquet."}])
    return root


def content(database: MemDB) -> dict[str, str]:
    return {document.id: document.text for document in database.documents()}


def state(database: MemDB) -> tuple[Any, ...]:
    """What any write changes."""
    stats = database.stats()
    return stats["changes"], [(d.id, d.version, d.metadata) for d in database.documents()]


def test_a_second_run_writes_nothing(database: MemDB, folder: Path) -> None:
    report = database.ingest(folder)
    assert (report.inserted, report.updated, report.unchanged) == (14, 0, 0)
    kinds = ("code", "csv", "docx", "html", "json", "jsonl", "markdown", "notebook", "parquet")
    assert report.kinds == {**dict.fromkeys((*kinds, "pdf", "rst", "text", "tsv"), 1), "csv": 2}
    assert content(database)["tables/i.csv#x"] == "First row."
    assert database.count({"origin.kind": "pdf"}) == 1
    before = state(database)
    again = database.ingest(folder, prune=True)
    assert (again.unchanged, again.references, again.memories, again.deleted) == (14, 0, 0, 0)
    assert state(database) == before


def test_a_second_run_does_what_changed(database: MemDB, folder: Path) -> None:
    database.ingest(folder)
    versions = {document.id: document.version for document in database.documents()}
    (folder / "b.txt").write_text("No ships come.")
    (folder / "tables" / "i.csv").write_text("id,text,n\nnew,Before.,\nx,First row.,7\n")
    report = database.ingest(folder)
    assert (report.inserted, report.updated, report.unchanged, report.deleted) == (1, 2, 11, 0)
    changed = {d.id for d in database.documents() if versions.get(d.id) != d.version}
    assert changed == {"b.txt", "tables/i.csv#new", "tables/i.csv#x"}
    assert database.get("tables/i.csv#x").metadata["n"] == "7"
    assert database.get("b.txt").warm > 0


def test_prune_deletes_what_went_and_nothing_else(
    database: MemDB, folder: Path, tmp_path: Path
) -> None:
    database.insert("By hand.", id="hand")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "z.txt").write_text("Of another folder.")
    database.ingest(tmp_path / "more")
    database.ingest(folder)
    (folder / "a.md").unlink()
    (folder / "b.txt").write_text("")
    (folder / "e.py").rename(folder / "moved.py")
    (folder / "tables" / "i.csv").write_text("id,text\ny,Second row.\n")
    (folder / "tables" / "l.jsonl").write_text('{"id": "other", "text": "Another."}\n')
    shutil.rmtree(tmp_path / "more")
    before = {*content(database)}
    report = database.ingest(folder, prune=True)
    assert report.deleted == 5
    gone = {"a.md", "b.txt", "e.py", "tables/i.csv#x", "line"}
    assert {*content(database)} == before - gone | {"moved.py", "other"}
    # A folder within it speaks for nothing: its documents are others.
    assert database.ingest(folder / "tables", prune=True).deleted == 0


def test_prune_speaks_for_no_more_than_was_read(database: MemDB, folder: Path) -> None:
    database.ingest(folder)
    everything = {*content(database)}
    assert database.ingest(Files(folder, include=["*.md"]), prune=True).deleted == 0
    assert database.ingest(Files(folder, exclude=["tables/"]), prune=True).deleted == 0
    (folder / "f.pdf").write_bytes(b"%PDF, half of it")
    write_json(folder / "h.ipynb", [])
    (folder / "tables" / "i.csv").write_text("id,text\nx,a\nx,b\n")
    assert database.ingest(Files(folder, skip_bad=True), prune=True).deleted == 0
    assert {*content(database)} == everything
    (folder / "b.txt").unlink()
    (folder / "d.rst").unlink()
    assert database.ingest(Files(folder, only=[folder / "b.txt"]), prune=True).deleted == 1
    assert database.ingest(Files(folder, only=[folder / "a.md"]), prune=True).deleted == 0
    assert {*content(database)} == everything - {"b.txt"}
    shutil.rmtree(folder / "tables")
    tables = {id for id in everything if id.startswith("tables/") or id == "line"}
    report = database.ingest(Files(folder, only=[folder / "tables"]), prune=True)
    assert (report.deleted, report.unchanged) == (len(tables), 0)
    assert {*content(database)} == everything - tables - {"b.txt"}


def test_prune_of_what_is_ignored_now(database: MemDB, folder: Path) -> None:
    database.ingest(folder)
    (folder / ".gitignore").write_text("/b.txt\n")
    assert database.ingest(folder, prune=True).deleted == 1
    assert "b.txt" not in content(database)


def test_prune_of_one_file_is_of_this_file(database: MemDB, folder: Path) -> None:
    database.ingest([folder / "tables" / "i.csv", folder / "tables" / "j.tsv"])
    assert {*content(database)} == {"i.csv#x", "i.csv#y", "j.tsv#1"}
    (folder / "tables" / "i.csv").write_text("id,text\ny,Second row.\n")
    assert database.ingest(folder / "tables" / "i.csv", prune=True).deleted == 1
    assert {*content(database)} == {"i.csv#y", "j.tsv#1"}


def test_an_emptied_folder_deletes_nothing(database: MemDB, folder: Path) -> None:
    database.ingest(folder)
    shutil.rmtree(folder)
    folder.mkdir()
    with pytest.raises(InvalidInputError, match="docs' holds no documents"):
        database.ingest(folder, prune=True)
    assert len(database) == 14


def test_lines_given_by_name_prune_what_came_from_no_file(
    database: MemDB, folder: Path, tmp_path: Path
) -> None:
    """As ever; but documents of other files are not theirs."""
    database.insert("By hand.", id="hand")
    database.ingest(folder)
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"id": "one", "text": "One."}\n{"id": "two", "text": "Two."}\n')
    report = database.ingest(corpus, prune=True)
    assert (report.inserted, report.deleted, report.kinds) == (2, 1, {"jsonl": 2})
    assert len(database) == 16
    corpus.write_text('{"id": "two", "text": "Two."}\n')
    assert database.ingest(corpus, prune=True).deleted == 1
    assert database.ingest([corpus, folder], prune=True).deleted == 0
    database.insert("By hand.", id="hand")
    assert database.ingest([corpus, folder], prune=True).deleted == 1
    assert len(database) == 15


# --- whose a document is --------------------------------------------------------------------------


def test_a_path_replaces_nothing_of_another_place(
    database: MemDB, folder: Path, tmp_path: Path
) -> None:
    database.insert("Mine.", id="b.txt")
    before = state(database)
    with pytest.raises(InvalidInputError) as caught:
        database.ingest(folder)
    assert "the id 'b.txt' is taken by a document that came from no file" in str(caught.value)
    assert "namespace" in str(caught.value)
    assert state(database) == before
    database.delete("b.txt")
    database.ingest(folder)
    other = tmp_path / "other"
    other.mkdir()
    (other / "b.txt").write_text("Of another folder.")
    before = state(database)
    with pytest.raises(InvalidInputError, match=f"is taken by a document from '{folder}'"):
        database.ingest(other)
    assert state(database) == before
    with database.namespace("other") as inner:
        assert inner.ingest(other).inserted == 1
    # A line says itself which document it is.
    (tmp_path / "c.jsonl").write_text('{"id": "b.txt", "text": "Replaced."}\n')
    assert database.ingest(tmp_path / "c.jsonl").updated == 1


def test_a_folder_that_was_moved_keeps_its_documents(database: MemDB, folder: Path) -> None:
    database.ingest(folder)
    there = {d.id: d.references for d in database.documents()}
    moved = folder.rename(folder.parent / "moved")
    report = database.ingest(moved)
    assert (report.inserted, report.updated, report.references) == (0, 14, 0)
    assert {d.id: d.references for d in database.documents()} == there
    assert database.get("a.md").metadata["origin"]["root"] == str(moved)


# --- all or nothing, and interruptions ------------------------------------------------------------


def test_nothing_is_written_if_one_file_is_bad(database: MemDB, folder: Path) -> None:
    (folder / "zz.csv").write_text("id,text\n1,a\n1,b\n")
    told: list[str] = []
    with pytest.raises(InvalidInputError, match=r"zz\.csv, line 3: the id"):
        database.ingest(folder, progress=lambda stage, *_: told.append(stage))
    assert len(database) == 0
    assert set(told) == {"reading files"}
    report = database.ingest(Files(folder, skip_bad=True))
    assert report.inserted == 14
    assert report.passed_over == {"cannot be read": 1}
    (note,) = report.notes
    assert "zz.csv, line 3: the id" in note


def test_a_report_says_what_was_passed_over(database: MemDB, folder: Path) -> None:
    (folder / "blank.txt").write_text("\n")
    (folder / "x.bin").write_bytes(b"\0")
    (folder / "x.txt").write_bytes(b"a\0")
    (folder / "old.txt").write_bytes("Grüße".encode("latin-1"))
    (folder / "tables" / "i.csv").write_text("id,text\nx,\ny,Second row.\n")
    report = database.ingest(folder)
    assert report.passed_over == {"empty": 1, "of unknown kind": 1, "binary": 1}
    assert report.blank_rows == 1
    assert sorted(note.rpartition("/")[2].partition(":")[0] for note in report.notes) == [
        *("blank.txt", "old.txt", "x.txt")
    ]
    json.dumps(vars(report))


def test_an_interrupted_ingest_of_files_goes_on(database: MemDB, tmp_path: Path) -> None:
    root = tmp_path / "many"
    root.mkdir()
    for number in range(150):
        (root / f"{number:03}.txt").write_text(f"{number}. The harbour is old.")
    with (
        MemDB.open(database.path, embedder=FailingEmbedder(2, KeyboardInterrupt())) as breaking,
        pytest.raises(KeyboardInterrupt),
    ):
        breaking.ingest(root)
    there = len(database)
    assert 0 < there < 150
    report = database.ingest(root)
    assert (report.inserted, report.unchanged, report.memories) == (150 - there, there, 150)


KILLED = """
import os, signal, sys
from memdb import MemDB
from tests.engine.helpers import TokenWriter, WordEmbedder

class Embedder(WordEmbedder):
    calls = 0

    def embed(self, texts, *, query=False):
        self.calls += 1
        if self.calls == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().embed(texts, query=query)

with MemDB.open(sys.argv[1], embedder=Embedder(), writer=TokenWriter()) as database:
    database.ingest(sys.argv[2])
"""


def test_a_killed_ingest_of_files_goes_on(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [{"text": f"Row {n}."} for n in range(100)])
    MemDB.create(tmp_path / "db", embedder=WordEmbedder(), writer=TokenWriter()).close()
    done = child(KILLED, tmp_path / "db", tmp_path / "a.parquet")
    assert done.returncode == -signal.SIGKILL, done.stderr
    with MemDB.open(tmp_path / "db", embedder=WordEmbedder(), writer=TokenWriter()) as database:
        there = len(database)
        assert 0 < there < 100
        assert database.ingest(tmp_path / "a.parquet").inserted == 100 - there


# --- in a program ---------------------------------------------------------------------------------


def test_files_are_documents_to_insert(database: MemDB, folder: Path) -> None:
    database.insert_many(Files(folder), cold=True)
    assert len(database) == 14
    report = database.ingest(folder)
    assert (report.unchanged, report.memories) == (14, report.memories)
    assert report.memories > 0


def test_what_was_gathered_may_be_looked_at_first(database: MemDB, folder: Path) -> None:
    with Files(folder, include=["*.csv"]).gather() as gathered:
        gathered.check()
        assert gathered.kinds == {"csv": 2}
        assert len(list(gathered)) == 2
        assert database.ingest(gathered).inserted == 2
    with pytest.raises(InvalidInputError, match="name is an argument of `Files`"):
        database.ingest(Files(folder), name="docs")


def test_a_pipe_has_a_name_of_its_own(database: MemDB, tmp_path: Path) -> None:
    (tmp_path / "copy").write_text("id,text\nx,Row.\n")
    files = Files(tmp_path / "copy", format="csv", name="<stdin>")
    assert database.ingest(files).inserted == 1
    assert database.get("stdin#x").metadata["origin"]["root"] == "<stdin>"
    (tmp_path / "copy").write_text("id,text\ny,Row.\n")
    assert database.ingest(files, prune=True).deleted == 1
    assert [*database] == ["stdin#y"]


def test_a_document_may_come_back_out_and_in(database: MemDB, folder: Path, tmp_path: Path) -> None:
    """As lines, with all that is in the metadata."""
    database.ingest(folder)
    lines = [
        json.dumps({"id": d.id, "text": d.text, "metadata": d.metadata})
        for d in database.documents()
    ]
    (tmp_path / "all.jsonl").write_text("\n".join(lines))
    before = state(database)
    assert database.ingest(tmp_path / "all.jsonl").unchanged == 14
    assert database.ingest(folder).unchanged == 14
    assert state(database) == before
