"""What `MemDB.stats` counts."""

from __future__ import annotations

from typing import Any, TypedDict

import numpy as np

from memdb.codecs import codec_of, memory_sizes
from memdb.memories import unfitted
from memdb.storage.record_layout import DOCUMENTS, MEMORIES, REFERENCES, TABLES, integer_key
from memdb.storage.store import Store
from memdb.storage.transaction import Transaction, decoded
from memdb.types.shape import MemoryShape

_SAMPLE = 200  # memories


class MemoryBytes(TypedDict, total=False):
    """Of up to 200 memories, spread over all; without fields where there are none.

    Attributes:
        stored: mean bytes of a memory as it is stored.
        exact: mean bytes of its vectors as the model computed them.
        compression: how many times smaller its vectors are as they are stored.
        codecs: how many each codec wrote.
    """

    stored: float
    exact: float
    compression: float
    codecs: dict[str, int]


class IndexStats(TypedDict, total=False):
    """The state of the index; where search is exact, `kind` and `keys` alone.

    Attributes:
        kind: `exact` or `ivf`.
        keys: metadata keys that are indexed for filters.
        building: whether one is being built in the background.
        failure: why the last building failed, if it did.
        references: how many it was built of.
        lists: into how many clusters.
        nprobe: how many of these are looked at.
        recall: as measured when it was built.
        changed: how many references came or went since.
        bytes: of its file.
    """

    kind: str
    keys: list[str]
    building: bool
    failure: dict[str, Any] | None
    references: int
    lists: int
    nprobe: int
    recall: float
    changed: int
    bytes: int


class Stats(TypedDict):
    """What `MemDB.stats` gives: a dictionary of JSON values.

    Attributes:
        path: the database's folder.
        id: drawn when it was made.
        documents, references, memories: how many there are.
        cold: references without a memory.
        changes: number of the newest change.
        bytes: on disk, by table; `file` is all of it.
        memory_bytes: how much memories are compressed.
        cache: of decoded memories: what it holds, hits and misses.
        index: its state.
        recoding: the state of a codec that takes over.
        keywords: the state of the index of words; None: nobody asked for one.
        unfitted: why the codec of new memories is not fitted, though there are enough; or None.
        shape: what all memories share, as JSON.
        model, embedder, memory: what the database records of them.
        calibration: how memories are best read, if that was measured.
        cutting: how documents are cut, and whether references have a place.
    """

    path: str
    id: str
    calibration: dict[str, Any] | None
    cutting: dict[str, Any]
    embedder: dict[str, Any]
    model: dict[str, Any]
    memory: dict[str, Any]
    documents: int
    references: int
    memories: int
    changes: int
    cold: int
    keywords: dict[str, Any] | None
    unfitted: dict[str, Any] | None
    bytes: dict[str, int]
    memory_bytes: MemoryBytes
    cache: dict[str, int]
    shape: dict[str, Any]
    index: IndexStats
    recoding: dict[str, Any]


def statistics(store: Store, shape: MemoryShape) -> dict[str, Any]:
    """Counts, bytes by table, and the compression of a sample of the memories."""
    with store.read() as transaction:
        counts = {
            "documents": transaction.count(DOCUMENTS),
            "references": transaction.count(REFERENCES),
            "memories": transaction.count(MEMORIES),
            "changes": transaction.last_change(),
        }
        sizes = {name: transaction.size(name) for name in TABLES}
        memory = _memory(transaction, shape)
        settings = transaction.required_setting("memory")
        why_unfitted = unfitted.reason(transaction, settings, shape)
        sizes["file"] = transaction.file_size()
    return {
        **counts,
        "cold": counts["references"] - counts["memories"],
        "bytes": sizes,
        "memory": settings,
        "memory_bytes": memory,
        "unfitted": why_unfitted,
    }


def _memory(transaction: Transaction, shape: MemoryShape) -> dict[str, Any]:
    """Of up to 200 memories, spread over all: means of the bytes as stored, and of the bytes of
    their vectors as the model computed them; the second over the bytes of the vectors as stored;
    and how many each codec wrote."""
    numbers = transaction.numbers(MEMORIES)
    if not len(numbers):
        return {}
    places = np.unique(np.linspace(0, len(numbers) - 1, _SAMPLE).astype(int))
    stored = vectors = exact = 0
    codecs: dict[str, int] = {}
    for number in numbers[places].tolist():
        key = integer_key(number)
        payload = transaction.payload(MEMORIES, key)
        pairs, coded = decoded(MEMORIES, key, (0, payload), lambda _, p: memory_sizes(p))
        codec = decoded(MEMORIES, key, (0, payload), lambda _, p: codec_of(p))
        codecs[codec] = codecs.get(codec, 0) + 1
        stored += len(payload)
        vectors += coded
        exact += 2 * pairs * shape.head_dim * shape.storage_dtype.itemsize
    return {
        "stored": round(stored / len(places), 1),
        "exact": round(exact / len(places), 1),
        "compression": round(exact / vectors, 3) if vectors else 1.0,
        "codecs": codecs,
    }
