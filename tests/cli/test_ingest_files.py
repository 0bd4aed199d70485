"""`memdb ingest` of files and folders, and folders that are followed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, Queue

import pytest

from memdb import MemDB
from model_adapter import SentenceEmbedder
from tests.cli.conftest import Run, rows
from tests.cli.small import make_database

PROGRAM = str(Path(sys.executable).parent / "memdb")
TIMEOUT = 120


@pytest.fixture
def database(tmp_path: Path, minilm: SentenceEmbedder) -> None:
    """A database at `db`, of a small model."""
    make_database(tmp_path, minilm)


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    folder = tmp_path / "docs"
    (folder / "guide").mkdir(parents=True)
    (folder / "guide" / "a.md").write_text("# Harbour\n\nThe harbour is old.\n")
    (folder / "b.txt").write_text("Ships come to it.")
    (folder / "faq.csv").write_text("slug,answer\ntide,Twice a day.\n")
    (folder / "x.bin").write_bytes(b"\0")
    return folder


def test_a_folder_comes_in_and_is_summed_up(run: Run, docs: Path, database: None) -> None:
    fields = ("--text-field", "answer", "--id-field", "slug")
    result = run("ingest", "docs", "--cold", *fields)
    assert result.stdout.splitlines() == [
        "3 documents inserted, 0 updated, 0 unchanged; 3 references and 0 memories written",
        "3 documents: 1 text, 1 csv, 1 markdown",
        "passed over: 1 of unknown kind",
    ]
    assert result.stderr == ""
    assert "Twice a day." in run("get", "faq.csv#tide").stdout
    (docs / "b.txt").unlink()
    (report,) = rows(run("ingest", "docs", "--cold", "--prune", "--json", *fields))
    assert report == {
        "inserted": 0, "updated": 0, "unchanged": 2, "references": 0, "memories": 0, "deleted": 1,
        "kinds": {"csv": 1, "markdown": 1}, "passed_over": {"of unknown kind": 1},
        "blank_rows": 0, "notes": [],
    }  # fmt: skip
    result = run("ingest", "docs/guide/a.md", "docs/faq.csv", "-v", *fields)
    assert result.stdout.splitlines()[0].startswith("1 document inserted, 0 updated, 1 unchanged;")
    assert "2 memories written" in result.stdout
    result = run("ingest", "docs", "--cold", "-v", "--exclude", "*.csv", "--include", "*")
    assert result.stdout.splitlines()[2] == "passed over: 1 not included, 1 binary"
    assert "docs/x.bin: it is binary" in result.stderr
    assert "passed over: docs/faq.csv (not included)" in result.stderr


def test_a_bad_file_is_named_and_nothing_is_written(run: Run, docs: Path, database: None) -> None:
    before = rows(run("stats", "--json"))[0]["documents"]
    message = run("ingest", "docs", "--cold", code=2).stderr
    assert "docs/faq.csv: there is no field 'text'; it has 'slug', 'answer'" in message
    (docs / "c.pdf").write_bytes(b"no PDF")
    message = run("ingest", "docs", "--cold", code=2).stderr
    assert "2 files cannot be read, and nothing was written" in message
    assert rows(run("stats", "--json"))[0]["documents"] == before
    result = run("ingest", "docs", "--cold", "--skip-bad")
    assert "2 documents inserted" in result.stdout
    assert "passed over: 2 cannot be read, 1 of unknown kind" in result.stdout
    assert "docs/c.pdf: cannot be read as PDF" in result.stderr


def test_bad_files_make_no_database(run: Run, docs: Path, tmp_path: Path) -> None:
    assert "no field 'text'" in run("ingest", "docs", code=2).stderr
    message = run("ingest", "docs", "--include", "*.bin", code=2).stderr
    assert "'docs' holds no documents (passed over: 3 not included, 1 binary)" in message
    assert "there is no file 'none'" in run("ingest", "docs", "none", code=2).stderr
    assert not (tmp_path / "db").exists()


def test_a_pipe_is_lines_or_what_it_is_said_to_be(run: Run, database: None) -> None:
    message = run("ingest", "-", "--cold", input="Some words.\n", code=2).stderr
    assert "<stdin>, line 1: not JSON" in message
    assert "a pipe holds JSON lines; --format says what else it is" in message
    run("ingest", "-", "--cold", "--format", "text", input="Some words.\n")
    assert "Some words." in run("get", "stdin").stdout
    table = "key,body\nk,One row.\n"
    run("ingest", "-", "--cold", "--format", "csv", "--text-field", "body", input=table)
    assert "One row." in run("get", "stdin#1").stdout
    beir = '{"_id": "7", "title": "T", "text": "Of BEIR."}\n'
    run("ingest", "-", "--cold", input=beir)
    assert "Of BEIR." in run("get", "7").stdout
    assert "'-' is a pipe, and comes alone" in run("ingest", "-", "docs", code=2, input="").stderr


def test_watching_asks_for_folders(run: Run, docs: Path, database: None) -> None:
    message = run("ingest", "docs/b.txt", "--watch", code=2).stderr
    assert "--watch follows folders, and 'docs/b.txt' is none" in message
    assert (
        "leave out --workers" in run("ingest", "docs", "--watch", "--workers", "2", code=2).stderr
    )


def test_a_missing_library_is_named_with_the_extra(
    run: Run, docs: Path, database: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "watchfiles", None)
    message = run("ingest", "docs", "--watch", code=2).stderr
    assert "--watch needs the library watchfiles" in message
    assert "pip install 'explicit-memdb[files]'" in message


# --- following ------------------------------------------------------------------------------------


class Following:
    """`memdb ingest --watch` as a process, and what it says."""

    def __init__(self, *arguments: str, cwd: Path) -> None:
        self.process = subprocess.Popen(
            [PROGRAM, "ingest", *arguments, "--watch", "--cold", "--db", "db"],
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        self._lines: Queue[str] = Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line.rstrip("\n"))

    def until(self, *words: str) -> str:
        """The next line that has all of these."""
        said = []
        end = time.monotonic() + TIMEOUT
        while True:
            try:
                said.append(self._lines.get(timeout=max(end - time.monotonic(), 0.01)))
            except Empty:
                raise AssertionError(f"{words} was not said, but {said}") from None
            if all(word in said[-1] for word in words):
                return said[-1]

    def rest(self) -> list[str]:
        """What was said and not asked for."""
        return [self._lines.get() for _ in range(self._lines.qsize())]


@contextmanager
def following(*arguments: str, cwd: Path) -> Iterator[Following]:
    child = Following(*arguments, cwd=cwd)
    try:
        yield child
        child.process.send_signal(signal.SIGINT)
        child.until("no longer following; what was written stays")
        assert child.process.wait(TIMEOUT) == 0
    finally:
        child.process.kill()


def test_a_folder_is_followed(tmp_path: Path, docs: Path, database: None) -> None:
    (docs / "faq.csv").unlink()
    (docs / ".gitignore").write_text("*.log\n")

    def there() -> dict[str, str]:
        with MemDB.open(tmp_path / "db", read_only=True) as db:
            return {d.id: d.text for d in db.documents(where={"origin.root": {"$exists": True}})}

    with following("docs", "--prune", cwd=tmp_path) as child:
        child.until("2 documents inserted")
        child.until("following 'docs'; Ctrl-C ends it")
        assert {*there()} == {"b.txt", "guide/a.md"}

        (docs / "new.md").write_text("A new text.")
        child.until("docs/new.md: 1 document inserted")
        (docs / "b.txt").write_text("No ships come.")
        child.until("docs/b.txt: 0 documents inserted, 1 updated")
        assert there()["b.txt"] == "No ships come."

        (docs / "bad.json").write_text("[")  # named, and the rest goes on
        child.until("docs/bad.json, line 1: not JSON")
        (docs / "bad.json").write_text('["Good now."]')
        child.until("docs/bad.json: 1 document inserted")

        (docs / "more" / "deep").mkdir(parents=True)
        (docs / "more" / "deep" / "c.txt").write_text("Deep.")
        child.until("docs/more", "1 document inserted")
        (docs / "more").rename(tmp_path / "away")
        child.until("docs/more", "1 deleted")
        (docs / "new.md").unlink()
        child.until("docs/new.md", "1 deleted")
        assert {*there()} == {"b.txt", "guide/a.md", "bad.json#1"}

        child.rest()
        (docs / "unknown.bin").write_bytes(b"\0")
        (docs / "b.txt").touch()
        (docs / "x.log").write_text("ignored")
        (docs / ".gitignore").write_text("/b.txt\n")  # which makes all of the folder look again
        child.until("docs/", "1 deleted")
        assert {*there()} == {"guide/a.md", "bad.json#1"}
        assert child.rest() == []


def test_without_prune_what_went_stays_and_is_said(
    tmp_path: Path, docs: Path, database: None
) -> None:
    (docs / "faq.csv").unlink()
    with following("docs", "--json", cwd=tmp_path) as child:
        assert json.loads(child.until('"inserted": 2'))["kinds"] == {"text": 1, "markdown": 1}
        child.until("following")
        (docs / "temporary~").write_text("of an editor")
        (docs / "temporary~").unlink()
        (docs / "b.txt").unlink()
        line = child.until("gone: docs/b.txt; what was brought in of it stays (--prune deletes it)")
        assert "temporary" not in line
        (docs / "b.txt").write_text("Here again.")
        assert json.loads(child.until('"updated": 1'))["inserted"] == 0


def test_an_empty_folder_may_be_followed(tmp_path: Path, database: None) -> None:
    (tmp_path / "notes").mkdir()
    with following("notes", cwd=tmp_path) as child:
        child.until("0 documents inserted")
        child.until("following 'notes'")
        (tmp_path / "notes" / "first.md").write_text("A first note.")
        child.until("notes/first.md: 1 document inserted")


def test_a_database_in_the_folder_is_not_followed(
    tmp_path: Path, docs: Path, database: None
) -> None:
    (docs / "faq.csv").unlink()
    with following(".", cwd=tmp_path) as child:
        child.until("2 documents inserted")
        child.until("following '.'")
        (docs / "b.txt").write_text("Once.")
        child.until("docs/b.txt: 0 documents inserted, 1 updated")
        time.sleep(1.5)
        assert child.rest() == []
