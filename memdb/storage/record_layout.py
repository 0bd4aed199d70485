"""Records as bytes: the seal that every record carries, and the layout of each table's payload.

storage_format.md describes the same bytes in prose; the two must agree.
"""

from __future__ import annotations

import secrets
import struct
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from types import NoneType
from typing import Any

import numpy as np
import xxhash
import zstandard
from numpy.typing import NDArray

from memdb.errors import CorruptRecordError
from memdb.types.canonical import read_json
from memdb.types.change import What
from memdb.types.checks import TEXT_LIMIT
from memdb.types.document import Reference
from memdb.types.native import of_the_machine

FORMAT_VERSION = 2

SETTINGS = "settings"
DOCUMENTS = "documents"
METADATA = "metadata"
REFERENCES = "references"
EMBEDDINGS = "embeddings"
MEMORIES = "memories"
CHANGES = "changes"
POSTINGS = "postings"

#: The setting that says how memories are best read, as somebody measured it.
CALIBRATION = "calibration"

#: The setting that says how documents are cut, and whether references have a place; a database
#: without it cuts as the releases before it did.
CUTTING = "cutting"
#: The setting that says why the codec of new memories is not fitted, though there are enough.
UNFITTED = "unfitted"
#: The setting that names the codec that took over, until all that was before is recoded.
RECODING = "recoding"

#: Tables keyed by an integer (uint64, LMDB's MDB_INTEGERKEY); the others by UTF-8.
INTEGER_TABLES = frozenset({REFERENCES, EMBEDDINGS, MEMORIES, CHANGES})
TABLES = (SETTINGS, DOCUMENTS, METADATA, REFERENCES, EMBEDDINGS, MEMORIES, CHANGES, POSTINGS)

#: What a change did to a reference.
INSERTED, DELETED, REMEMBERED, FORGOTTEN = 1, 2, 3, 4
#: Of no reference: random bits, so that the record's seal names this very change.
NAMED = 5
#: The same in words, as `MemDB.changes` says them.
CHANGE_NAMES: dict[int, What] = {
    INSERTED: "inserted",
    DELETED: "deleted",
    REMEMBERED: "remembered",
    FORGOTTEN: "forgotten",
}

_SEAL = struct.Struct("<QII")  # checksum, version, payload length
_REST = struct.Struct("<II")  # what the checksum is of, with the payload
_KEY = struct.Struct("<Q")
_REFERENCE = struct.Struct("<IHH")  # ordinal, tokens, bytes of the document's id
_OWNER, _OWNER_AT = struct.Struct("<H"), _SEAL.size + 6  # of a whole record: that size again
_ENTRY = struct.Struct("<Bq")  # what, reference
_CHANGE = np.dtype([("what", "u1"), ("reference", "<i8")])
_PLACES = {table: table.encode() + b"\0" for table in TABLES}
_RAW = 128  # bytes of text that are not worth compressing
_HUGE = 1e300


#: Fields that a setting must have, with their types.
_FIELDS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "calibration": {
        "adapter": (str, NoneType),
        "date": str,
        "model": str,
        "questions": int,
        "weighing": dict,
    },
    "counters": {"next_reference": int, "last_change": int, "trimmed": int},
    "cutting": {"rule": str, "place": bool},
    "embedder": {"dimension": int, "name": (str, NoneType), "fingerprint": (str, NoneType)},
    "index": {"kind": str, "recall": (int, float), "keys": list},
    "memory": {"codec": str},
    "model": {"name": (str, NoneType)},
}


def checked_setting(name: str, value: Any) -> Any:
    """A setting's JSON value; ValueError if it lacks a field that it must have."""
    for field, kind in _FIELDS.get(name, {}).items():
        if not isinstance(value, dict) or not isinstance(value.get(field, ...), kind):
            raise ValueError(f"its field '{field}' is missing, or of a wrong type")
    if name == CALIBRATION and not all(map(_is_number, value["weighing"].values())):
        raise ValueError("its field 'weighing' has a value that is no number")
    return value


def _is_number(value: object) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and -_HUGE < value < _HUGE  # type: ignore[operator]


def codec_key(name: str) -> bytes:
    """The setting that a fitted codec's parameters are in."""
    return f"codec {name}".encode()


def integer_key(number: int) -> bytes:
    """A reference id or change number as a key."""
    return _KEY.pack(number)


def read_integer_key(key: bytes | memoryview) -> int:
    """The inverse of `integer_key`."""
    return int(_KEY.unpack(key)[0])


def is_before(table: str, one: bytes, other: bytes) -> bool:
    """Whether a key comes before another in a table's order."""
    if table in INTEGER_TABLES:
        return read_integer_key(one) < read_integer_key(other)
    return one < other


def seal(table: str, key: bytes, version: int, payload: bytes) -> bytes:
    """A payload as it is stored, behind its checksum."""
    head = _REST.pack(version, len(payload))
    return b"".join((_KEY.pack(_checksum(table, key, head, payload)), head, payload))


def unseal(table: str, key: bytes | memoryview, record: memoryview) -> tuple[int, memoryview]:
    """Version and payload of a stored record.

    Raises:
        CorruptRecordError: the checksum does not fit the table, the key, the version and the bytes.
    """
    key = bytes(key)
    if len(record) < _SEAL.size:
        raise CorruptRecordError(table, readable(table, key), f"it has only {len(record)} bytes")
    version: int
    checksum, version, length = _SEAL.unpack_from(record)
    payload = record[_SEAL.size :]
    if len(payload) != length or checksum != _checksum(table, key, b"", record[8:]):
        raise CorruptRecordError(table, readable(table, key), "its checksum does not match")
    return version, payload


def seal_in(record: bytes | memoryview) -> str:
    """The checksum that a record begins with, 16 hexadecimal digits, highest first."""
    return f"{_KEY.unpack_from(record)[0]:016x}"


def readable(table: str, key: bytes) -> str:
    """A key for an error message."""
    if table in INTEGER_TABLES and len(key) == _KEY.size:
        return str(read_integer_key(key))
    return repr(key.decode("utf-8", "backslashreplace"))


def _checksum(table: str, key: bytes, head: bytes, rest: bytes | memoryview) -> int:
    """Of a record's table, key, version, length and payload, the last three in two pieces."""
    digest = xxhash.xxh3_64(b"".join((_PLACES[table], key, b"\0", head)))
    digest.update(rest)
    return digest.intdigest()


# --- payloads -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DocumentEntry:
    """The document map's record: which references a document has, and what it was made of.

    Attributes:
        version: of the document.
        content_hash: 32 bytes, SHA-256 of its text and metadata.
        text_hash: 32 bytes, SHA-256 of its text.
        references: ids in the order of the text.
    """

    version: int
    content_hash: bytes
    text_hash: bytes
    references: tuple[int, ...]

    def payload(self) -> bytes:
        """Bytes for the table `documents`."""
        ids = struct.pack(f"<{len(self.references)}q", *self.references)
        return self.content_hash + self.text_hash + ids

    @classmethod
    def read(cls, version: int, payload: memoryview) -> DocumentEntry:
        """The inverse of `payload`; ValueError if it is none."""
        ids = np.frombuffer(payload[64:], "<i8")
        if ids.min(initial=1) < 1:
            raise ValueError("it lists a reference with a number below 1")
        return cls(version, bytes(payload[:32]), bytes(payload[32:64]), tuple(map(int, ids)))


def reference_payload(reference: Reference) -> bytes:
    """Bytes for the table `references`."""
    text = compress(reference.text.encode())
    return reference_bytes(
        reference.ordinal, reference.tokens, reference.document_id.encode(), text
    )


def reference_bytes(ordinal: int, tokens: int, document: bytes, text: bytes) -> bytes:
    """As `reference_payload`, from a reference's parts; the document's id as UTF-8, the text as
    `compress` has it."""
    return _REFERENCE.pack(ordinal, tokens, len(document)) + document + text


def read_owner(payload: bytes | memoryview) -> bytes:
    """Of a reference's payload, the id of its document, as UTF-8; ValueError if it is too short."""
    size = _head(payload)[2]
    return bytes(payload[_REFERENCE.size : _REFERENCE.size + size])


def owner_in(record: bytes) -> bytes:
    """As `read_owner`, of a whole record whose seal is not checked, in a third of the time;
    struct.error if it is too short."""
    (size,) = _OWNER.unpack_from(record, _OWNER_AT)
    return record[_OWNER_AT + 2 : _OWNER_AT + 2 + size]


def read_tokens(payload: bytes | memoryview) -> int:
    """Of a reference's payload, its length in tokens; ValueError if it is too short."""
    return int(_head(payload)[1])


def _head(payload: bytes | memoryview) -> tuple[int, int, int]:
    """Ordinal, tokens and bytes of the document's id."""
    try:
        return _REFERENCE.unpack_from(payload)
    except struct.error as error:
        raise ValueError(f"its head does not decode ({error})") from error


def read_reference(number: int, version: int, payload: bytes | memoryview) -> Reference:
    """The inverse of `reference_payload`; ValueError if it is no reference's."""
    ordinal, tokens, size = _head(payload)
    at = _REFERENCE.size + size
    return Reference(
        id=number,
        version=version,
        document_id=bytes(payload[_REFERENCE.size : at]).decode(),
        ordinal=ordinal,
        tokens=tokens,
        text=decompress(payload[at:]).decode(),
    )


def read_metadata(payload: bytes | memoryview) -> dict[str, Any]:
    """A document's metadata; ValueError if it is no JSON object."""
    values = read_json(payload)
    if not isinstance(values, dict):
        raise ValueError("it is no JSON object")
    return values


def read_embedding(payload: memoryview) -> NDArray[np.float32]:
    """(dimension,) float32; ValueError if the bytes are no numbers."""
    return np.frombuffer(payload, "<f4").copy()


def new_name() -> tuple[int, int]:
    """The entry that tells a change from every other one, also from one that was undone. Less than
    0, so that no reference has it."""
    return NAMED, int.from_bytes(secrets.token_bytes(8), "little", signed=True) | -(1 << 63)


def changes_payload(changes: Iterable[tuple[int, int]]) -> bytes:
    """(what, reference id) pairs of one transaction, for the table `changes`."""
    return b"".join(map(_ENTRY.pack, *zip(*changes, strict=True)))


def read_changes(payload: memoryview) -> NDArray[Any]:
    """Structured array with the fields `what` and `reference`; ValueError if it has none."""
    if not len(payload):
        raise ValueError("it has no entries")
    return np.frombuffer(payload, _CHANGE).copy()


def compress(text: bytes) -> bytes:
    """One zstandard frame. Of a short text it is made by hand, as zstd makes it, which takes a
    tenth of the time: a header that says the size, and one block as it is."""
    if len(text) >= _RAW:
        return _contexts.compressor.compress(text)
    size = len(text)
    return b"\x28\xb5\x2f\xfd\x20" + bytes([size, size << 3 & 0xFF | 1, size >> 5, 0]) + text


def decompress(frame: bytes | memoryview) -> bytes:
    """The content of one zstandard frame; ValueError if it is none, or claims more than 256 MiB."""
    try:
        size = zstandard.frame_content_size(frame)
        if not 0 <= size <= TEXT_LIMIT:
            raise ValueError(f"a compressed text claims {size} bytes")
        return _contexts.decompressor.decompress(frame)
    except zstandard.ZstdError as error:
        raise (of_the_machine(error) or ValueError(str(error))) from error


class _Contexts(threading.local):
    """zstd's working memory; one for each thread, since to make it takes longer than to use it."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(level=1)
        self.decompressor = zstandard.ZstdDecompressor()


_contexts = _Contexts()
