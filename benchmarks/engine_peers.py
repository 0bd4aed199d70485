"""The engines that benchmarks/engine.py measures memdb against, each in a process of its own.

    python benchmarks/engine_peers.py PEER FOLDER CORPUS.json

inserts the corpus, builds the index, retrieves, and prints what it measured as JSON lines; a later
line adds to those before it, so that what was measured stays where the process is ended for taking
too long.
"""

from __future__ import annotations

import base64
import importlib
import importlib.util
import json
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from engine_data import DIMENSION, Corpus, K, Records, Vectors, nearest, reference_number

_ENOUGH = 0.95  # the fastest settings that reach this recall are the ones that count
_TUNED_WITH = 50  # queries
_FLAT_UP_TO = 20_000  # references that a search without index is tried with


class Peer(ABC):
    """One other engine.

    Attributes:
        title: what the table calls it.
        package: that has to be installed.
    """

    title: str
    package: str

    def __init__(self, folder: Path) -> None:
        self.module: Any = importlib.import_module(self.package)
        self.folder = folder

    @abstractmethod
    def prepare(self, preloaded: list[Records]) -> list[Any]:
        """Records in the form that `insert` takes, outside the clock."""

    @abstractmethod
    def insert(self, prepared: list[Any], deadline: float) -> int:
        """Write them, and return how many references were written before the deadline."""

    def build_index(self) -> bool:
        """Make searches fast; False where inserting has done so."""
        return False

    @abstractmethod
    def settings(self, references: int) -> dict[str, Callable[[Vectors], tuple[list[str], int]]]:
        """Ways to search by name: query -> ids, and bytes of their memories."""


class Lance(Peer):
    """LanceDB: the memory is a binary column."""

    title = "LanceDB"
    package = "lancedb"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._arrow: Any = importlib.import_module("pyarrow")
        self._database = self.module.connect(str(folder))
        self._table: Any = None
        self._indexed = False

    def prepare(self, preloaded: list[Records]) -> list[Any]:
        arrow = self._arrow
        return [
            arrow.record_batch(
                {
                    "id": arrow.array(records.ids),
                    "text": arrow.array(records.texts),
                    "vector": arrow.FixedSizeListArray.from_arrays(
                        arrow.array(records.embeddings.ravel()), DIMENSION
                    ),
                    "memory": arrow.array(records.payloads, arrow.binary()),
                }
            )
            for records in preloaded
        ]

    def insert(self, prepared: list[Any], deadline: float) -> int:
        reader = self._arrow.RecordBatchReader.from_batches(prepared[0].schema, prepared)
        if self._table is None:
            self._table = self._database.create_table("records", reader)
        else:
            self._table.add(reader)
        return sum(batch.num_rows for batch in prepared)

    def build_index(self) -> bool:
        index = importlib.import_module("lancedb.index")
        self._table.create_index("vector", config=index.HnswSq(distance_type="dot"))
        self._indexed = True
        return True

    def settings(self, references: int) -> dict[str, Callable[[Vectors], tuple[list[str], int]]]:
        found = {}
        if self._indexed:
            for ef in (None, 64, 128):
                for refine in (None, 2, 4):
                    name = "IVF_HNSW_SQ"
                    name += f", ef {ef}" if ef else ""
                    name += f", refine {refine}" if refine else ""
                    found[name] = self._search(ef, refine)
        if not self._indexed or references <= _FLAT_UP_TO:
            found["no index"] = self._search(None, None, flat=True)
        return found

    def _search(
        self, ef: int | None, refine: int | None, flat: bool = False
    ) -> Callable[[Vectors], tuple[list[str], int]]:
        def search(query: Vectors) -> tuple[list[str], int]:
            asked = self._table.search(query).distance_type("dot").limit(K)
            asked = asked.select(["id", "memory", "_distance"])
            if flat:
                asked = asked.bypass_vector_index()
            if ef is not None:
                asked = asked.ef(ef)
            if refine is not None:
                asked = asked.refine_factor(refine)
            table = asked.to_arrow()
            return table["id"].to_pylist(), sum(map(len, table["memory"].to_pylist()))

        return search


class Chroma(Peer):
    """Chroma: it has no binary values, so the memory is a base64 string among the metadata."""

    title = "Chroma, metadata"
    package = "chromadb"
    at_once = 1000

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        settings = importlib.import_module("chromadb.config").Settings(anonymized_telemetry=False)
        self._client = self.module.PersistentClient(str(folder), settings=settings)
        self._collection = self._client.create_collection(
            "records", embedding_function=None, configuration={"hnsw": {"space": "ip"}}
        )

    def prepare(self, preloaded: list[Records]) -> list[Any]:
        return [
            {
                "ids": records.ids[at : at + self.at_once],
                "embeddings": records.embeddings[at : at + self.at_once],
                **self.with_memories(
                    records.texts[at : at + self.at_once],
                    [
                        base64.b64encode(payload).decode()
                        for payload in records.payloads[at : at + self.at_once]
                    ],
                ),
            }
            for records in preloaded
            for at in range(0, len(records.ids), self.at_once)
        ]

    def with_memories(self, texts: list[str], memories: list[str]) -> dict[str, Any]:
        return {
            "metadatas": [
                {"text": text, "memory": memory}
                for text, memory in zip(texts, memories, strict=True)
            ]
        }

    def insert(self, prepared: list[Any], deadline: float) -> int:
        inserted = 0
        for batch in prepared:
            if time.perf_counter() > deadline:
                break
            self._collection.add(**batch)
            inserted += len(batch["ids"])
        return inserted

    def settings(self, references: int) -> dict[str, Callable[[Vectors], tuple[list[str], int]]]:
        return {"HNSW": self._search}

    def _search(self, query: Vectors) -> tuple[list[str], int]:
        found = self._collection.query(
            query_embeddings=query[None], n_results=K, include=[self.included, "distances"]
        )
        memories = [base64.b64decode(text) for text in self.memories_of(found)]
        return found["ids"][0], sum(map(len, memories))

    included = "metadatas"

    def memories_of(self, found: Any) -> list[str]:
        return [values["memory"] for values in found["metadatas"][0]]


class ChromaDocuments(Chroma):
    """Chroma again: the memory is a base64 document, which Chroma makes searchable as text."""

    title = "Chroma, documents"
    at_once = 100
    included = "documents"

    def with_memories(self, texts: list[str], memories: list[str]) -> dict[str, Any]:
        return {"documents": memories, "metadatas": [{"text": text} for text in texts]}

    def memories_of(self, found: Any) -> list[str]:
        return list(found["documents"][0])


PEERS: dict[str, type[Peer]] = {
    "lancedb": Lance,
    "chroma": Chroma,
    "chroma-documents": ChromaDocuments,
}


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@dataclass
class Measured:
    """Times of some queries, in ms, and the recall of what they found."""

    p50: float
    p99: float
    recall: float


def measure(
    search: Callable[[Vectors], tuple[list[str], int]],
    queries: Vectors,
    truth: Sequence[Sequence[int]],
) -> Measured:
    times, hits = [], 0
    for query, due in zip(queries, truth, strict=True):
        began = time.perf_counter()
        ids, _ = search(query)
        times.append(time.perf_counter() - began)
        hits += len(set(map(reference_number, ids)) & set(due))
    p50, p99 = np.percentile(times, [50, 99]) * 1e3
    return Measured(float(p50), float(p99), hits / sum(map(len, truth)))


def say(**values: object) -> None:
    print(json.dumps(values), flush=True)


def run(peer: Peer, corpus: Corpus, queries: Vectors, seconds: float) -> None:
    inserted, payload, spent = 0, 0, 0.0
    for preloaded in corpus.preloaded():
        prepared = peer.prepare(preloaded)
        due = sum(len(records.ids) for records in preloaded)
        size = sum(records.size for records in preloaded)
        del preloaded
        began = time.perf_counter()
        count = peer.insert(prepared, began + seconds - spent)
        spent += time.perf_counter() - began
        inserted += count
        payload += size * count // due
        say(references=inserted, insert_seconds=spent, payload=payload)
        if count < due or spent > seconds:
            break
    truth = nearest(corpus.vectors[:inserted], queries).tolist()
    tuning, tuning_truth = queries[:_TUNED_WITH], truth[:_TUNED_WITH]
    queries, truth = queries[_TUNED_WITH:], truth[_TUNED_WITH:]

    if isinstance(peer, Lance):  # in case that its index does not come to an end
        (name, search), *_ = peer.settings(inserted).items()
        few = measure(search, queries[:10], truth[:10])
        say(**vars(few), how=name)

    began = time.perf_counter()
    if peer.build_index():
        say(index_seconds=time.perf_counter() - began)

    tried = []
    for name, search in peer.settings(inserted).items():
        measure(search, tuning[:5], tuning_truth[:5])
        tried.append((measure(search, tuning, tuning_truth), name, search))
    good = [one for one in tried if one[0].recall >= _ENOUGH]
    _, name, search = (
        min(good, key=lambda one: one[0].p50) if good else max(tried, key=lambda one: one[0].recall)
    )
    measure(search, queries, truth)  # warm, as memdb is
    say(**vars(measure(search, queries, truth)), how=name)


def main() -> None:
    name, folder, run_file = sys.argv[1:]
    given = json.loads(Path(run_file).read_text())
    corpus = Corpus(**given["corpus"])
    queries = np.load(given["queries"])
    run(PEERS[name](Path(folder)), corpus, queries, given["seconds"])


if __name__ == "__main__":
    main()
