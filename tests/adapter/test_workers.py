"""Several processes write the memories of one database. Each imports torch: few are started."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from memdb import InvalidInputError, MemDB, MismatchError, MissingPartError, verify
from memdb.storage.record_layout import REMEMBERED
from model_adapter import Writer, load_model, open_database
from model_adapter.warming import WorkerError, _batches, warm_database
from tests.engine.helpers import WordEmbedder, keep_whatever_is_lost, make_shape
from tests.helpers import SAMPLE, tiny_model

REFERENCES = 280  # more than a codec is fitted to
Step = tuple[str, int, int]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in a folder."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    model = tiny_model()
    model.model.save_pretrained(path)
    model.tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def template(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database of many cold references, of various lengths."""
    path = tmp_path_factory.mktemp("templates") / "cold"
    writer = Writer(load_model(str(folder)), budget=60, head_weights=[1, 2, 0.5, 4, 1, 3])
    with MemDB.create(path, embedder=WordEmbedder(), writer=writer) as database:
        for i in range(REFERENCES):
            database.insert(f"{i} {SAMPLE[i : i + 5 + i * 7 % 60]}", id=f"{i:03}", cold=True)
        assert database.stats()["references"] == REFERENCES
    return path


@pytest.fixture
def path(template: Path, tmp_path: Path) -> Path:
    return shutil.copytree(template, tmp_path / "db")


def remembered(path: Path) -> list[int]:
    """The references whose memories were written (a codec's, too), as often as they were."""
    with MemDB.open(path) as database, database._store.read() as transaction:
        blocks = [block[["what", "reference"]].tolist() for block in transaction.changes(0)]
    return [number for block in blocks for what, number in block if what == REMEMBERED]


def when_some_are_there(do: Callable[[], None]) -> Callable[[str, int, int], None]:
    """A progress that does something when the first memories are stored, once."""
    begun = threading.Event()

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "writing memories" and done and not begun.is_set():
            begun.set()
            do()

    return progress


def interrupt() -> None:
    raise KeyboardInterrupt


def kill_one() -> None:
    os.kill(int(multiprocessing.active_children()[0].pid or 0), signal.SIGKILL)


# --- with processes -------------------------------------------------------------------------------


def test_two_write_what_one_writes(
    path: Path, template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_whatever_is_lost(monkeypatch)
    told: list[Step] = []
    written = warm_database(path, workers=2, progress=lambda *step: told.append(step))
    assert written == REFERENCES
    assert multiprocessing.active_children() == []
    assert set(remembered(path)) == set(range(1, REFERENCES + 1))
    assert verify(path) == []
    assert told[:2] == [("starting workers", 0, 2), ("starting workers", 1, 2)]
    counts = [done for stage, done, total in told if stage == "writing memories"]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (0, REFERENCES)
    assert len(counts) > 30  # a batch is 8
    assert warm_database(path, workers=2) == 0

    alone = shutil.copytree(template, tmp_path / "alone")
    assert warm_database(alone) == REFERENCES
    with MemDB.open(path) as one, MemDB.open(alone) as other:
        # The codec was fitted here as there, and those before it recoded.
        (name,) = one.stats()["memory_bytes"]["codecs"]
        assert name.startswith("klt8:")
        query = WordEmbedder().embed(["harbour"])[0]
        for a, b in zip(
            one.retrieve(query, REFERENCES).hits, other.retrieve(query, REFERENCES).hits,
            strict=True,
        ):  # fmt: skip
            assert a.memory is not None
            assert b.memory is not None
            assert a.memory.offsets.tolist() == b.memory.offsets.tolist()
            assert a.memory.positions.tolist() == b.memory.positions.tolist()
        with open_database(template) as database:  # with the head weights that it records
            assert isinstance(database.writer, Writer)
            (same,) = database.writer.write([a.reference.text])
            assert database.writer.head_weights == (1, 2, 0.5, 4, 1, 3)
            plain = Writer(database.writer.model, budget=60).write([a.reference.text])
        assert same.offsets.tolist() == a.memory.offsets.tolist() != plain[0].offsets.tolist()


@pytest.mark.parametrize(
    ("what", "error", "message"),
    [
        (interrupt, KeyboardInterrupt, None),
        (
            kill_one,
            WorkerError,
            r"worker \d of 2 was killed \(SIGKILL\).* fewer workers need less. What was written "
            "stays; the same call goes on",
        ),
    ],
    ids=["interrupted", "killed"],
)
def test_what_was_written_stays_and_the_next_call_goes_on(
    path: Path, what: Callable[[], None], error: type[BaseException], message: str | None
) -> None:
    with MemDB.open(path) as database:
        database.recode("int8")  # so that no codec is fitted, and writes memories again
    with pytest.raises(error, match=message):
        warm_database(path, workers=2, progress=when_some_are_there(what))
    assert multiprocessing.active_children() == []
    before = remembered(path)
    assert 0 < len(before) < REFERENCES
    assert warm_database(path) == REFERENCES - len(before)
    assert sorted(remembered(path)) == list(range(1, REFERENCES + 1))  # none of them twice
    assert verify(path) == []


def test_what_a_worker_raises_is_raised_here(path: Path, tmp_path: Path) -> None:
    """One reference takes one worker, however many may be started."""
    other = tiny_model("qwen2")
    other.model.save_pretrained(tmp_path / "other")
    other.tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(MismatchError, match="does not fit this database"):
        warm_database(path, workers=3, ids=["007"], model=str(tmp_path / "other"))
    assert multiprocessing.active_children() == []
    assert remembered(path) == []


# --- without --------------------------------------------------------------------------------------


@pytest.fixture
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr("model_adapter.warming._Team.__enter__", refuse)


@pytest.mark.usefixtures("no_processes")
def test_no_process_is_started_for_nothing(path: Path, folder: Path, tmp_path: Path) -> None:
    assert warm_database(path, ids=["000", "001"]) == 2  # by this process
    assert warm_database(path, workers=2, ids=["000", "001"]) == 0
    assert warm_database(path, workers=2, top=5) == 0  # none was asked for
    with open_database(path, model=str(folder)) as database:
        assert database.get("000").warm == 1
    with pytest.raises(InvalidInputError, match="at least 1, got 0"):
        warm_database(path, workers=0)
    MemDB.create(tmp_path / "bare", shape=make_shape(), dimension=2).close()
    with pytest.raises(MissingPartError, match="records no model"):
        warm_database(tmp_path / "bare", workers=2)


@pytest.mark.parametrize(
    ("total", "size", "workers", "sizes"),
    [
        (24, 8, 2, [6, 6, 6, 6]),
        (16, 8, 2, [8, 8]),
        (17, 8, 2, [4, 4, 4, 5]),
        (3, 8, 2, [1, 2]),
        (2, 8, 2, [1, 1]),
        (100, 64, 1, [50, 50]),
    ],
)
def test_each_worker_has_as_many_batches(
    total: int, size: int, workers: int, sizes: list[int]
) -> None:
    batches = list(_batches(range(total), size, workers))
    assert [len(batch) for batch in batches] == sizes
    assert [number for batch in batches for number in batch] == list(range(total))


def test_a_process_takes_its_share_of_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    from model_adapter import warming

    asked = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(warming.LanguageModel, "load", lambda *_, **options: asked.append(options))
    monkeypatch.setattr(warming, "open_database", lambda *_, **__: None)
    for number in range(3):
        warming._open(warming._Job("db", "tiny", "none", {"dtype": "bfloat16"}, number))
    assert [options["device"] for options in asked] == ["cuda:0", "cuda:1", "cuda:0"]
    assert {options["dtype"] for options in asked} == {"bfloat16"}
    warming._open(warming._Job("db", "tiny", "none", {"device": "cpu"}, 1))
    assert asked[-1]["device"] == "cpu"
