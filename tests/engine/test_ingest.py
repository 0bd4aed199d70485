from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from memdb import (
    CorpusError,
    ExplicitMemory,
    IngestReport,
    InvalidInputError,
    MemDB,
    MismatchError,
    MissingPartError,
    rewrite,
)
from tests.engine.helpers import (
    PAGE,
    TokenWriter,
    WordEmbedder,
    child,
    make_shape,
    write_corpus,
)

SENTENCES = [sentence.strip() for sentence in PAGE.replace("\n", " ").split(".")][:-1]


class CountingEmbedder(WordEmbedder):
    """Counts the texts it embedded."""

    def __init__(self) -> None:
        self.texts = 0

    def embed(self, texts: Sequence[str], *, query: bool = False) -> NDArray[np.float32]:
        self.texts += len(texts)
        return super().embed(texts, query=query)


@pytest.fixture
def embedder() -> CountingEmbedder:
    return CountingEmbedder()


@pytest.fixture
def database(tmp_path: Path, embedder: CountingEmbedder, full_template: Path) -> Iterator[MemDB]:
    path = shutil.copytree(full_template, tmp_path / "db")
    with MemDB.open(path, embedder=embedder, writer=TokenWriter()) as database:
        yield database


def lines(count: int = 5) -> list[dict[str, Any]]:
    """Documents of one or two references."""
    return [
        {"id": f"{n:04}", "text": f"{n}. {SENTENCES[n % len(SENTENCES)]}.", "metadata": {"n": n}}
        for n in range(count)
    ]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "corpus.jsonl", lines())


def content(database: MemDB) -> dict[str, Any]:
    """What a database holds, without ids and versions."""
    return {
        document.id: (document.text, document.metadata, len(document.references), document.warm)
        for document in database.documents()
    }


def complete(corpus: Path, database: MemDB) -> dict[str, Any]:
    """What a database must hold after a whole ingest, by splitting each line for itself."""
    documents = [json.loads(line) for line in corpus.read_text().splitlines()]
    wanted = {}
    for document in documents:
        count = len(database.split(document["text"]))
        wanted[document["id"]] = (document["text"], document["metadata"], count, count)
    return wanted


def assert_whole(database: MemDB, corpus: Path) -> None:
    """Everything of the corpus is there, once, warm, and found."""
    wanted = complete(corpus, database)
    references = sum(count for _, _, count, _ in wanted.values())
    assert content(database) == wanted
    stats = database.stats()
    assert (stats["references"], stats["memories"]) == (references, references)
    found = database.retrieve("the", 10_000).hits
    assert len({hit.reference.id for hit in found}) == len(found) == references
    assert all(hit.memory is not None for hit in found)


# --- what it does ---------------------------------------------------------------------------------


def test_a_corpus_comes_in_whole(database: MemDB, corpus: Path) -> None:
    report = database.ingest(corpus)
    references = database.stats()["references"]
    assert report == IngestReport(5, 0, 0, references, references)
    assert_whole(database, corpus)


def test_the_same_corpus_again_changes_nothing(
    database: MemDB, corpus: Path, embedder: CountingEmbedder
) -> None:
    database.ingest(corpus)
    before, changes, texts = list(database.documents()), database.stats()["changes"], embedder.texts
    assert database.ingest(corpus) == IngestReport(0, 0, 5, 0, 0)
    assert list(database.documents()) == before
    assert database.stats()["changes"] == changes
    assert embedder.texts == texts


def test_the_same_corpus_in_another_order_with_more_brings_the_rest(
    database: MemDB, corpus: Path
) -> None:
    database.ingest(corpus)
    write_corpus(corpus, reversed(lines(8)))
    report = database.ingest(corpus)
    assert (report.inserted, report.updated, report.unchanged) == (3, 0, 5)
    assert_whole(database, corpus)


def test_a_changed_document_is_updated_and_no_other(
    database: MemDB, corpus: Path, embedder: CountingEmbedder
) -> None:
    database.ingest(corpus)
    before = {document.id: document for document in database.documents()}
    texts = embedder.texts
    changed = lines()
    changed[2]["text"] = "Quite another text."
    write_corpus(corpus, changed)
    assert database.ingest(corpus) == IngestReport(0, 1, 4, 1, 1)
    assert embedder.texts == texts + 1
    after = {document.id: document for document in database.documents()}
    assert after["0002"].version == 2
    assert not set(after["0002"].references) & set(before["0002"].references)
    assert {k: v for k, v in after.items() if k != "0002"} == {
        k: v for k, v in before.items() if k != "0002"
    }
    assert_whole(database, corpus)


def test_changed_metadata_keeps_references_and_memories(
    database: MemDB, corpus: Path, embedder: CountingEmbedder
) -> None:
    database.ingest(corpus)
    before, texts = database.get("0002"), embedder.texts
    changed = lines()
    changed[2]["metadata"] = {"n": True}
    write_corpus(corpus, changed)
    assert database.ingest(corpus) == IngestReport(0, 1, 4, 0, 0)
    after = database.get("0002")
    assert (after.version, after.metadata) == (2, {"n": True})
    assert after.references == before.references
    assert embedder.texts == texts
    assert_whole(database, corpus)


def test_a_document_that_is_no_longer_in_the_corpus_stays(database: MemDB, corpus: Path) -> None:
    database.ingest(corpus)
    write_corpus(corpus, lines(2))
    assert database.ingest(corpus).unchanged == 2
    assert len(content(database)) == 5


def test_cold_first_and_warm_later(database: MemDB, corpus: Path) -> None:
    cold = database.ingest(corpus, cold=True)
    assert (cold.inserted, cold.memories, database.stats()["memories"]) == (5, 0, 0)
    assert database.ingest(corpus, cold=True) == IngestReport(0, 0, 5, 0, 0)
    database.insert("This one is not in the corpus.", id="x", cold=True)
    warm = database.ingest(corpus)
    assert warm == IngestReport(0, 0, 5, 0, cold.references)
    assert database.get("x").warm == 0
    assert database.ingest(corpus).memories == 0


def test_without_a_writer_it_stays_cold(database: MemDB, corpus: Path) -> None:
    with MemDB.open(database.path, embedder=WordEmbedder()) as unable:
        assert unable.ingest(corpus).memories == 0
    assert database.ingest(corpus).memories == database.stats()["references"]
    assert_whole(database, corpus)


def test_without_an_embedder_nothing_is_written(tmp_path: Path, corpus: Path) -> None:
    with MemDB.create(tmp_path / "bare", shape=make_shape(), dimension=2) as bare:
        with pytest.raises(MissingPartError, match="without an embedder"):
            bare.ingest(corpus)
        assert bare.stats()["documents"] == 0


def test_lines_without_an_id_are_known_by_their_text(database: MemDB, corpus: Path) -> None:
    write_corpus(corpus, [{"text": line["text"]} for line in lines()])
    assert database.ingest(corpus).inserted == 5
    write_corpus(corpus, [{"text": line["text"], "metadata": {"x": 1}} for line in lines(6)])
    report = database.ingest(corpus)
    assert (report.inserted, report.updated) == (1, 5)


def test_a_document_of_many_batches_comes_in_whole(database: MemDB, corpus: Path) -> None:
    long = " ".join(f"{n} {sentence}." for n in range(20) for sentence in SENTENCES)
    write_corpus(
        corpus,
        [
            {"id": "short", "text": "The harbour.", "metadata": {}},
            {"id": "long", "text": long, "metadata": {}},
            {"id": "last", "text": "The town.", "metadata": {}},
        ],
    )
    report = database.ingest(corpus)
    assert report.references > 200
    assert_whole(database, corpus)


def test_progress_is_told_from_beginning_to_end(database: MemDB, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "many.jsonl", lines(150))
    told: list[tuple[str, int, int]] = []
    report = database.ingest(corpus, progress=lambda *step: told.append(step))
    for stage, total in (("embedding", report.references), ("writing memories", report.memories)):
        steps = [(done, of) for name, done, of in told if name == stage]
        assert steps[0] == (0, total)
        assert steps[-1] == (total, total)
        assert steps == sorted(steps)
        assert len(steps) > 2


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        ({"id": "x"}, "line 151: the field 'text' is missing"),
        ({"id": "0000", "text": "a"}, "line 151: the id '0000' is already used in line 1"),
    ],
)
def test_nothing_is_written_when_a_later_line_is_bad(
    database: MemDB,
    tmp_path: Path,
    embedder: CountingEmbedder,
    bad: dict[str, Any],
    problem: str,
) -> None:
    database.insert("The harbour is old.", id="0001")
    before, changes, texts = content(database), database.stats()["changes"], embedder.texts
    corpus = write_corpus(tmp_path / "bad.jsonl", [*lines(150), bad, *lines(1)])
    with pytest.raises(CorpusError, match=problem) as caught:
        database.ingest(corpus)
    assert caught.value.line == 151
    assert content(database) == before
    assert (database.stats()["changes"], embedder.texts) == (changes, texts)


def test_errors_call_the_corpus_what_the_caller_calls_it(database: MemDB, corpus: Path) -> None:
    corpus.write_text("?")
    with pytest.raises(CorpusError, match=r"^<stdin>, line 1"):
        database.ingest(corpus, name="<stdin>")


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_an_empty_corpus_is_an_error(database: MemDB, corpus: Path, text: str) -> None:
    corpus.write_text(text)
    with pytest.raises(InvalidInputError, match=r"corpus\.jsonl' holds no documents"):
        database.ingest(corpus)


@pytest.mark.parametrize("name", ["missing.jsonl", "missing/corpus.jsonl"])
def test_a_corpus_that_is_not_there_is_an_error(database: MemDB, tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidInputError, match="there is no file"):
        database.ingest(tmp_path / name)


# --- interruptions --------------------------------------------------------------------------------


class FailingEmbedder(WordEmbedder):
    """Raises at its n-th call."""

    def __init__(self, calls: int, error: BaseException) -> None:
        self.left = calls
        self.error = error

    def embed(self, texts: Sequence[str], *, query: bool = False) -> NDArray[np.float32]:
        self.left -= 1
        if self.left == 0:
            raise self.error
        return super().embed(texts, query=query)


class FailingWriter(TokenWriter):
    """Raises at its n-th call."""

    def __init__(self, calls: int, error: BaseException) -> None:
        super().__init__()
        self.left = calls
        self.error = error

    def write(self, texts: Sequence[str]) -> list[ExplicitMemory]:
        self.left -= 1
        if self.left == 0:
            raise self.error
        return super().write(texts)


@pytest.mark.parametrize(
    ("calls", "error"),
    [(1, RuntimeError("no more memory")), (2, KeyboardInterrupt()), (3, RuntimeError("again"))],
)
def test_an_embedder_that_breaks_midway_costs_one_batch(
    database: MemDB, tmp_path: Path, calls: int, error: BaseException
) -> None:
    corpus = write_corpus(tmp_path / "many.jsonl", lines(150))
    with (
        MemDB.open(database.path, embedder=FailingEmbedder(calls, error)) as breaking,
        pytest.raises(type(error)),
    ):
        breaking.ingest(corpus)
    there = content(database)
    assert (len(there) > 0) == (calls > 1)
    assert list(there) == sorted(complete(corpus, database))[: len(there)]
    report = database.ingest(corpus)
    assert (report.inserted, report.unchanged) == (150 - len(there), len(there))
    assert_whole(database, corpus)


@pytest.mark.parametrize(
    ("calls", "error"),
    [(1, RuntimeError("no more memory")), (2, KeyboardInterrupt()), (4, RuntimeError("again"))],
)
def test_a_writer_that_breaks_midway_costs_one_batch(
    database: MemDB, tmp_path: Path, calls: int, error: BaseException
) -> None:
    corpus = write_corpus(tmp_path / "many.jsonl", lines(40))
    failing = FailingWriter(calls, error)
    with (
        MemDB.open(database.path, embedder=WordEmbedder(), writer=failing) as breaking,
        pytest.raises(type(error)),
    ):
        breaking.ingest(corpus)
    stats = database.stats()
    assert stats["documents"] == 40
    assert (stats["memories"] > 0) == (calls > 1)
    assert stats["cold"] > 0
    report = database.ingest(corpus)
    assert (report.unchanged, report.memories) == (40, stats["cold"])
    assert_whole(database, corpus)


KILLED = """
import os, signal, sys
from pathlib import Path
from memdb import MemDB
from tests.engine.helpers import TokenWriter, WordEmbedder

path, corpus, part, left = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])

def count():
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

class Embedder(WordEmbedder):
    def embed(self, texts, *, query=False):
        vectors = super().embed(texts, query=query)
        if part == "embedder":
            count()
        return vectors

class Writer(TokenWriter):
    def write(self, texts):
        memories = super().write(texts)
        if part == "writer":
            count()
        return memories

with MemDB.open(path, embedder=Embedder(), writer=Writer()) as database:
    database.ingest(corpus)
"""


@pytest.mark.parametrize(
    ("part", "calls", "held_open"),
    [("embedder", 2, False), ("embedder", 2, True), ("writer", 1, False), ("writer", 3, True)],
)
def test_a_killed_ingest_goes_on_where_it_stopped(
    tmp_path: Path, part: str, calls: int, held_open: bool
) -> None:
    """Whether or not another process has the database open meanwhile."""
    corpus = write_corpus(tmp_path / "many.jsonl", lines(70))
    database = MemDB.create(tmp_path / "db", embedder=WordEmbedder(), writer=TokenWriter())
    if not held_open:
        database.close()
    result = child(KILLED, tmp_path / "db", corpus, part, calls)
    assert result.returncode == -signal.SIGKILL, result.stderr
    if not held_open:
        database = MemDB.open(tmp_path / "db", embedder=WordEmbedder(), writer=TokenWriter())
    with database:
        before = database.stats()
        assert before["documents"] > 0
        assert before["cold"] > 0
        assert (before["documents"] < 70) == (part == "embedder")
        report = database.ingest(corpus)
        assert report.inserted == 70 - before["documents"]
        assert report.memories == report.references + before["cold"]
        assert_whole(database, corpus)


@pytest.mark.parametrize("cold", [False, True])
def test_a_handle_from_before_a_rewrite_writes_no_documents(
    database: MemDB, tmp_path: Path, cold: bool
) -> None:
    """It would cut them by the tokens of the model before."""
    corpus = write_corpus(tmp_path / "new.jsonl", [{"id": "new", "text": PAGE}])
    rewrite(database.path, TokenWriter(12), embedder=WordEmbedder)
    with pytest.raises(MismatchError, match="open it again"):
        database.ingest(corpus, cold=cold)
    assert list(database.documents()) == []
