"""What `MemDB.stats` counts."""

from __future__ import annotations

from typing import Any

import numpy as np

from memdb.codecs import codec_of, memory_sizes
from memdb.memories import unfitted
from memdb.storage.record_layout import DOCUMENTS, MEMORIES, REFERENCES, TABLES, integer_key
from memdb.storage.store import Store
from memdb.storage.transaction import Transaction, decoded
from memdb.types.shape import MemoryShape

_SAMPLE = 200  # memories


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
