"""What is damaged and what is not: an error of the machine, or of a program, is what it is,
wherever a record is decoded; and `repair` takes out nothing for it."""

from __future__ import annotations

import errno
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import lmdb
import numpy as np
import pytest
import zstandard

import memdb
from memdb import CorruptRecordError, MemDB, Problem, StorageError
from memdb.care import read_aside
from memdb.codecs import FAMILIES
from memdb.index import searcher
from memdb.ingest.chunking import text_tokenizer
from memdb.memories.codec_choice import KnownCodecs
from memdb.storage.record_layout import (
    CHANGES,
    EMBEDDINGS,
    MEMORIES,
    METADATA,
    REFERENCES,
    SETTINGS,
    integer_key,
    read_reference,
    unseal,
)
from memdb.storage.store import Store
from memdb.storage.transaction import decoded
from memdb.storage.usage import FILE as USAGE
from memdb.types.canonical import read_json
from memdb.types.native import of_the_machine
from tests.engine.fitted import fitted, make_like, roped_shape
from tests.engine.helpers import (
    WordEmbedder,
    child,
    keep_whatever_is_lost,
    make_memory,
    make_shape,
    tokenizer_json,
    unit,
)

# The fixtures of test_verify are used here too.
from tests.engine.test_verify import (  # noqa: F401
    SHORT,
    forging,
    index_file,
    indexed,
    indexed_template,
    opened,
    records,
    small,
    small_template,
)

ERRORS: dict[str, Callable[[], Exception]] = {
    "memory": lambda: MemoryError("no more"),
    "disk": lambda: OSError(errno.EIO, "Input/output error"),
    "bug": lambda: TypeError("a bug"),
    "closed": lambda: StorageError("it is closed"),
    "recursion": lambda: RecursionError("too deep"),
}

#: Where bytes of a database are decoded, by what is decoded there.
PLACES = {
    "a seal": "memdb.storage.record_layout._checksum",
    "JSON": "memdb.storage.transaction.read_json",
    "zstd": "memdb.storage.record_layout.decompress",
    "a document": "memdb.storage.record_layout.DocumentEntry.read",
    "metadata": "memdb.storage.record_layout.read_metadata",
    "a reference": "memdb.storage.record_layout.read_reference",
    "an embedding": "memdb.storage.record_layout.read_embedding",
    "a change": "memdb.storage.record_layout.read_changes",
    "a memory's head": "memdb.codecs.payload.read_payload",
    "a memory's vectors": "memdb.codecs.int8.Int8.decode",
    "a memory as a whole": "memdb.care.verify.decode_memory",
    "numbers": "memdb.care.verify.to_float32",
    "postings": "memdb.filters.postings._read",
}


class Failing:
    """Raises an error from the nth call on; else does what the original does."""

    def __init__(self, patch: pytest.MonkeyPatch, place: str, error: Exception, after: int) -> None:
        self.met = False
        left = iter(range(after))
        owner, name = place.rsplit(".", 1)
        module, _, kind = owner.rpartition(".")
        holder = getattr(sys.modules[module], kind) if kind[:1].isupper() else sys.modules[owner]
        original = getattr(holder, name)

        def fail(*args: Any, **options: Any) -> Any:
            if next(left, None) is None:
                self.met = True
                raise error
            return original(*args, **options)

        patch.setattr(holder, name, fail)


def raised_by(call: Callable[[], Any], kind: type[Exception]) -> Exception | None:
    """The error of that kind that a call raises, if it does."""
    try:
        call()
    except kind as error:
        return error
    return None


@pytest.mark.parametrize("after", [0, 2])
@pytest.mark.parametrize("kind", list(ERRORS))
@pytest.mark.parametrize("place", list(PLACES))
def test_an_error_that_is_no_complaint_is_raised_by_verify_and_repair_as_it_is(
    small: Path,  # noqa: F811
    place: str,
    kind: str,
    after: int,
) -> None:
    before = records(small)
    for care in (
        lambda: memdb.verify(small),
        lambda: memdb.repair(small, embedder=WordEmbedder, drop=True),
    ):
        error = ERRORS[kind]()
        with pytest.MonkeyPatch.context() as patch:
            failing = Failing(patch, PLACES[place], error, after)
            assert raised_by(care, type(error)) is (error if failing.met else None)
        assert failing.met or after
    assert records(small) == before
    assert memdb.verify(small) == []
    assert list(small.rglob("aside*")) == []


CALLS: dict[str, Callable[[MemDB], Any]] = {
    "get": lambda database: database.get("short"),
    "documents": lambda database: list(database.documents({"x": [1]})),
    "filter": lambda database: database.query("A short text.", where={"kind": "note"}).hits,
    "hits": lambda database: [
        (hit.reference, hit.metadata, hit.memory)
        for hit in database.retrieve("A short text.", 9).hits
    ],
    "pack": lambda database: memdb.pack(
        database.retrieve("A short text.", 9).stored, database.shape
    ),
    "memories": lambda database: [m and m.memory for _, m in database.memories("long")],
    "stats": lambda database: database.stats(),
    "update": lambda database: database.update("short", metadata={"kind": "new"}),
    "follow": lambda database: (
        database.query("A short text."),
        database.delete("short"),
        database.query("A short text."),
    ),
    "recode": lambda database: database.recode("exact"),
}


@pytest.mark.parametrize("kind", list(ERRORS))
@pytest.mark.parametrize("place", list(PLACES))
def test_an_error_that_is_no_complaint_is_raised_by_every_call_as_it_is(
    small_template: Path,  # noqa: F811
    tmp_path: Path,
    place: str,
    kind: str,
) -> None:
    met = 0
    for name, call in CALLS.items():
        path = Path(shutil.copytree(small_template, tmp_path / name))
        error = ERRORS[kind]()
        with opened(path) as database, pytest.MonkeyPatch.context() as patch:
            failing = Failing(patch, PLACES[place], error, 0)
            raised = raised_by(partial(call, database), type(error))
            assert raised is (error if failing.met else None)
            met += failing.met
    assert met or place in ("an embedding", "a memory as a whole", "numbers")


@pytest.mark.parametrize("kind", list(ERRORS))
def test_a_tokenizer_that_cannot_be_loaded_now_is_not_a_wrong_one(kind: str) -> None:
    error = ERRORS[kind]()
    with pytest.MonkeyPatch.context() as patch:
        Failing(patch, "memdb.ingest.text_only.read_json", error, 0)
        assert raised_by(lambda: text_tokenizer(tokenizer_json()), type(error)) is error
    for wrong in ("", "[]", "{}", '{"model": 1}', "[" * 100_000):
        with pytest.raises(memdb.InvalidInputError, match="the tokenizer does not load"):
            text_tokenizer(wrong)


@pytest.mark.parametrize("place", list(PLACES))
def test_a_complaint_of_a_decoder_is_damage(small: Path, place: str) -> None:  # noqa: F811
    with pytest.MonkeyPatch.context() as patch:
        failing = Failing(patch, PLACES[place], ValueError("these bytes are none"), 0)
        with suppress(ValueError):  # of what is no decoder, and is a bug then
            assert memdb.verify(small) != []
    assert failing.met


# --- the machine --------------------------------------------------------------------------------


def test_a_memory_that_does_not_fit_in_ram_is_no_damage(tmp_path: Path) -> None:
    """A process that may take no more address space: it can read all the same once it may."""
    shape = make_shape(layers=tuple(range(30)), kv_heads=4, head_dim=128)
    path = tmp_path / "large"
    with MemDB.create(path, shape=shape, dimension=2, codec="exact") as database:
        memory = make_memory(shape, 1, 110)
        database.insert("large", id="large", embeddings=unit(1, 0), memories=[memory])
        assert memory.nbytes > 4 << 20
    done = child(
        """
        import re, resource, sys
        import memdb
        with memdb.MemDB.open(sys.argv[1], cache_bytes=0) as database:
            database.get("large")
            ((_, stored),) = database.memories("large")
            now = int(re.search(r"VmSize:\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10
            raised = set()
            for room in range(0, 32 << 20, 1 << 19):
                resource.setrlimit(resource.RLIMIT_AS, (now + room, -1))
                try:
                    stored.memory
                except MemoryError:
                    raised.add("MemoryError")
                else:
                    break
            resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
            print(sorted(raised), stored.memory.pairs > 0)
        print(memdb.verify(sys.argv[1]))
        """,
        path,
    )
    assert done.stdout.splitlines() == ["['MemoryError'] True", "[]"], done.stderr


def test_what_libraries_say_of_the_machine_is_told_from_what_they_say_of_bytes(
    tmp_path: Path,
) -> None:
    closed = tmp_path / "file"
    closed.write_bytes(b"IxXX" + bytes(100))
    with pytest.raises(RuntimeError) as of_bytes:
        faiss.read_index(str(closed))
    assert of_the_machine(of_bytes.value) is None
    with pytest.raises(zstandard.ZstdError) as of_a_frame:
        zstandard.decompress(zstandard.compress(bytes(1000))[:-3])
    assert of_the_machine(of_a_frame.value) is None
    for text, kind in (
        ("cannot compress: Allocation error : not enough memory", MemoryError),
        ("Error -4 while decompressing data: out of memory", MemoryError),
        ("C++ exception std::bad_alloc", MemoryError),
        ("could not mmap: Cannot allocate memory", MemoryError),
        ("could not open x for reading: Too many open files", OSError),
        ("read error in x: 0 != 8 (Input/output error)", OSError),
        ("could not open x for reading: Permission denied", OSError),
    ):
        assert type(of_the_machine(RuntimeError(text))) in (kind, PermissionError)


@pytest.mark.parametrize("kind", ["memory", "disk"])
@pytest.mark.parametrize("place", ["faiss.read_index", "memdb.index.ann._described"])
def test_an_index_file_that_cannot_be_read_now_is_whole(
    indexed: Path,  # noqa: F811
    place: str,
    kind: str,
) -> None:
    error = ERRORS[kind]()
    query = np.ones(8, np.float32)
    whole = index_file(indexed).read_bytes()
    with MemDB.open(indexed) as database, pytest.MonkeyPatch.context() as patch:
        Failing(patch, place, error, 0)
        for care in (memdb.verify, memdb.repair):
            with pytest.raises(type(error)):
                care(indexed)
        if kind == "disk":  # search is right without
            assert len(database.retrieve(query, 80).hits) == 80
            assert database._searcher._view is not None
            assert database._searcher._view.base is None
        else:
            with pytest.raises(MemoryError):
                database.retrieve(query, 80)
        patch.undo()
        database._searcher._looked = 0.0  # the next look
        assert len(database.retrieve(query, 80).hits) == 80
        assert database._searcher._view is not None
        assert database._searcher._view.base is not None
    assert index_file(indexed).read_bytes() == whole


def test_an_index_of_a_later_state_than_a_searchs_own_is_used_by_the_next(
    indexed: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Between the beginning of a search and its look at the file another one writes, and builds."""
    query = np.ones(8, np.float32)
    look = searcher.file_stamp
    with MemDB.open(indexed) as other, MemDB.open(indexed) as database:

        def late(file: Path) -> tuple[int, int, int]:
            monkeypatch.undo()
            other.insert("late", id="late", embeddings=query[None])
            other.build_index()
            return look(file)

        monkeypatch.setattr(searcher, "file_stamp", late)
        assert len(database.retrieve(query, 100).hits) == 80  # of its own state
        database._searcher._looked = 0.0  # the next look
        assert database.retrieve(query, 1).hits[0].document_id == "late"
        assert database.stats()["index"]["kind"] == "ivf"
        assert database._searcher._view is not None
        assert database._searcher._view.base is not None


def test_an_index_that_is_built_while_it_is_verified_is_no_damage(
    indexed: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    query = np.ones(8, np.float32)
    verifying = sys.modules["memdb.care.verify"]  # a function has its name, too
    whole = verifying.AnnIndex
    with MemDB.open(indexed) as other:

        def late(file: Path) -> Any:
            monkeypatch.undo()
            other.insert("late", id="late", embeddings=query[None])
            other.build_index()
            return whole(file)

        monkeypatch.setattr(verifying, "AnnIndex", late)
        assert memdb.verify(indexed) == []


def test_a_damaged_change_record_is_no_fault_of_the_index(
    indexed: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    query = np.ones(8, np.float32)

    def damaged(*_: object) -> bool:
        raise CorruptRecordError(CHANGES, "80", "its checksum does not match")

    with MemDB.open(indexed) as database:
        monkeypatch.setattr(searcher, "is_of_this_past", damaged)
        assert len(database.retrieve(query, 100).hits) == 80
        monkeypatch.undo()
        database._searcher._looked = 0.0
        assert len(database.retrieve(query, 100).hits) == 80
        assert database.stats()["index"]["kind"] == "ivf"


def test_an_index_that_faiss_had_no_memory_for_is_whole(
    indexed: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """FAISS has one error for all."""

    def refuse(*_: object) -> None:
        raise RuntimeError("Error in mmap: could not mmap: Cannot allocate memory")

    monkeypatch.setattr(faiss, "read_index", refuse)
    with pytest.raises(MemoryError):
        memdb.verify(indexed)


def test_counts_of_use_that_cannot_be_read_are_not_written_over(
    small: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with opened(small) as database:
        database.retrieve("A short text.", 3)
    (file,) = small.glob(f"gen-*/{USAGE}")
    counts = file.read_bytes()
    read = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path.name == USAGE:
            raise ERRORS["disk"]()
        return read(path)

    with opened(small) as database, monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", refuse)
        database.retrieve("A short text.", 3)
        database._usage.flush(file.parent)
        with pytest.raises(StorageError, match="Input/output"):
            memdb.compact(small)
    assert file.read_bytes() == counts


def test_a_database_that_was_closed_is_no_damage() -> None:
    """The parameters of a codec are read when they are first needed."""

    def closed(_: str) -> bytes:
        raise StorageError("it is closed")

    with pytest.raises(StorageError):
        KnownCodecs(closed)[fitted("klt8").name]


@pytest.mark.parametrize("family", ["klt8", "paper"])
@pytest.mark.parametrize("kind", list(ERRORS))
def test_a_fitted_codec_that_cannot_be_loaded_now_is_no_damage(
    monkeypatch: pytest.MonkeyPatch, family: str, kind: str
) -> None:
    codec = fitted(family)
    error = ERRORS[kind]()
    known = KnownCodecs(lambda _: codec.parameters)
    with monkeypatch.context() as patch:
        Failing(
            patch,
            f"{type(FAMILIES[family]).__module__}.{type(FAMILIES[family]).__name__}.load",
            error,
            0,
        )
        with pytest.raises(type(error)) as caught:
            known[codec.name]
    assert caught.value is error
    assert known[codec.name].name == codec.name


@pytest.mark.parametrize(
    ("raised", "kind"),
    [
        (lmdb.CorruptedError, CorruptRecordError),
        (lmdb.PageNotFoundError, CorruptRecordError),
        (lmdb.MemoryError, StorageError),
        (lmdb.DiskError, StorageError),
        (lmdb.ReadersFullError, StorageError),
        (lmdb.BadTxnError, StorageError),
    ],
)
def test_what_lmdb_says_of_its_pages_is_damage_and_nothing_else(
    small: Path,  # noqa: F811
    raised: type[Exception],
    kind: type[Exception],
) -> None:
    store = Store(small)
    try:
        with pytest.raises(kind) as caught, store.read():
            raise raised("it")
        assert type(caught.value) is kind
    finally:
        store.close()


def test_json_that_nests_too_deep_is_damage(small: Path) -> None:  # noqa: F811
    deep = b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    with pytest.raises(ValueError, match="100001 deep"):
        read_json(deep)
    marks = {"[[[": '\\"{['}
    assert read_json(json.dumps(marks).encode()) == marks
    with forging(small) as forge:
        forge.put(METADATA, "short", 1, deep)
    with opened(small) as database, pytest.raises(CorruptRecordError, match="deep"):
        database.get("short")
    assert any("deep" in problem.what for problem in memdb.verify(small))


def test_a_full_stack_is_no_damage() -> None:
    """What nests as deep as it may, read where the stack is nearly full."""
    text = b"[" * 60 + b"]" * 60
    seen: set[type[BaseException]] = set()

    def descend(left: int) -> None:
        if left:
            descend(left - 1)
        else:
            read_json(text)

    for depth in range(sys.getrecursionlimit() - 200, sys.getrecursionlimit()):
        try:
            descend(depth)
        except (RecursionError, ValueError) as error:
            seen.add(type(error))
    assert seen == {RecursionError}


def test_decoded_names_what_a_decoder_complains_of_and_nothing_else() -> None:
    def complain(_: int, payload: bytes) -> None:
        raise UnicodeDecodeError("utf-8", payload, 0, 1, "none")

    with pytest.raises(CorruptRecordError, match="record 7 of table 'references'"):
        decoded(REFERENCES, integer_key(7), (1, b"x"), complain)
    for make in (lambda: KeyError("k"), lambda: AttributeError("a"), lambda: ZeroDivisionError()):
        error = make()

        def fail(_: int, __: bytes, error: Exception = error) -> None:
            raise error

        with pytest.raises(type(error)) as caught:
            decoded(REFERENCES, integer_key(7), (1, b"x"), fail)
        assert caught.value is error


# --- what repair takes out ------------------------------------------------------------------------


def aside_of(report: memdb.Repair) -> Iterator[Any]:
    for file in report.aside:
        yield from read_aside(file)


def test_a_memory_that_was_written_anew_meanwhile_is_not_taken_out(
    small: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What `verify` found is looked at again by the transaction that mends."""
    before = records(small)
    stale = [
        Problem(MEMORIES, str(SHORT), "its checksum does not match", "short"),
        Problem(EMBEDDINGS, str(SHORT), "its checksum does not match", "short"),
        Problem(CHANGES, "1", "its checksum does not match"),
        Problem(REFERENCES, str(SHORT), "its checksum does not match", "short"),
    ]
    told = iter([stale, stale])
    real = memdb.verify
    monkeypatch.setattr(
        sys.modules["memdb.care.repair"],
        "verify",
        lambda *a, **o: next(told, None) or real(*a, **o),
    )
    report = memdb.repair(small, embedder=WordEmbedder, drop=True)
    assert (report.mended, report.dropped, report.put_aside) == ([], [], [])
    assert records(small) == before


def test_what_was_dropped_can_be_read_and_brought_back(small: Path) -> None:  # noqa: F811
    whole = records(small)
    with forging(small) as forge:
        forge.spoil(METADATA, "long")
    report = memdb.repair(small, drop=True)
    assert report.dropped == ["long"]
    (file,) = report.aside
    assert file.parent == small / "gen-000001"
    found = list(read_aside(file))
    texts = [
        read_reference(1, *record.unsealed()).text for record in found if record.table == REFERENCES
    ]
    with opened(small) as database:
        assert "".join(texts)[:20] == "The harbour of Veldm"
        database.insert("".join(texts), id="long")
        assert database.get("long").text == "".join(texts)
    for record in found:
        if record.table == METADATA:
            with pytest.raises(CorruptRecordError):
                record.unsealed()
        else:
            assert whole[record.table, record.key] == record.record
        assert record.why


def test_memories_of_a_lost_codec_are_put_aside_with_what_is_left_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their seals are right: with the parameters from elsewhere they can be read again."""
    keep_whatever_is_lost(monkeypatch)
    shape, path = roped_shape(), tmp_path / "a"
    with MemDB.create(path, shape=shape, dimension=2, codec="klt8", durability="off") as database:
        for n in range(FAMILIES["klt8"].enough):
            memory = make_like(shape, n)
            database.insert(f"{n}", id=f"{n}", embeddings=unit(1, n), memories=[memory])
        database.settle()
        (name,) = set(database.stats()["memory_bytes"]["codecs"]) - {"int8"}
    whole = records(path)
    with forging(path) as forge:
        forge.spoil(SETTINGS, f"codec {name}")
    report = memdb.repair(path)
    assert report.left == []
    found = {(record.table, record.key): record for record in aside_of(report)}
    lost = {place for place in whole if place[0] == MEMORIES} - set(records(path))
    assert len(lost) > 100
    assert lost <= set(found)
    assert all(found[place].record == whole[place] for place in lost)
    assert (SETTINGS, f"codec {name}".encode()) in found
    with forging(path) as forge:  # a backup has the parameters
        key = f"codec {name}"
        forge.put(SETTINGS, key, *plain(whole[SETTINGS, key.encode()], key.encode()))
        for table, number in lost:
            version, payload = found[table, number].unsealed()
            forge.put(MEMORIES, int.from_bytes(number, "little"), version, payload)
    with MemDB.open(path) as database:
        assert database.get("5").warm == 1
        ((_, stored),) = database.memories("5")
        assert stored is not None
        assert stored.memory.pairs == make_like(shape, 5).pairs


def plain(record: bytes, key: bytes) -> tuple[int, bytes]:
    version, payload = unseal(SETTINGS, key, memoryview(record))
    return version, bytes(payload)


def test_what_is_put_aside_goes_with_a_compaction_and_is_in_no_backup(
    small: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    with forging(small) as forge:
        forge.spoil(REFERENCES, SHORT)
    assert memdb.repair(small, drop=True).aside
    memdb.backup(small, tmp_path / "backup")
    assert list((tmp_path / "backup").rglob("aside*")) == []
    memdb.compact(small)
    assert list(small.rglob("aside*")) == []


def test_what_is_put_aside_may_lie_elsewhere_and_each_repair_has_its_own_file(
    small: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    kept = tmp_path / "some" / "where"
    files = []
    for number in (SHORT, 5):
        with forging(small) as forge:
            forge.spoil(MEMORIES, number)
        report = memdb.repair(small, aside=kept)
        files += report.aside
        assert report.put_aside == [f"memories, record {number}"]
    assert files == [kept / "aside-000001.jsonl", kept / "aside-000002.jsonl"]
    memdb.compact(small)
    assert [record.table for file in files for record in read_aside(file)] == [MEMORIES, MEMORIES]
    with pytest.raises(memdb.InvalidInputError, match="line 1"):
        list(read_aside(Path(__file__)))


def test_nothing_is_taken_out_where_it_cannot_be_put_aside(
    small: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    (tmp_path / "file").touch()
    with forging(small) as forge:
        forge.spoil(MEMORIES, SHORT)
    before = records(small)
    with pytest.raises(StorageError, match="put aside"):
        memdb.repair(small, aside=tmp_path / "file")
    assert records(small) == before
    assert memdb.repair(small).left == []


def test_a_repair_that_fails_leaves_nothing_aside(small: Path) -> None:  # noqa: F811
    class NoEmbedder(WordEmbedder):
        def embed(self, *_: object, **__: object) -> Any:
            raise MemoryError

    with forging(small) as forge:
        forge.spoil(MEMORIES, SHORT)
        forge.spoil(EMBEDDINGS, SHORT)
    before = records(small)
    with pytest.raises(MemoryError):
        memdb.repair(small, embedder=NoEmbedder)
    assert records(small) == before
    assert list(small.rglob("aside*")) == []


def test_an_embedding_made_anew_is_what_open_databases_and_the_index_find(
    small: Path,  # noqa: F811
) -> None:
    """A vector with a right seal that is not of length 1: views and index files hold it, too."""
    with forging(small) as forge:
        forge.embedding(SHORT, *[0.25] * 64)
    with opened(small) as database:
        assert len(database.query("A short text.", 9).hits) == 8
        assert memdb.repair(small, embedder=WordEmbedder).left == []
        best = database.query("A short text.", 1).hits[0]
        assert (best.id, round(best.score, 3)) == (SHORT, 1.0)
