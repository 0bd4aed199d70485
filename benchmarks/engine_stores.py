"""memdb behind what benchmarks/engine.py asks of it, and the limit: raw LMDB, raw FAISS."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import faiss
import lmdb
import numpy as np
from engine_data import DIMENSION, SHAPE, Corpus, K, Records, Vectors, reference_number

from memdb import Batch, IndexInfo, MemDB, Progress

_MAP_SIZE = 1 << 40
_KEY = struct.Struct("@Q")  # LMDB's integer keys have the machine's byte order


class RawStore:
    """LMDB without anything around it: a naive loop of puts, a synced commit for each batch."""

    def __init__(self, folder: Path) -> None:
        self._environment = lmdb.open(str(folder), map_size=_MAP_SIZE, max_dbs=3)
        self._references, self._embeddings, self._memories = (
            self._environment.open_db(name, integerkey=True) for name in (b"r", b"e", b"m")
        )

    def put(self, batches: Iterable[Records], first: int) -> None:
        """Write the bytes of all records.

        Args:
            batches: each becomes a transaction.
            first: key of the corpus' record 0.
        """
        for records in batches:
            vectors = records.embeddings
            with self._environment.begin(write=True) as transaction:
                for row, payload in enumerate(records.payloads):
                    key = _KEY.pack(first + records.first + row)
                    text = f"{records.ids[row]}\0{records.texts[row]}".encode()
                    transaction.put(key, text, db=self._references)
                    transaction.put(key, vectors[row].tobytes(), db=self._embeddings)
                    transaction.put(key, payload, db=self._memories)

    def memories(self, keys: Sequence[int]) -> list[bytes]:
        with self._environment.begin() as transaction:
            return [transaction.get(_KEY.pack(key), db=self._memories) for key in keys]

    def close(self) -> None:
        self._environment.close()


class MemDBStore:
    """memdb: all that the benchmark calls of it."""

    def __init__(self, folder: Path, corpus: Corpus) -> None:
        self.folder = folder
        self._codec = corpus.codec
        self._db = MemDB.create(folder, shape=SHAPE, dimension=DIMENSION, codec=corpus.codec)
        self.index: IndexInfo | None = None

    def load(self, preloaded: Iterable[Records]) -> None:
        self._db.load(Batch(r.documents, r.embeddings, r.memories) for r in preloaded)

    def build_index(self, progress: Progress) -> None:
        self.index = self._db.build_index(progress=progress)

    def first_reference(self) -> int:
        """The id of the corpus' record 0; the others follow it."""
        return self._db.get("document-00000000").references[0]

    def reopen(self, cache_bytes: int) -> None:
        """Open it anew, with a cache of that size for decoded memories."""
        self.close()
        self._db = MemDB.open(self.folder, cache_bytes=cache_bytes)

    def payloads(self, query: Vectors) -> list[memoryview | None]:
        """Search, and the memories' stored bytes."""
        found = self._db.retrieve(query, K)
        return [None if hit.stored is None else hit.stored.payload for hit in found.hits]

    def memories(self, query: Vectors) -> list[Any]:
        """Search, and the memories decoded."""
        return [hit.memory for hit in self._db.retrieve(query, K).hits]

    def found(self, query: Vectors) -> list[int]:
        """Row numbers in the corpus of what is found."""
        hits = self._db.retrieve(query, K).hits
        return [reference_number(hit.reference.document_id) for hit in hits]

    def limit(
        self, raw: RawStore, vectors: Vectors, first: int
    ) -> Callable[[Vectors], list[bytes]]:
        """The same search by FAISS alone, and raw gets of the same bytes."""
        if self.index is None:
            flat = faiss.IndexFlatIP(DIMENSION)
            flat.add(np.ascontiguousarray(vectors))
            return lambda query: raw.memories(
                [first + row for row in flat.search(query[None], K)[1][0].tolist()]
            )
        path = next(self.folder.glob("*/index.faiss"))
        index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
        coarse = faiss.SearchParametersHNSW(efSearch=max(16, self.index.nprobe))
        parameters = faiss.SearchParametersIVF(nprobe=self.index.nprobe, quantizer_params=coarse)
        # FAISS knows rows: ids in their order, and the corpus' follow each other.
        return lambda query: raw.memories(
            [first + row for row in index.search(query[None], K, params=parameters)[1][0].tolist()]
        )

    def in_a_new_process(self, queries: Path, cold: bool) -> dict[str, float]:
        """What engine_open.py says of opening it.

        Args:
            queries: a file of query vectors.
            cold: with the files out of the system's cache.
        """
        self.close()
        if cold:
            drop_from_cache(self.folder)
        command = [sys.executable, str(Path(__file__).with_name("engine_open.py"))]
        began = time.perf_counter()  # the same clock in all processes
        result = subprocess.run(
            [*command, str(self.folder), str(queries), repr(began)],
            check=True,
            stdout=subprocess.PIPE,
        )
        self._db = MemDB.open(self.folder)
        figures: dict[str, float] = json.loads(result.stdout)
        return figures

    def close(self) -> None:
        self._db.close()


def drop_from_cache(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)  # what is not written yet stays
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def disk_bytes(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())
