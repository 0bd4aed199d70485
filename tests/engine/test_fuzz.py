"""Bytes that nobody vouches for: every decoder gives a value or the error that it documents.

Two sorts of input: any bytes, and bytes that were right until something in them was changed. A seal
is no secret, so records are given seals that fit: what is behind them is read in any case.
"""

from __future__ import annotations

import json
import shutil
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import xxhash
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

import memdb
from memdb import (
    CODECS,
    CorruptRecordError,
    DType,
    FormatError,
    MemDB,
    MemDBError,
    MemoryShape,
    MismatchError,
)
from memdb.codecs import decode_memory, encode_memory
from memdb.filters.language import parse
from memdb.filters.planning import known
from memdb.filters.postings import Postings
from memdb.index.ann import AnnIndex
from memdb.storage.record_layout import (
    CHANGES,
    DOCUMENTS,
    EMBEDDINGS,
    MEMORIES,
    METADATA,
    POSTINGS,
    REFERENCES,
    SETTINGS,
    TABLES,
    TEXT_LIMIT,
    DocumentEntry,
    changes_payload,
    decompress,
    integer_key,
    reference_payload,
    seal,
    unseal,
)
from memdb.storage.transaction import Transaction, decoded
from memdb.storage.usage import Usage, read_usage
from memdb.types.canonical import json_payload
from memdb.types.document import Reference
from tests.engine.helpers import make_memory, make_shape, raw, time_limit, unit

MANY = settings(max_examples=300)
DTYPES: tuple[DType, ...] = ("float32", "float16", "bfloat16")

#: JSON, as anybody may write it.
any_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


@st.composite
def mutated(draw: st.DrawFn, *whole: bytes) -> bytes:
    """Bytes that are right but for a few changes."""
    data = bytearray(draw(st.sampled_from(whole)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        match draw(st.sampled_from(["turn", "cut", "insert", "number"])):
            case "turn" if at < len(data):
                data[at] ^= draw(st.integers(1, 255))
            case "cut":
                del data[at : at + draw(st.integers(1, 16))]
            case "insert":
                data[at:at] = draw(st.binary(max_size=16))
            case "number":
                size = draw(st.sampled_from([1, 2, 4, 8]))
                number = draw(st.sampled_from([0, 1, 2 ** (8 * size - 1) - 1, 2 ** (8 * size) - 1]))
                data[at : at + size] = number.to_bytes(size, "little")
    return bytes(data)


def any_bytes(*whole: bytes) -> st.SearchStrategy[bytes]:
    return st.binary(max_size=200) | mutated(*whole)


@contextmanager
def little_memory(most: int = 8 << 20) -> Iterator[None]:
    """Fail if more bytes than that are taken at once: a length that lies must not be believed."""
    tracemalloc.start()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < most


# --- functions ------------------------------------------------------------------------------------


@MANY
@given(
    st.sampled_from(TABLES),
    st.binary(min_size=1, max_size=20),
    any_bytes(seal(SETTINGS, b"k", 1, b"payload")),
)
def test_any_record_unseals_or_is_damaged(table: str, key: bytes, record: bytes) -> None:
    try:
        version, payload = unseal(table, key, memoryview(record))
    except CorruptRecordError:
        return
    assert seal(table, key, version, bytes(payload)) == record


@MANY
@given(any_bytes(zstandard.compress(b"a text " * 40), zstandard.compress(b"\0" * 100_000)))
def test_any_frame_decompresses_or_is_refused(frame: bytes) -> None:
    try:
        content = decompress(frame)
    except (ValueError, zstandard.ZstdError):
        return
    assert len(content) <= TEXT_LIMIT


def frame_that_claims(size: int) -> bytes:
    """A frame's header with that content size, and a block of one byte."""
    return b"\x28\xb5\x2f\xfd\xc0\x58" + struct.pack("<Q", size) + b"\x0b\0\0a"


def test_a_frame_that_claims_too_much_is_refused_before_room_is_made() -> None:
    assert zstandard.frame_content_size(frame_that_claims(1 << 40)) == 1 << 40
    for size in (TEXT_LIMIT + 1, 1 << 40, 2**64 - 3):
        with little_memory(), pytest.raises(ValueError, match="claims"):
            decompress(frame_that_claims(size))
    with pytest.raises((ValueError, zstandard.ZstdError)), little_memory(TEXT_LIMIT + (8 << 20)):
        decompress(frame_that_claims(TEXT_LIMIT))


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_memory_decodes_to_a_memory_of_its_shape_or_is_refused(
    codec: Any, dtype: DType
) -> None:
    shape = make_shape(dtype)
    whole = [encode_memory(make_memory(shape, seed), shape, codec) for seed in range(4)]

    @settings(max_examples=150)
    @given(any_bytes(*whole))
    def check(payload: bytes) -> None:
        try:
            memory = decode_memory(payload, shape, CODECS)
        except (ValueError, MismatchError, FormatError):
            return
        assert len(memory.offsets) == shape.rows + 1
        assert memory.keys.shape == memory.values.shape == (memory.pairs, shape.head_dim)
        assert memory.keys.dtype == shape.storage_dtype

    with little_memory():
        check()


@pytest.mark.parametrize("field", range(3))
def test_lengths_in_a_memory_that_lie_take_no_memory(field: int) -> None:
    shape = make_shape()
    payload = bytearray(encode_memory(make_memory(shape, 1), shape, CODECS["int8"]))
    at = 1 + len("int8") + 8 + 4 * field
    payload[at : at + 4] = b"\xff" * 4
    with little_memory(), pytest.raises(ValueError, match="are due"):
        decode_memory(bytes(payload), shape, CODECS)


@MANY
@given(
    any_json
    | st.fixed_dictionaries(
        {name: any_json | st.just(value) for name, value in make_shape().to_json().items()}
    )
)
def test_any_json_is_a_memory_shape_or_is_refused(value: Any) -> None:
    try:
        shape = MemoryShape.from_json(value)
    except (MemDBError, ValueError):
        return
    assert MemoryShape.from_json(json.loads(json_payload(shape.to_json()))) == shape


# --- records, through a transaction ---------------------------------------------------------------

SHAPE = make_shape()
REFERENCE = Reference(2, 1, "doc-1", 0, 5, "This is text number 1, and it is a little longer.")
WHOLE: dict[str, bytes] = {
    SETTINGS: json_payload({"next_reference": 4, "last_change": 3, "trimmed": 0}),
    DOCUMENTS: DocumentEntry(1, b"c" * 32, b"t" * 32, (2, 3)).payload(),
    METADATA: json_payload({"n": 1, "deep": {"a": [1, 2.5, None]}}),
    REFERENCES: reference_payload(REFERENCE),
    EMBEDDINGS: np.array([0.6, 0.8], "<f4").tobytes(),
    MEMORIES: encode_memory(make_memory(SHAPE, 1), SHAPE, CODECS["int8"]),
    CHANGES: changes_payload([(1, 1), (3, 1), (2, 1)]),
    POSTINGS: np.array([1, 2, 3], "<i8").tobytes(),
}
KEYS: dict[str, bytes] = {
    SETTINGS: b"counters",
    DOCUMENTS: b"doc-1",
    METADATA: b"doc-1",
    REFERENCES: integer_key(2),
    EMBEDDINGS: integer_key(2),
    MEMORIES: integer_key(2),
    CHANGES: integer_key(1),
    POSTINGS: b"\1n\5x\0\0" + bytes(8),
}


def payloads(table: str) -> st.SearchStrategy[bytes]:
    return any_bytes(WHOLE[table]) | any_json.map(json_payload)


def create(path: Path) -> None:
    with MemDB.create(path, shape=SHAPE, dimension=2, keys=["n"]) as database:
        for n in range(3):
            database.insert(
                f"This is text number {n}.",
                id=f"doc-{n}",
                metadata={"n": n},
                embeddings=unit(1, n),
                memories=[make_memory(SHAPE, n)],
            )


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("templates") / "fuzz"
    create(path)
    return path


READ: dict[str, tuple[Callable[[Transaction], object], ...]] = {
    SETTINGS: (lambda t: t.setting("counters"),),
    DOCUMENTS: (lambda t: t.document("doc-1"), lambda t: list(t.documents())),
    METADATA: (lambda t: t.metadata("doc-1"), lambda t: t.metadata("doc-1", 1)),
    REFERENCES: (lambda t: t.reference(2), lambda t: t.owner(2), lambda t: t.tokens(2)),
    EMBEDDINGS: (
        lambda t: t.embedding(2),
        lambda t: list(t.embeddings()),
        lambda t: t.embeddings_of(np.array([1, 2])),
    ),
    MEMORIES: (
        lambda t: decoded(
            MEMORIES,
            integer_key(2),
            t.version_and_payload(MEMORIES, integer_key(2)),
            lambda _, payload: decode_memory(payload, SHAPE, CODECS),
        ),
        lambda t: t.is_warm(2),
    ),
    CHANGES: (lambda t: list(t.changes(0)),),
    POSTINGS: (
        lambda t: list(Postings(t).items()),
        lambda t: known(parse({"n": {"$gte": 0}}), Postings(t), ["n"]),
        lambda t: Postings(t).discard([2]),
        lambda t: Postings(t).add("n", "x", [2, 5]),
        lambda t: Postings(t).remove("n", "x", [2, 5]),
    ),
}


@pytest.mark.parametrize("table", TABLES)
def test_any_payload_behind_a_seal_that_fits_is_a_value_or_an_error_of_memdb(
    tmp_path: Path, template: Path, table: str
) -> None:
    path = Path(shutil.copytree(template, tmp_path / "db"))
    with raw(path) as (environment, tables):

        @MANY
        @given(payloads(table), st.sampled_from([0, 1, 2**32 - 1]))
        def check(payload: bytes, version: int) -> None:
            for read in READ[table]:
                inner = environment.begin(write=True, buffers=True)
                try:
                    key = KEYS[table]
                    inner.put(key, seal(table, key, version, payload), db=tables[table])
                    read(Transaction(inner, tables))
                except MemDBError:
                    pass
                finally:
                    inner.abort()

        with little_memory(64 << 20):
            check()


def test_any_key_of_postings_is_read_or_refused(tmp_path: Path, template: Path) -> None:
    path = Path(shutil.copytree(template, tmp_path / "db"))
    keys = st.binary(min_size=1, max_size=40) | mutated(KEYS[POSTINGS]).filter(bool)
    with raw(path) as (environment, tables):

        @MANY
        @given(keys, any_bytes(WHOLE[POSTINGS]))
        def check(key: bytes, payload: bytes) -> None:
            for read in READ[POSTINGS]:
                inner = environment.begin(write=True, buffers=True)
                try:
                    inner.put(key, seal(POSTINGS, key, 1, payload), db=tables[POSTINGS])
                    read(Transaction(inner, tables))
                except MemDBError:
                    pass
                finally:
                    inner.abort()

        check()


# --- records, through the public API --------------------------------------------------------------


def use(path: Path) -> None:
    """Everything that reads; each step may be refused on its own."""
    steps: tuple[Callable[[MemDB], object], ...] = (
        lambda d: [d.get(f"doc-{n}") for n in range(3)],
        lambda d: list(d.documents()),
        lambda d: list(d.documents({"n": 1})),
        lambda d: [
            (hit.reference, hit.metadata, hit.memory) for hit in d.retrieve(np.ones(2), 5).hits
        ],
        lambda d: d.retrieve(np.ones(2), 5, where={"n": {"$gte": 0}}).memories,
        lambda d: d.split("A text."),
        lambda d: d.stats(),
        lambda d: d.usage(),
        lambda d: d.warm(),
        lambda d: d.update("doc-1", metadata={"n": 7}),
        lambda d: d.insert("new", embeddings=unit(1, 1)),
        lambda d: d.delete("doc-2"),
        lambda d: d.declare_keys("m"),
        lambda d: d.build_index(kind="ivf"),
    )
    try:
        database = MemDB.open(path)
    except MemDBError:
        return
    with database:
        for step in steps:
            with suppress(MemDBError):
                step(database)


def records_of(path: Path) -> dict[str, list[tuple[bytes, bytes]]]:
    with raw(path) as (environment, tables), environment.begin() as inner:
        return {name: list(inner.cursor(table)) for name, table in tables.items()}


@pytest.mark.parametrize("table", TABLES)
def test_the_api_raises_errors_of_memdb_alone_whatever_a_record_holds(
    tmp_path: Path, template: Path, table: str
) -> None:
    whole = records_of(template)[table]

    @settings(max_examples=60)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        path = tmp_path / "db"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(template, path)
        key, record = data.draw(st.sampled_from(whole))
        version, payload = unseal(table, key, memoryview(record))
        changed = data.draw(
            any_bytes(bytes(payload)) | any_json.map(json_payload) | fields_of(bytes(payload))
        )
        with raw(path) as (environment, tables), environment.begin(write=True) as inner:
            inner.put(key, seal(table, key, version, changed), db=tables[table])
        with time_limit(60):
            use(path)
            for call in (memdb.verify, memdb.repair, memdb.compact):
                with suppress(MemDBError):
                    call(path)

    check()


def fields_of(payload: bytes) -> st.SearchStrategy[bytes]:
    """The payload, if it is a JSON object, with other values in its fields."""
    try:
        value = json.loads(payload)
        assert isinstance(value, dict)
    except (ValueError, AssertionError):
        return st.just(payload)
    return st.fixed_dictionaries(
        {name: any_json | st.just(field) for name, field in value.items()}
    ).map(json_payload)


# --- files beside the data ------------------------------------------------------------------------


@pytest.fixture(scope="session")
def index_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("templates") / "index"
    with MemDB.create(path, shape=SHAPE, dimension=4, index="ivf") as database:
        for n in range(64):
            vector = np.random.default_rng(n).standard_normal((1, 4)).astype(np.float32)
            database.insert(f"text {n}", embeddings=vector)
        assert database.build_index() is not None
    return path


def test_any_bytes_are_an_index_file_or_are_damaged(tmp_path: Path, index_template: Path) -> None:
    whole = (index_template / "gen-000001" / "index.faiss").read_bytes()
    file = tmp_path / "index.faiss"

    @MANY
    @given(any_bytes(whole[-400:], whole))
    def check(content: bytes) -> None:
        file.write_bytes(content)
        try:
            AnnIndex(file)
        except CorruptRecordError:
            assert content != whole

    check()


def test_any_description_with_a_right_checksum_is_an_index_or_is_damaged(
    tmp_path: Path, index_template: Path
) -> None:
    """As `open` reads it: what is no index of this database is passed over."""
    path = Path(shutil.copytree(index_template, tmp_path / "db"))
    file = path / "gen-000001" / "index.faiss"
    whole = file.read_bytes()
    (size,) = struct.unpack_from("<Q", whole, len(whole) - 24)
    description = json.loads(whole[-24 - size : -24])
    faiss_part = whole[: -24 - size]

    @settings(max_examples=150)
    @given(
        any_json.map(json_payload)
        | st.fixed_dictionaries(
            {
                name: st.just(value) if name == "checksum" else any_json | st.just(value)
                for name, value in description.items()
            }
        ).map(json_payload)
        | any_bytes(json_payload(description))
        | st.just(b"[" * 60_000)
    )
    def check(text: bytes) -> None:
        tail = struct.pack("<QQ8s", len(text), xxhash.xxh3_64_intdigest(text), b"memdbix2")
        file.write_bytes(faiss_part + text + tail)
        try:
            AnnIndex(file)
        except CorruptRecordError:
            with MemDB.open(path) as database:
                assert len(database.retrieve(np.ones(4), 64).hits) == 64
            assert memdb.verify(path)

    check()


def usage_file(entries: bytes) -> bytes:
    return b"memdbuse" + xxhash.xxh3_64_intdigest(entries).to_bytes(8, "little") + entries


ENTRIES = struct.pack("<qQqQ", 1, 7, 2, 2**63)


@MANY
@given(
    any_bytes(usage_file(ENTRIES)) | any_bytes(ENTRIES).map(usage_file),
    st.lists(st.integers(1, 5), max_size=4),
)
def test_any_bytes_are_a_usage_file_or_no_counts(content: bytes, used: list[int]) -> None:
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "usage").write_bytes(content)
        before = read_usage(folder)
        usage = Usage()
        usage.count(used, folder)
        usage.flush(folder)  # adds to what is there
        after = read_usage(folder)
        assert all(after[number] >= before[number] for number in before)
        assert set(after) == set(before) | set(used)


def test_a_count_that_is_full_costs_no_error(tmp_path: Path, template: Path) -> None:
    path = Path(shutil.copytree(template, tmp_path / "db"))
    full = struct.pack("<qQ", 1, 2**64 - 1)
    (path / "gen-000001" / "usage").write_bytes(usage_file(full))
    with MemDB.open(path) as database:
        database.retrieve(np.ones(2), 3)
    with MemDB.open(path) as database:
        assert len(database.retrieve(np.ones(2), 3).hits) == 3
