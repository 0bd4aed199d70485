"""The measurements of benchmarks/engine.py at one size."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import engine_filtered
import engine_hybrid
import engine_peers
import faiss
import numpy as np
from engine_data import Corpus, Vectors, embeddings, nearest
from engine_filtered import FilteredRow
from engine_hybrid import ModeRow, Texts
from engine_stores import MemDBStore, RawStore, disk_bytes

from cli.progress import progress_bar
from memdb import MissingPartError, Progress

_INDEX_SECONDS = 3600  # a peer's index that takes longer is given up
_CACHE = 8 << 30  # holds every memory that the queries find

MEMDB, LIMIT, LANCE = "memdb", "limit: FAISS, raw LMDB", engine_peers.Lance.title
CHROMAS = (engine_peers.Chroma.title, engine_peers.ChromaDocuments.title)


@dataclass
class Row:
    """What one engine did. Times of retrieving in ms; None: not measured."""

    references: int
    insert_seconds: float | None = None
    index_seconds: float | None = None
    p50: float | None = None
    p99: float | None = None
    recall: float | None = None
    disk: float | None = None  # bytes on disk over bytes of payload
    how: str = ""

    @property
    def rate(self) -> float | None:
        """References inserted in a second."""
        return self.references / self.insert_seconds if self.insert_seconds else None


@dataclass
class Size:
    """What was measured at one size."""

    title: str
    references: int
    rows: dict[str, Row] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    opened: dict[str, float] = field(default_factory=dict)
    opened_cold: dict[str, float] = field(default_factory=dict)
    filtered: list[FilteredRow] = field(default_factory=list)
    modes: list[ModeRow] = field(default_factory=list)

    def figures(self) -> dict[str, float]:
        """The figures of `--json`; those of peers that are not installed are left out."""
        memdb, limit = self.rows[MEMDB], self.rows[LIMIT]
        chromas = [self.rows[name] for name in CHROMAS if name in self.rows]
        chroma = max(chromas, key=lambda row: (row.references, -(row.p50 or 0)), default=None)
        found = {
            "references": float(self.references),
            "retrieve_p50_over_limit": _ratio(memdb.p50, limit.p50),
            "retrieve_p50_lancedb_over_memdb": _ratio(_p50(self.rows.get(LANCE)), memdb.p50),
            "retrieve_p50_chroma_over_memdb": _ratio(_p50(chroma), memdb.p50),
            "bulk_insert_over_lmdb": _ratio(memdb.rate, limit.rate),
            "recall_at_5": memdb.recall,
            "open_seconds": self.opened["open"],
            "resident_gib": self.opened["anonymous_gib"],
        }
        for row in self.filtered:
            found[f"filtered_{row.kind}_{row.share}_recall_at_5"] = row.recall
            found[f"filtered_{row.kind}_{row.share}_p50_ms"] = row.p50
        for mode in self.modes:
            found[f"{mode.mode}_search_recall_at_5"] = mode.recall
            found[f"{mode.mode}_search_p50_ms"] = mode.p50
        return {name: round(value, 4) for name, value in found.items() if value is not None}


def _p50(row: Row | None) -> float | None:
    return row.p50 if row else None


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above and below else None


@dataclass
class Bench:
    """One run of the program.

    Attributes:
        folder: databases are made and removed in it.
        queries: how many are timed.
        peers: names in `engine_peers.PEERS`.
        chroma_seconds: that Chroma may take to insert.
        filtered_queries: how many are timed under each filter, and in each mode.
    """

    folder: Path
    queries: int
    peers: list[str]
    chroma_seconds: float
    filtered_queries: int
    _stopped: dict[str, Row] = field(default_factory=dict)

    def measure(self, title: str, references: int, pairs: int, codec: str) -> Size:
        size = Size(title, references)
        place = self.folder / f"{references}-{codec}"
        place.mkdir()
        try:
            with progress_bar() as progress:
                progress("making data", 0, 1)
                vectors, queries = embeddings(references, self.queries)
                np.save(place / "embeddings.npy", vectors)
                np.save(place / "queries.npy", queries)
                corpus = Corpus(references, pairs, codec, str(place / "embeddings.npy"))
                progress("making data", 1, 1)
                self._memdb(size, corpus, vectors, queries, place, progress)
                self._searches(size, vectors, queries, place, progress)
                del vectors
                for name in self.peers:
                    self._peer(name, size, corpus, place, progress)
        finally:
            shutil.rmtree(place)
        return size

    # --- memdb and the limit ----------------------------------------------------------------------

    def _memdb(
        self,
        size: Size,
        corpus: Corpus,
        vectors: Vectors,
        queries: Vectors,
        place: Path,
        progress: Progress,
    ) -> None:
        raw_folder, folder = place / "raw", place / "memdb"
        raw, store = RawStore(raw_folder), MemDBStore(folder, corpus)
        memdb, limit = Row(corpus.references), Row(corpus.references)
        memdb.insert_seconds = limit.insert_seconds = 0.0
        payload, first = 0, None
        for preloaded in corpus.preloaded():
            began = time.perf_counter()
            store.load(preloaded)
            memdb.insert_seconds += time.perf_counter() - began
            first = store.first_reference() if first is None else first
            began = time.perf_counter()
            raw.put(preloaded, first)
            limit.insert_seconds += time.perf_counter() - began
            payload += sum(records.size for records in preloaded)
            done = preloaded[-1].first + len(preloaded[-1].ids)
            progress("memdb and raw LMDB: inserting", done, corpus.references)
        assert first is not None
        began = time.perf_counter()
        store.build_index(progress)
        memdb.index_seconds = time.perf_counter() - began
        memdb.disk = disk_bytes(folder) / payload
        limit.disk = disk_bytes(raw_folder) / payload
        if store.index is None:
            memdb.how = "exact search"
        else:
            memdb.how = f"IVF, {store.index.lists} lists, nprobe {store.index.nprobe}"

        progress("memdb: opening", 0, 2)
        size.opened_cold = store.in_a_new_process(place / "queries.npy", cold=True)
        progress("memdb: opening", 1, 2)
        size.opened = store.in_a_new_process(place / "queries.npy", cold=False)
        progress("memdb: opening", 2, 2)

        threads = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(1)
        alone = store.limit(raw, vectors, first)
        store.reopen(cache_bytes=0)
        _require_same(store, alone, queries[:20])
        _time_in_turns(store.payloads, memdb, alone, limit, queries, progress)
        decoded, cached = Row(corpus.references), Row(corpus.references)
        decoded.p50, decoded.p99 = _percentiles(_times(store.memories, queries))
        store.reopen(cache_bytes=_CACHE)
        _times(store.memories, queries)
        cached.p50, cached.p99 = _percentiles(_times(store.memories, queries))
        decoded.how, cached.how = "no cache", "all from the cache"
        found = [store.found(query) for query in queries]
        store.close()
        raw.close()
        faiss.omp_set_num_threads(threads)

        progress("exact search, for recall", 0, 1)
        memdb.recall = limit.recall = _recall(found, nearest(vectors, queries).tolist())
        progress("exact search, for recall", 1, 1)
        size.rows |= {
            LIMIT: limit,
            MEMDB: memdb,
            "memdb, memories decoded": decoded,
            "memdb, decoded, cached": cached,
        }
        shutil.rmtree(raw_folder)
        shutil.rmtree(folder)

    def _searches(
        self, size: Size, vectors: Vectors, queries: Vectors, place: Path, progress: Progress
    ) -> None:
        """Searches that the limit has none of: with filters, and by words."""
        texts = Texts(vectors, self.filtered_queries)
        with engine_filtered.database(vectors, texts, place / "filtered", progress) as db:
            some = queries[: self.filtered_queries]
            size.filtered = engine_filtered.measure(db, vectors, some, progress)
            try:
                size.modes = engine_hybrid.measure(db, texts, progress)
            except MissingPartError as error:
                size.notes.append(f"search by words was not measured: {error}")

    # --- the peers --------------------------------------------------------------------------------

    def _peer(self, name: str, size: Size, corpus: Corpus, place: Path, progress: Progress) -> None:
        title = engine_peers.PEERS[name].title
        if name in self._stopped:
            size.rows[title] = self._stopped[name]
            return
        seconds = self.chroma_seconds if name.startswith("chroma") else _INDEX_SECONDS
        run = {"corpus": asdict(corpus), "queries": str(place / "queries.npy"), "seconds": seconds}
        folder, run_file = place / name, place / f"{name}.json"
        run_file.write_text(json.dumps(run))
        command = [sys.executable, engine_peers.__file__, name, str(folder), str(run_file)]
        values: dict[str, Any] = {}
        with tempfile.TemporaryFile("w+") as errors:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
            timer = threading.Timer(seconds + _INDEX_SECONDS, process.kill)
            timer.start()
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    values |= json.loads(line)
                    progress(f"{title}: inserting", values["references"], corpus.references)
            finally:
                timer.cancel()
                process.kill()
                process.wait()
            if process.returncode:
                errors.seek(0)
                last = (errors.read().strip().splitlines() or ["no message"])[-1]
                values["how"] = f"{values.get('how', '')} (then ended: {last[:60]})"
        if "references" not in values:
            size.notes.append(f"{title}: {values['how']}")
            return
        payload = values.pop("payload")
        row = size.rows[title] = Row(**values, disk=disk_bytes(folder) / payload)
        if row.references < corpus.references:
            self._stopped[name] = row
        shutil.rmtree(folder)


def _times(search: Callable[[Vectors], object], queries: Vectors) -> list[float]:
    times = []
    for query in queries:
        began = time.perf_counter()
        search(query)
        times.append(time.perf_counter() - began)
    return times


def _time_in_turns(
    one: Callable[[Vectors], object],
    one_row: Row,
    other: Callable[[Vectors], object],
    other_row: Row,
    queries: Vectors,
    progress: Progress,
) -> None:
    """Both are timed on all queries, in turns, never the same query one after the other: the
    second would find its data in the processor's cache."""
    shifted = np.roll(queries, len(queries) // 2, axis=0)
    for query in queries:
        one(query)
        other(query)
    ones: list[float] = []
    others: list[float] = []
    for number in range(len(queries)):
        first = [(one, queries[number], ones), (other, shifted[number], others)]
        for search, query, times in first if number % 2 else reversed(first):
            times += _times(search, query[None])
        if number % 100 == 99:
            progress("memdb and the limit: retrieving", number + 1, len(queries))
    one_row.p50, one_row.p99 = _percentiles(ones)
    other_row.p50, other_row.p99 = _percentiles(others)


def _percentiles(times: list[float]) -> tuple[float, float]:
    p50, p99 = np.percentile(times, [50, 99]) * 1e3
    return float(p50), float(p99)


def _recall(found: list[list[int]], truth: list[list[int]]) -> float:
    hits = sum(len(set(a) & set(b)) for a, b in zip(found, truth, strict=True))
    return hits / sum(map(len, truth))


def _require_same(
    store: MemDBStore, alone: Callable[[Vectors], list[bytes]], queries: Vectors
) -> None:
    """The limit must be the limit of the same work."""
    pairs = [(store.payloads(query), alone(query)) for query in queries]
    same = sum(len(set(a) & set(b)) for a, b in pairs)
    due = sum(len(b) for _, b in pairs)
    if same < 0.98 * due:
        raise RuntimeError(
            f"memdb and the limit do not read the same bytes: {same} of {due} memories agree"
        )
