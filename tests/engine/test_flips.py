"""Turned bytes: in records, in LMDB's own pages, in the files beside them.

A record's seal finds each of them. LMDB's pages carry no checksums: there `verify` walks them
before LMDB sees them, in a child process, since LMDB trusts what it reads. What no walk can find is
asserted here too: see `rolled_back`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

import memdb
from memdb import (
    Batch,
    CorruptRecordError,
    Document,
    ExplicitMemory,
    MemDB,
    MemDBError,
    NotADatabaseError,
)
from memdb.storage.record_layout import TABLES
from tests.engine.helpers import TokenWriter, child, make_shape, raw

PAGE = 4096
META = 16 + 136  # bytes of a meta page that mean something
TXNID = range(16 + 128, 16 + 136)  # bytes of a meta page that say which of the two is newer


def small_tokenizer() -> str:
    """A tokenizer of a few words, so that its record is short."""
    words = ["[UNK]", "A", "text", "of", "few", "words", "."]
    model = models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="[UNK]")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return str(tokenizer.to_str())


class FewWords(TokenWriter):
    """Memories of one head."""

    tokenizer = small_tokenizer()

    def __init__(self, reference_length: int = 16) -> None:
        super().__init__(reference_length)
        self.shape = make_shape(
            reference_length=reference_length, layers=(1,), kv_heads=1, head_dim=2
        )


# --- what a reader gets ---------------------------------------------------------------------------

Value = object
TWO = ("doc-0", "doc-1")
WHERE: tuple[dict[str, Any], ...] = ({"kind": "even"}, {"year": {"$gte": 1}}, {"free": "x"})


def plain(memory: ExplicitMemory | None) -> Value:
    if memory is None:
        return None
    return [
        (array.dtype.str, array.shape, array.tobytes())
        for array in (memory.offsets, memory.positions, memory.keys, memory.values)
    ]


class Refused:
    """Stands for a value that could not be read: a `MemDBError` was raised."""


def tried(read: Callable[[], Value]) -> Value:
    try:
        return read()
    except MemDBError:
        return Refused


def readings(path: Path, names: Iterable[str] = TWO) -> Iterator[tuple[str, Value]]:
    """Everything that the public API tells, piece by piece; `Refused` where it raises a
    `MemDBError`, and any other error is not caught."""
    try:
        database = MemDB.open(path, cache_bytes=0)
    except MemDBError:
        yield "open", Refused
        return
    with database:
        yield "shape", database.shape
        yield "settings", database.settings
        yield "split", tried(lambda: database.split("A text of few words. A text of words."))
        for name in names:
            yield f"get {name}", tried(lambda name=name: document(database.get(name)))  # type: ignore[misc]
        walk = database.documents()
        at = 0
        while (found := tried(lambda: next(walk, None))) is not None:
            if found is Refused:
                break
            yield f"document {at}", document(found)
            at += 1
        else:
            yield "documents", at
        for n, where in enumerate(WHERE):
            yield f"filter {n}", tried(lambda where=where: hits_of(database, where))  # type: ignore[misc]
        hits = tried(lambda: database.retrieve(np.ones(2), 100).hits)
        if isinstance(hits, list):
            yield "hits", [(hit.id, hit.score) for hit in hits]
            for hit in hits:
                yield f"reference {hit.id}", tried(lambda hit=hit: hit.reference)  # type: ignore[misc]
                yield f"metadata {hit.id}", tried(lambda hit=hit: hit.metadata)  # type: ignore[misc]
                yield f"memory {hit.id}", tried(lambda hit=hit: plain(hit.memory))  # type: ignore[misc]


def hits_of(database: MemDB, where: dict[str, Any]) -> Value:
    """The references of the documents that a filter means."""
    (found,) = database.retrieve_batch([np.ones(2)], 100, where=where, memories=False)
    return [(hit.id, hit.score) for hit in found.hits]


def document(found: Any) -> Value:
    """All of a document but how many of its references are warm: that is counted from records of
    which the seal is not checked."""
    return found.id, found.version, found.text, found.metadata, found.references


def wrong(path: Path, due: dict[str, Value], names: Iterable[str] = TWO) -> list[str]:
    """What is read, and is neither refused nor what it should be."""
    return [
        what
        for what, value in readings(path, names)
        if value is not Refused and (what not in due or due[what] != value)
    ]


def damaged_tables(path: Path) -> set[str]:
    try:
        return {problem.table for problem in memdb.verify(path)}
    except CorruptRecordError as error:  # it does not open
        return {error.table}


def insert(database: MemDB, n: int, name: str | None = None) -> None:
    shape = database.shape
    memory = FewWords(shape.reference_length).write(["A text of few words. " * 2])
    database.insert(
        f"A text of few words, number {n}.",
        id=name or f"doc-{n}",
        metadata={"kind": "odd" if n % 2 else "even", "year": n, "free": "x" * (n % 3)},
        embeddings=np.array([[1, n]], np.float32),
        memories=memory if n else None,
    )


# --- records --------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def two_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("templates") / "two"
    with MemDB.create(path, writer=FewWords(), dimension=2, keys=["kind", "year"]) as database:
        for n in range(2):
            insert(database, n)
    return path


@pytest.fixture
def two(tmp_path: Path, two_template: Path) -> Path:
    """A closed database of two documents, one of them warm."""
    return Path(shutil.copytree(two_template, tmp_path / "two"))


def test_every_turned_byte_of_every_record_is_reported_and_never_read(two: Path) -> None:
    due = dict(readings(two))
    assert {"get doc-0", "document 1", "filter 2", "hits", "memory 2", "split"} <= due.keys()
    assert Refused not in due.values()
    with raw(two) as (environment, handles), environment.begin() as inner:
        records = [
            (name, bytes(record))
            for name, handle in handles.items()
            for _, record in inner.cursor(handle)
        ]
    assert {name for name, _ in records} == set(TABLES)
    file = two / "gen-000001" / "data.mdb"
    whole = file.read_bytes()
    with file.open("r+b", buffering=0) as data:
        for table, record in records:
            places = [found.start() for found in re.finditer(re.escape(record), whole)]
            assert places  # one is the record, others are left in pages that are free
            for at in range(len(record)):
                turned = bytes([record[at] ^ 1 << at % 8])
                for place in places:
                    os.pwrite(data.fileno(), turned, place + at)
                assert table in damaged_tables(two), (table, at)
                assert wrong(two, due) == [], (table, at)
                for place in places:
                    os.pwrite(data.fileno(), record[at : at + 1], place + at)
    assert memdb.verify(two) == []
    assert dict(readings(two)) == due


# --- pages ----------------------------------------------------------------------------------------

MANY = (*(f"doc-{n}" for n in range(24)), "long", "last")


@pytest.fixture(scope="session")
def many_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A closed database with branch pages, overflow pages and free pages; beside it is `before`,
    the same without what the last transaction wrote."""
    path = tmp_path_factory.mktemp("templates") / "many"
    shape = FewWords().shape
    documents = [
        Document(f"text {n}", f"doc-{n}", {"kind": "odd" if n % 2 else "even", "note": "x" * 150})
        for n in range(24)
    ]
    memories = FewWords().write(["A text of few words."] * 24)
    with MemDB.create(path, shape=shape, dimension=2, keys=["kind"]) as database:
        database.load([Batch(documents, np.eye(24, 2, dtype=np.float32) + 1, memories)])
        long = {"note": "a long value " * 400, "kind": "long"}
        database.insert("A long one.", id="long", metadata=long, embeddings=np.ones((1, 2)))
        database.delete("doc-7", "doc-8", "doc-9")
        database.update("doc-3", metadata={"kind": "new"})
    shutil.copytree(path, path.with_name("before"))
    with MemDB.open(path) as database:
        insert(database, 77, "last")
    data = (path / "gen-000001" / "data.mdb").read_bytes()
    flags = {int.from_bytes(data[at + 10 : at + 12], "little") for at in range(0, len(data), PAGE)}
    assert flags >= {1, 2, 4, 8}  # branch, leaf, overflow, meta
    return path


SAME, REPORTED, ROLLED_BACK, WRONG, RAISED = range(5)


def outcome(path: Path, due: dict[str, Value], before: dict[str, Value]) -> int:
    """What a turned byte comes to: the same values as before, a report, the values before the last
    transaction, or anything else."""
    try:
        if memdb.verify(path):
            return REPORTED
    except MemDBError:
        return REPORTED
    found = dict(readings(path, MANY))
    if found == due:
        return SAME
    if found == before:
        return ROLLED_BACK
    return WRONG


def survey(path: Path, before: Path, offsets: Iterable[tuple[int, int]]) -> None:
    """Turn bits of `data.mdb` one by one, and print what each comes to.

    Args:
        path: the database.
        before: the database without its last transaction.
        offsets: of a byte in the file, and the bits to turn.
    """
    file = path / "gen-000001" / "data.mdb"
    whole = file.read_bytes()
    dues = dict(readings(path, MANY)), dict(readings(before, MANY))
    with file.open("r+b", buffering=0) as data:
        for at, bits in offsets:
            os.pwrite(data.fileno(), bytes([whole[at] ^ bits]), at)
            signal.alarm(20)  # a page that leads back to itself
            try:
                code = outcome(path, *dues)
            except Exception:
                traceback.print_exc()
                code = RAISED
            os.pwrite(data.fileno(), whole[at : at + 1], at)
            print(code, flush=True)
    signal.alarm(0)


SURVEY = """
    import json, sys
    from pathlib import Path
    from tests.engine.test_flips import survey
    survey(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(Path(sys.argv[3]).read_text()))
"""


def surveyed(
    template: Path, tmp_path: Path, offsets: list[tuple[int, int]]
) -> tuple[Counter[int], list[tuple[int, int]]]:
    """How often each outcome came about, and where in which page a transaction was undone.

    LMDB may end the process that reads a damaged page: another one goes on behind it.
    """
    path = Path(shutil.copytree(template, tmp_path / "many"))
    file, whole = path / "gen-000001" / "data.mdb", (template / "gen-000001/data.mdb").read_bytes()
    codes: list[int] = []
    while len(codes) < len(offsets):
        (tmp_path / "offsets").write_text(json.dumps(offsets[len(codes) :]))
        result = child(SURVEY, path, template.with_name("before"), tmp_path / "offsets")
        codes.extend(map(int, result.stdout.split()))
        if len(codes) < len(offsets):
            codes.append(result.returncode)
            assert result.returncode < 0, result.stderr
        file.write_bytes(whole)
        # A crash, a hang or a wrong value that verify did not report would stand here.
        bad = [
            (at // PAGE, at % PAGE, bits, code)
            for (at, bits), code in zip(offsets, codes, strict=False)
            if code not in (SAME, REPORTED, ROLLED_BACK)
        ]
        assert bad == [], result.stderr
    undone = [at for (at, _), code in zip(offsets, codes, strict=True) if code == ROLLED_BACK]
    return Counter(codes), [(at // PAGE, at % PAGE) for at in undone]


def page_bytes(template: Path, step: int, head: int) -> list[tuple[int, int]]:
    """Bytes of the pages behind the meta pages: the first `head` of each, and each `step`-th."""
    size = (template / "gen-000001" / "data.mdb").stat().st_size
    return [
        (at, 1 << at % 8)
        for at in range(2 * PAGE, size)
        if at % PAGE < head or (at // PAGE * 5 + at) % step == 0
    ]


@pytest.mark.parametrize(
    ("step", "head"), [(409, 16), pytest.param(31, 64, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_a_turned_byte_of_a_page_is_reported_or_harmless(
    many_template: Path, tmp_path: Path, step: int, head: int
) -> None:
    found, undone = surveyed(many_template, tmp_path, page_bytes(many_template, step, head))
    assert undone == []
    assert min(found[SAME], found[REPORTED]) > 100


def test_a_key_of_a_wrong_length_is_reported(many_template: Path, tmp_path: Path) -> None:
    """It stands two bytes before the key in its page."""
    data = (many_template / "gen-000001" / "data.mdb").read_bytes()
    offsets = []
    copy = Path(shutil.copytree(many_template, tmp_path / "copy"))
    with raw(copy) as (environment, handles), environment.begin() as inner:
        for table in ("references", "embeddings", "memories", "changes"):
            for key, record in inner.cursor(handles[table]):
                # Copies of it may stand in free pages, too.
                for found in re.finditer(re.escape(bytes(key) + bytes(record)), data):
                    at = found.start() - 2
                    assert data[at : at + 2] == b"\x08\0"
                    offsets.extend([(at, 2), (at, 12)])
    outcomes, _ = surveyed(many_template, tmp_path, offsets)
    assert outcomes[REPORTED] > 100


@pytest.mark.parametrize(
    "bits", [(2,), pytest.param(tuple(1 << n for n in range(8)), marks=pytest.mark.slow)]
)
def test_a_turned_byte_of_a_meta_page_is_reported_or_harmless_or_undoes_the_last_write(
    many_template: Path, tmp_path: Path, bits: tuple[int, ...]
) -> None:
    """There are two meta pages, and the one with the higher number counts: a number that is wrong
    makes the state before the last transaction the newest. No walk can tell."""
    offsets = [
        (page * PAGE + at, b << at % 8 & 255 or 1)
        for page in (0, 1)
        for at in range(META)
        for b in bits
    ]
    found, undone = surveyed(many_template, tmp_path, offsets)
    assert all(at in TXNID for _, at in undone), undone
    assert found[REPORTED] > 20


# --- files beside the data ------------------------------------------------------------------------


@pytest.fixture(scope="session")
def indexed_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("templates") / "indexed"
    with MemDB.create(path, shape=make_shape(), dimension=4, index="ivf") as database:
        vectors = np.random.default_rng(0).standard_normal((70, 4)).astype(np.float32)
        for n, vector in enumerate(vectors):
            database.insert(f"text {n}", id=f"doc-{n}", embeddings=vector[None])
        assert database.build_index() is not None
        database.retrieve(vectors[0], 3)
        database.delete("doc-5")
        database.insert("one more", id="more", embeddings=np.ones((1, 4)))
    return path


def searched(path: Path) -> list[list[tuple[int, str]]]:
    """What three queries find: as many as there are, so that an index of any recall has to find
    the same."""
    queries = list(np.random.default_rng(1).standard_normal((3, 4)).astype(np.float32))
    with MemDB.open(path) as database:
        found = database.retrieve_batch(queries, 70, memories=False)
        return [
            sorted((hit.id, hit.reference.text) for hit in retrieval.hits) for retrieval in found
        ]


@pytest.mark.parametrize("step", [149, pytest.param(5, marks=pytest.mark.slow)])
def test_a_turned_byte_or_a_wrong_length_of_the_index_file_changes_no_search(
    indexed_template: Path, tmp_path: Path, step: int
) -> None:
    path = Path(shutil.copytree(indexed_template, tmp_path / "indexed"))
    (path / "gen-000001" / "index.faiss").unlink()
    with MemDB.open(path) as database:
        assert database.stats()["index"]["kind"] == "exact"
    due = searched(path)
    file = path / "gen-000001" / "index.faiss"
    shutil.copy(indexed_template / "gen-000001" / "index.faiss", file)
    with MemDB.open(path) as database:
        assert database.stats()["index"]["kind"] == "ivf"
    assert searched(path) == due
    whole = file.read_bytes()
    for at in range(0, len(whole), step):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        assert searched(path) == due, at
        file.write_bytes(whole[:at])
        assert searched(path) == due, at


def test_a_turned_byte_or_a_wrong_length_of_the_usage_file_costs_the_counts_alone(
    indexed_template: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(indexed_template, tmp_path / "indexed"))
    file = path / "gen-000001" / "usage"
    whole = file.read_bytes()
    with MemDB.open(path) as database:
        due = database.usage()
        assert sum(due.values()) == 3
        for at in range(len(whole)):
            file.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
            assert database.usage() == {}
            file.write_bytes(whole[:at])
            assert database.usage() == {}
        found = database.retrieve(np.ones(4), 2).hits
    with MemDB.open(path) as database:
        assert database.usage() == {hit.id: 1 for hit in found}  # the file is written anew
    assert memdb.verify(path) == []


def test_a_turned_byte_of_current_is_no_database(two: Path) -> None:
    file = two / "CURRENT"
    whole = file.read_bytes()
    due = dict(readings(two))
    for at in range(len(whole)):
        for bit in range(8):
            file.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
            if file.read_bytes().strip() == whole.strip():  # another white space at the end
                assert dict(readings(two)) == due
                continue
            for call in (MemDB.open, memdb.verify, memdb.repair, memdb.compact):
                with pytest.raises(NotADatabaseError):
                    call(two)
    for size in range(len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(NotADatabaseError):
            MemDB.open(two)
    file.write_bytes(whole)
    assert dict(readings(two)) == due
