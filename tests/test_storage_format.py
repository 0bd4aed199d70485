"""storage_format.md is enough to read a database, and says what the code does.

The first half is a reader and a verifier written from that document alone: it uses nothing of
memdb. The second half makes databases with memdb and reads them with it, and compares the
document's test vectors with what memdb produces.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import re
import shutil
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
import xxhash
import zstandard
from tokenizers import Tokenizer, models, pre_tokenizers

from memdb import (
    CODECS,
    CorruptRecordError,
    Document,
    ExplicitMemory,
    FormatError,
    MemDB,
    MemoryShape,
    MismatchError,
    Reference,
    Rope,
    from_float32,
    layout,
)
from memdb.canonical import json_payload
from memdb.documents import checked
from memdb.store import Store

DOCUMENT = (Path(__file__).parents[1] / "storage_format.md").read_text("utf-8")

# --- the reader, from the document ----------------------------------------------------------------

INTEGER_KEYS = {"references", "embeddings", "memories", "changes"}
TABLES = {"settings", "documents", "metadata"} | INTEGER_KEYS
INSERTED, DELETED, REMEMBERED = 1, 2, 3
WHITE_SPACE = (
    "\t\n\v\f\r\x1c\x1d\x1e\x1f \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007"
    "\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000"
)


def checksum(table: str, key: bytes, rest: bytes) -> bytes:
    return struct.pack(
        "<Q", xxhash.xxh3_64_intdigest(table.encode() + b"\0" + key + b"\0" + rest, seed=0)
    )


def seal(table: str, key: bytes, version: int, payload: bytes) -> bytes:
    rest = struct.pack("<II", version, len(payload)) + payload
    return checksum(table, key, rest) + rest


def unseal(table: str, key: bytes, record: bytes) -> tuple[int, bytes]:
    assert len(record) >= 16
    version, length = struct.unpack_from("<II", record, 8)
    assert len(record) == 16 + length
    assert record[:8] == checksum(table, key, record[8:])
    return version, record[16:]


def number(key: bytes) -> int:
    return struct.unpack("<Q", key)[0]


def frame(data: bytes) -> str:
    assert 0 <= zstandard.get_frame_parameters(data).content_size <= 1 << 28
    decoder = zstandard.ZstdDecompressor().decompressobj()
    text = decoder.decompress(data)
    assert decoder.eof
    assert not decoder.unused_data
    return text.decode()


def f32(x: float) -> float:
    """Rounded to the nearest f32. From the f64 quotient or product of two f32 this is exact."""
    return struct.unpack("<f", struct.pack("<f", x))[0]


def widen(data: bytes, dtype: str) -> list[float]:
    if dtype == "bfloat16":
        data = b"".join(b"\0\0" + data[i : i + 2] for i in range(0, len(data), 2))
    code, size = ("e", 2) if dtype == "float16" else ("f", 4)
    return list(struct.unpack(f"<{len(data) // size}{code}", data))


def narrow(numbers: Sequence[float], dtype: str) -> bytes:
    if dtype == "float32":
        return struct.pack(f"<{len(numbers)}f", *numbers)
    if dtype == "float16":
        return struct.pack(f"<{len(numbers)}e", *[min(max(x, -65504), 65504) for x in numbers])
    most = 2.0**128 - 2.0**120
    clipped = [min(max(x, -most), most) for x in numbers]
    bits = struct.unpack(f"<{len(numbers)}I", struct.pack(f"<{len(numbers)}f", *clipped))
    return struct.pack(f"<{len(bits)}H", *[(b + 0x7FFF + ((b >> 16) & 1)) >> 16 for b in bits])


def fingerprint(shape: dict[str, Any]) -> int:
    canonical = json.dumps(shape, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return xxhash.xxh3_64_intdigest(canonical.encode(), seed=0)


def section_bytes(codec: str, n: int, d: int, dtype: str) -> int:
    """How long the keys, or the values, are due to be."""
    return n * (d + 4) if codec == "int8" else n * d * (4 if dtype == "float32" else 2)


LARGEST_SCALE = struct.unpack("<f", struct.pack("<I", 0x7C010203))[0]


def write_int8(data: bytes, d: int, dtype: str) -> bytes:
    """Vectors of `dtype`, as `exact` bytes, to `int8` bytes."""
    numbers = widen(data, dtype)
    scales, levels = [], []
    for at in range(0, len(numbers), d):
        x = numbers[at : at + d]
        s = min(f32(max(map(abs, x)) / 127), LARGEST_SCALE)
        scales.append(s)
        levels += [max(-127, min(127, round(x_i / s))) if s else 0 for x_i in x]
    return struct.pack(f"<{len(scales)}f{len(levels)}b", *scales, *levels)


def read_int8(data: bytes, d: int, dtype: str) -> bytes:
    """`int8` bytes to vectors of `dtype`, as `exact` bytes."""
    n = len(data) // (d + 4)
    fields = struct.unpack(f"<{n}f{n * d}b", data)
    return narrow([f32(q * fields[i // d]) for i, q in enumerate(fields[n:])], dtype)


@dataclass(frozen=True)
class Memory:
    codec: str
    counts: tuple[int, ...]
    positions: tuple[int, ...]
    keys: bytes  # as stored
    values: bytes

    def vectors(self, shape: dict[str, Any]) -> tuple[bytes, bytes]:
        """Keys and values as `exact` bytes."""
        d, dtype = shape["head_dim"], shape["dtype"]
        assert self.codec in ("exact", "int8")
        for data in (self.keys, self.values):
            assert len(data) == section_bytes(self.codec, len(self.positions), d, dtype)
        if self.codec == "exact":
            return self.keys, self.values
        return read_int8(self.keys, d, dtype), read_int8(self.values, d, dtype)


@dataclass
class Database:
    """Every record of every table of one generation, as it lies there."""

    generation: str
    records: dict[str, dict[bytes, bytes]]
    integer_keys: set[str]

    def table(self, name: str) -> dict[bytes, tuple[int, bytes]]:
        return {key: unseal(name, key, record) for key, record in self.records[name].items()}

    def setting(self, name: str) -> Any:
        return json.loads(self.table("settings")[name.encode()][1])

    @property
    def tokenizer(self) -> str | None:
        found = self.table("settings").get(b"tokenizer")
        return None if found is None else frame(found[1])

    @cached_property
    def shape(self) -> dict[str, Any]:
        return self.setting("shape")

    def documents(self) -> dict[str, tuple[int, bytes, bytes, tuple[int, ...]]]:
        """Version, content hash, text hash and references by id."""
        found = {}
        for key, (version, payload) in self.table("documents").items():
            k = (len(payload) - 64) // 8
            content, text, *ids = struct.unpack(f"<32s32s{k}q", payload)
            found[key.decode()] = version, content, text, tuple(ids)
        return found

    def references(self) -> dict[int, tuple[int, int, int, str, str]]:
        """Version, ordinal, tokens, document id and text by id."""
        found = {}
        for key, (version, payload) in self.table("references").items():
            ordinal, tokens, m = struct.unpack_from("<IHH", payload)
            name = payload[8 : 8 + m].decode()
            found[number(key)] = version, ordinal, tokens, name, frame(payload[8 + m :])
        return found

    def embeddings(self) -> dict[int, tuple[float, ...]]:
        return {
            number(key): struct.unpack(f"<{len(payload) // 4}f", payload)
            for key, (_, payload) in self.table("embeddings").items()
        }

    def memories(self) -> dict[int, Memory]:
        return {
            number(key): self._memory(payload)
            for key, (_, payload) in self.table("memories").items()
        }

    def _memory(self, payload: bytes) -> Memory:
        shape = self.shape
        rows = len(shape["layers"]) * shape["kv_heads"]
        p, code = (1, "B") if shape["reference_length"] <= 256 else (2, "H")
        c = payload[0]
        codec = payload[1 : 1 + c].decode("ascii")
        written_for, n, k, v = struct.unpack_from("<QIII", payload, 1 + c)
        assert written_for == fingerprint(shape)
        h = 21 + c
        assert len(payload) == h + 2 * rows + n * p + k + v
        counts = struct.unpack_from(f"<{rows}H", payload, h)
        assert sum(counts) == n
        at = h + 2 * rows
        positions = struct.unpack_from(f"<{n}{code}", payload, at)
        at += n * p
        return Memory(codec, counts, positions, payload[at : at + k], payload[at + k :])

    def changes(self) -> dict[int, list[tuple[int, int]]]:
        return {
            number(key): list(struct.iter_unpack("<Bq", payload))
            for key, (_, payload) in self.table("changes").items()
        }


def read_database(folder: Path) -> Database:
    with (folder / "LOCK").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        generation = (folder / "CURRENT").read_text("ascii").strip()
        environment = lmdb.open(str(folder / generation), readonly=True, max_dbs=16)
        try:
            with environment.begin() as transaction:
                names = [key.decode() for key, _ in transaction.cursor()]
            handles = {name: environment.open_db(name.encode(), create=False) for name in names}
            with environment.begin() as transaction:
                return Database(
                    generation,
                    {name: dict(transaction.cursor(db)) for name, db in handles.items()},
                    {n for n, db in handles.items() if db.flags(transaction)["integerkey"]},
                )
        finally:
            environment.close()


def follow(index: set[int], built: int | None, database: Database) -> tuple[set[int], int]:
    """The ids that an index holds, brought in step as the document says."""
    last = database.setting("counters")["last_change"]
    if built == last:
        return index, last
    changes = database.changes()
    if built is None or built > last or not set(range(built + 1, last + 1)) <= set(changes):
        return set(database.embeddings()), last
    entries = [entry for i in range(built + 1, last + 1) for entry in changes[i]]
    deleted = {reference for what, reference in entries if what == DELETED}
    inserted = {reference for what, reference in entries if what == INSERTED}
    assert inserted - deleted <= set(database.embeddings())
    return (index - deleted) | (inserted - deleted), last


# --- the verifier, from the document --------------------------------------------------------------


def tables_and_flags(database: Database) -> None:
    assert re.fullmatch("gen-[0-9]{6}", database.generation)
    assert set(database.records) == TABLES
    assert database.integer_keys == INTEGER_KEYS


def seals(database: Database) -> None:
    for name in database.records:
        database.table(name)
        if name in INTEGER_KEYS:
            assert all(len(key) == 8 for key in database.records[name])


def settings_are_there(database: Database) -> None:
    assert database.setting("format")["version"] == 1
    assert re.fullmatch("[0-9a-f]{32}", database.setting("format")["id"])
    for setting, name, kind, _ in rows("Settings", columns=4):
        record = database.setting(setting.strip("`"))
        if name.strip("`") in record or not kind.endswith(" or missing"):
            assert is_kind(record[name.strip("`")], kind.removesuffix(" or missing"))
    shape = database.shape
    fields = {name.strip("`"): kind for name, kind, _ in rows("Memory shape", columns=3)}
    rope = {name: fields.pop(name) for name in ("base", "kind", "parameters")}
    assert set(shape) == set(fields)
    assert all(is_kind(shape[name], kind) for name, kind in fields.items())
    assert shape["layers"] == sorted(set(shape["layers"])) != []
    assert min(shape["kv_heads"], shape["head_dim"]) >= 1
    assert 1 <= shape["reference_length"] <= 65535
    assert shape["dtype"] in ("float32", "float16", "bfloat16")
    assert shape["framing"] in ("plain", "chat")
    assert len(shape["rope"]) in (0, len(shape["layers"]))
    for entry in filter(None, shape["rope"]):
        assert set(entry) == set(rope)
        assert all(is_kind(entry[name], kind) for name, kind in rope.items())


def is_kind(value: object, kind: str) -> bool:
    if kind == "array of integers":
        return isinstance(value, list) and all(is_kind(item, "integer") for item in value)
    if kind.endswith(" or null"):
        return value is None or is_kind(value, kind.removesuffix(" or null"))
    types: dict[str, Any] = {
        "integer": int,
        "number": (int, float),
        "string": str,
        "array": list,
        "object": dict,
    }
    return isinstance(value, types[kind]) and not isinstance(value, bool)


def documents_and_metadata(database: Database) -> None:
    documents, metadata = database.table("documents"), database.table("metadata")
    assert {key: version for key, (version, _) in documents.items()} == {
        key: version for key, (version, _) in metadata.items()
    }
    assert all(version >= 1 for version, _ in documents.values())


def references_are_listed(database: Database) -> None:
    listed = [i for _, _, _, references in database.documents().values() for i in references]
    assert len(listed) == len(set(listed))
    assert all(references for _, _, _, references in database.documents().values())
    assert set(listed) == set(map(number, database.records["references"]))
    assert set(listed) == set(map(number, database.records["embeddings"]))
    assert set(listed) >= set(map(number, database.records["memories"]))


def references_know_their_place(database: Database) -> None:
    references = database.references()
    for name, (_, _, _, listed) in database.documents().items():
        for i, reference in enumerate(listed):
            _, ordinal, _, document, _ = references[reference]
            assert (document, ordinal) == (name, i)


def versions(database: Database) -> None:
    references = database.references()
    for version, _, _, listed in database.documents().values():
        assert len({references[reference][0] for reference in listed}) == 1
        assert 1 <= references[listed[0]][0] <= version
    for name in ("embeddings", "memories"):
        for key, (version, _) in database.table(name).items():
            assert version == references[number(key)][0]


def hashes(database: Database) -> None:
    references, metadata = database.references(), database.table("metadata")
    for name, (_, content, text, listed) in database.documents().items():
        joined = "".join(references[reference][4] for reference in listed)
        assert text == hashlib.sha256(joined.encode()).digest()
        assert content == hashlib.sha256(text + metadata[name.encode()][1]).digest()


def tokens(database: Database) -> None:
    most = database.shape["reference_length"] if database.tokenizer is not None else 0
    for _, _, count, _, text in database.references().values():
        assert count <= most or (most > 0 and len(text.strip(WHITE_SPACE)) == 1)


def embeddings_are_unit_vectors(database: Database) -> None:
    dimension = database.setting("embedder")["dimension"]
    for vector in database.embeddings().values():
        assert len(vector) == dimension
        assert abs(math.hypot(*vector) - 1) < 1e-5


def memories_are_well_formed(database: Database) -> None:
    for memory in database.memories().values():
        at = 0
        for count in memory.counts:
            row = memory.positions[at : at + count]
            assert list(row) == sorted(set(row))
            at += count
        assert all(p < database.shape["reference_length"] for p in memory.positions)
        if memory.codec not in ("exact", "int8"):
            continue
        for vectors in memory.vectors(database.shape):
            assert all(map(math.isfinite, widen(vectors, database.shape["dtype"])))


def ids(database: Database) -> None:
    named = set(database.references())
    named |= {reference for entries in database.changes().values() for _, reference in entries}
    assert all(1 <= i < database.setting("counters")["next_reference"] for i in named)


def changes_have_no_gaps(database: Database) -> None:
    last = database.setting("counters")["last_change"]
    assert sorted(database.changes()) == list(range(1, last + 1))
    assert all(database.changes().values())


def changes_lead_here(database: Database) -> None:
    there: dict[int, bool] = {}
    gone: set[int] = set()
    for _, entries in sorted(database.changes().items()):
        for what, reference in entries:
            if what in (INSERTED, DELETED, REMEMBERED):
                assert reference not in gone
                assert (reference in there) == (what != INSERTED)
            if what == DELETED:
                gone.add(reference)
                del there[reference]
            elif what in (INSERTED, REMEMBERED):
                there[reference] = what == REMEMBERED
    assert set(there) == set(database.references())
    assert {i for i, warm in there.items() if warm} == set(database.memories())


INVARIANTS: dict[int, Callable[[Database], None]] = dict(
    enumerate(
        [
            tables_and_flags,
            seals,
            settings_are_there,
            documents_and_metadata,
            references_are_listed,
            references_know_their_place,
            versions,
            hashes,
            tokens,
            embeddings_are_unit_vectors,
            memories_are_well_formed,
            ids,
            changes_have_no_gaps,
            changes_lead_here,
        ],
        1,
    )
)


def broken(database: Database) -> set[int]:
    """Numbers of the invariants that do not hold."""
    found = set()
    for i, check in INVARIANTS.items():
        try:
            check(database)
        except Exception:
            found.add(i)
    return found


# --- the document as data -------------------------------------------------------------------------


def section(title: str) -> str:
    """What stands between a heading and the next."""
    found = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#+ |\Z)", DOCUMENT, re.M | re.S)
    assert found, f"storage_format.md has no section '{title}'"
    return found[1]


def rows(title: str, columns: int) -> list[list[str]]:
    """The body rows of a section's tables that have so many columns."""
    lines = [line for line in section(title).splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    rules = [i for i, row in enumerate(cells) if set(row[0]) == {"-"}]
    heads = {i - 1 for i in rules} | set(rules)
    return [row for i, row in enumerate(cells) if i not in heads and len(row) == columns]


def names(title: str, columns: int) -> list[str]:
    return [row[0].strip("`") for row in rows(title, columns)]


def blocks(title: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", section(title), re.M | re.S)


def stanzas(title: str, language: str) -> list[dict[str, str]]:
    """`label hex # comment` lines, continued by lines without a label, in groups."""
    (block,) = blocks(title, language)
    found = []
    for stanza in block.split("\n\n"):
        fields: dict[str, str] = {}
        label = ""
        for line in stanza.splitlines():
            content = line.partition("#")[0]
            label = content[:8].strip() or label
            fields[label] = fields.get(label, "") + content[8:].replace(" ", "")
        found.append(fields)
    return found


def records_of(title: str) -> dict[str, dict[bytes, bytes]]:
    """Records in hexadecimal, by table and key."""
    found: dict[str, dict[bytes, bytes]] = {}
    for fields in stanzas(title, "records"):
        records = found.setdefault(fields["table"], {})
        records[bytes.fromhex(fields["key"])] = bytes.fromhex(fields["record"])
    return found


# --- databases made with memdb --------------------------------------------------------------------

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


@dataclass
class FakeWriter:
    shape: MemoryShape
    name: str = "fake"
    settings: dict[str, Any] = field(default_factory=lambda: {"selection": "none", "budget": 7})

    @cached_property
    def tokenizer(self) -> str:
        tokenizer = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return str(tokenizer.to_str())

    def write(self, texts: Sequence[str]) -> list[ExplicitMemory]:
        return [memory_of(text, self.shape) for text in texts]


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
        rope=(Rope(1e6), None, Rope(10000.0, "llama3", {"factor": 32.0})),
    )


def create(folder: Path, dtype: str, codec: str) -> MemDB:
    writer = FakeWriter(shape_of(dtype))
    return MemDB.create(folder, embedder=FakeEmbedder(), writer=writer, codec=codec)


def read_copy(path: Path, to: Path) -> Database:
    """Read a database that memdb has open: `CURRENT` and `data.mdb` are a whole one."""
    shutil.rmtree(to, ignore_errors=True)
    (to / "gen-000001").mkdir(parents=True)
    shutil.copy(path / "CURRENT", to)
    shutil.copy(path / "gen-000001" / "data.mdb", to / "gen-000001")
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
            assert stored.codec == codec
            assert stored.counts == tuple(np.diff(memory.offsets))
            assert stored.positions == tuple(memory.positions)
            for vectors, data in ((memory.keys, stored.keys), (memory.values, stored.values)):
                exact = vectors.tobytes()
                assert data == (exact if codec == "exact" else write_int8(exact, d, dtype))


# --- (a) the reader reads what memdb wrote --------------------------------------------------------

LONG = "One two three. Four five six seven eight nine ten.  Eleven!\n\nTwelve \u3000 thirteen\u2003"
OTHER = " " + "word " * 400 + "end"
METADATA = {"year": 2024, "é": [1, 1.0, -0.0, 1e300, None, True, {}], "a": {"b": "\u2028\x7f\n"}}


@pytest.mark.parametrize("codec", ["exact", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_an_independent_reader_reads_it_all(tmp_path: Path, dtype: str, codec: str) -> None:
    path = tmp_path / "a.memdb"
    written: dict[str, Written] = {}
    index, built = set(), None
    given: set[int] = set()

    def want(name: str, version: int, text: str, metadata: dict[str, Any], warm: bool) -> None:
        pieces = db.split(text)
        contents = [piece.text.strip() for piece in pieces]
        written[name] = Written(
            version,
            text,
            metadata,
            [(piece.text, piece.tokens) for piece in pieces],
            FakeEmbedder().embed(contents),
            [memory_of(content, db.shape) for content in contents] if warm else None,
        )

    def check() -> Database:
        nonlocal index, built, given
        database = read_copy(path, tmp_path / "copy")
        for invariant in INVARIANTS.values():
            invariant(database)
        compare(database, written, codec)
        index, built = follow(index, built, database)
        assert index == set(database.references())
        given |= index
        return database

    with create(path, dtype, codec) as db:
        database = check()
        assert MemoryShape.from_json(database.shape) == db.shape
        assert fingerprint(database.shape) == db.shape.fingerprint
        assert database.setting("format")["id"] == db.stats()["id"]
        assert database.tokenizer == FakeWriter(db.shape).tokenizer
        assert database.setting("embedder") == {"name": "fake", "fingerprint": "e1", "dimension": 5}
        assert database.setting("memory") == {"codec": codec, "selection": "none", "budget": 7}

        db.insert(LONG, id="a", metadata=METADATA)
        want("a", 1, LONG, METADATA, warm=True)
        check()

        derived = "sha256:" + hashlib.sha256(OTHER.encode()).hexdigest()[:32]
        assert db.insert(OTHER).id == derived
        want(derived, 1, OTHER, {}, warm=True)
        assert len(check().documents()[derived][3]) > 1

        db.insert(LONG, id="ü\U0001f600", cold=True)
        want("ü\U0001f600", 1, LONG, {}, warm=False)
        check()

        before = check().documents()["a"][3]
        db.update("a", metadata={"year": 1.5})
        want("a", 2, LONG, {"year": 1.5}, warm=True)
        assert check().documents()["a"][3] == before

        db.update("ü\U0001f600", text=OTHER)
        want("ü\U0001f600", 2, OTHER, {}, warm=True)
        check()

        db.insert(LONG, id="b", cold=True)
        db.warm(["b"])
        want("b", 1, LONG, {}, warm=True)
        check()

        random = [memory_of(f"random {i}", db.shape) for i in range(len(db.split(LONG)))]
        vectors = np.random.default_rng(0).normal(size=(len(random), DIMENSION))
        db.update("b", embeddings=vectors.astype(np.float32), memories=random)
        want("b", 2, LONG, {}, warm=True)
        written["b"].embeddings, written["b"].memories = vectors, random
        check()

        db.delete("a", derived)
        del written["a"], written[derived]
        check()

        before_again = set(given)
        db.insert(OTHER)
        want(derived, 1, OTHER, {}, warm=True)
        database = check()
        assert not before_again & set(database.documents()[derived][3])

        # What memdb reads is what the document says is read.
        memories = database.memories()
        hits = db.retrieve(vectors[0], k=len(memories)).hits
        assert {hit.reference.id for hit in hits} == set(memories)
        for hit in hits:
            assert hit.memory is not None
            keys, values = memories[hit.reference.id].vectors(database.shape)
            assert hit.memory.keys.tobytes() == keys
            assert hit.memory.values.tobytes() == values

    assert index == set(follow(set(), None, read_database(path))[0])
    assert {entry.name for entry in path.iterdir()} == {"CURRENT", "LOCK", "gen-000001"}
    assert {entry.name for entry in (path / "gen-000001").iterdir()} == {"data.mdb", "lock.mdb"}
    assert (path / "CURRENT").read_bytes() == b"gen-000001\n"


# --- the verifier sees damage ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Database:
    path = tmp_path_factory.mktemp("sound") / "a.memdb"
    with create(path, "float32", "int8") as db:
        db.insert(LONG, id="a", metadata={"year": 2024})
        db.insert("Short.", id="b", cold=True)
        db.insert("Gone.", id="c")
        db.delete("c")
    return read_database(path)


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


def flip(database: Database) -> None:
    key = first(database, "memories")
    record = bytearray(database.records["memories"][key])
    record[-1] ^= 1
    database.records["memories"][key] = bytes(record)


COUNTS = 21 + len("int8")  # where the counts of a memory begin, and its positions
POSITIONS = COUNTS + 2 * 6


def swap_positions(payload: bytes) -> bytes:
    at = POSITIONS
    (count,) = struct.unpack_from("<H", payload, COUNTS)
    assert count >= 2
    return payload[:at] + payload[at : at + 2][::-1] + payload[at + 2 :]


def put(at: int, data: bytes) -> Callable[[bytes], bytes]:
    """The payload with other bytes there."""
    return lambda payload: payload[:at] + data + payload[at + len(data) :]


def move_the_border(payload: bytes) -> bytes:
    """A byte of the values goes to the keys: the sections still add up."""
    k, v = struct.unpack_from("<II", payload, COUNTS - 8)
    return put(COUNTS - 8, struct.pack("<II", k + 1, v - 1))(payload)


DAMAGE: dict[int, list[Callable[[Database], Any]]] = {
    1: [
        lambda d: d.records.pop("changes"),
        lambda d: d.records.update(extra={}),
        lambda d: d.integer_keys.discard("changes"),
    ],
    2: [
        flip,
        lambda d: d.records["references"].update({b"key": seal("references", b"key", 1, b"")}),
    ],
    3: [
        lambda d: d.records["settings"].pop(b"model"),
        lambda d: set_setting(d, "format", {"id": 32 * "0", "version": 2}),
        lambda d: set_setting(d, "format", {"version": 1}),
        lambda d: set_setting(d, "format", {"id": 31 * "0", "version": 1}),
        lambda d: set_setting(d, "memory", {}),
        lambda d: set_setting(d, "shape", {**d.shape, "more": 1}),
    ],
    4: [
        lambda d: d.records["metadata"].pop(first(d, "metadata")),
        lambda d: edit(d, "metadata", bytes, raise_by=1),
    ],
    5: [
        lambda d: d.records["embeddings"].pop(first(d, "embeddings")),
        lambda d: edit(d, "documents", lambda p: p[:-8]),
        lambda d: edit(d, "documents", lambda p: p + p[-8:]),
    ],
    6: [lambda d: edit(d, "references", lambda p: struct.pack("<I", 9) + p[4:])],
    7: [
        lambda d: edit(d, "references", bytes, raise_by=1),
        lambda d: edit(d, "embeddings", bytes, raise_by=1),
    ],
    8: [
        lambda d: edit(d, "metadata", lambda _: b"{}"),
        lambda d: edit(d, "documents", lambda p: p[:32] + bytes(32) + p[64:]),
    ],
    9: [lambda d: edit(d, "references", lambda p: p[:4] + struct.pack("<H", 9) + p[6:])],
    10: [
        lambda d: edit(d, "embeddings", lambda p: p[:-4]),
        lambda d: edit(d, "embeddings", lambda p: struct.pack("<5f", *[0.5] * 5)),
        lambda d: edit(d, "embeddings", lambda p: p[:-4] + struct.pack("<f", math.nan)),
    ],
    11: [
        lambda d: edit(d, "memories", lambda p: p + b"\0"),
        lambda d: edit(d, "memories", swap_positions),
        lambda d: edit(d, "memories", put(POSITIONS, b"\xff")),
        lambda d: edit(d, "memories", put(COUNTS, b"\xff")),
        lambda d: edit(d, "memories", put(len("?int8"), bytes(8))),
        lambda d: edit(d, "memories", move_the_border),
    ],
    12: [lambda d: set_setting(d, "counters", {"next_reference": 1, "last_change": 4})],
    13: [
        lambda d: d.records["changes"].pop(first(d, "changes")),
        lambda d: edit(d, "changes", lambda p: p[:-1]),
        lambda d: edit(d, "changes", lambda _: b""),
    ],
    14: [
        lambda d: edit(d, "changes", lambda p: p[9:]),
        lambda d: edit(d, "changes", lambda p: p[:-9]),
        lambda d: edit(d, "changes", lambda p: p + p[:9]),
        lambda d: edit(d, "changes", lambda p: p[:-9] + bytes([DELETED]) + p[-8:]),
    ],
}


@pytest.mark.parametrize(
    ("invariant", "case"), [(i, n) for i in DAMAGE for n in range(len(DAMAGE[i]))]
)
def test_the_verifier_sees_damage(sound: Database, invariant: int, case: int) -> None:
    assert broken(sound) == set()
    records = {name: dict(table) for name, table in sound.records.items()}
    damaged = Database(sound.generation, records, set(sound.integer_keys))
    DAMAGE[invariant][case](damaged)
    assert invariant in broken(replace(damaged))  # a new one, which has not read its shape yet


def test_every_byte_of_a_record_is_under_its_seal(sound: Database) -> None:
    key = first(sound, "references")
    record = sound.records["references"][key]
    for at in range(len(record)):
        with pytest.raises(AssertionError):
            unseal("references", key, record[:at] + bytes([record[at] ^ 1]) + record[at + 1 :])
    with pytest.raises(AssertionError):
        unseal("embeddings", key, record)
    with pytest.raises(AssertionError):
        unseal("references", bytes(8), record)


# --- what memdb does with what it does not know ---------------------------------------------------


def edit_file(path: Path, change: Callable[[Any, Any], None]) -> None:
    """Change a closed database's file: `change(transaction, environment)`."""
    environment = lmdb.open(str(path / "gen-000001"), max_dbs=16, map_size=1 << 30)
    settings = environment.open_db(b"settings", create=False)
    memories = environment.open_db(b"memories", create=False)
    with environment.begin(write=True) as transaction:
        change(transaction, {"settings": settings, "memories": memories})
    environment.close()


def test_another_format_version_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "a.memdb"
    create(path, "float32", "int8").close()

    def make_newer(transaction: Any, tables: Any) -> None:
        record = seal("settings", b"format", 1, b'{"needs":["x"],"version":2}')
        transaction.put(b"format", record, db=tables["settings"])
        transaction.drop(tables["memories"])  # it has other tables

    edit_file(path, make_newer)
    with pytest.raises(FormatError, match="version 2"):
        MemDB.open(path)


def with_another_memory(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Make a database whose one memory has another payload, with the right seal for it."""
    with create(path, "float32", "int8") as db:
        (reference,) = db.insert("Short.", id="a").references

    def rewrite(transaction: Any, tables: Any) -> None:
        key = struct.pack("<Q", reference)
        _, payload = unseal("memories", key, transaction.get(key, db=tables["memories"]))
        record = seal("memories", key, 1, change(payload))
        transaction.put(key, record, db=tables["memories"])

    edit_file(path, rewrite)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda p: p.replace(b"\4int8", b"\4int4"), FormatError, "record 1 of .*codec 'int4'"),
        (put(len("?int8"), b"!"), MismatchError, "record 1 of .*another memory shape.*not damaged"),
        (lambda p: p + b"\0", CorruptRecordError, "are due"),
        (move_the_border, CorruptRecordError, "are due"),
    ],
    ids=["codec", "shape", "length", "sections"],
)
def test_an_unknown_codec_and_another_shape_are_no_damage(
    tmp_path: Path, change: Callable[[bytes], bytes], error: type[Exception], match: str
) -> None:
    path = tmp_path / "a.memdb"
    with_another_memory(path, change)
    with MemDB.open(path) as db:
        assert db.get("a").warm == 1
        embedding = np.ones(DIMENSION, np.float32)
        assert db.retrieve_batch([embedding], memories=False)[0].hits
        with pytest.raises(error, match=match) as caught:
            db.retrieve(embedding)
        assert type(caught.value) is error


def test_an_index_of_another_past_begins_anew() -> None:
    records = {name: dict[bytes, bytes]() for name in TABLES}
    database = Database("gen-000001", records, INTEGER_KEYS)
    set_setting(database, "counters", {"next_reference": 9, "last_change": 3})
    for i in (1, 2, 3):
        key, entry = struct.pack("<Q", i), struct.pack("<Bq", INSERTED, i)
        records["changes"][key] = seal("changes", key, 1, entry)
        records["embeddings"][key] = seal("embeddings", key, 1, struct.pack("<f", 1))
    assert follow({1}, 1, database) == ({1, 2, 3}, 3)
    assert follow({7}, 1, database) == ({7, 2, 3}, 3)  # a wrong index stays wrong
    for gap in (2, 3):
        log = {k: v for k, v in records["changes"].items() if k != struct.pack("<Q", gap)}
        gapped = replace(database, records={**records, "changes": log})
        assert follow({7}, 1, gapped) == ({1, 2, 3}, 3)
    assert follow({7}, 4, database) == follow({7}, None, database) == ({1, 2, 3}, 3)


# --- (b) test vectors -----------------------------------------------------------------------------


def example() -> dict[str, Any]:
    (calls,) = blocks("A database", "json")
    return json.loads(calls)


def bfloat16(numbers: Any) -> np.ndarray:
    flat = np.asarray(numbers, np.float64)
    bits = np.frombuffer(narrow([f32(x) for x in flat.ravel()], "bfloat16"), "<u2")
    return bits.reshape(flat.shape)


def test_the_example_database_has_the_records_of_the_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = example()
    drawn = iter([calls["id"]])
    monkeypatch.setattr("secrets.token_hex", lambda size: next(drawn) if size == 16 else None)
    shape = MemoryShape.from_json(calls["create"].pop("shape"))
    given = calls["insert"].pop("memory")
    memory = ExplicitMemory(
        offsets=np.array(given["offsets"], np.int32),
        positions=np.array(given["positions"], np.uint8),
        keys=bfloat16(given["keys"]),
        values=bfloat16(given["values"]),
    )
    embedding = np.array([calls["insert"].pop("embedding")], np.float32)
    with MemDB.create(tmp_path / "a.memdb", shape=shape, **calls["create"]) as db:
        assert db.stats()["id"] == calls["id"]
        db.insert(**calls["insert"], embeddings=embedding, memories=[memory])
        db.update(**calls["update"])
    database = read_database(tmp_path / "a.memdb")
    assert database.records == records_of("A database")
    assert broken(database) == set()


def test_the_example_database_by_hand() -> None:
    calls = example()
    insert, update = calls["insert"], calls["update"]
    given = insert["memory"]
    metadata = '{"née":1.0,"year":2024}'.encode()
    text_hash = hashlib.sha256(insert["text"].encode()).digest()
    one = struct.pack("<Q", 1)
    text = b"Memory is text."
    # A frame of one segment with a one-byte content size, and in it one last block, raw.
    frame_bytes = b"\x28\xb5\x2f\xfd\x20" + bytes([len(text), len(text) << 3 | 1, 0, 0]) + text
    shape = (
        '{"adapter":null,"dtype":"bfloat16","framing":"plain","head_dim":2,"kv_heads":1,'
        '"layers":[1,3],"model":"m1","prefix":[5],"reference_length":128,"rope":[{"base":10000.0,'
        '"kind":"default","parameters":{}},null]}'
    )
    vectors = [write_int8(bfloat16(given[n]).tobytes(), 2, "bfloat16") for n in ("keys", "values")]
    assert [len(data) for data in vectors] == [18, 18]
    memory = [b"\4int8", struct.pack("<Q", xxhash.xxh3_64_intdigest(shape.encode()))]
    memory += [struct.pack("<IIIHH", 3, 18, 18, 2, 1), bytes(given["positions"]), *vectors]
    payloads = {
        ("settings", b"format"): (
            1,
            b'{"id":"000102030405060708090a0b0c0d0e0f","version":1}',
        ),
        ("settings", b"shape"): (1, shape.encode()),
        ("settings", b"embedder"): (1, b'{"dimension":2,"fingerprint":null,"name":null}'),
        ("settings", b"model"): (1, b'{"name":null}'),
        ("settings", b"memory"): (1, b'{"codec":"int8"}'),
        ("settings", b"counters"): (1, b'{"last_change":1,"next_reference":2}'),
        ("documents", b"a"): (
            2,
            hashlib.sha256(text_hash + metadata).digest() + text_hash + struct.pack("<q", 1),
        ),
        ("metadata", b"a"): (2, metadata),
        ("references", one): (1, struct.pack("<IHH", 0, 0, 1) + b"a" + frame_bytes),
        ("embeddings", one): (1, struct.pack("<2f", 0.6, 0.8)),
        ("memories", one): (1, b"".join(memory)),
        ("changes", one): (1, struct.pack("<BqBq", INSERTED, 1, REMEMBERED, 1)),
    }
    assert json.loads(metadata) == update["metadata"]
    assert json.loads(shape) == calls["create"]["shape"]
    by_hand: dict[str, dict[bytes, bytes]] = {}
    for (table, key), (version, payload) in payloads.items():
        by_hand.setdefault(table, {})[key] = seal(table, key, version, payload)
    assert by_hand == records_of("A database")


def test_more_records(tmp_path: Path) -> None:
    stated = records_of("More records")
    Store.create(tmp_path / "a.memdb", {}, "{}")
    made = read_database(tmp_path / "a.memdb").records["settings"][b"tokenizer"]
    assert stated["settings"] == {b"tokenizer": made}
    assert frame(unseal("settings", b"tokenizer", made)[1]) == "{}"

    key = struct.pack("<Q", 513)
    reference = Reference(513, 2, "née", 1, 3, " Text is memory.")
    payload = layout.reference_payload(reference)
    assert stated["references"] == {key: layout.seal("references", key, 2, payload)}
    version, payload = layout.unseal("references", key, memoryview(stated["references"][key]))
    assert layout.read_reference(513, version, payload) == reference
    head = struct.pack("<IHH", 1, 3, 5 - 1) + "née".encode()
    assert bytes(payload).startswith(head)
    assert frame(bytes(payload)[len(head) :]) == reference.text


@pytest.mark.parametrize("place", range(3))
def test_vectors_under_each_codec(place: int) -> None:
    stated = stanzas("Vectors under each codec", "codecs")[place]
    dtype: Any = stated["dtype"]
    exact, int8, back = (bytes.fromhex(stated[name]) for name in ("exact", "int8", "back"))
    assert dtype == ("float32", "float16", "bfloat16")[place]
    assert write_int8(exact, 3, dtype) == int8
    assert read_int8(int8, 3, dtype) == back
    assert len(exact) == section_bytes("exact", 4, 3, dtype)
    assert len(int8) == section_bytes("int8", 4, 3, dtype)

    counts = np.array([1, 0, 3], np.uint16)
    array = CODECS["exact"].decode(memoryview(exact), counts, 3, dtype)
    assert CODECS["exact"].encode(array, counts, dtype) == exact
    assert CODECS["int8"].encode(array, counts, dtype) == int8
    assert CODECS["int8"].decode(memoryview(int8), counts, 3, dtype).tobytes() == back
    assert all(map(math.isfinite, widen(back, dtype)))
    np.testing.assert_allclose(
        widen(exact, dtype)[:6], np.float32([1, -0.1, 0.3, 127, 2.5, -3.5]), rtol=4e-3
    )


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_int8_agrees_bit_by_bit_on_any_vector(dtype: Any) -> None:
    size = 4 if dtype == "float32" else 2
    bits = np.random.default_rng(0).integers(0, 1 << 8 * size, 4000, np.uint64)
    data = bits.astype(f"<u{size}").tobytes()
    numbers = np.array(widen(data, dtype), np.float64).reshape(-1, 2)
    keep = np.isfinite(numbers).all(1)
    data = b"".join(data[2 * size * i : 2 * size * (i + 1)] for i in range(len(keep)) if keep[i])
    counts = np.array([keep.sum()])
    assert counts[0] > 1000
    array = CODECS["exact"].decode(memoryview(data), counts, 2, dtype)
    coded = CODECS["int8"].encode(array, counts, dtype)
    assert coded == write_int8(data, 2, dtype)
    back = CODECS["int8"].decode(memoryview(coded), counts, 2, dtype)
    assert back.tobytes() == read_int8(coded, 2, dtype)


def test_a_derived_id() -> None:
    (stated,) = blocks("A derived id", "id")
    text = "Memory is text."
    assert stated.strip() == checked(Document(text))[0]
    assert stated.strip() == "sha256:" + hashlib.sha256(text.encode()).hexdigest()[:32]


def test_canonical_json() -> None:
    (value,) = blocks("Canonical JSON of a value", "json")
    (stated,) = blocks("Canonical JSON of a value", "hex")
    by_hand = (
        '{"a":{},"b":[1,1.0,100.0,1e+16,0.0001,1e-05,-0.0,true,null],'
        '"\uffff":"\x7f/\\"\\\\\\n\\u0001","\U0001f600":1}'
    )
    assert bytes.fromhex(stated.replace("\n", "")) == by_hand.encode()
    assert json_payload(json.loads(value)) == by_hand.encode()


# --- (c) the document is complete -----------------------------------------------------------------


def test_the_document_names_every_table() -> None:
    flags = {row[0].strip("`"): row[1] for row in rows("Tables", columns=5)}
    assert tuple(flags) == layout.TABLES
    assert {name for name, flag in flags.items() if flag == "`MDB_INTEGERKEY`"} == (
        layout.INTEGER_TABLES
    )
    for table in layout.TABLES:
        assert section(table.capitalize())
    assert f"Format version {layout.FORMAT_VERSION}." in DOCUMENT


def test_the_document_names_every_setting(sound: Database) -> None:
    stored = {key.decode() for key in sound.records["settings"]}
    assert set(names("Settings", columns=3)) == stored
    fields: dict[str, set[str]] = {}
    for setting, name, *_ in rows("Settings", columns=4):
        fields.setdefault(setting.strip("`"), set()).add(name.strip("`"))
    assert fields.keys() == stored - {"shape", "tokenizer"}
    for setting, stated in fields.items():
        assert set(sound.setting(setting)) == stated
    fields_of_both = sorted([*asdict(shape_of("float32")), *asdict(Rope(1.0))])
    assert sorted(names("Memory shape", columns=3)) == fields_of_both


def test_the_document_names_every_codec_and_change() -> None:
    assert set(names("Codecs", columns=3)) == set(CODECS)
    for codec in CODECS:
        assert section(codec)
    assert {row[1]: int(row[0]) for row in rows("Changes", columns=3)} == {
        "inserted": layout.INSERTED,
        "deleted": layout.DELETED,
        "remembered": layout.REMEMBERED,
    }


def test_every_invariant_of_the_document_is_checked() -> None:
    stated = [int(n) for n in re.findall(r"^(\d+)\. ", section("Invariants"), re.M)]
    assert stated == list(INVARIANTS) == list(DAMAGE)


def test_the_links_of_the_document_lead_somewhere() -> None:
    prose = re.sub(r"^```.*?^```$", "", DOCUMENT, flags=re.M | re.S)
    headings = {title.lower().replace(" ", "-") for title in re.findall(r"^#+ (.*)$", prose, re.M)}
    links = re.findall(r"\]\(#([^)]*)\)", prose)
    assert links
    assert set(links) <= headings
