"""The test vectors of storage_format.md are what memdb writes, and what follows by hand."""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from memdb import CODECS, Document, ExplicitMemory, MemDB, MemoryShape, Reference, layout
from memdb.canonical import json_payload
from memdb.documents import checked
from memdb.filters import index_key
from memdb.store import Store
from tests.storage_format.databases import described, description
from tests.storage_format.document import blocks, records_of, rows, stanzas
from tests.storage_format.reader import (
    DELETED,
    FORGOTTEN,
    INSERTED,
    REMEMBERED,
    broken,
    f32,
    frame,
    narrow,
    read_database,
    read_int8,
    seal,
    section_bytes,
    unseal,
    value_key,
    widen,
    write_int8,
)


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
        ("settings", b"counters"): (1, b'{"last_change":1,"next_reference":2,"trimmed":0}'),
        ("documents", b"a"): (
            2,
            hashlib.sha256(text_hash + metadata).digest() + text_hash + struct.pack("<q", 1),
        ),
        ("metadata", b"a"): (2, metadata),
        ("references", one): (1, struct.pack("<IHH", 0, 0, 1) + b"a" + frame_bytes),
        ("embeddings", one): (1, struct.pack("<2f", 0.6, 0.8)),
        ("memories", one): (1, b"".join(memory)),
        ("changes", one): (1, struct.pack("<BqBq", INSERTED, 1, REMEMBERED, 1)),
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
    payload = layout.reference_payload(reference)
    assert stated["references"] == {key: layout.seal("references", key, 2, payload)}
    version, payload = layout.unseal("references", key, memoryview(stated["references"][key]))
    assert layout.read_reference(513, version, payload) == reference
    head = struct.pack("<IHH", 1, 3, 5 - 1) + "née".encode()
    assert bytes(payload).startswith(head)
    assert frame(bytes(payload)[len(head) :]) == reference.text

    key = "\4née\4".encode() + bytes.fromhex("3ffbffffffffffff") + struct.pack(">Q", 257)
    assert key == "\4née".encode() + value_key(-2.5) + struct.pack(">Q", 257)
    payload = struct.pack("<2q", 257, 513)
    assert stated["postings"] == {key: layout.seal("postings", key, 1, payload)}

    key = struct.pack("<Q", 7)
    entries = [(FORGOTTEN, 513), (REMEMBERED, 513), (DELETED, 2)]
    payload = layout.changes_payload(entries)
    assert stated["changes"] == {key: layout.seal("changes", key, 1, payload)}
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


def test_the_end_of_an_index_file(indexed: Path) -> None:
    (text,) = blocks("The end of an index file", "json")
    (stated,) = blocks("The end of an index file", "hex")
    said = json.loads(text)
    assert json.dumps(said) == text.strip()
    assert said["checksum"] == f"{xxhash.xxh3_64_intdigest(b''):016x}"
    made = described(bytes(3) + b"{}" + struct.pack("<QQ8s", 2, 0, b""), said)
    assert made == bytes(3) + text.strip().encode() + bytes.fromhex(re.sub("#.*", "", stated))
    real = (indexed / "gen-000001" / "index.faiss").read_bytes()
    assert list(said) == list(description(real))
    assert described(real, description(real)) == real
