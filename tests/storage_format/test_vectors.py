"""The test vectors of storage_format.md are what memdb writes, and what follows by hand."""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import xxhash

import memdb.codecs
from memdb import CODECS, Document, ExplicitMemory, MemDB, MemoryShape, Reference, Rope
from memdb.codecs import Codec, Layout, Part, fitted_codec
from memdb.codecs.rotated import rotation as memdb_rotation
from memdb.filters.order import index_key
from memdb.storage import record_layout
from memdb.storage.store import Store
from memdb.types.canonical import json_payload
from memdb.types.checks import checked
from memdb.types.shape import DType
from tests.engine.helpers import keep_whatever_is_lost
from tests.storage_format.coded import (
    FAMILIES,
    PLAIN,
    Parameters,
    Place,
    assert_close,
    f32,
    matrix,
    narrow,
    read_section,
    read_vectors,
    rotation,
    transform_levels,
    vector_bytes,
    widen,
    write_int8,
    write_vectors,
)
from tests.storage_format.databases import described, description
from tests.storage_format.document import blocks, records_of, rows, stanzas
from tests.storage_format.reader import (
    DELETED,
    FORGOTTEN,
    INSERTED,
    NAMED,
    REMEMBERED,
    broken,
    frame,
    read_database,
    seal,
    unseal,
    value_key,
)

#: The random bits of the example's only change.
NAME = bytes([1, 2, 3, 4, 5, 6, 7, 0x88])


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
    monkeypatch.setattr("secrets.token_bytes", lambda size: NAME if size == 8 else None)
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
    metadata = '{"lang":"en","née":1.0,"year":2024}'.encode()
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
            b'{"id":"000102030405060708090a0b0c0d0e0f","version":2}',
        ),
        ("settings", b"shape"): (1, shape.encode()),
        ("settings", b"embedder"): (1, b'{"dimension":2,"fingerprint":null,"name":null}'),
        ("settings", b"model"): (1, b'{"name":null}'),
        ("settings", b"memory"): (1, b'{"codec":"int8"}'),
        ("settings", b"index"): (1, b'{"keys":["lang","year"],"kind":"auto","recall":0.99}'),
        ("settings", b"cutting"): (1, b'{"place":false,"rule":"structure"}'),
        ("settings", b"counters"): (1, b'{"last_change":1,"next_reference":2,"trimmed":0}'),
        ("documents", b"a"): (
            2,
            hashlib.sha256(text_hash + metadata).digest() + text_hash + struct.pack("<q", 1),
        ),
        ("metadata", b"a"): (2, metadata),
        ("references", one): (1, struct.pack("<IHH", 0, 0, 1) + b"a" + frame_bytes),
        ("embeddings", one): (1, struct.pack("<2f", 0.6, 0.8)),
        ("memories", one): (1, b"".join(memory)),
        ("changes", one): (
            1,
            struct.pack("<BqBqB", INSERTED, 1, REMEMBERED, 1, NAMED) + NAME,
        ),
        ("postings", b"\4lang\5en\0\0" + bytes(8)): (1, one),
        # 2024 = 1.9765625 * 2^10: exponent 1023 + 10, and the sign turned to 1.
        ("postings", b"\4year\4" + bytes.fromhex("c09fa00000000000") + bytes(8)): (1, one),
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
    payload = record_layout.reference_payload(reference)
    assert stated["references"] == {key: record_layout.seal("references", key, 2, payload)}
    version, payload = record_layout.unseal(
        "references", key, memoryview(stated["references"][key])
    )
    assert record_layout.read_reference(513, version, payload) == reference
    head = struct.pack("<IHH", 1, 3, 5 - 1) + "née".encode()
    assert bytes(payload).startswith(head)
    assert frame(bytes(payload)[len(head) :]) == reference.text

    key = "\4née\4".encode() + bytes.fromhex("3ffbffffffffffff") + struct.pack(">Q", 257)
    assert key == "\4née".encode() + value_key(-2.5) + struct.pack(">Q", 257)
    payload = struct.pack("<2q", 257, 513)
    assert stated["postings"] == {key: record_layout.seal("postings", key, 1, payload)}

    key = struct.pack("<Q", 7)
    entries = [(FORGOTTEN, 513), (REMEMBERED, 513), (DELETED, 2)]
    payload = record_layout.changes_payload(entries)
    assert stated["changes"] == {key: record_layout.seal("changes", key, 1, payload)}
    assert payload == b"".join(struct.pack("<Bq", *entry) for entry in entries)


def test_values_as_keys() -> None:
    stated = [
        (json.loads(value.strip("`")), bytes.fromhex(key.strip("`")))
        for value, key in rows("Values as keys", columns=2)
    ]
    for value, key in stated:
        assert value_key(value) == key
        assert (index_key(value) or b"\x7f") == key
    assert {key[0] for _, key in stated} == {1, 2, 3, 4, 5, 0x7F}
    assert [key for _, key in stated] == sorted(key for _, key in stated)


@pytest.mark.parametrize("sign", [1, -1])
def test_keys_of_values_agree_on_any_number_and_string(sign: int) -> None:
    random = np.random.default_rng(0)
    floats = random.integers(0, 1 << 64, 2000, np.uint64).view(np.float64)
    numbers = sorted(sign * x for x in floats.tolist() if math.isfinite(x))
    numbers = sorted([*numbers, *range(-3, 4), sign * 2**53, sign * 0.0, sign * 5e-324])
    keys = [value_key(x) for x in numbers]
    assert keys == [index_key(x) for x in numbers]
    assert keys == sorted(keys)
    texts = sorted("".join(random.choice(list("\0\1aé\uffff\U0001f600"), n)) for n in range(90))
    assert [value_key(x) for x in texts] == [index_key(x) for x in texts]
    assert [value_key(x) for x in texts] == sorted(value_key(x) for x in texts)
    for edge in ("a" * 400, "a" * 401, "\0" * 200, "\0" * 201, 2**53, 2**53 + 1, -(2**53) - 1):
        assert value_key(edge) == (index_key(edge) or b"\x7f")


DTYPES = ("float32", "float16", "bfloat16")


def place_of(d: int, counts: Sequence[int], dtype: str) -> Place:
    shape = MemoryShape(
        model="m",
        layers=tuple(range(len(counts))),
        kv_heads=1,
        head_dim=d,
        dtype=cast(DType, dtype),
        prefix=(),
        reference_length=65535,
    )
    return Place(shape.to_json(), counts, [i for count in counts for i in range(count)])


def memdb_encodes(codec: Codec, part: Part, data: bytes, place: Place) -> bytes | None:
    """Vectors, as `exact` bytes, to the codec's."""
    shape = MemoryShape.from_json(place.shape)
    positions = np.array(place.positions, shape.position_dtype)
    vectors = np.frombuffer(data, shape.storage_dtype).reshape(-1, shape.head_dim)
    layout = Layout.dense(np.array(place.counts), positions)
    (coded,) = codec.encode(part, vectors, layout, shape)
    return coded


def memdb_decodes(codec: Codec, part: Part, data: bytes, place: Place) -> bytes:
    """The inverse."""
    shape = MemoryShape.from_json(place.shape)
    positions = np.array(place.positions, shape.position_dtype)
    out = np.empty((place.n, shape.head_dim), shape.storage_dtype)
    layout = Layout.dense(np.array(place.counts), positions)
    codec.decode(part, [memoryview(data)], layout, shape, out)
    return out.tobytes()


def same(codec: str, data: bytes, other: bytes, d: int, dtype: str) -> None:
    """What is read back, bit by bit where that is promised."""
    if codec.startswith("rotated"):
        assert_close(data, other, d, dtype)
    else:
        assert data == other


def stated_vectors() -> dict[tuple[str, str], tuple[bytes, bytes, bytes]]:
    """The input, the codec's bytes and what is read back, by dtype and codec."""
    inputs: dict[str, bytes] = {}
    found = {}
    for fields in stanzas("Vectors under each codec", "codecs"):
        dtype, back = fields.pop("dtype"), bytes.fromhex(fields.pop("back"))
        inputs[dtype] = bytes.fromhex(fields.pop("exact", "")) or inputs[dtype]
        ((codec, coded),) = fields.items()
        found[dtype, codec] = inputs[dtype], bytes.fromhex(coded), back
    return found


def test_there_are_vectors_under_each_codec() -> None:
    assert set(stated_vectors()) == {(d, c) for d in DTYPES for c in PLAIN if c != "exact"}


@pytest.mark.parametrize("codec", [codec for codec in PLAIN if codec != "exact"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_vectors_under_each_codec(dtype: str, codec: str) -> None:
    exact, coded, back = stated_vectors()[dtype, codec]
    assert write_vectors(codec, exact, 3, dtype) == coded
    assert len(exact) == 4 * vector_bytes("exact", 3, dtype)
    assert len(coded) == 4 * vector_bytes(codec, 3, dtype)
    assert all(map(math.isfinite, widen(back, dtype)))
    np.testing.assert_allclose(
        widen(exact, dtype)[:6], np.float32([1, -0.1, 0.3, 127, 2.5, -3.5]), rtol=4e-3
    )
    place = place_of(3, [1, 0, 3], dtype)
    assert memdb_encodes(CODECS["exact"], "keys", exact, place) == exact
    assert memdb_decodes(CODECS["exact"], "keys", exact, place) == exact
    assert memdb_encodes(CODECS[codec], "keys", exact, place) == coded
    same(codec, back, memdb_decodes(CODECS[codec], "keys", coded, place), 3, dtype)
    same(codec, back, read_section(codec, "keys", coded, place, {}), 3, dtype)


@pytest.mark.parametrize("d", [1, 2, 5, 8])
@pytest.mark.parametrize("codec", PLAIN)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_codec_agrees_bit_by_bit_on_any_vector(
    dtype: str, codec: str, d: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_whatever_is_lost(monkeypatch, math.inf)
    size = 4 if dtype == "float32" else 2
    bits = np.random.default_rng(d).integers(0, 1 << 8 * size, (400, d), np.uint64)
    bits = bits.astype(f"<u{size}")
    data = bits.tobytes()
    keep = np.isfinite(matrix(data, d, dtype)).all(1)
    data = bits[keep].tobytes()
    assert keep.sum() > 300
    place = place_of(d, [int(keep.sum())], dtype)
    coded = memdb_encodes(CODECS[codec], "keys", data, place)
    assert coded == write_vectors(codec, data, d, dtype)
    back = memdb_decodes(CODECS[codec], "keys", coded, place)
    same(codec, read_vectors(codec, coded, d, dtype), back, d, dtype)
    assert np.isfinite(matrix(back, d, dtype)).all()


@pytest.mark.parametrize("d", [1, 2, 3, 64, 80, 128])
def test_the_rotation_is_that_of_the_document(d: int) -> None:
    np.testing.assert_allclose(rotation(d), memdb_rotation(d), atol=1e-13)
    np.testing.assert_allclose(rotation(d) @ rotation(d).T, np.eye(d), atol=1e-13)


def test_a_fitted_codec_made_by_hand() -> None:
    (text,) = blocks("A fitted codec", "json")
    said = json.loads(text)
    (fields,) = stanzas("A fitted codec", "fitted")
    stated = {label: bytes.fromhex(data) for label, data in fields.items()}
    name, data = said["name"], stated["param"]
    assert name == f"klt8:{xxhash.xxh3_64_hexdigest(data)}"
    place = Place(said["shape"], said["counts"], said["positions"])
    codec = fitted_codec(name, data)
    assert codec is not None
    assert (codec.name, codec.parameters) == (name, data)
    with pytest.raises(ValueError, match="klt8:"):
        fitted_codec(name, data[:-1] + b"\1")
    streams = Parameters.read(name, data).values
    parts: tuple[tuple[Part, str], ...] = ("keys", "backkeys"), ("values", "backvals")
    for part, label in parts:
        back = stated[label]
        assert_close(
            read_section(name, part, stated[part], place, {name: data}), back, 4, "float32"
        )
        assert_close(memdb_decodes(codec, part, stated[part], place), back, 4, "float32")
        # memdb compresses the same bytes in another way.
        again = memdb_encodes(codec, part, back, place)
        assert again is not None
        of_both = [transform_levels(streams[part]["streams"], s, 3) for s in (again, stated[part])]
        assert (of_both[0] == of_both[1]).all()


def test_the_vectors_of_a_fitted_codec_by_hand() -> None:
    (fields,) = stanzas("A fitted codec", "fitted")
    keys = np.frombuffer(bytes.fromhex(fields["backkeys"]), "<f4").reshape(3, 4)
    values = np.frombuffer(bytes.fromhex(fields["backvals"]), "<f4").reshape(3, 4)
    before = np.array([[3, -0.25, 1, 0.25], [-62.5, 1.75, 0, 2.25]])
    for turned, key, p in zip(keys, before, (1, 5), strict=False):
        (a, b, c, d), (cos, sin) = key, np.cos([p, p * 0.01])
        s, t = np.sin([p, p * 0.01])
        np.testing.assert_allclose(
            turned, [a * cos - c * s, b * sin - d * t, c * cos + a * s, d * sin + b * t], rtol=1e-6
        )
    assert keys[2].tolist() == [0, 3, 0, -7]
    assert values.tolist() == [[0.25, 0.5, -0.25, 0.25], [0, -0.5, 0, 0], [-1, 0, 1, 127]]


@pytest.mark.parametrize(("d", "n"), [(16, 10000), (5, 400), (6, 3)])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_fitted_codec_agrees_on_other_dimensions(
    family: str, d: int, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With OPQ, without, with one coarse quantizer, and with next to nothing to be fitted to."""
    keep_whatever_is_lost(monkeypatch)
    rope = (Rope(1e4), None)
    shape = MemoryShape("m", (0, 1), 1, d, "float32", (1, 2), reference_length=65535, rope=rope)
    counts = [n - n // 3, n // 3]
    place = Place(shape.to_json(), counts, [i for count in counts for i in range(count)])
    keys, values = np.random.default_rng(0).normal(size=(2, n, d)).astype(np.float32)
    layout = Layout.dense(np.array(counts), np.array(place.positions, shape.position_dtype))
    codec = memdb.codecs.FAMILIES[family].fit(keys, values, layout, shape)
    parts: tuple[tuple[Part, bytes], ...] = ("keys", keys.tobytes()), ("values", values.tobytes())
    for part, exact in parts:
        section = memdb_encodes(codec, part, exact, place)
        assert section is not None
        read = read_section(codec.name, part, section, place, {codec.name: codec.parameters})
        assert_close(read, memdb_decodes(codec, part, section, place), d, "float32")


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


def test_the_end_of_an_index_file(indexed: Path) -> None:
    (text,) = blocks("The end of an index file", "json")
    (stated,) = blocks("The end of an index file", "hex")
    said = json.loads(text)
    assert json.dumps(said) == text.strip()
    assert said["checksum"] == f"{xxhash.xxh3_64_intdigest(b''):016x}"
    (change,) = records_of("A database")["changes"].values()
    assert said["seal"] == change[:8][::-1].hex()
    made = described(bytes(3) + b"{}" + struct.pack("<QQ8s", 2, 0, b""), said)
    assert made == bytes(3) + text.strip().encode() + bytes.fromhex(re.sub("#.*", "", stated))
    real = (indexed / "gen-000001" / "index.faiss").read_bytes()
    assert list(said) == list(description(real))
    assert described(real, description(real)) == real
