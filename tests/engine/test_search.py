"""What a search promises: recall under filters, for many hits, over copies, whatever ids there are;
and that a damaged index file is noticed where it is looked at."""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import threading
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import memdb
from memdb import Batch, Document, MemDB
from memdb.errors import CorruptRecordError
from memdb.filters.language import parse
from memdb.filters.matching import Matcher, matching
from memdb.index.ann import AnnIndex
from memdb.storage.store import Store
from memdb.storage.transaction import Transaction
from memdb.storage.usage import FILE as USAGE
from memdb.storage.usage import Usage, read_usage, write_usage
from tests.engine.helpers import make_shape

Vectors = NDArray[np.float32]

DIMENSION = 32
GROUPS, TOPICS = 5, 150
ALIKE = 2**-11  # scores that float16 cannot tell apart


def unit(vectors: NDArray[Any]) -> Vectors:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


class Points:
    """Vectors of 150 topics in 5 groups, and queries like them."""

    def __init__(self, seed: int = 0, spread: float = 0.6, dimension: int = DIMENSION) -> None:
        self._random = np.random.default_rng(seed)
        self._centres = self._random.standard_normal((TOPICS, dimension))
        self._spread = spread

    def draw(self, count: int) -> tuple[Vectors, NDArray[np.int64]]:
        """Vectors, and the group of each."""
        topics = self._random.integers(0, TOPICS, count)
        noise = self._random.standard_normal((count, self._centres.shape[1]))
        return unit(self._centres[topics] + self._spread * noise), topics % GROUPS


class Database:
    """A database beside the truth about it."""

    def __init__(self, path: Path, **settings: Any) -> None:
        self.db = MemDB.create(
            path,
            shape=make_shape(),
            dimension=DIMENSION,
            codec="exact",
            durability="off",
            index="ivf",
            **settings,
        )
        self.vectors = np.zeros((0, DIMENSION), np.float32)
        self.metadata: list[dict[str, Any]] = []
        self.there = np.zeros(0, np.bool_)

    def load(self, vectors: Vectors, metadata: list[dict[str, Any]]) -> None:
        first = len(self.vectors)
        documents = [Document("text", str(first + n), m) for n, m in enumerate(metadata)]
        self.db.load(
            Batch(documents[at : at + 1000], vectors[at : at + 1000])
            for at in range(0, len(vectors), 1000)
        )
        self.vectors = np.concatenate([self.vectors, vectors])
        self.there = np.concatenate([self.there, np.ones(len(vectors), np.bool_)])
        self.metadata += metadata

    def delete(self, rows: NDArray[np.int64]) -> None:
        self.db.delete(*map(str, rows.tolist()))
        self.there[rows] = False

    def recall(
        self,
        queries: Vectors,
        k: int,
        where: Callable[[int], dict[str, Any] | None],
        allowed: Callable[[int], NDArray[np.bool_]],
    ) -> float:
        """Share of the true k nearest that are found; each hit is checked."""
        found = due = 0
        for n, query in enumerate(queries):
            hits = self.db.retrieve_batch([query], k, where=where(n), memories=False)[0].hits
            rows = np.array([int(hit.reference.document_id) for hit in hits], np.int64)
            scores = self.vectors @ query
            mask = allowed(n) & self.there
            assert mask[rows].all()
            assert len(set(rows.tolist())) == len(rows) == min(k, mask.sum())
            assert [hit.score for hit in hits] == pytest.approx(scores[rows].tolist(), abs=1e-3)
            least = np.sort(scores[mask])[-len(rows)] if len(rows) else 0
            found += int((scores[rows] >= least - ALIKE).sum())
            due += len(rows)
        return found / due if due else 1.0


def own_groups_and_others(queries: NDArray[np.int64], rows: NDArray[np.int64]) -> dict[str, Any]:
    return {
        "the query's own group": (lambda n: int(queries[n]), lambda n: rows == queries[n]),
        "another group": (
            lambda n: int(queries[n] + 1) % GROUPS,
            lambda n: rows == (queries[n] + 1) % GROUPS,
        ),
    }


@pytest.mark.parametrize("keys", [["group", "share"], []], ids=["indexed", "not indexed"])
def test_filtered_recall_with_a_tail_with_deletions_and_after_a_rebuild(
    tmp_path: Path, keys: list[str]
) -> None:
    """Filters of 0.1 % to 100 %: random, of what is near the query, and of what is not."""
    random = np.random.default_rng(1)
    points = Points()
    base = Database(tmp_path / "db", keys=keys)
    groups = np.zeros(0, np.int64)
    shares = np.zeros(0, np.int64)

    def load(count: int) -> None:
        nonlocal groups, shares
        vectors, drawn = points.draw(count)
        share = random.integers(0, 1000, count)
        base.load(
            vectors,
            [{"group": g, "share": s} for g, s in zip(drawn.tolist(), share.tolist(), strict=True)],
        )
        groups, shares = np.concatenate([groups, drawn]), np.concatenate([shares, share])

    queries, asked = points.draw(50)

    def check(state: str) -> None:
        recalls = {}
        for per_mille in (1, 10, 100, 200, 500, 1000):
            recalls[f"{per_mille} per mille"] = base.recall(
                queries,
                5,
                lambda _, most=per_mille: {"share": {"$lt": most}},
                lambda _, most=per_mille: shares < most,
            )
        for most in (1000, 200):
            for name, (group, mask) in own_groups_and_others(asked, groups).items():
                where = {} if most == 1000 else {"share": {"$lt": most}}
                recalls[f"{name}, {most}"] = base.recall(
                    queries,
                    5,
                    lambda n, group=group, where=where: {"group": group(n), **where},
                    lambda n, mask=mask, most=most: mask(n) & (shares < most),
                )
        recalls["no filter"] = base.recall(
            queries, 5, lambda _: None, lambda _: np.ones(len(groups), np.bool_)
        )
        low = {name: recall for name, recall in recalls.items() if recall < 0.98}
        assert not low, (state, low)

    load(8_000)
    assert base.db.build_index() is not None
    check("built")
    load(600)
    nearest = np.unique(np.argsort(-(queries @ base.vectors.T), axis=1)[:, :5])
    base.delete(np.union1d(nearest, random.choice(8_000, 300, replace=False)))
    check("with a tail and deletions")
    assert base.db.build_index() is not None
    check("built again")
    base.db.close()


def test_a_filter_may_leave_nothing_of_the_index_file_or_of_the_tail(tmp_path: Path) -> None:
    base = Database(tmp_path / "db", keys=["part"])
    vectors, _ = Points().draw(3050)
    base.load(vectors[:3000], [{"part": 0}] * 3000)
    assert base.db.build_index() is not None
    base.load(vectors[3000:], [{"part": 1}] * 50)
    base.delete(np.arange(0, 3050, 7))
    parts = np.repeat([0, 1], [3000, 50])
    for k in (3, 60, 3050, 10_000):
        for part in (0, 1, 2):
            recall = base.recall(
                vectors[:5], k, lambda _, part=part: {"part": part}, lambda _, p=part: parts == p
            )
            assert recall == 1 if part else recall >= 0.98
    base.db.close()


@pytest.mark.parametrize(
    ("seed", "spread", "promised"), [(3, 0.6, 0.99), (5, 0.9, 0.9), (0, 0.6, 0.99), (0, 0.9, 0.9)]
)
def test_other_queries_than_those_that_chose_the_clusters_find_what_is_promised(
    tmp_path: Path, seed: int, spread: float, promised: float
) -> None:
    points = Points(seed, spread)
    (vectors, _), (queries, _) = points.draw(2500), points.draw(600)
    base = Database(tmp_path / "db", recall=promised)
    base.load(vectors, [{}] * len(vectors))
    info = base.db.build_index()
    assert info is not None
    assert info.nprobe < info.lists // 10  # else it were no art
    every = np.ones(len(vectors), np.bool_)
    assert base.recall(queries, 5, lambda _: None, lambda _: every) >= promised
    base.db.close()


def test_recall_for_many_hits(tmp_path: Path) -> None:
    points = Points(spread=1.0)
    base = Database(tmp_path / "db")
    vectors, _ = points.draw(8_000)
    base.load(vectors, [{}] * len(vectors))
    info = base.db.build_index()
    assert info is not None
    assert info.nprobe < info.lists / 3
    queries, _ = points.draw(300)
    every = np.ones(len(vectors), np.bool_)
    for k in (1, 5, 6, 20, 100, 1000):
        asked = queries if k <= 6 else queries[:40]  # one miss of few would say little
        assert base.recall(asked, k, lambda _: None, lambda _: every) >= 0.98, k
    base.db.close()


def test_few_clusters_are_looked_at_where_few_are_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a recall of 1 were no art."""
    points = Points()
    base = Database(tmp_path / "db", keys=["group"])
    vectors, groups = points.draw(8_000)
    base.load(vectors, [{"group": group} for group in groups.tolist()])
    info = base.db.build_index()
    assert info is not None
    looked: list[int] = []
    scan = AnnIndex.scan

    def counted(self: AnnIndex, query: Any, k: int, clusters: Any, allowed: Any) -> Any:
        looked.append(len(clusters))
        return scan(self, query, k, clusters, allowed)

    monkeypatch.setattr(AnnIndex, "scan", counted)
    queries, asked = points.draw(40)
    for query, group in zip(queries, asked.tolist(), strict=True):
        base.db.retrieve_batch([query], 5, where={"group": group}, memories=False)
        base.db.retrieve_batch([query], 50, memories=False)
    assert looked
    assert sum(looked) / (2 * len(queries)) < info.lists / 4
    base.db.close()


@pytest.mark.parametrize("noise", [0, 1e-4])
def test_copies_do_not_disable_the_index(tmp_path: Path, noise: float) -> None:
    random = np.random.default_rng(2)
    points = Points(spread=0.8)
    vectors, _ = points.draw(1000)
    queries, _ = points.draw(300)
    infos = {}
    for name, copies in (("distinct", 1), ("copies", 8)):
        base = Database(tmp_path / name)
        every = vectors if copies > 1 else np.concatenate([vectors, points.draw(6_500)[0]])
        every = np.repeat(every, copies, axis=0)
        every = unit(every + noise * random.standard_normal(every.shape))
        base.load(every, [{}] * len(every))
        info = infos[name] = base.db.build_index()
        assert info is not None
        mask = np.ones(len(every), np.bool_)
        for k in (5, 50):
            assert base.recall(queries, k, lambda _: None, lambda _, m=mask: m) >= 0.98, name
        base.db.close()
    assert infos["copies"].nprobe <= max(2 * infos["distinct"].nprobe, infos["copies"].lists // 20)


def test_one_text_many_thousand_times_has_an_index(tmp_path: Path) -> None:
    base = Database(tmp_path / "db")
    vectors = np.repeat(
        unit(np.random.default_rng(0).standard_normal((2, DIMENSION))), 1500, axis=0
    )
    base.load(vectors, [{}] * len(vectors))
    info = base.db.build_index()
    assert info is not None
    assert info.nprobe < info.lists
    hits = base.db.retrieve(vectors[0], 5).hits
    assert [hit.score for hit in hits] == pytest.approx([1] * 5, abs=1e-3)
    base.db.close()


def test_a_search_needs_no_room_for_ids_that_are_not_there(tmp_path: Path) -> None:
    """Ids are never given again: after years the highest may be far above the number there are."""
    points = Points()
    base = Database(tmp_path / "db", keys=["group"])
    first, groups = points.draw(3000)
    base.load(first, [{"group": group} for group in groups.tolist()])
    base.db.close()
    store = Store(tmp_path / "db")
    with store.write() as transaction:
        counters = transaction.required_setting("counters")
        transaction.put_setting("counters", {**counters, "next_reference": 4 * 10**8})
    store.close()
    base.db = MemDB.open(tmp_path / "db")
    second, more = points.draw(3000)
    base.load(second, [{"group": group} for group in more.tolist()])
    groups = np.concatenate([groups, more])
    assert base.db.build_index() is not None
    base.delete(np.arange(0, 6000, 50))
    queries, asked = points.draw(20)
    base.db.retrieve_batch([queries[0]], 5, memories=False)
    tracemalloc.start()
    try:
        for name, (group, mask) in own_groups_and_others(asked, groups).items():
            assert (
                base.recall(
                    queries, 5, lambda n, group=group: {"group": group(n)}, lambda n, m=mask: m(n)
                )
                >= 0.98
            ), name
        every = np.ones(6000, np.bool_)
        assert base.recall(queries, 5, lambda _: None, lambda _: every) >= 0.98
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()
    base.db.close()


# --- a damaged index file -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "db"
    base = Database(path)
    vectors, _ = Points().draw(4000)
    base.load(vectors, [{}] * len(vectors))
    assert base.db.build_index() is not None
    base.db.close()
    return path


@pytest.fixture
def indexed(tmp_path: Path, template: Path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "db"))


def index_file(path: Path) -> Path:
    return path / "gen-000001" / "index.faiss"


def test_a_damaged_cluster_is_noticed_when_it_is_looked_at(indexed: Path) -> None:
    vectors, _ = Points().draw(4000)
    file = index_file(indexed)
    whole = file.read_bytes()
    queries = vectors[::40]
    truth = np.sort(queries @ vectors.T, axis=1)[:, -5:]
    content = whole.find(vectors[0].astype("<f2").tobytes())
    assert content > 0
    file.write_bytes(whole[:content] + b"\xff\x7b" + whole[content + 2 :])  # a very large number
    AnnIndex(file)  # what opening reads is sound
    with pytest.raises(CorruptRecordError):
        AnnIndex(file).check()
    with MemDB.open(indexed) as database:
        assert database.stats()["index"]["kind"] == "ivf"
        for query, due in zip(queries, truth, strict=True):
            hits = database.retrieve_batch([query], 5, memories=False)[0].hits
            assert [hit.score for hit in hits] == pytest.approx(due[::-1].tolist(), abs=1e-3)
        assert database.stats()["index"]["kind"] == "exact"
        # Its place is taken by a new one.
        assert database.build_index() is not None
        hits = database.retrieve_batch([queries[0]], 5, memories=False)[0].hits
        assert [hit.score for hit in hits] == pytest.approx(truth[0][::-1].tolist(), abs=1e-3)
        assert database.stats()["index"]["kind"] == "ivf"
    assert memdb.verify(indexed) == []


def test_the_last_clusters_are_looked_at_together(indexed: Path) -> None:
    """A query would pay for each later one with a look whether it was checked."""
    vectors, _ = Points().draw(4000)
    file = index_file(indexed)
    whole = file.read_bytes()
    index = AnnIndex(file)
    damaged = int(index._clusters[0])
    content = whole.find(vectors[0].astype("<f2").tobytes())
    file.write_bytes(whole[:content] + b"\xff\x7b" + whole[content + 2 :])
    clusters = [cluster for cluster in range(index.info.lists) if cluster != damaged]
    index = AnnIndex(file)
    few = index.info.nprobe
    for cluster in clusters[:-few]:
        index.scan(vectors[:1], 5, np.array([cluster]), None)
    with pytest.raises(CorruptRecordError, match=f"cluster {damaged} "):
        index.scan(vectors[:1], 5, np.array([clusters[-few]]), None)
    assert index.damaged


def test_verify_looks_at_all_clusters(indexed: Path) -> None:
    assert memdb.verify(indexed) == []
    file = index_file(indexed)
    whole = file.read_bytes()
    at = len(whole) // 2
    file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    assert [problem.table for problem in memdb.verify(indexed)] == ["index"]


def test_opening_and_stats_do_not_read_the_clusters(
    indexed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[int] = []
    check = AnnIndex._check

    def counted(self: AnnIndex, clusters: Any) -> None:
        before = self._unchecked.sum()
        check(self, clusters)
        checked.append(int(before - self._unchecked.sum()))

    monkeypatch.setattr(AnnIndex, "_check", counted)
    with MemDB.open(indexed) as database:
        info = database.stats()["index"]
        assert checked == []
        query = Points().draw(1)[0][0]
        for _ in range(3):
            database.retrieve_batch([query], 5, memories=False)
        assert sum(checked) == info["nprobe"]  # each once
        database.stats()
        assert sum(checked) == info["nprobe"]


def test_an_index_file_of_the_release_before_is_no_damage(indexed: Path) -> None:
    file = index_file(indexed)
    whole = file.read_bytes()
    file.write_bytes(whole[:-8] + b"memdbidx")
    assert memdb.verify(indexed) == []
    with MemDB.open(indexed) as database:
        assert database.stats()["index"]["kind"] == "exact"
        vectors, _ = Points().draw(4000)
        hits = database.retrieve_batch([vectors[7]], 1, memories=False)[0].hits
        assert hits[0].score == pytest.approx(1, abs=1e-6)
        assert database.build_index() is not None
        assert database.stats()["index"]["kind"] == "ivf"


# --- filters without an index ---------------------------------------------------------------------


def test_after_a_write_only_what_was_written_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = Database(tmp_path / "db")
    vectors, groups = Points().draw(500)
    base.load(vectors, [{"group": group} for group in groups.tolist()])
    read: list[str] = []
    metadata = Transaction.metadata

    def counted(self: Transaction, name: str, version: int | None = None) -> dict[str, Any]:
        read.append(name)
        return metadata(self, name, version)

    monkeypatch.setattr(Transaction, "metadata", counted)

    def found(group: int) -> set[str]:
        hits = base.db.retrieve_batch([vectors[0]], 1000, where={"group": group})[0].hits
        return {hit.reference.document_id for hit in hits}

    due = {str(n) for n in np.flatnonzero(groups == 1)}
    assert found(1) == due
    assert len(read) == 500
    read.clear()
    base.db.insert("new", id="new", metadata={"group": 1}, embeddings=vectors[:1])
    read.clear()
    assert found(1) == due | {"new"}
    assert read == ["new"]
    base.db.update("new", metadata={"group": 2})
    read.clear()
    assert found(1) == due
    assert read == ["new"]
    base.db.delete(min(due))
    read.clear()
    assert found(1) == due - {min(due)}
    assert read == []
    base.db.close()


def test_a_filter_means_the_same_with_and_without_what_it_meant_before(tmp_path: Path) -> None:
    """Whatever was written meanwhile, and a compaction between."""
    random = np.random.default_rng(3)
    path = tmp_path / "db"
    MemDB.create(
        path, shape=make_shape(), dimension=2, codec="exact", durability="off", keys=["known"]
    ).close()
    filters = [
        parse(where)
        for where in (
            {"a": 1},
            {"a": {"$gte": 1}},
            {"known": 1, "a": 0},
            {"known": {"$gte": 0}, "a": {"$in": [0, 2]}},
            {},
        )
    ]
    vector = np.ones((1, 2), np.float32)
    matcher = Matcher()
    with MemDB.open(path) as database:
        store = database._store
        for step in range(120):
            for _ in range(int(random.integers(1, 5))):
                name = f"d{random.integers(0, 40)}"
                there = name in {document.id for document in database.documents()}
                metadata = {"a": int(random.integers(0, 3)), "known": int(random.integers(0, 2))}
                if there and random.random() < 0.4:
                    database.delete(name)
                elif there:
                    database.update(name, metadata=metadata)
                else:
                    database.insert("text", id=name, metadata=metadata, embeddings=vector)
            if step == 60:
                memdb.compact(path)
            with store.read() as transaction:
                for where in filters[:: 1 if step % 3 else 2]:
                    due = sorted(
                        reference
                        for name, entry in transaction.documents()
                        if where.matches(transaction.metadata(name))
                        for reference in entry.references
                    )
                    assert matcher(transaction, where).tolist() == due
                    assert matching(transaction, where).tolist() == due


# --- counts of use --------------------------------------------------------------------------------


def test_counting_does_not_wait_for_the_file(tmp_path: Path) -> None:
    usage = Usage()
    write_usage(tmp_path, Counter({1: 5, 7: 1}))
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    many = [7] * 60_000 + [2] * 60_000
    counting = threading.Thread(target=usage.count, args=(many, tmp_path), daemon=True)
    counting.start()
    counting.join(30)
    assert not counting.is_alive()
    usage.count([9], tmp_path)
    assert read_usage(tmp_path) == {1: 5, 7: 1}
    os.close(handle)
    usage.flush(tmp_path)
    assert read_usage(tmp_path) == {1: 5, 2: 60_000, 7: 60_001, 9: 1}
    assert usage.counts(tmp_path) == {1: 5, 2: 60_000, 7: 60_001, 9: 1}


def test_counts_are_added_to_those_in_the_file(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    due: Counter[int] = Counter()
    usage = Usage()
    for _ in range(30):
        used = random.integers(-3, 60, int(random.integers(0, 40))).tolist()
        usage.count(used, tmp_path)
        due.update(used)
        if random.random() < 0.7:
            usage.flush(tmp_path)
        assert usage.counts(tmp_path) == due
    usage.flush(tmp_path)
    content = (tmp_path / USAGE).read_bytes()
    entries = list(struct.iter_unpack("<qQ", content[16:]))
    assert entries == sorted(due.items())


def test_a_count_stays_at_the_most_that_it_can_be(tmp_path: Path) -> None:
    write_usage(tmp_path, Counter({3: 2**64 - 2}))
    usage = Usage()
    usage.count([3, 3, 3, 4], tmp_path)
    usage.flush(tmp_path)
    assert read_usage(tmp_path) == {3: 2**64 - 1, 4: 1}
