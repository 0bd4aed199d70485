"""A reader and a verifier of databases, written from storage_format.md alone: it uses nothing of
memdb."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import faiss
import lmdb
import numpy as np
import xxhash
import zstandard
from tokenizers import Tokenizer

from tests.storage_format.coded import Parameters, Place, is_known, read_section, split_name, widen
from tests.storage_format.document import rows

INTEGER_KEYS = {"references", "embeddings", "memories", "changes"}
TABLES = {"settings", "documents", "metadata", "postings"} | INTEGER_KEYS
INSERTED, DELETED, REMEMBERED, FORGOTTEN, NAMED = 1, 2, 3, 4, 5
OTHER = b"\x7f"
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


def value_key(value: Any) -> bytes:
    """A metadata value as `postings` has it in its keys."""
    if value is None or value is False or value is True:
        return {None: b"\1", False: b"\2", True: b"\3"}[value]
    if isinstance(value, float) or (isinstance(value, int) and -(2**53) <= value <= 2**53):
        (bits,) = struct.unpack(">Q", struct.pack(">d", value if value else 0.0))
        return b"\4" + struct.pack(">Q", bits ^ (2**64 - 1 if bits >> 63 else 1 << 63))
    if isinstance(value, str):
        escaped = value.encode().replace(b"\0", b"\0\xff")
        return b"\5" + escaped + b"\0\0" if len(escaped) <= 400 else OTHER
    return OTHER


def frame_content(data: bytes) -> bytes:
    assert 0 <= zstandard.get_frame_parameters(data).content_size <= 1 << 28
    decoder = zstandard.ZstdDecompressor().decompressobj()
    content = decoder.decompress(data)
    assert decoder.eof
    assert not decoder.unused_data
    return content


def frame(data: bytes) -> str:
    return frame_content(data).decode()


def fingerprint(shape: dict[str, Any]) -> int:
    canonical = json.dumps(shape, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return xxhash.xxh3_64_intdigest(canonical.encode(), seed=0)


@dataclass(frozen=True)
class Memory:
    codec: str
    counts: tuple[int, ...]
    positions: tuple[int, ...]
    keys: bytes  # as stored
    values: bytes

    def vectors(self, shape: dict[str, Any], fitted: Mapping[str, bytes]) -> tuple[bytes, bytes]:
        """Keys and values as `exact` bytes."""
        place = Place(shape, self.counts, self.positions)
        keys = read_section(self.codec, "keys", self.keys, place, fitted)
        return keys, read_section(self.codec, "values", self.values, place, fitted)


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
    def _text_tokenizer(self) -> Tokenizer | None:
        if self.tokenizer is None:
            return None
        return Tokenizer.from_str(json.dumps({**json.loads(self.tokenizer), "added_tokens": []}))

    def count(self, text: str) -> int:
        """Tokens of a text; 0 where there is no tokenizer."""
        if self._text_tokenizer is None:
            return 0
        return len(self._text_tokenizer.encode(text, add_special_tokens=False).ids)

    @cached_property
    def fitted(self) -> dict[str, bytes]:
        """Parameters of the fitted codecs, by name."""
        return {
            key.decode().removeprefix("codec "): frame_content(payload)
            for key, (_, payload) in self.table("settings").items()
            if key.startswith(b"codec ")
        }

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

    def memories(self) -> dict[int, Memory | None]:
        return {
            number(key): self._memory(payload)
            for key, (_, payload) in self.table("memories").items()
        }

    def _memory(self, payload: bytes) -> Memory | None:
        """None if it was written for another shape."""
        shape = self.shape
        rows = len(shape["layers"]) * shape["kv_heads"]
        p, code = (1, "B") if shape["reference_length"] <= 256 else (2, "H")
        c = payload[0]
        codec = payload[1 : 1 + c].decode("ascii")
        written_for, n, k, v = struct.unpack_from("<QIII", payload, 1 + c)
        if written_for != fingerprint(shape):
            return None
        h = 21 + c
        assert len(payload) == h + 2 * rows + n * p + k + v
        counts = struct.unpack_from(f"<{rows}H", payload, h)
        assert sum(counts) == n
        at = h + 2 * rows
        positions = struct.unpack_from(f"<{n}{code}", payload, at)
        at += n * p
        return Memory(codec, counts, positions, payload[at : at + k], payload[at + k :])

    def changes(self) -> dict[int, list[tuple[int, int]]]:
        """What happened to which reference, by the number of the change."""
        return {
            number(key): [e for e in struct.iter_unpack("<Bq", payload) if e[0] != NAMED]
            for key, (_, payload) in self.table("changes").items()
        }

    def name(self, change: int) -> str | None:
        """What names a change; None if the log does not reach back so far."""
        record = self.records["changes"].get(struct.pack("<Q", change))
        if record is not None:
            return record[7::-1].hex()
        counters = self.setting("counters")
        return counters.get("trimmed_seal", "") if change == counters["trimmed"] else None

    def postings(self) -> dict[tuple[bytes, bytes], list[tuple[int, tuple[int, ...]]]]:
        """By metadata key and value, both as in the table's keys: bound and ids of each block."""
        found: dict[tuple[bytes, bytes], list[tuple[int, tuple[int, ...]]]] = {}
        for key, (_, payload) in sorted(self.table("postings").items()):
            end = 1 + key[0]
            assert 1 < end < len(key) - 8
            (bound,) = struct.unpack(">Q", key[-8:])
            ids = struct.unpack(f"<{len(payload) // 8}q", payload)
            found.setdefault((key[1:end], key[end:-8]), []).append((bound, ids))
        return found


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


@dataclass(frozen=True)
class IndexFile:
    """What `index.faiss` says of itself, and the ids that it holds."""

    description: dict[str, Any]
    ids: set[int]


def read_index(path: Path, database: Database) -> IndexFile:
    """A valid index file; AssertionError, or what FAISS raises, for any other."""
    content = path.read_bytes()
    j, checksum_of_json = struct.unpack("<QQ", content[-24:-8])
    assert content[-8:] == b"memdbix2"
    assert j <= min(65536, len(content) - 24)
    end = len(content) - 24 - j
    assert xxhash.xxh3_64_intdigest(content[end:-24]) == checksum_of_json
    said = json.loads(content[end:-24])
    for name, kind, _ in rows("Index file", columns=3):
        assert is_kind(said[name.strip("`")], kind)
    assert len(said["spread"]) == 40
    assert all(number > 0 for number in said["spread"])
    n, c, head, each = said["references"], said["lists"], said["head"], 2 * said["dimension"] + 8
    f = head + n * each
    assert end == f + 16 * n + 8 * c
    sealed = content[:head] + content[f:end]
    assert said["checksum"] == f"{xxhash.xxh3_64_intdigest(sealed):016x}"
    ids = np.frombuffer(content, "<i8", n, f)
    assert (ids[1:] > ids[:-1]).all()
    clusters, places = np.frombuffer(content, "<u4", 2 * n, f + 8 * n).reshape(2, n)
    seals = np.frombuffer(content, "<u8", c, f + 16 * n)
    index = faiss.deserialize_index(np.frombuffer(content[:f], np.uint8))
    assert (index.ntotal, index.d, index.nlist) == (n, said["dimension"], c)
    assert index.metric_type == faiss.METRIC_INNER_PRODUCT
    assert said["database"] == database.setting("format")["id"]
    assert said["dimension"] == database.setting("embedder")["dimension"]
    assert said["change"] <= database.setting("counters")["last_change"]
    assert said["seal"] == database.name(said["change"])
    lists = faiss.extract_index_ivf(index).invlists
    for cluster in range(c):
        m = lists.list_size(cluster)
        held = content[head : head + m * each]
        assert xxhash.xxh3_64_intdigest(held) == seals[cluster]
        head += m * each
        within = np.frombuffer(held, "<i8", m, m * (each - 8))
        if m:
            assert (faiss.rev_swig_ptr(lists.get_ids(cluster), m) == within).all()
        assert (clusters[within] == cluster).all()
        assert (places[within] == np.arange(m)).all()
    assert head == f
    return IndexFile(said, set(ids.tolist()))


def read_usage(content: bytes) -> dict[int, int]:
    """Counts by reference, in the file's order; none if it has another form."""
    entries = content[16:]
    head = b"memdbuse" + struct.pack("<Q", xxhash.xxh3_64_intdigest(entries))
    if content[:16] != head or len(entries) % 16:
        return {}
    return dict(struct.iter_unpack("<qQ", entries))


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


# --- places, from the document ---


def name_in(text: str) -> str | None:
    name = re.sub(f"[{WHITE_SPACE}]+", " ", text).strip(" ")
    return name if 1 <= len(name) <= 200 else None


def headings(text: str) -> list[tuple[int, int, str]]:
    """Where each heading begins, its level and its name."""
    found = []
    fence = None
    at = 0
    for line in re.findall("[^\n]*\n|[^\n]+", text):
        bare = line.strip(WHITE_SPACE)
        opening = re.match(r"[ \t]*(```+(?!.*`)|~~~+)", line)
        heading = re.match(r"( {0,3})(#{1,6})[ \t](.*)", line)
        if fence is not None:
            if len(bare) >= len(fence) and set(bare) == {fence[0]}:
                fence = None
        elif opening:
            fence = opening[1]
        elif heading:
            name = name_in(re.sub(r"(^|[ \t])#+$", "", heading[3].rstrip(WHITE_SPACE)))
            if name is not None and set(name) != {"#"}:
                found.append((at + len(heading[1]), len(heading[2]), name))
        at += len(line)
    return found


def places(database: Database, name: str) -> list[str]:
    """Of the references of a document; empty for one that has none."""
    references = database.references()
    texts = [references[reference][4] for reference in database.documents()[name][3]]
    cutting = {"place": False}
    if b"cutting" in database.records["settings"]:
        cutting = database.setting("cutting")
    if not cutting["place"]:
        return [""] * len(texts)
    room = database.shape["reference_length"]
    metadata = json.loads(database.table("metadata")[name.encode()][1])
    of_text = headings("".join(texts))
    given = metadata.get("title")
    title = name_in(given) if isinstance(given, str) else None
    if title is None and of_text:
        title = of_text[0][2]
    if title is None and not name.startswith("sha256:"):
        title = name_in(name)
    found = []
    at = 0
    for text in texts:
        content = text.strip(WHITE_SPACE)
        start = at + text.index(content)
        above: list[tuple[int, int, str]] = []
        own = None
        for heading in of_text:
            if heading[0] <= start:
                above = [one for one in above if one[1] < heading[1]]
                if heading[0] < start:
                    above.append(heading)
                else:
                    own = heading[2]
        names = [one for _, _, one in above]
        if title is not None and names[:1] != [title]:
            names = [title, *names]
        if names == [own]:
            names = []
        while names and database.count(" > ".join(names) + "\n") > min(32, room // 4):
            del names[1 if len(names) > 2 else 0]
        place = " > ".join(names)
        if place and database.count(f"{place}\n{content}") > room:
            place = ""
        found.append(place)
        at += len(text)
    return found


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
    assert database.setting("format")["version"] == 2
    assert re.fullmatch("[0-9a-f]{32}", database.setting("format")["id"])
    for setting, name, kind, _ in rows("Settings", columns=4):
        there = setting.strip("`").encode() in database.records["settings"]
        may_be_missing = ("`unfitted`", "`calibration`", "`cutting`", "`rewriting`", "`recoding`")
        if setting in may_be_missing and not there:
            continue
        record = database.setting(setting.strip("`"))
        if name.strip("`") in record or not kind.endswith(" or missing"):
            assert is_kind(record[name.strip("`")], kind.removesuffix(" or missing"))
    for name, data in database.fitted.items():
        if is_known(name):
            Parameters.read(name, data)
    memory = database.setting("memory")
    if "fitted" in memory:
        assert memory["fitted"] in database.fitted
        assert split_name(memory["fitted"])[0] == memory["codec"]
    if b"calibration" in database.records["settings"]:
        weighing = database.setting("calibration")["weighing"]
        assert all(is_kind(value, "number") for value in weighing.values())
    index = database.setting("index")
    assert index["kind"] in ("auto", "exact", "ivf")
    assert 0 < index["recall"] <= 1
    assert len(set(index["keys"])) == len(index["keys"])
    assert all(1 <= len(key.encode()) <= 64 for key in index["keys"])
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
    if kind.startswith("array of "):
        of = kind.removeprefix("array of ").removesuffix("s")
        return isinstance(value, list) and all(is_kind(item, of) for item in value)
    if kind.endswith(" or null"):
        return value is None or is_kind(value, kind.removesuffix(" or null"))
    types: dict[str, Any] = {
        "integer": int,
        "number": (int, float),
        "boolean": bool,
        "string": str,
        "array": list,
        "object": dict,
    }
    return isinstance(value, types[kind]) and isinstance(value, bool) == (kind == "boolean")


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
    rewriting: dict[str, Any] = {"recut": False}
    if b"rewriting" in database.records["settings"]:
        rewriting = database.setting("rewriting")
    for _, _, count, name, text in database.references().values():
        if rewriting["recut"] and name.encode() > rewriting["after"].encode():
            continue
        assert count <= most or (most > 0 and len(text.strip(WHITE_SPACE)) == 1)


def embeddings_are_unit_vectors(database: Database) -> None:
    dimension = database.setting("embedder")["dimension"]
    for vector in database.embeddings().values():
        assert len(vector) == dimension
        assert abs(math.hypot(*vector) - 1) < 1e-5


def memories_are_well_formed(database: Database) -> None:
    for memory in database.memories().values():
        if memory is None:
            continue
        at = 0
        for count in memory.counts:
            row = memory.positions[at : at + count]
            assert list(row) == sorted(set(row))
            at += count
        assert all(p < database.shape["reference_length"] for p in memory.positions)
        if not is_known(memory.codec):
            continue
        for vectors in memory.vectors(database.shape, database.fitted):
            assert all(map(math.isfinite, widen(vectors, database.shape["dtype"])))


def ids(database: Database) -> None:
    named = set(database.references())
    named |= {reference for entries in database.changes().values() for _, reference in entries}
    assert all(1 <= i < database.setting("counters")["next_reference"] for i in named)


def changes_have_no_gaps(database: Database) -> None:
    counters = database.setting("counters")
    last, trimmed = counters["last_change"], counters["trimmed"]
    assert 0 <= trimmed <= last
    assert sorted(database.changes()) == list(range(trimmed + 1, last + 1))
    assert all(len(payload) >= 9 for _, payload in database.table("changes").values())


def changes_lead_here(database: Database) -> None:
    whole = database.setting("counters")["trimmed"] == 0
    warm: dict[int, bool] = {}  # of what is there, as far as the log says
    gone: set[int] = set()
    for _, entries in sorted(database.changes().items()):
        for what, reference in entries:
            if what not in (INSERTED, DELETED, REMEMBERED, FORGOTTEN):
                continue
            assert reference not in gone
            if what == INSERTED:
                assert reference not in warm
            elif whole:
                assert reference in warm
            if what == DELETED:
                gone.add(reference)
                warm.pop(reference, None)
            else:
                warm[reference] = what == REMEMBERED
    references, memories = set(database.references()), set(database.memories())
    assert not gone & references
    assert set(warm) == references if whole else set(warm) <= references
    assert all((reference in memories) == said for reference, said in warm.items())


def blocks_are_well_formed(database: Database) -> None:
    for blocks in database.postings().values():
        bounds = [bound for bound, _ in blocks] + [1 << 63]
        for (bound, held), behind in zip(blocks, bounds[1:], strict=True):
            assert 1 <= len(held) <= 256
            assert list(held) == sorted(set(held))
            assert bound <= held[0]
            assert held[-1] < behind


def postings_follow_from_metadata(database: Database) -> None:
    metadata, declared = database.table("metadata"), database.setting("index")["keys"]
    due: dict[tuple[bytes, bytes], set[int]] = {}
    for name, (_, _, _, listed) in database.documents().items():
        values = json.loads(metadata[name.encode()][1])
        for key in set(declared) & set(values):
            due.setdefault((key.encode(), value_key(values[key])), set()).update(listed)
    assert due == {
        place: {reference for _, held in blocks for reference in held}
        for place, blocks in database.postings().items()
    }


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
            blocks_are_well_formed,
            postings_follow_from_metadata,
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
