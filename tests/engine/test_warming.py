"""From cold to warm: batches, and what happens beside each other while they are written."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from memdb import ExplicitMemory, InvalidInputError, MemDB, MismatchError, StorageError, rewrite
from memdb.codecs import FAMILIES
from memdb.memories.memory_store import MemoryStore
from memdb.protocols import Progress
from memdb.storage.record_layout import REMEMBERED
from tests.engine.helpers import (
    PAGE,
    TokenWriter,
    WordEmbedder,
    keep_whatever_is_lost,
    time_limit,
)

WORDS = "The harbour of Veldmoor is old and the lighthouse shows the way to ships from far"


class WatchedWriter(TokenWriter):
    """Says what it was asked for; `before` is called with the number of each call, from 1."""

    def __init__(
        self, batch: int | None = None, before: Callable[[int], None] = lambda _: None
    ) -> None:
        super().__init__()
        self.calls: list[list[str]] = []
        self.before = before
        if batch is not None:
            self.batch = batch

    def write(self, texts: Sequence[str]) -> list[ExplicitMemory]:
        self.calls.append(list(texts))
        self.before(len(self.calls))
        return super().write(texts)


@pytest.fixture
def path(tmp_path: Path, full_template: Path) -> Path:
    """A database of 20 cold references of 6 to 16 tokens or so, in no order."""
    path = shutil.copytree(full_template, tmp_path / "full")
    with MemDB.open(path, embedder=WordEmbedder(), writer=TokenWriter()) as database:
        for i in range(20):
            text = " ".join(WORDS.split()[: 1 + i * 7 % 9])
            database.insert(f"{text} {i}", id=f"{i:02}", cold=True)
        assert database.stats()["references"] == 20
    return path


def opened(path: Path, writer: TokenWriter) -> MemDB:
    return MemDB.open(path, embedder=WordEmbedder(), writer=writer)


def references(path: Path) -> list[int]:
    with opened(path, TokenWriter()) as database:
        return [number for document in database.documents() for number in document.references]


def warm_ones(path: Path) -> int:
    with opened(path, TokenWriter()) as database:
        return int(database.stats()["memories"])


def remembered(database: MemDB) -> list[int]:
    """The references whose memories were written, in this order, as often as they were."""
    with database._store.read() as transaction:
        blocks = [block[["what", "reference"]].tolist() for block in transaction.changes(0)]
    return [number for block in blocks for what, number in block if what == REMEMBERED]


@pytest.fixture
def slow_codec(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Callable[[], None]]]:
    """What to do, batch by batch, before its memories are encoded."""
    todo: list[Callable[[], None]] = []
    encode = MemoryStore.encode

    def wait(self: MemoryStore, memories: Sequence[ExplicitMemory], count: int) -> list[bytes]:
        if todo:
            todo.pop(0)()
        return encode(self, memories, count)

    monkeypatch.setattr(MemoryStore, "encode", wait)
    with time_limit():
        yield todo


# --- batches --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "sizes"), [(None, [8, 8, 4]), (6, [6, 6, 6, 2]), (64, [20]), (0, [1] * 20)]
)
def test_a_writer_says_how_many_it_wants(path: Path, batch: int | None, sizes: list[int]) -> None:
    writer = WatchedWriter(batch)
    with opened(path, writer) as database:
        assert database.warm() == 20
    assert [len(call) for call in writer.calls] == sizes


@pytest.mark.parametrize("top", [None, 20])
def test_the_longest_come_first_over_the_whole_job(path: Path, top: int | None) -> None:
    writer = WatchedWriter(4)
    with opened(path, TokenWriter()) as database:
        if top is not None:
            database._usage.count(references(path), database._store.generation)
    with opened(path, writer) as database:
        database.warm(top=top)
        lengths = [database._chunker.count(text) for call in writer.calls for text in call]
    assert lengths == sorted(lengths, reverse=True)
    assert len(set(lengths)) > 5


def test_progress_counts_what_is_stored(path: Path) -> None:
    seen = []

    def told(stage: str, done: int, total: int) -> None:
        seen.append((stage, done, total, warm_ones(path)))

    with opened(path, WatchedWriter()) as database:
        database.warm(progress=told)
    assert seen == [("writing memories", done, 20, done) for done in (0, 8, 16, 20)]


def test_what_another_wrote_or_deleted_meanwhile_is_not_counted(path: Path) -> None:
    with opened(path, TokenWriter()) as other:

        def meanwhile(call: int) -> None:
            if call == 1:
                other.warm(["00", "01", "02", "03", "04"])
                other.delete("05", "06", "07")

        with opened(path, WatchedWriter(20, meanwhile)) as database:
            assert database.warm() == 12
        assert other.stats()["cold"] == 0
        written = remembered(other)
    assert len(written) == len(set(written)) == 17


# --- beside each other ----------------------------------------------------------------------------


def test_the_model_writes_while_the_batch_before_is_stored(
    path: Path, slow_codec: list[Callable[[], None]]
) -> None:
    second = threading.Event()
    slow_codec.append(lambda: assert_(second.wait(10)))  # if it were first stored: never
    writer = WatchedWriter(None, lambda call: second.set() if call == 2 else None)
    with opened(path, writer) as database:
        assert database.warm() == 20


def assert_(truth: bool) -> None:
    assert truth


def test_batches_are_stored_in_their_order_and_no_more_than_one_waits(
    path: Path, slow_codec: list[Callable[[], None]]
) -> None:
    ahead = []

    def compare() -> None:
        ahead.append(len(writer.calls) - len(ahead))

    slow_codec.extend([compare] * 3)
    writer = WatchedWriter()
    with opened(path, writer) as database:
        database.warm()
        stored = remembered(database)
        order = [database.retrieve(text, 1).hits[0].id for call in writer.calls for text in call]
    assert max(ahead) <= 2
    assert stored == order


def test_an_error_of_the_codec_comes_out_and_nothing_behind_it_is_stored(
    path: Path, slow_codec: list[Callable[[], None]]
) -> None:
    def fail() -> None:
        raise ZeroDivisionError("in the codec")

    slow_codec.extend([lambda: None, fail])
    writer = WatchedWriter(4)
    with opened(path, writer) as database, pytest.raises(ZeroDivisionError, match="in the codec"):
        database.warm()
    assert warm_ones(path) == 4
    assert len(writer.calls) <= 3
    with opened(path, writer) as database:
        assert database.warm() == 16


def test_an_error_of_the_disk_comes_out(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise StorageError("the disk is full")

    monkeypatch.setattr(MemoryStore, "_keep", full)
    with opened(path, WatchedWriter(20)) as database, pytest.raises(StorageError, match="is full"):
        database.warm()
    assert warm_ones(path) == 0


@pytest.mark.parametrize("error", [RuntimeError("of the model"), KeyboardInterrupt()])
def test_what_ends_the_model_leaves_the_batch_before_it_stored(
    path: Path, slow_codec: list[Callable[[], None]], error: BaseException
) -> None:
    failed = threading.Event()

    def third(call: int) -> None:
        if call == 3:
            failed.set()
            raise error

    # The second batch is still at the codec when the model fails at the third.
    slow_codec.extend([lambda: None, lambda: assert_(failed.wait(10))])
    with opened(path, WatchedWriter(4, third)) as database, pytest.raises(type(error)):
        database.warm()
    assert warm_ones(path) == 8


def test_an_interruption_between_batches_loses_one_at_most(path: Path) -> None:
    def interrupt(stage: str, done: int, total: int) -> None:
        if done == 8:
            raise KeyboardInterrupt

    writer = WatchedWriter(4)
    with opened(path, writer) as database, pytest.raises(KeyboardInterrupt):
        database.warm(progress=interrupt)
    assert warm_ones(path) == 8
    assert len(writer.calls) == 3
    with opened(path, WatchedWriter()) as database:
        assert database.warm() == 12


def test_a_shape_that_changed_meanwhile_is_an_error(path: Path) -> None:
    def meanwhile(call: int) -> None:
        if call == 1:
            rewrite(path, TokenWriter(12), embedder=WordEmbedder)

    with (
        opened(path, WatchedWriter(4, meanwhile)) as database,
        pytest.raises(MismatchError, match="open it again"),
    ):
        database.warm()


def test_the_codec_is_fitted_on_the_way(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_whatever_is_lost(monkeypatch)
    for family in FAMILIES.values():
        monkeypatch.setattr(family, "enough", 8)
    threads = []
    fit = type(FAMILIES["klt8"]).fit

    def where(*arguments: object) -> object:
        threads.append(threading.current_thread().name)
        return fit(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(type(FAMILIES["klt8"]), "fit", where)
    with opened(path, WatchedWriter(4)) as database:
        database.warm()
        (name,) = database.stats()["memory_bytes"]["codecs"]  # those before were recoded
    assert name.startswith("klt8:")
    assert threads == ["memdb fitting the codec and recoding"]


# --- by other hands -------------------------------------------------------------------------------


def test_a_warmer_is_given_what_is_cold_and_the_codec_is_fitted_here(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_whatever_is_lost(monkeypatch)
    for family in FAMILIES.values():
        monkeypatch.setattr(family, "enough", 8)
    seen = []
    given: list[int] = []

    def warmer(numbers: Sequence[int], progress: Progress) -> int:
        given.extend(numbers)
        written = 0
        with opened(path, WatchedWriter()) as other:
            for start in range(0, len(numbers), 5):
                written += other.warm_batches([numbers[start : start + 5]])
                progress("writing memories", written, len(numbers))
                database.settle()
                with MemDB.open(path) as third:
                    seen.append("fitted" in third.settings["memory"])
        return written

    with MemDB.open(path) as database:  # which has no writer of its own
        assert database.warm(warmer=warmer) == 20
        (name,) = database.stats()["memory_bytes"]["codecs"]
    assert sorted(given) == sorted(references(path))
    assert seen == [False, True, True, True]
    assert name.startswith("klt8:")


def test_batches_are_taken_one_by_one_and_the_codec_is_left_alone(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for family in FAMILIES.values():
        monkeypatch.setattr(family, "enough", 8)
    numbers = references(path)
    writer = WatchedWriter()
    taken = []

    def batches() -> Iterator[list[int]]:
        for start in range(0, 20, 7):
            taken.append(len(writer.calls))
            yield numbers[start : start + 7]

    told: list[tuple[str, int, int]] = []
    with opened(path, writer) as database:
        database.warm(["00"])
        assert database.warm_batches(batches(), progress=lambda *step: told.append(step)) == 19
        assert database.warm_batches([numbers, [], [999]]) == 0
        assert list(database.stats()["memory_bytes"]["codecs"]) == ["int8"]
    assert taken == [1, 2, 3]
    assert told == [("writing memories", done, 0) for done in (7, 14, 20)]


def test_nothing_is_warmed_during_a_rewrite(path: Path) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rewrite(path, TokenWriter(12), embedder=WordEmbedder, progress=stop)
    with opened(path, TokenWriter(12)) as database:
        for call in (database.warm, lambda: database.warm_batches([[1]])):
            with pytest.raises(MismatchError, match="being rewritten"):
                call()


def test_a_document_longer_than_a_batch_is_inserted_whole(path: Path) -> None:
    writer = WatchedWriter(2)
    with opened(path, writer) as database:
        stored = database.insert(PAGE, id="page")
        assert stored.warm == len(stored.references) > 8
        with pytest.raises(InvalidInputError, match="at least 1"):
            database.warm(top=0)
