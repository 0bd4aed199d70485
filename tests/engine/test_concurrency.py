"""Several threads, several objects, several processes, forks and kills."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from numpy.typing import NDArray

from memdb import (
    Batch,
    ConflictError,
    CorruptRecordError,
    Document,
    DocumentExistsError,
    ExplicitMemory,
    MemDB,
    UnknownDocumentError,
)
from memdb.index.ann import AnnIndex
from memdb.ingest.recording import put_metadata
from memdb.storage.store import Store
from tests.engine.helpers import (
    PAGE,
    ROOT,
    TokenWriter,
    WordEmbedder,
    child,
    command,
    make_shape,
    same_memory,
    time_limit,
    unit,
    write_corpus,
)

EAST = np.array([1.0, 0.0])


@pytest.fixture
def path(tmp_path: Path, bare_template: Path) -> Path:
    """A closed database without parts, embeddings of 2 numbers."""
    return Path(shutil.copytree(bare_template, tmp_path / "db"))


@pytest.fixture
def full(tmp_path: Path, full_template: Path) -> Iterator[MemDB]:
    path = shutil.copytree(full_template, tmp_path / "full")
    with MemDB.open(path, embedder=WordEmbedder(), writer=TokenWriter()) as database:
        yield database


def found(database: MemDB) -> list[str]:
    """Ids of all documents, as the index finds them: nearest to the east first."""
    return [hit.reference.document_id for hit in database.retrieve(EAST, 1000).hits]


# --- one index, many writers ----------------------------------------------------------------------

Write = Callable[..., Any]


class Worker:
    """Another process that has the database open and does what it is told."""

    SCRIPT = """
    import json, sys
    import numpy as np
    from memdb import MemDB

    with MemDB.open(sys.argv[1]) as database:
        print("ready", flush=True)
        for line in sys.stdin:
            verb, arguments, options = json.loads(line)
            if verb == "found":
                hits = database.retrieve(np.array([1.0, 0.0]), 1000).hits
                answer = [hit.reference.document_id for hit in hits]
            else:
                getattr(database, verb)(*arguments, **options)
                answer = "done"
            print(json.dumps(answer), flush=True)
    """

    def __init__(self, path: Path) -> None:
        self.process = subprocess.Popen(
            command(self.SCRIPT, path),
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._read()

    def _read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def __call__(self, verb: str, *arguments: Any, **options: Any) -> Any:
        assert self.process.stdin is not None
        print(json.dumps([verb, arguments, options]), file=self.process.stdin, flush=True)
        return json.loads(self._read())

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()
        assert self.process.returncode == 0


def check_that_the_index_follows(database: MemDB, found_there: Write, write: Write) -> None:
    """`write` changes the database through something else; both see each change."""
    write("insert", "a", id="a", embeddings=[[1, 0]])
    assert found(database) == found_there() == ["a"]
    write("insert", "b", id="b", embeddings=[[2, 1]])
    assert found(database) == found_there() == ["a", "b"]
    write("update", "a", text="A", embeddings=[[-1, 0]])
    assert found(database) == found_there() == ["b", "a"]
    write("update", "a", metadata={"x": 1})
    assert [hit.metadata for hit in database.retrieve(EAST).hits] == [{}, {"x": 1}]
    write("delete", "b")
    assert found(database) == found_there() == ["a"]
    database.insert("c", id="c", embeddings=unit(1, 0))
    assert found(database) == found_there() == ["c", "a"]
    write("insert", "d", id="d", embeddings=[[1, 0.1]])
    write("delete", "d", "a")
    assert found(database) == found_there() == ["c"]
    database.delete("c")
    assert found(database) == found_there() == []


def test_the_index_follows_another_object_of_this_process(path: Path) -> None:
    with MemDB.open(path) as one, MemDB.open(path) as other:

        def write(verb: str, *arguments: Any, **options: Any) -> None:
            getattr(other, verb)(*arguments, **options)

        check_that_the_index_follows(one, lambda: found(other), write)


def test_the_index_follows_another_process(path: Path) -> None:
    with MemDB.open(path) as database, Worker(path) as worker:
        check_that_the_index_follows(database, lambda: worker("found"), worker)


def test_an_index_that_missed_changes_is_built_anew(path: Path) -> None:
    """As when the log was cut, or an older copy of the database put in its place."""
    script = """
    import sys
    from pathlib import Path
    from memdb import MemDB
    from tests.engine.helpers import raw, unit

    path = Path(sys.argv[1])
    with MemDB.open(path) as database:
        database.delete("a")
        database.insert("b", id="b", embeddings=unit(1, 0))
        database.insert("c", id="c", embeddings=unit(1, 1))
    with raw(path) as (environment, tables), environment.begin(write=True) as transaction:
        for number in (2, 3):
            assert transaction.delete(number.to_bytes(8, "little"), db=tables["changes"])
    """
    with MemDB.open(path) as database:
        database.insert("a", id="a", embeddings=unit(1, 2))
        assert found(database) == ["a"]
        result = child(script, path)
        assert result.returncode == 0, result.stderr
        assert found(database) == ["b", "c"]


def test_an_index_that_failed_to_catch_up_starts_anew(full: MemDB) -> None:
    """A search over a damaged vector fails; once the document is gone, searches work again and
    find each of the others once."""
    full.insert("The harbour is old.", id="a")
    full.query("harbour")
    full.insert("The harbour is new.", id="b")
    full.insert("The harbour is wide.", id="c")
    script = """
    import sys
    from pathlib import Path
    from tests.engine.helpers import raw

    with raw(Path(sys.argv[1])) as (environment, tables), environment.begin(write=True) as t:
        assert t.replace(int(sys.argv[2]).to_bytes(8, "little"), b"?", db=tables["embeddings"])
    """
    (number,) = full.get("c").references
    assert child(script, full.path, number).returncode == 0
    for _ in range(2):
        with pytest.raises(CorruptRecordError, match=f"record {number} of table 'embeddings'"):
            full.query("harbour")
    full.delete("c")
    hits = full.query("harbour").hits
    assert sorted(hit.reference.document_id for hit in hits) == ["a", "b"]


# --- races ----------------------------------------------------------------------------------------


class Interrupted(WordEmbedder):
    """An embedder in whose first call something else happens."""

    def __init__(self, happens: Callable[[], object]) -> None:
        self.happens: list[Callable[[], object]] = [happens]

    def embed(self, texts: Sequence[str], *, query: bool = False) -> NDArray[np.float32]:
        if self.happens:
            self.happens.pop()()
        return super().embed(texts, query=query)


class InterruptedWriter(TokenWriter):
    """A writer in whose first call something else happens."""

    def __init__(self, happens: Callable[[], object]) -> None:
        super().__init__()
        self.happens: list[Callable[[], object]] = [happens]

    def write(self, texts: Sequence[str]) -> list[ExplicitMemory]:
        if self.happens:
            self.happens.pop()()
        return super().write(texts)


def test_of_two_inserts_of_one_id_the_first_counts(full: MemDB) -> None:
    other = Interrupted(lambda: full.insert("The harbour is old.", id="a"))
    with MemDB.open(full.path, embedder=other) as late, pytest.raises(DocumentExistsError):
        late.insert("The harbour is new.", id="a")
    assert full.get("a").text == "The harbour is old."
    assert full.stats()["references"] == 1


@pytest.mark.parametrize(
    "meanwhile",
    [
        lambda database: database.update("a", metadata={"x": 2}),
        lambda database: database.update("a", text="The town is old."),
        lambda database: (database.delete("a"), database.insert("The town is old.", id="a")),
    ],
    ids=["metadata", "text", "deleted and inserted"],
)
def test_an_update_does_not_undo_one_that_it_did_not_see(
    full: MemDB, meanwhile: Callable[[MemDB], object]
) -> None:
    full.insert("The harbour is old.", id="a", metadata={"x": 1})
    other = Interrupted(lambda: meanwhile(full))
    with (
        MemDB.open(full.path, embedder=other) as late,
        pytest.raises(ConflictError, match="changed document 'a'"),
    ):
        late.update("a", text="The harbour is new.")
    assert full.get("a").text != "The harbour is new."
    assert (full.get("a").metadata, full.get("a").text) != ({"x": 1}, "The harbour is old.")


def test_new_metadata_for_a_text_that_changed_is_a_conflict(full: MemDB) -> None:
    full.insert("The harbour is old.", id="a")
    store = Store(full.path)
    try:
        with pytest.raises(ConflictError, match="changed document 'a'"), store.write() as t:
            put_metadata(t, "a", Document("The harbour is new.", "a", {"x": 1}))
    finally:
        store.close()
    assert full.get("a").metadata == {}


def test_an_update_of_what_was_deleted_meanwhile_is_refused(full: MemDB) -> None:
    full.insert("The harbour is old.", id="a")
    other = Interrupted(lambda: full.delete("a"))
    with MemDB.open(full.path, embedder=other) as late, pytest.raises(UnknownDocumentError):
        late.update("a", text="The harbour is new.")
    assert full.stats()["references"] == 0


def test_no_memory_is_kept_of_what_was_deleted_while_it_was_written(full: MemDB) -> None:
    full.insert("The harbour is old.", id="a", cold=True)
    full.insert("The harbour is new.", id="b", cold=True)
    other = InterruptedWriter(lambda: full.delete("a"))
    with MemDB.open(full.path, embedder=WordEmbedder(), writer=other) as late:
        hits = late.retrieve("harbour").hits
        assert sorted(hit.reference.document_id for hit in hits) == ["a", "b"]
        assert all(hit.memory is not None for hit in hits)
    assert (full.stats()["references"], full.stats()["memories"]) == (1, 1)


def test_a_memory_that_another_wrote_meanwhile_stays(full: MemDB) -> None:
    full.insert("The harbour is old.", id="a", cold=True)
    other = InterruptedWriter(full.warm)
    with MemDB.open(full.path, embedder=WordEmbedder(), writer=other) as late:
        late.retrieve("harbour")
    assert full.stats()["changes"] == 2  # inserted, remembered once
    assert full.get("a").warm == 1


def test_warm_passes_over_what_was_deleted_meanwhile(full: MemDB) -> None:
    full.insert(PAGE, id="a", cold=True)
    assert len(full.get("a").references) > 8  # more than one batch
    other = InterruptedWriter(lambda: full.delete("a"))
    with MemDB.open(full.path, writer=other) as late:
        late.warm()
    assert (full.stats()["references"], full.stats()["memories"]) == (0, 0)


# --- threads --------------------------------------------------------------------------------------


def run(*jobs: Callable[[], object]) -> None:
    """Run jobs in threads of their own, begun together; raise what one of them raised."""
    errors: list[BaseException] = []
    start = threading.Barrier(len(jobs))

    def work(job: Callable[[], object]) -> None:
        try:
            start.wait()
            job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=[job], daemon=True) for job in jobs]
    with time_limit(60):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]


def test_threads_insert_update_delete_and_retrieve(path: Path) -> None:
    """Each document's text, metadata and embedding change together; nobody sees them apart."""
    with MemDB.open(path) as database:
        finished: list[str] = []

        def change(name: str) -> None:
            for n in range(8):
                there = f"{name}-{n}"
                database.insert(f"{n}", id=there, metadata={"n": n}, embeddings=unit(1, n))
                database.update(
                    there, text=f"{n + 100}", metadata={"n": n + 100}, embeddings=unit(1, n + 100)
                )
                if n % 2:
                    database.delete(there)

        def write(name: str) -> None:
            try:
                change(name)
            finally:
                finished.append(name)

        def read() -> None:
            while len(finished) < 3:
                for hit in database.retrieve(EAST, 50).hits:
                    n = hit.metadata["n"]
                    assert hit.reference.text == str(n)
                    assert hit.score == pytest.approx(1 / (1 + n * n) ** 0.5, abs=1e-5)

        run(read, read, *(lambda name=name: write(name) for name in "abc"))
        names = [f"{name}-{n}" for name in "abc" for n in range(0, 8, 2)]
        assert sorted(found(database)) == names
        documents = list(database.documents())
        assert [(d.id, d.version) for d in documents] == [(name, 2) for name in names]
        references = [number for document in documents for number in document.references]
        assert len(set(references)) == len(references) == database.stats()["references"]


def test_threads_that_find_one_cold_reference_all_get_its_memory(full: MemDB) -> None:
    full.insert("The harbour is old.", id="a", cold=True)
    memories: list[ExplicitMemory] = []
    run(*[lambda: memories.extend(full.retrieve("harbour", 1).memories)] * 4)
    assert len(memories) == 4
    assert all(same_memory(memory, memories[0]) for memory in memories)
    assert full.stats()["changes"] == 2  # inserted, remembered once


def test_threads_open_and_close_one_database(path: Path) -> None:
    def work() -> None:
        for _ in range(20):
            with MemDB.open(path) as database:
                assert database.retrieve(EAST).hits == []

    run(work, work, work)


def test_closing_waits_for_what_other_threads_read(path: Path) -> None:
    """In a process of its own: a page that is unmapped under a reader would end it."""
    script = """
    import sys, threading, time
    import numpy as np
    from memdb import MemDB, StorageError
    from tests.engine.helpers import unit

    with MemDB.open(sys.argv[1]) as database:
        for n in range(30):
            database.insert(f"{n} " * 2000, embeddings=unit(1, n))

    closed = 0

    def read():
        global closed
        try:
            while True:
                assert len(database.retrieve(np.ones(2), 30).hits) == 30
        except StorageError as error:
            assert "closed" in str(error)
            closed += 1

    for _ in range(60):
        database = MemDB.open(sys.argv[1])
        database.retrieve(np.ones(2), 1)
        threads = [threading.Thread(target=read) for _ in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(0.005)
        database.close()
        for thread in threads:
            thread.join()
    assert closed == 180, closed
    """
    result = child(script, path)
    assert result.returncode == 0, result.stderr


# --- processes ------------------------------------------------------------------------------------

TOGETHER = """
import sys
from pathlib import Path
from memdb import *
from tests.engine.helpers import TokenWriter, WordEmbedder, make_shape, unit

path, name = Path(sys.argv[1]), sys.argv[2]
print("ready", flush=True)
sys.stdin.readline()
"""


def together(script: str, path: Path, count: int) -> list[str]:
    """What `count` processes print that run the same script, begun together."""
    with ExitStack() as stack, time_limit(60):
        children = [
            stack.enter_context(
                subprocess.Popen(
                    command(TOGETHER + script, path, name),
                    cwd=ROOT,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
            for name in range(count)
        ]
        for process in children:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in children:
            assert process.stdin is not None
            print(file=process.stdin, flush=True)
        outputs = [process.communicate() for process in children]
        for process, (_, error) in zip(children, outputs, strict=True):
            assert process.returncode == 0, error
        return [output.strip() for output, _ in outputs]


def test_two_processes_insert_side_by_side(path: Path) -> None:
    script = """
with MemDB.open(path) as database:
    won = 0
    for n in range(20):
        database.insert(f"{name} {n}", id=f"{name}-{n}", embeddings=unit(1, n))
        try:
            database.insert(name, id=f"shared-{n}", embeddings=unit(1, n))
            won += 1
        except DocumentExistsError:
            pass
    print(won)
"""
    won = together(script, path, 2)
    assert sum(map(int, won)) == 20
    with MemDB.open(path) as database:
        documents = list(database.documents())
        assert len(documents) == 60
        numbers = [number for document in documents for number in document.references]
        assert len(set(numbers)) == 60
        assert len(found(database)) == 60


def test_two_processes_ingest_the_same_corpus(tmp_path: Path, full: MemDB) -> None:
    lines = [{"id": f"{n:03}", "text": f"{n} {PAGE[n : n + 60]}"} for n in range(100)]
    write_corpus(tmp_path / "corpus.jsonl", lines)
    script = """
with MemDB.open(path, embedder=WordEmbedder(), writer=TokenWriter()) as database:
    print(database.ingest(path.parent / "corpus.jsonl").inserted)
"""
    inserted = together(script, full.path, 2)
    assert sum(map(int, inserted)) == 100
    documents = list(full.documents())
    assert [(d.id, d.text, d.version) for d in documents] == [
        (line["id"], line["text"], 1) for line in lines
    ]
    stats = full.stats()
    assert stats["references"] == stats["memories"] == sum(len(d.references) for d in documents)


def test_of_several_processes_one_creates(tmp_path: Path) -> None:
    script = """
try:
    with MemDB.create(path, shape=make_shape(), dimension=2) as database:
        database.insert("text", id=name, embeddings=unit(1, 1))
    print("made")
except DatabaseExistsError:
    print("late")
"""
    fates = together(script, tmp_path / "db", 3)
    assert sorted(fates) == ["late", "late", "made"]
    with MemDB.open(tmp_path / "db") as database:
        assert found(database) == [str(fates.index("made"))]


def test_what_was_acknowledged_survives_a_kill(path: Path) -> None:
    script = """
    import sys
    from memdb import MemDB
    from tests.engine.helpers import unit

    with MemDB.open(sys.argv[1]) as database:
        for n in range(100_000):
            database.insert(f"{n} " * 500, id=f"{n}", metadata={"n": n}, embeddings=unit(1, n))
            print(n, flush=True)
    """
    for _ in range(2):
        with MemDB.open(path) as database:
            database.delete(*(document.id for document in database.documents()))
        with subprocess.Popen(
            command(script, path), cwd=ROOT, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if int(line) == 25:
                    process.kill()
            acknowledged = max(25, int(line))
        assert process.returncode == -signal.SIGKILL
        with MemDB.open(path) as database:
            documents = {document.metadata["n"]: document for document in database.documents()}
            assert len(documents) in (acknowledged + 1, acknowledged + 2)
            for n in range(acknowledged + 1):
                assert documents[n].text == f"{n} " * 500
            assert len(found(database)) == len(documents)


KILLED_IN_A_TRANSACTION = """
import os, signal, sys
from pathlib import Path
from memdb.index.ann import AnnIndex
from memdb.storage.store import Store

store = Store(Path(sys.argv[1]))
with (store.write() if sys.argv[2] == "write" else store.read()) as transaction:
    if sys.argv[2] == "write":
        transaction.put("documents", b"half", 1, bytes(64))
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_process_killed_while_it_writes_blocks_nobody(path: Path) -> None:
    with MemDB.open(path) as database:
        database.insert("text", id="a", embeddings=unit(1, 1))
        result = child(KILLED_IN_A_TRANSACTION, path, "write")
        assert result.returncode == -signal.SIGKILL, result.stderr
        with time_limit():
            database.insert("text", id="b", embeddings=unit(1, 1))
        assert [document.id for document in database.documents()] == ["a", "b"]


def test_what_a_killed_reader_held_is_given_back(path: Path) -> None:
    """Else its snapshot would keep every later page from being used again."""
    readers = """
    import lmdb, sys
    with lmdb.open(sys.argv[1] + "/gen-000001", max_dbs=16) as environment:
        print(len(environment.readers().splitlines()))
    """
    with MemDB.open(path) as database:
        found(database)
        before = int(child(readers, path).stdout)
        for _ in range(2):
            assert child(KILLED_IN_A_TRANSACTION, path, "read").returncode == -signal.SIGKILL
        assert int(child(readers, path).stdout) > before
        opened = child("import sys; from memdb import MemDB; MemDB.open(sys.argv[1])", path)
        assert opened.returncode == 0, opened.stderr
        assert int(child(readers, path).stdout) == before


# --- forks ----------------------------------------------------------------------------------------

FORKED = """
import os, sys
import faiss
import numpy as np
from memdb import ForkedProcessError, MemDB
from tests.engine.helpers import unit

database = MemDB.open(sys.argv[1])
database.insert("text", id="a", embeddings=unit(1, 1))
database.retrieve(np.ones(2))

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

def refused():
    for use in (
        lambda: database.get("a"),
        lambda: database.insert("b", embeddings=unit(1, 1)),
        lambda: database.update("a", metadata={"x": 1}),
        lambda: database.delete("a"),
        lambda: database.retrieve(np.ones(2)),
        lambda: list(database.documents()),
        lambda: database.stats(),
    ):
        try:
            use()
        except ForkedProcessError as error:
            assert "spawn" in str(error)
        else:
            raise AssertionError("used after a fork")
    database.close()

def opened():
    with MemDB.open(sys.argv[1]) as mine:
        mine.insert("b", id="b", embeddings=unit(1, 1))
        mine.delete("b")

in_child(refused)
in_child(opened)  # its own
in_child(database.close)
database.update("a", metadata={"x": 2})  # the parent goes on
assert database.retrieve(np.ones(2)).hits[0].metadata == {"x": 2}
database.close()

in_child(opened)
with MemDB.open(sys.argv[1]) as database:
    assert [document.id for document in database.documents()] == ["a"]
"""


def test_a_database_opened_before_a_fork_is_refused_after_it_and_opened_anew(path: Path) -> None:
    result = child(FORKED, path)
    assert result.returncode == 0, result.stderr


def test_a_file_that_is_replaced_while_it_is_opened_is_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Description and vectors never come from two files."""
    vectors = np.eye(300, dtype=np.float32)

    def insert(database: MemDB, numbers: range) -> None:
        documents = [Document(f"{n}", f"{n}") for n in numbers]
        database.load([Batch(documents, vectors[list(numbers)])])

    with MemDB.create(tmp_path / "db", shape=make_shape(), dimension=300, index="ivf") as database:
        insert(database, range(100))
        database.build_index()
        first = tmp_path / "first"
        file = tmp_path / "db" / "gen-000001" / "index.faiss"
        shutil.copy(file, first)
        insert(database, range(100, 200))
        database.build_index()
        second = tmp_path / "second"
        shutil.copy(file, second)
    read_index = faiss.read_index
    calls = []

    def replaced(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 1:
            second.rename(file)
        return read_index(*arguments)

    first.rename(file)
    monkeypatch.setattr(faiss, "read_index", replaced)
    index = AnnIndex(file)
    assert len(calls) == 2
    assert index.info.references == index._index.ntotal == 200
