"""The independent verifier checks each invariant of storage_format.md: it sees damage to any."""

from __future__ import annotations

import math
import re
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import zstandard

from tests.storage_format.databases import (
    COUNTS,
    KEYS,
    POSITIONS,
    edit,
    first,
    move_the_border,
    put,
    rename,
    set_in,
    set_setting,
)
from tests.storage_format.document import section
from tests.storage_format.reader import (
    DELETED,
    FORGOTTEN,
    INSERTED,
    INVARIANTS,
    REMEMBERED,
    Database,
    broken,
    seal,
    unseal,
    value_key,
)


def flip(database: Database) -> None:
    key = first(database, "memories")
    record = bytearray(database.records["memories"][key])
    record[-1] ^= 1
    database.records["memories"][key] = bytes(record)


def swap_positions(payload: bytes) -> bytes:
    at = POSITIONS
    (count,) = struct.unpack_from("<H", payload, COUNTS)
    assert count >= 2
    return payload[:at] + payload[at : at + 2][::-1] + payload[at + 2 :]


def trim(
    database: Database, entries: Sequence[tuple[int, int]] = (), last_change: int = 9
) -> Database:
    """The log is cut at 8; behind it there is one record, if any."""
    set_in(database, "counters", trimmed=8, last_change=last_change)
    key = struct.pack("<Q", 9)
    payload = b"".join(struct.pack("<Bq", *entry) for entry in entries)
    database.records["changes"] = {key: seal("changes", key, 1, payload)} if entries else {}
    return database


def in_log(database: Database, change: Callable[[bytes], bytes]) -> None:
    """The first change has other entries, but for its name, which is the last."""
    edit(database, "changes", lambda p: change(p[:-9]) + p[-9:])


def cold_reference(database: Database) -> int:
    return min(set(database.references()) - set(database.memories()))


def deleted_reference(database: Database) -> int:
    entries = [entry for record in database.changes().values() for entry in record]
    return next(reference for what, reference in entries if what == DELETED)


def ids_of(database: Database, key: bytes) -> bytes:
    return unseal("postings", key, database.records["postings"][key])[1]


def add_block(database: Database, key: bytes, ids: bytes = struct.pack("<q", 1)) -> None:
    database.records["postings"][key] = seal("postings", key, 1, ids)


def move_block(database: Database, bound: int) -> None:
    """The first block has another bound."""
    key = first(database, "postings")
    add_block(database, key[:-8] + struct.pack(">Q", bound), ids_of(database, key))
    del database.records["postings"][key]


def cut_block(database: Database, bound: int) -> None:
    """A second block begins at an id that the first one reaches beyond."""
    key = first(database, "postings")
    assert ids_of(database, key)[-8:] > struct.pack("<q", bound)
    add_block(database, key[:-8] + struct.pack(">Q", bound), ids_of(database, key)[-8:])


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
        lambda d: set_setting(d, "format", {"id": 32 * "0", "version": 1}),
        lambda d: set_setting(d, "format", {"version": 2}),
        lambda d: set_setting(d, "format", {"id": 31 * "0", "version": 2}),
        lambda d: set_in(d, "counters", trimmed=None),
        lambda d: set_in(d, "calibration", date=2026),
        lambda d: set_in(d, "calibration", model=None),
        lambda d: set_in(d, "calibration", weighing={"lift": "0.5"}),
        lambda d: set_in(d, "index", kind="other"),
        lambda d: set_in(d, "index", recall=0),
        lambda d: set_in(d, "index", keys=["year", "year"]),
        lambda d: set_in(d, "index", keys=[""]),
        lambda d: set_in(d, "index", keys=["é" * 33]),
        lambda d: set_in(d, "index", keys=[1]),
        lambda d: set_setting(d, "memory", {}),
        lambda d: set_setting(d, "shape", {**d.shape, "more": 1}),
        lambda d: set_in(d, "memory", codec="klt8", fitted="klt8:0123456789abcdef"),
        lambda d: set_parameters(d, "klt8:0123456789abcdef", b"\2\0\0\0{}"),
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
        lambda d: edit(d, "memories", move_the_border),
        lambda d: edit(d, "memories", lambda p: p[:20]),
        lambda d: edit(d, "memories", lambda p: rename(p, "int4")),
        lambda d: edit(d, "memories", lambda p: rename(p, "klt8:0123456789abcdef")),
    ],
    12: [
        lambda d: set_in(d, "counters", next_reference=1),
        lambda d: edit(d, "changes", put(1, struct.pack("<q", 99))),
        lambda d: edit(d, "changes", put(1, struct.pack("<q", 0))),
    ],
    13: [
        lambda d: set_in(d, "counters", trimmed=1),
        lambda d: set_in(d, "counters", last_change=6),
        lambda d: set_in(d, "counters", trimmed=-1),
        lambda d: trim(d, last_change=3),
        lambda d: d.records["changes"].pop(first(d, "changes")),
        lambda d: edit(d, "changes", lambda p: p[:-1]),
        lambda d: edit(d, "changes", lambda _: b""),
    ],
    14: [
        lambda d: in_log(d, lambda p: p[9:]),
        lambda d: in_log(d, lambda p: p[:-9]),
        lambda d: in_log(d, lambda p: p + p[:9]),
        lambda d: in_log(d, lambda p: p[:-9] + bytes([DELETED]) + p[-8:]),
        lambda d: in_log(d, lambda p: p[:-9] + bytes([FORGOTTEN]) + p[-8:]),
        lambda d: trim(d, [(DELETED, 1)]),
        lambda d: trim(d, [(FORGOTTEN, 1)]),
        lambda d: trim(d, [(INSERTED, 1)]),
        lambda d: trim(d, [(REMEMBERED, 1), (INSERTED, 1), (REMEMBERED, 1)]),
        lambda d: trim(d, [(REMEMBERED, cold_reference(d))]),
        lambda d: trim(d, [(REMEMBERED, deleted_reference(d))]),
    ],
    15: [
        lambda d: edit(d, "postings", lambda p: p + p),
        lambda d: edit(d, "postings", lambda p: p[8:] + p[:8]),
        lambda d: edit(d, "postings", lambda _: b""),
        lambda d: edit(d, "postings", lambda p: p + b"\0"),
        lambda d: edit(d, "postings", lambda _: struct.pack("<257q", *range(1, 258))),
        lambda d: move_block(d, bound=2),
        lambda d: cut_block(d, bound=1),
        lambda d: add_block(d, b"\4year" + bytes(8)),
        lambda d: add_block(d, b"\0" + value_key(1) + bytes(8)),
        lambda d: add_block(d, b"\xffyear" + bytes(8)),
    ],
    16: [
        lambda d: d.records["postings"].pop(first(d, "postings")),
        lambda d: edit(d, "postings", lambda p: p[:-8]),
        lambda d: edit(d, "postings", lambda p: p + struct.pack("<q", 99)),
        lambda d: add_block(d, b"\4year" + value_key(1) + bytes(8)),
        lambda d: add_block(d, b"\4gone" + value_key(2024) + bytes(8)),
        lambda d: add_block(d, b"\5other" + value_key(2024) + bytes(8)),
        lambda d: set_in(d, "index", keys=["year"]),
        lambda d: set_in(d, "index", keys=[*KEYS, "new"], metadata={"new": 1}),
        lambda d: edit(d, "metadata", lambda _: b'{"year":2025}'),
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


def set_parameters(database: Database, name: str, parameters: bytes) -> None:
    key = f"codec {name}".encode()
    frame = zstandard.compress(parameters)
    database.records["settings"][key] = seal("settings", key, 1, frame)


def in_keys(database: Database, change: Callable[[bytes], bytes]) -> None:
    """The keys of the first memory that a fitted codec wrote are others."""
    key, memory = next(
        (struct.pack("<Q", reference), memory)
        for reference, memory in sorted(database.memories().items())
        if memory is not None and ":" in memory.codec and memory.positions
    )
    version, payload = unseal("memories", key, database.records["memories"][key])
    keys = change(memory.keys)
    head = 13 + payload[0]
    before = payload[: len(payload) - len(memory.keys) - len(memory.values)]
    before = put(head, struct.pack("<I", len(keys)))(before)
    payload = before + keys + memory.values
    database.records["memories"][key] = seal("memories", key, version, payload)


def first_stream(change: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    """A transform codec's section with another first stream, and the right length of that."""

    def changed(section: bytes) -> bytes:
        streams = next(t for t in range(1, 99) if is_section(section, t))
        (length,) = struct.unpack_from("<I", section)
        stream = change(section[4 * streams : 4 * streams + length])
        rest = section[4 : 4 * streams], stream, section[4 * streams + length :]
        return struct.pack("<I", len(stream)) + b"".join(rest)

    return changed


def is_section(section: bytes, streams: int) -> bool:
    """Whether it may be one of so many streams."""
    lengths: tuple[int, ...] = struct.unpack_from(f"<{streams}I", section)
    return len(section) == 4 * streams + sum(lengths)


def inflated(change: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    """A stream of other bytes."""

    def changed(stream: bytes) -> bytes:
        deflate = zlib.compressobj(wbits=-15)
        return deflate.compress(change(zlib.decompress(stream, -15))) + deflate.flush()

    return changed


def parameters_changed(database: Database) -> None:
    ((name, data),) = database.fitted.items()
    set_parameters(database, name, data[:-1] + bytes([data[-1] ^ 1]))


DAMAGE_UNDER_A_FITTED_CODEC: list[tuple[int, Callable[[Database], Any]]] = [
    (3, parameters_changed),
    (11, parameters_changed),
    (3, lambda d: d.records["settings"].pop(b"codec " + next(iter(d.fitted)).encode())),
    (11, lambda d: d.records["settings"].pop(b"codec " + next(iter(d.fitted)).encode())),
    (3, lambda d: set_in(d, "memory", codec="klt5")),
    (11, lambda d: in_keys(d, lambda k: k[:-1])),
    (11, lambda d: in_keys(d, lambda k: k + b"\0")),
    (11, lambda d: in_keys(d, first_stream(lambda s: s[:-1]))),
    (11, lambda d: in_keys(d, first_stream(lambda s: s + b"\0"))),
    (11, lambda d: in_keys(d, first_stream(lambda s: b"\7" + s[1:]))),
    (11, lambda d: in_keys(d, first_stream(inflated(lambda data: data + data[:1])))),
    (11, lambda d: in_keys(d, first_stream(inflated(lambda data: data[1:])))),
    (11, lambda d: in_keys(d, first_stream(inflated(lambda data: b"\xff" + data[1:])))),
]


@pytest.mark.parametrize("case", range(len(DAMAGE_UNDER_A_FITTED_CODEC)))
def test_the_verifier_sees_damage_under_a_fitted_codec(fitted: Database, case: int) -> None:
    assert broken(fitted) == set()
    records = {name: dict(table) for name, table in fitted.records.items()}
    damaged = Database(fitted.generation, records, set(fitted.integer_keys))
    invariant, damage = DAMAGE_UNDER_A_FITTED_CODEC[case]
    damage(damaged)
    assert invariant in broken(replace(damaged))


def test_the_verifier_takes_the_same_levels_compressed_otherwise(fitted: Database) -> None:
    records = {name: dict(table) for name, table in fitted.records.items()}
    changed = Database(fitted.generation, records, set(fitted.integer_keys))
    in_keys(changed, first_stream(inflated(bytes)))
    assert changed.records != fitted.records
    assert broken(replace(changed)) == set()
    assert [
        m and m.vectors(changed.shape, changed.fitted) for m in changed.memories().values()
    ] == [m and m.vectors(fitted.shape, fitted.fitted) for m in fitted.memories().values()]


def test_the_verifier_takes_what_may_be(sound: Database) -> None:
    for allowed in (
        lambda d: edit(d, "memories", put(len("?int8"), bytes(8))),  # for another shape
        lambda d: edit(d, "memories", lambda p: put(len("?int8"), bytes(8))(p)[:25]),
        lambda d: edit(d, "memories", lambda p: rename(p, "int9")),  # of a later release
        lambda d: edit(d, "memories", lambda p: rename(p, "new:0123456789abcdef")),
        lambda d: set_parameters(d, "new:0123456789abcdef", b"!"),
        lambda d: in_log(d, lambda p: p + p[-9:]),  # remembered again
        lambda d: in_log(d, lambda p: p[:-9] + b"\4" + p[-8:] + p[-9:]),
        lambda d: in_log(d, lambda p: p[:9] + b"\x09" + p[1:]),  # not known
        lambda d: edit(d, "changes", lambda p: p[:-9]),  # without a name, of an older release
        lambda d: trim(d, last_change=8),
        lambda d: trim(d, [(REMEMBERED, 1)]),
        lambda d: trim(d, [(FORGOTTEN, cold_reference(d))]),
        lambda d: trim(d, [(DELETED, deleted_reference(d))]),
        lambda d: set_in(d, "index", more=1),
        split_block,
    ):
        records = {name: dict(table) for name, table in sound.records.items()}
        changed = Database(sound.generation, records, set(sound.integer_keys))
        allowed(changed)
        assert changed.records != sound.records
        assert broken(replace(changed)) == set()


def split_block(database: Database) -> None:
    """The first block as two, neither of which has the bound that memdb would give it."""
    key = min(key for key in database.records["postings"] if len(ids_of(database, key)) > 8)
    ids = ids_of(database, key)
    (low,) = struct.unpack("<q", ids[:8])
    del database.records["postings"][key]
    for bound, part in ((low, ids[:8]), (low + 1, ids[8:])):
        add_block(database, key[:-8] + struct.pack(">Q", bound), part)


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


def test_every_invariant_of_the_document_is_checked() -> None:
    stated = [int(n) for n in re.findall(r"^(\d+)\. ", section("Invariants"), re.M)]
    assert stated == list(INVARIANTS) == list(DAMAGE)
