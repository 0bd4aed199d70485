"""Databases made with memdb, what is in them, and edits of them."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
import xxhash
from tokenizers import Tokenizer, models, pre_tokenizers

from memdb import ExplicitMemory, MemDB, MemoryShape, Rope, from_float32, to_float32
from memdb.codecs import FAMILIES
from tests.engine.helpers import keep_whatever_is_lost
from tests.storage_format.coded import assert_close, write_vectors
from tests.storage_format.reader import Database, Memory, read_database, seal, unseal

LONG = "One two three. Four five six seven eight nine ten.  Eleven!\n\nTwelve \u3000 thirteen\u2003"
OTHER = " " + "word " * 400 + "end"
METADATA = {"year": 2024, "é": [1, 1.0, -0.0, 1e300, None, True, {}], "a": {"b": "\u2028\x7f\n"}}


DIMENSION = 5


def rng(text: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(text.encode()))


def memory_of(text: str, shape: MemoryShape) -> ExplicitMemory:
    """A random ragged memory, the same for the same text; some rows are empty, one vector is 0."""
    random = rng(text)
    kept = random.random((shape.rows, min(shape.reference_length, 9))) < 0.3
    counts = kept.sum(1)
    keys, values = random.normal(size=(2, int(counts.sum()), shape.head_dim)).astype(np.float32)
    keys[:1] = 0
    positions = kept.nonzero()[1] * (shape.reference_length // 9 or 1)
    return ExplicitMemory(
        offsets=np.concatenate([[0], counts.cumsum()]).astype(np.int32),
        positions=positions.astype(shape.position_dtype),
        keys=from_float32(keys, shape.dtype),
        values=from_float32(values * np.float32(40), shape.dtype),
    )


class FakeEmbedder:
    name = "fake"
    fingerprint = "e1"
    dimension = DIMENSION

    def embed(self, texts: Sequence[str], *, query: bool = False) -> np.ndarray:
        return np.stack([rng(text).normal(size=DIMENSION) for text in texts]).astype(np.float32)


#: What the writer says of how it writes.
WRITTEN: dict[str, Any] = {
    "selection": "none",
    "budget": 7,
    "floor": 3,
    "spread": "all",
    "heads": [[0, 1], [2, 0]],
    "weights": [0.5, 1.25, 2.0, 1.0, 1.0, 1.0],
    "predictor": base64.b64encode(np.zeros((6, 18), "<f4").tobytes()).decode(),
    "adapter": "trained",
    "precision": "exact",
}


CALIBRATION: dict[str, Any] = {
    "adapter": None,
    "date": "2026-11-30",
    "model": "m1",
    "questions": 24,
    "weighing": {"lift": 0.5, "most": 2, "slope": 20.0},
}


@dataclass
class FakeWriter:
    shape: MemoryShape
    name: str = "fake"
    settings: dict[str, Any] = field(default_factory=lambda: dict(WRITTEN))

    @cached_property
    def tokenizer(self) -> str:
        tokenizer = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return str(tokenizer.to_str())

    def write(self, texts: Sequence[str]) -> list[ExplicitMemory]:
        return [memory_of(text, self.shape) for text in texts]


LLAMA3 = {
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def shape_of(dtype: Any) -> MemoryShape:
    return MemoryShape(
        model="m1",
        layers=(1, 2, 5),
        kv_heads=2,
        head_dim=4,
        dtype=dtype,
        prefix=(1, 15, 9),
        framing="chat",
        reference_length=300 if dtype == "float16" else 8,
        rope=(Rope(1e6), None, Rope(10000.0, "llama3", LLAMA3)),
    )


KEYS = ("year", "é", "gone")


def create(folder: Path, dtype: str, codec: str, **options: Any) -> MemDB:
    writer = FakeWriter(shape_of(dtype))
    options = {"keys": KEYS, **options}
    return MemDB.create(folder, embedder=FakeEmbedder(), writer=writer, codec=codec, **options)


def read_copy(path: Path, to: Path) -> Database:
    """Read a database that memdb has open: `CURRENT` and `data.mdb` are a whole one."""
    generation = (path / "CURRENT").read_text().strip()
    shutil.rmtree(to, ignore_errors=True)
    (to / generation).mkdir(parents=True)
    shutil.copy(path / "CURRENT", to)
    shutil.copy(path / generation / "data.mdb", to / generation)
    return read_database(to)


@dataclass
class Written:
    """What the test wrote last under one document id."""

    version: int
    text: str
    metadata: dict[str, Any]
    pieces: list[tuple[str, int]]
    embeddings: np.ndarray
    memories: list[ExplicitMemory] | None


def compare(database: Database, written: dict[str, Written], codec: str) -> None:
    """All that is in a database with all that was written."""
    documents, references = database.documents(), database.references()
    embeddings, memories = database.embeddings(), database.memories()
    d, dtype = database.shape["head_dim"], database.shape["dtype"]
    assert list(documents) == sorted(written, key=str.encode)
    for name, want in written.items():
        version, _, text_hash, listed = documents[name]
        assert version == want.version
        assert text_hash == hashlib.sha256(want.text.encode()).digest()
        assert "".join(references[i][4] for i in listed) == want.text
        assert json.loads(database.table("metadata")[name.encode()][1]) == want.metadata
        assert [(references[i][4], references[i][2]) for i in listed] == want.pieces
        lengths = np.linalg.norm(want.embeddings, axis=1, keepdims=True)
        np.testing.assert_allclose(
            [embeddings[i] for i in listed], want.embeddings / lengths, rtol=1e-6, atol=1e-7
        )
        if want.memories is None:
            assert not memories.keys() & set(listed)
            continue
        for i, memory in zip(listed, want.memories, strict=True):
            stored = memories[i]
            assert stored is not None
            assert stored.codec == codec
            assert stored.counts == tuple(np.diff(memory.offsets))
            assert stored.positions == tuple(memory.positions)
            for vectors, data in ((memory.keys, stored.keys), (memory.values, stored.values)):
                assert data == write_vectors(codec, vectors.tobytes(), d, dtype)


def assert_reads_as(database: Database, stored: Memory, memory: ExplicitMemory) -> None:
    """What memdb reads is what the document says is read."""
    d, dtype = database.shape["head_dim"], database.shape["dtype"]
    assert stored.counts == tuple(np.diff(memory.offsets))
    assert stored.positions == tuple(memory.positions)
    for vectors, data in zip(
        (memory.keys, memory.values), stored.vectors(database.shape, database.fitted), strict=True
    ):
        if stored.codec in ("exact", "int8", "int4"):
            assert vectors.tobytes() == data
        else:
            assert_close(data, vectors.tobytes(), d, dtype)


def filled(folder: Path, **options: Any) -> MemDB:
    """An open database with enough references for an index file; every third is gone."""
    db = create(folder, "float32", "int8", durability="off", index="ivf", **options)
    for n in range(120):
        db.insert(f"Text {n}.", id=f"d{n}", metadata={"year": n % 7}, cold=n % 2 == 0)
    db.delete(*(f"d{n}" for n in range(0, 120, 3)))
    return db


ENOUGH = 12


@contextmanager
def few_are_enough(family: str) -> Iterator[None]:
    """To fit a codec."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FAMILIES[family], "enough", ENOUGH)
        keep_whatever_is_lost(patch)
        yield


def grown(folder: Path, dtype: str, codec: str) -> MemDB:
    """An open database with enough memories to fit a codec to."""
    db = create(folder, dtype, codec, durability="off")
    for n in range(2 * ENOUGH):
        db.insert(f"Text {n}.", id=f"d{n}", metadata={"year": n % 7})
        if n == ENOUGH - 1:
            db.settle()  # until it is fitted, and those before are recoded
    return db


def insert_unlike(db: MemDB) -> None:
    """A document whose memory suits no codec that was fitted to the others."""
    text, dtype = "Unlike all others.", db.shape.dtype
    memory = memory_of(text, db.shape)
    keys = from_float32(to_float32(memory.keys, dtype) * np.float32(1000) + 500, dtype)
    embeddings = FakeEmbedder().embed([text])
    db.insert(text, id="unlike", embeddings=embeddings, memories=[replace(memory, keys=keys)])


def names_in(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def described(content: bytes, description: dict[str, Any]) -> bytes:
    """An index file with another description, and the right checksum for it."""
    (j,) = struct.unpack("<Q", content[-24:-16])
    text = json.dumps(description).encode()
    tail = struct.pack("<QQ8s", len(text), xxhash.xxh3_64_intdigest(text), b"memdbix2")
    return content[: -24 - j] + text + tail


def description(content: bytes) -> dict[str, Any]:
    return json.loads(content[-24 - struct.unpack("<Q", content[-24:-16])[0] : -24])


def first(database: Database, table: str) -> bytes:
    return min(database.records[table])


def edit(
    database: Database, table: str, change: Callable[[bytes], bytes], raise_by: int = 0
) -> None:
    """A table's first record with another payload or version, and the right seal for it."""
    key = first(database, table)
    version, payload = unseal(table, key, database.records[table][key])
    database.records[table][key] = seal(table, key, version + raise_by, change(payload))


def set_setting(database: Database, name: str, value: object) -> None:
    record = seal("settings", name.encode(), 1, json.dumps(value).encode())
    database.records["settings"][name.encode()] = record


COUNTS = 21 + len("int8")  # where the counts of a memory begin, and its positions
POSITIONS = COUNTS + 2 * 6


def put(at: int, data: bytes) -> Callable[[bytes], bytes]:
    """The payload with other bytes there."""
    return lambda payload: payload[:at] + data + payload[at + len(data) :]


def rename(payload: bytes, codec: str) -> bytes:
    """The memory says that another codec wrote it."""
    return bytes([len(codec)]) + codec.encode() + payload[1 + payload[0] :]


def move_the_border(payload: bytes) -> bytes:
    """A byte of the values goes to the keys: the sections still add up."""
    k, v = struct.unpack_from("<II", payload, COUNTS - 8)
    return put(COUNTS - 8, struct.pack("<II", k + 1, v - 1))(payload)


def set_in(
    database: Database, setting: str, metadata: dict[str, Any] | None = None, **values: Any
) -> None:
    """A setting with other fields (None: without them), and the first document's metadata."""
    fields = {**database.setting(setting), **values}
    set_setting(database, setting, {k: v for k, v in fields.items() if v is not None})
    if metadata is not None:
        edit(database, "metadata", lambda _: json.dumps(metadata).encode())


def edit_file(path: Path, change: Callable[[Any, Any], None]) -> None:
    """Change a closed database's file: `change(transaction, environment)`."""
    environment = lmdb.open(str(path / "gen-000001"), max_dbs=16, map_size=1 << 30)
    tables = {
        name: environment.open_db(name.encode(), create=False)
        for name in ("settings", "memories", "changes")
    }
    with environment.begin(write=True) as transaction:
        change(transaction, tables)
    environment.close()
