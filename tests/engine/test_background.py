"""Work in the background: it holds nobody up, ends with the database and with the program, and
fails in the open, once."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import memdb.index.searcher
from memdb import Batch, Document, MemDB, StorageError, compact, repair, verify
from memdb.background import Cancelled, Task, task
from memdb.care import recode
from memdb.codecs import FAMILIES
from memdb.index import build, policy
from memdb.protocols import no_progress
from memdb.storage.folder import only_writer
from tests.engine.helpers import (
    PAGE,
    ROOT,
    TokenWriter,
    WordEmbedder,
    child,
    command,
    keep_whatever_is_lost,
    make_shape,
    raw,
    time_limit,
)
from tests.engine.test_recoding import SHAPE, codecs, east, error, insert, make_like

ENOUGH = 12
DIMENSION = 16


@pytest.fixture(autouse=True)
def few_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    for family in FAMILIES.values():
        monkeypatch.setattr(family, "enough", ENOUGH)
    monkeypatch.setattr(policy, "EXACT_BELOW", 300)


@pytest.fixture(autouse=True)
def nothing_takes_for_ever() -> Iterator[None]:
    with time_limit(60):
        yield


@pytest.fixture
def bare(tmp_path: Path) -> Iterator[MemDB]:
    with MemDB.create(tmp_path / "db", shape=SHAPE, dimension=2) as database:
        yield database


def vectors(count: int) -> NDArray[np.float32]:
    drawn = np.random.default_rng(0).standard_normal((count, DIMENSION), np.float32)
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


def fill(database: MemDB, count: int = 1200) -> NDArray[np.float32]:
    """So many that an index is due; it is not built by this."""
    found = vectors(count)
    database.load([Batch([Document(f"text {n}", f"{n:05}") for n in range(count)], found)])
    return found


@pytest.fixture(scope="module")
def unindexed_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("templates") / "unindexed"
    with MemDB.create(
        path, shape=make_shape(), dimension=DIMENSION, codec="exact", durability="off"
    ) as database:
        fill(database)
    return path


@pytest.fixture
def unindexed(unindexed_template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(unindexed_template, tmp_path / "unindexed"))


def until(true: Callable[[], Any]) -> None:
    while not true():
        time.sleep(0.01)


def failure(database: MemDB, what: str) -> Any:
    return database.stats()[what]["failure"]


class Blocked:
    """A fit that waits, in the steps that a real one has, until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.threads: list[threading.Thread] = []
        self.go = threading.Event()
        real = FAMILIES["klt8"].fit

        def fit(*arguments: Any) -> Any:
            self.threads.append(threading.current_thread())
            told = arguments[4]
            while not self.go.wait(0.01):
                told(0, 1)
            return real(*arguments)

        monkeypatch.setattr(FAMILIES["klt8"], "fit", fit)

    def assert_elsewhere(self) -> None:
        until(lambda: self.threads)
        assert threading.current_thread() not in self.threads


# --- nobody waits for it --------------------------------------------------------------------------


def test_an_insert_does_not_wait_for_the_fit(bare: MemDB, monkeypatch: pytest.MonkeyPatch) -> None:
    fit = Blocked(monkeypatch)
    insert(bare, range(ENOUGH + 3))
    fit.assert_elsewhere()
    assert bare.stats()["recoding"] == {"running": True, "failure": None}
    assert codecs(bare) == {"int8": ENOUGH + 3}
    fit.go.set()
    bare.settle()
    (name,) = codecs(bare)
    assert name.startswith("klt8:")
    assert bare.stats()["recoding"] == {"running": False, "failure": None}
    assert error(bare, range(ENOUGH + 3)) < 0.3


def test_an_update_does_not_wait_for_the_fit(bare: MemDB, monkeypatch: pytest.MonkeyPatch) -> None:
    fit = Blocked(monkeypatch)
    insert(bare, range(ENOUGH - 1))
    bare.insert("cold", id="099", embeddings=east(99), cold=True)
    assert not fit.threads
    bare.update("099", embeddings=east(99), memories=[make_like(99)])
    fit.assert_elsewhere()
    fit.go.set()
    bare.settle()
    assert len(codecs(bare)) == 1


def test_a_retrieval_does_not_wait_for_the_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_whatever_is_lost(monkeypatch)
    fit = Blocked(monkeypatch)
    words = PAGE.split()
    with MemDB.create(tmp_path / "db", embedder=WordEmbedder(), writer=TokenWriter()) as database:
        for n in range(2 * ENOUGH):
            database.insert(" ".join(words[n : n + 5]), id=f"{n:03}", cold=True)
        assert database.retrieve(PAGE, 2 * ENOUGH).written == 2 * ENOUGH
        fit.assert_elsewhere()
        fit.go.set()
        database.settle()
        assert database.stats()["memory"]["fitted"].startswith("klt8:")
        assert verify(database.path) == []


def test_no_batch_of_a_load_waits_for_the_fit(bare: MemDB, monkeypatch: pytest.MonkeyPatch) -> None:
    fit = Blocked(monkeypatch)
    monkeypatch.setattr("memdb.ingest.load._BYTES", 1)  # else all are drawn before one is written
    seen = []

    def batches() -> Iterator[Batch]:
        for start in range(0, 3 * ENOUGH, ENOUGH):
            some = range(start, start + ENOUGH)
            documents = [Document(f"text {n}", f"{n:03}") for n in some]
            documents.append(Document("again", f"{start:03}"))  # which ends a transaction
            memories = [make_like(n) for n in (*some, start)]
            yield Batch(documents, np.concatenate([east(n) for n in (*some, start)]), memories)
        seen.append(codecs(bare))
        fit.go.set()

    bare.load(batches())
    fit.assert_elsewhere()
    assert list(seen[0]) == ["int8"]
    (name,) = codecs(bare)  # also what was coded before and written after
    assert name.startswith("klt8:")


def test_memories_written_while_the_codec_took_over_follow(
    bare: MemDB, monkeypatch: pytest.MonkeyPatch
) -> None:
    insert(bare, range(ENOUGH - 1))
    prepare = bare._preparer.prepare

    def slowly(*arguments: Any, **named: Any) -> Any:
        prepared = prepare(*arguments, **named)  # by the codec of now
        with monkeypatch.context() as usual:
            usual.setattr(bare._preparer, "prepare", prepare)
            insert(bare, [50])
            bare.settle()
        return prepared

    monkeypatch.setattr(bare._preparer, "prepare", slowly)
    insert(bare, [60])
    bare.settle()
    (name,) = codecs(bare)
    assert name.startswith("klt8:")


def test_the_end_of_warm_waits_and_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_whatever_is_lost(monkeypatch)
    told = []
    words = PAGE.split()
    with MemDB.create(tmp_path / "db", embedder=WordEmbedder(), writer=TokenWriter()) as database:
        for n in range(2 * ENOUGH):
            database.insert(" ".join(words[n : n + 5]), id=f"{n:03}", cold=True)
        database.warm(progress=lambda stage, done, total: told.append(stage))
        assert "fitted" in database.stats()["memory"]
        assert not database.stats()["recoding"]["running"]
    assert told[0] == "writing memories"


# --- a failure is said once -----------------------------------------------------------------------


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From when on what failed is tried again at once."""

    def off() -> None:
        for key, found in Task._failures.items():
            Task._failures[key] = task._Failure(found.error, found.times, 0.0)

    return off


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The index builds that begin."""
    begun: list[int] = []

    def counted(*arguments: Any) -> Any:
        begun.append(1)
        return build.build_index(*arguments)

    monkeypatch.setattr(memdb.index.searcher, "build_index", counted)
    return begun


def test_an_index_that_cannot_be_written_is_tried_again_after_a_pause(
    unindexed: Path,
    builds: list[int],
    no_pause: Callable[[], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    obstacle = unindexed / "gen-000001" / "index.faiss.new"
    obstacle.mkdir()  # as a disk that takes no index
    query = vectors(1)[0]

    def searches(database: MemDB) -> None:
        for _ in range(5):
            assert database.retrieve(query).hits[0].reference.document_id == "00000"
            until(lambda: not database.stats()["index"]["building"])
            database._searcher._looked = 0.0

    with MemDB.open(unindexed) as database:
        searches(database)
        assert len(builds) == 1
        said = failure(database, "index")
        assert "cannot write the index" in said["error"]
        assert said["times"] == 1
        assert 0 < said["again_in"] <= 60
        with MemDB.open(unindexed) as other:  # no more than one for all objects of a process
            searches(other)
            assert failure(other, "index")["times"] == 1
    with MemDB.open(unindexed) as database:  # nor for each time that it is opened
        searches(database)
        assert len(builds) == 1
        no_pause()
        searches(database)
        assert len(builds) == 2
        said = failure(database, "index")
        assert said["times"] == 2
        assert 60 < said["again_in"] <= 120  # the pause grows
        (record,) = caplog.records  # and nobody is told twice
        assert (record.name, record.levelno) == ("memdb", logging.WARNING)
        assert "cannot write the index" in record.getMessage()
        obstacle.rmdir()
        no_pause()
        searches(database)
        assert failure(database, "index") is None
        assert database.stats()["index"]["kind"] == "ivf"
        assert len(builds) == 3


def test_what_somebody_builds_is_no_failure_any_more(unindexed: Path) -> None:
    obstacle = unindexed / "gen-000001" / "index.faiss.new"
    obstacle.mkdir()
    with MemDB.open(unindexed) as database:
        database.retrieve(vectors(1)[0])
        database.settle()
        assert failure(database, "index")["times"] == 1
        with pytest.raises(StorageError, match="cannot write the index"):
            database.build_index()
        obstacle.rmdir()
        assert database.build_index() is not None
        assert failure(database, "index") is None


def test_an_index_that_cannot_be_read_back_is_not_built_again_and_again(
    unindexed: Path, builds: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memdb.index.searcher.Searcher, "_previous", lambda *_: None)
    with MemDB.open(unindexed) as database:
        for _ in range(5):
            database.retrieve(vectors(1)[0])
            database.settle()
            database._searcher._looked = 0.0
        assert len(builds) == 1
        assert "cannot be read" in failure(database, "index")["error"]


def broken_fit(*_: object) -> Any:
    raise StorageError("the disk is full")


def broken_encode(*_: object) -> Any:
    raise MemoryError


@pytest.mark.parametrize("what", ["fit", "recode"])
def test_an_error_is_not_raised_for_a_write_that_is_committed(
    what: str,
    bare: MemDB,
    no_pause: Callable[[], None],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patched:
        if what == "fit":
            patched.setattr(FAMILIES["klt8"], "fit", broken_fit)
        else:
            patched.setattr(recode, "encode_batch", broken_encode)
        insert(bare, range(ENOUGH))
        until(lambda: not bare.stats()["recoding"]["running"])
        insert(bare, range(ENOUGH, ENOUGH + 10))
        until(lambda: not bare.stats()["recoding"]["running"])
        said = failure(bare, "recoding")
        assert said["times"] == 1
        assert said["error"] == ("the disk is full" if what == "fit" else "MemoryError")
        assert len(caplog.records) == 1
        documents = [Document("text", "l")]
        bare.load(
            [Batch(documents, east(90), [make_like(90)])]
        )  # explicit: tried again, not raised
        assert failure(bare, "recoding")["times"] == 2
        assert len(caplog.records) == 1
    no_pause()
    insert(bare, [91])
    bare.settle()
    assert failure(bare, "recoding") is None
    assert len(codecs(bare)) == 1
    assert verify(bare.path) == []


def test_what_is_due_cannot_be_found_out_and_the_write_is_there(
    bare: MemDB, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> Any:
        raise StorageError("no more readers")

    monkeypatch.setattr(bare._codec_choice, "is_due", broken)
    insert(bare, range(ENOUGH))
    assert bare.stats()["memories"] == ENOUGH


def test_a_system_without_threads_takes_writes_all_the_same(
    bare: MemDB, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_more(_: object) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", no_more)
        insert(bare, range(ENOUGH))
        assert failure(bare, "recoding")["error"] == "can't start new thread"
    bare.settle()
    assert len(codecs(bare)) == 1
    assert failure(bare, "recoding") is None


def test_too_few_of_its_shape_are_not_looked_through_with_each_write(
    bare: MemDB, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = []
    sample = bare._codec_choice._sample

    def few(*arguments: Any) -> Any:
        looks.append(1)
        return sample(*arguments)[: ENOUGH - 5]

    monkeypatch.setattr(bare._codec_choice, "_sample", few)
    for n in range(ENOUGH + 4):
        insert(bare, [n])
        until(lambda: not bare.stats()["recoding"]["running"])
    assert len(looks) == 1
    insert(bare, [99])  # 5 more than there were: now there might be enough
    bare.settle()
    assert len(looks) == 2


# --- it ends with the database and the program ----------------------------------------------------

_LAST_LOOK = """
        import atexit, sys, threading

        def look():
            print([thread.name for thread in threading.enumerate() if "memdb" in thread.name])

        atexit.register(look)  # before memdb is imported: it runs after what memdb does at the end
        import numpy as np
        from memdb import MemDB
"""


def test_a_program_that_ends_while_an_index_is_built_ends_well(tmp_path: Path) -> None:
    with MemDB.create(
        tmp_path / "db", shape=make_shape(), dimension=DIMENSION, codec="exact", durability="off"
    ) as database:
        fill(database, 30_000)
    script = """
        database = MemDB.open(sys.argv[1])
        database.retrieve(np.eye(16, dtype=np.float32)[0])
        assert [thread for thread in threading.enumerate() if "memdb" in thread.name]
    """
    done = child(_LAST_LOOK + script, tmp_path / "db")
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")
    assert verify(tmp_path / "db") == []


def test_a_program_that_ends_while_a_codec_is_fitted_ends_well(bare: MemDB) -> None:
    script = """
        from memdb.codecs import FAMILIES
        from tests.engine.test_recoding import insert

        fit = FAMILIES["klt8"].fit

        def for_ever(*arguments):
            while True:
                fit(*arguments)

        FAMILIES["klt8"].fit = for_ever
        FAMILIES["klt8"].enough = 12
        database = MemDB.open(sys.argv[1])
        insert(database, range(12))
        assert database.stats()["recoding"]["running"]
    """
    done = child(_LAST_LOOK + script, bare.path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")
    assert verify(bare.path) == []
    with MemDB.open(bare.path) as database:  # what was interrupted goes on
        database.settle()
        assert len(codecs(database)) == 1
        assert "fitted" in database.stats()["memory"]


def test_close_gives_up_a_fit_which_goes_on_at_the_next_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "db"
    with monkeypatch.context() as patched:
        fit = Blocked(patched)
        with MemDB.create(path, shape=SHAPE, dimension=2) as database:
            insert(database, range(ENOUGH))
            until(lambda: fit.threads)
        assert not fit.threads[0].is_alive()
    with MemDB.open(path) as database:
        database.settle()
        (name,) = codecs(database)
        assert name.startswith("klt8:")


def test_close_gives_up_recoding_which_goes_on_at_the_next_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "db"
    monkeypatch.setattr(recode, "_BATCH", 1)
    encode = recode.encode_batch
    steps = []

    def slow(*arguments: Any) -> Any:
        steps.append(1)
        if len(steps) > 3:
            time.sleep(0.05)
        return encode(*arguments)

    monkeypatch.setattr(recode, "encode_batch", slow)
    with MemDB.create(path, shape=SHAPE, dimension=2, durability="off") as database:
        insert(database, range(ENOUGH))
        until(lambda: len(steps) > 3)
    assert len(steps) < ENOUGH
    assert verify(path) == []
    with MemDB.open(path) as database:
        database.settle()
        assert len(codecs(database)) == 1
        assert error(database, range(ENOUGH)) < 0.3
        seen = len(steps)
    with MemDB.open(path) as database:  # and then it is done for good
        assert not database._codec_choice.is_due()
        database.settle()
    assert len(steps) == seen


def test_killed_while_it_recodes_it_goes_on_at_the_next_open(tmp_path: Path) -> None:
    path = tmp_path / "db"
    script = """
        import sys, time
        from memdb import MemDB
        from memdb.care import recode
        from memdb.codecs import FAMILIES
        from tests.engine.test_recoding import SHAPE, insert

        FAMILIES["klt8"].enough = 12
        recode._BATCH = 1
        encode = recode.encode_batch
        steps = []

        def told(*arguments):
            steps.append(1)
            if len(steps) == 4:
                print("now", flush=True)
                time.sleep(60)
            return encode(*arguments)

        recode.encode_batch = told
        with MemDB.create(sys.argv[1], shape=SHAPE, dimension=2) as database:
            insert(database, range(12))
            database.settle()
    """
    running = subprocess.Popen(command(script, path), stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert running.stdout is not None
    assert running.stdout.readline() == "now\n"
    running.kill()
    running.wait()
    assert verify(path) == []
    with MemDB.open(path) as database:
        database.settle()
        assert len(codecs(database)) == 1
        assert error(database, range(ENOUGH)) < 0.3


def test_a_recode_that_somebody_asked_for_and_stopped_does_not_go_on_by_itself(
    bare: MemDB, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recode, "_BATCH", 4)
    insert(bare, range(ENOUGH))
    bare.settle()

    def stop(what: str, done: int, total: int) -> None:
        if what == "recoding memories" and done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bare.recode("int4", progress=stop)
    mixed = codecs(bare)
    with MemDB.open(bare.path) as again:
        again.settle()
        insert(again, [50])
        again.settle()
    assert codecs(bare) == {**mixed, "int4": mixed["int4"] + 1}


def test_close_does_not_wait_for_a_compaction(bare: MemDB, monkeypatch: pytest.MonkeyPatch) -> None:
    began, go = threading.Event(), threading.Event()
    encode = recode.encode_batch

    def held(*arguments: Any) -> Any:
        began.set()
        go.wait()
        return encode(*arguments)

    monkeypatch.setattr(recode, "encode_batch", held)
    insert(bare, range(ENOUGH))
    began.wait()
    with only_writer(bare._store.generation):  # as a compaction holds it throughout
        go.set()
        time.sleep(0.1)
        assert bare.stats()["recoding"]["running"]
        bare.close()
    with MemDB.open(bare.path) as again:
        again.settle()
        assert len(codecs(again)) == 1


def test_a_damaged_word_of_what_is_left_is_told_and_mended(bare: MemDB) -> None:
    insert(bare, range(ENOUGH))
    bare.settle()
    bare.close()
    with raw(bare.path) as (environment, tables), environment.begin(write=True) as inner:
        inner.put(b"recoding", b"x" * 40, db=tables["settings"])
    with MemDB.open(bare.path) as database:  # it stops nobody
        insert(database, [50])
        database.settle()
    (problem,) = verify(bare.path)
    assert problem.key == "'recoding'"
    assert len(repair(bare.path).mended) == 1
    assert verify(bare.path) == []


def test_a_compaction_meanwhile_is_followed(bare: MemDB, monkeypatch: pytest.MonkeyPatch) -> None:
    fit = Blocked(monkeypatch)
    insert(bare, range(ENOUGH))
    until(lambda: fit.threads)
    compact(bare.path)
    fit.go.set()
    bare.settle()
    assert len(codecs(bare)) == 1
    assert verify(bare.path) == []


def test_a_build_can_be_given_up_at_every_step(
    unindexed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "_PRODUCTS", 1 << 18)
    looks = []

    def until_look(last: float) -> bool:
        looks.append(1)
        return len(looks) > last

    with MemDB.open(unindexed) as database, database._store.read() as transaction:

        def built(last: float) -> None:
            looks.clear()
            cancelled = partial(until_look, last)
            build.build_index(transaction, "id", DIMENSION, 0.99, None, no_progress, cancelled)

        built(np.inf)
        total = len(looks)
        assert total > 50  # also in the middle of each of 10 rounds of k-means
        for last in (0, total // 4, total // 2, total - 1):
            with pytest.raises(Cancelled):
                built(last)
            assert len(looks) == last + 1


def test_a_fork_while_it_works_leaves_the_child_free(
    bare: MemDB, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = Blocked(monkeypatch)
    insert(bare, range(ENOUGH))
    until(lambda: fit.threads)
    with bare._takeover._task._guard:  # as the thread in the background may hold it
        pid = os.fork()
        if not pid:
            try:
                bare._takeover.close()
                bare._searcher.close()
                assert not bare._takeover.state()["running"]
                os._exit(0)
            finally:
                os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    fit.go.set()
    bare.settle()
    assert len(codecs(bare)) == 1


# --- one at a time --------------------------------------------------------------------------------


def test_of_several_objects_one_builds(unindexed: Path, builds: list[int]) -> None:
    databases = [MemDB.open(unindexed) for _ in range(3)]
    for database in databases:
        database.retrieve(vectors(1)[0])
    for database in databases:
        database.settle()
        assert database.stats()["index"]["kind"] == "ivf"
        database.close()
    assert len(builds) == 1


def test_of_several_objects_one_fits(bare: MemDB, monkeypatch: pytest.MonkeyPatch) -> None:
    fit = Blocked(monkeypatch)
    with MemDB.open(bare.path) as one, MemDB.open(bare.path) as other:
        insert(one, range(ENOUGH))
        insert(other, [50])
        insert(bare, [51])
        until(lambda: fit.threads)
        fit.go.set()
        for database in (one, other, bare):
            database.settle()
        assert len(fit.threads) == 1
        assert len(codecs(bare)) == 1


def test_a_recode_that_is_asked_for_takes_the_place_of_that_in_the_background(
    bare: MemDB, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = Blocked(monkeypatch)
    insert(bare, range(ENOUGH))
    until(lambda: fit.threads)
    assert bare.recode("int4").recoded == ENOUGH
    bare.settle()
    assert codecs(bare) == {"int4": ENOUGH}


def test_two_that_recode_to_different_codecs_agree_on_the_last(
    bare: MemDB, monkeypatch: pytest.MonkeyPatch
) -> None:
    insert(bare, range(ENOUGH))
    bare.settle()
    monkeypatch.setattr(recode, "_BATCH", 4)
    with MemDB.open(bare.path) as other:

        def between(what: str, done: int, total: int) -> None:
            if what == "recoding memories" and done == 8:
                other.recode("int4")

        bare.recode("rotated3", progress=between)
    assert codecs(bare) == {"int4": ENOUGH}


# --- the task -------------------------------------------------------------------------------------


def test_a_task_is_done_once_more_if_there_is_more_to_do(tmp_path: Path) -> None:
    go = threading.Event()
    runs = []
    told = []

    def work(progress: Any) -> None:
        runs.append(1)
        progress("working", len(runs), 2)
        go.wait()

    found = Task("counting", tmp_path, "id", work)
    found.start()
    until(lambda: runs)
    found.start()  # that is being done
    found.start(again=True)
    found.start(again=True)
    go.set()
    found.wait(lambda *stage: told.append(stage))
    assert len(runs) == 2
    assert told[-1] == ("working", 2, 2)
    found.close()
    found.start()
    found.wait()
    assert len(runs) == 2


def test_what_is_given_up_is_no_failure(tmp_path: Path) -> None:
    began = threading.Event()

    def work(progress: Any) -> None:
        began.set()
        try:
            while True:
                progress("working", 0, 0)
        finally:
            raise OSError("what it worked on is closed")

    found = Task("working", tmp_path, "id", work)
    found.start()
    began.wait()
    found.cancel()
    assert found.state() == {"running": False, "failure": None}
