"""A process that writes is killed at random moments, again and again, on one database: what was
acknowledged is there, nothing is half there, and the index finds what the store holds."""

from __future__ import annotations

import multiprocessing
import random
import signal
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import xxhash
from numpy.typing import NDArray

import memdb
from memdb import Batch, Document, MemDB, NotADatabaseError
from memdb.storage.store import Store
from tests.engine.helpers import (
    PAGE,
    TokenWriter,
    raw,
    same_memory,
    time_limit,
)

WORDS = sorted(set(PAGE.split()))
WRITER = TokenWriter()


class HashEmbedder:
    """A vector for each text, drawn from the text's hash: no two are equally near to anything."""

    name = "hash"
    fingerprint = "hash-8"
    dimension = 8

    def embed(self, texts: Sequence[str], *, query: bool = False) -> NDArray[np.float32]:
        seeds = [xxhash.xxh3_64_intdigest(text.encode()) for text in texts]
        rows = [np.random.default_rng(seed).standard_normal(8) for seed in seeds]
        vectors = np.array(rows, np.float32).reshape(-1, 8)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


EMBEDDER = HashEmbedder()


# --- what a database should hold ------------------------------------------------------------------


@dataclass(frozen=True)
class Doc:
    """What the model knows of a document. Warm: all of its references are, else none."""

    version: int
    text: str
    metadata: dict[str, Any]
    warm: bool


State = dict[str, Doc]
Operation = dict[str, Any]


def after(state: State, operation: Operation) -> State:
    """The state once an operation is done."""
    new = dict(state)
    match operation:
        case {"verb": "insert", "id": name, "text": text, "metadata": metadata, "cold": cold}:
            new[name] = Doc(1, text, metadata, not cold)
        case {"verb": "rewrite", "id": name, "text": text, "cold": cold}:
            new[name] = Doc(state[name].version + 1, text, state[name].metadata, not cold)
        case {"verb": "relabel", "id": name, "metadata": metadata}:
            new[name] = replace(state[name], version=state[name].version + 1, metadata=metadata)
        case {"verb": "delete", "ids": names}:
            for name in names:
                del new[name]
        case {"verb": "load", "documents": documents}:
            for document in documents:
                old = state.get(document["id"])
                new[document["id"]] = Doc(
                    1 if old is None else old.version + 1,
                    document["text"],
                    document["metadata"],
                    not document["cold"],
                )
        case {"verb": "warm", "id": name}:
            new[name] = replace(state[name], warm=True)
    return new


def do(database: MemDB, operation: Operation) -> None:
    """Do it."""
    match operation:
        case {"verb": "insert", "id": name, "text": text, "metadata": metadata, "cold": cold}:
            pieces = [piece.text.strip() for piece in database.split(text)]
            database.insert(
                text, id=name, metadata=metadata, cold=cold, embeddings=EMBEDDER.embed(pieces)
            )
        case {"verb": "rewrite", "id": name, "text": text, "cold": cold}:
            database.update(name, text=text, cold=cold)
        case {"verb": "relabel", "id": name, "metadata": metadata}:
            database.update(name, metadata=metadata)
        case {"verb": "delete", "ids": names}:
            database.delete(*names)
        case {"verb": "load", "documents": documents}:
            database.load([batch(database, documents)])
        case {"verb": "warm", "id": name}:
            database.warm([name])
        case {"verb": "search", "text": text}:
            database.query(text)
        case {"verb": "declare", "key": key}:
            database.declare_keys(key)
        case {"verb": "build"}:
            database.build_index()
        case {"verb": "compact"}:
            memdb.compact(database.path)
        case _:
            raise AssertionError(operation)


def batch(database: MemDB, documents: Sequence[Operation]) -> Batch:
    """Documents with what the parts compute for them."""
    texts, memories = [], []
    for document in documents:
        pieces = [piece.text.strip() for piece in database.split(document["text"])]
        texts += pieces
        memories += [None] * len(pieces) if document["cold"] else WRITER.write(pieces)
    return Batch(
        [Document(d["text"], d["id"], d["metadata"]) for d in documents],
        EMBEDDER.embed(texts),
        memories,
    )


class Plan:
    """Random operations, each of which is right after those before it."""

    SHARES: ClassVar = {
        "insert": 22,
        "rewrite": 16,
        "relabel": 12,
        "delete": 14,
        "load": 6,
        "warm": 6,
        "search": 6,
        "declare": 2,
        "build": 5,
        "compact": 5,
    }

    def __init__(self, state: State, seed: int) -> None:
        self.state = state
        self._random = random.Random(seed)

    def operations(self, count: int) -> list[Operation]:
        """The next ones."""
        found = []
        for _ in range(count):
            operation = self._next()
            self.state = after(self.state, operation)
            found.append(operation)
        return found

    def documents(self, count: int) -> list[Operation]:
        """Some new ones, and some new contents for those that are there, in any order."""
        names = {self._name() for _ in range(count)}
        names |= {self._known() for _ in range(count // 3) if self.state}
        return [{"id": name, **self._content()} for name in names]

    def _next(self) -> Operation:
        verb = self._random.choices(list(self.SHARES), list(self.SHARES.values()))[0]
        if len(self.state) > 110 and verb in ("insert", "load"):
            verb = "delete"
        if len(self.state) < 70 and verb == "delete":
            verb = "insert"
        match verb:
            case "insert":
                return {"verb": verb, "id": self._name(), **self._content()}
            case "rewrite":
                content = {"text": self._text(), "cold": self._cold()}
                return {"verb": verb, "id": self._known(), **content}
            case "relabel":
                return {"verb": verb, "id": self._known(), "metadata": self._metadata()}
            case "delete":
                return {"verb": verb, "ids": sorted({self._known() for _ in range(3)})}
            case "load":
                return {"verb": verb, "documents": self.documents(5)}
            case "warm":
                return {"verb": verb, "id": self._known()}
            case "search":
                return {"verb": verb, "text": self._text()}
            case "declare":
                return {"verb": verb, "key": self._random.choice(["kind", "serial", "year"])}
            case _:
                return {"verb": verb}

    def _name(self) -> str:
        return f"document-{self._random.randrange(10**9)}"

    def _known(self) -> str:
        return self._random.choice(sorted(self.state))

    def _content(self) -> Operation:
        return {"text": self._text(), "metadata": self._metadata(), "cold": self._cold()}

    def _text(self) -> str:
        """1 to 8 references: as many as `warm` writes the memories of in one transaction."""
        words = self._random.choices(WORDS, k=self._random.randrange(1, 30))
        return " ".join([str(self._random.randrange(10**9)), *words])

    def _metadata(self) -> dict[str, Any]:
        # The serial number makes it new content each time: the version grows.
        metadata = {"year": self._random.randrange(5), "serial": self._random.randrange(10**9)}
        if self._random.random() < 0.5:
            metadata["kind"] = self._random.choice(["fact", "rule"])
        return metadata

    def _cold(self) -> bool:
        return self._random.random() < 0.3


def check(path: Path, *possible: State) -> State:
    """The database is whole and in one of these states; returns in which."""
    assert memdb.verify(path) == []
    with MemDB.open(path, embedder=EMBEDDER) as database:
        state = {}
        for document in database.documents():
            assert document.warm in (0, len(document.references))
            state[document.id] = Doc(
                document.version, document.text, document.metadata, document.warm > 0
            )
        assert state in possible, differences(state, possible[0])
        check_search(database, state)
    return state


def differences(state: State, due: State) -> str:
    """What is not as it is due."""
    names = sorted(name for name in state.keys() | due.keys() if state.get(name) != due.get(name))
    return "\n".join(f"{name}: {state.get(name)}, due: {due.get(name)}" for name in names)


def check_search(database: MemDB, state: State) -> None:
    """The store holds each reference's vector and memory, and the index finds what exact search
    over the store's vectors finds."""
    numbers, texts, years, warm = [], [], [], []
    for document in database.documents():
        pieces = [piece.text.strip() for piece in database.split(document.text)]
        assert len(pieces) == len(document.references)
        numbers += document.references
        texts += pieces
        years += [document.metadata["year"]] * len(pieces)
        warm += [state[document.id].warm] * len(pieces)
    order = np.argsort(numbers)
    ids, vectors = stored_vectors(database.path)
    assert ids.tolist() == sorted(numbers)
    np.testing.assert_allclose(vectors, EMBEDDER.embed(texts)[order], atol=1e-6)

    assert database.stats()["index"]["kind"] == "ivf"
    at = {number: place for place, number in enumerate(numbers)}
    for query in EMBEDDER.embed(["one", "two", "three"]):
        scores = dict(zip(ids.tolist(), (vectors @ query).tolist(), strict=True))
        hits = database.retrieve(query, len(ids) + 10).hits
        found = [hit.id for hit in hits]
        assert sorted(found) == ids.tolist()
        np.testing.assert_allclose(
            [hit.score for hit in hits], [scores[number] for number in found], atol=2e-3
        )
        assert all(a.score >= b.score for a, b in pairwise(hits))
        # (Pieces of one text are equally near; an index file knows scores as float16.)
        for year in range(5):
            due = {number: scores[number] for number in ids.tolist() if years[at[number]] == year}
            for k in (5, len(ids)):
                found = [hit.id for hit in database.retrieve(query, k, where={"year": year}).hits]
                assert len(set(found)) == len(found)
                np.testing.assert_allclose(
                    [due[number] for number in found],
                    sorted(due.values(), reverse=True)[:k],
                    atol=2e-3,
                )
    for hit in database.retrieve(EMBEDDER.embed(["four"])[0], len(ids)).hits:
        place = at[hit.id]
        assert hit.reference.content == texts[place]
        assert (hit.memory is not None) == warm[place]
        if hit.memory is not None:
            assert same_memory(hit.memory, WRITER.write([texts[place]])[0])


def stored_vectors(path: Path) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Ids and vectors of all references, as the store holds them."""
    store = Store(path)
    try:
        with store.read() as transaction:
            ids, vectors = zip(*transaction.embeddings(), strict=True)
            return np.concatenate(ids), np.concatenate(vectors)
    finally:
        store.close()


# --- killing --------------------------------------------------------------------------------------


def write(tell: Connection, operations: Sequence[Operation], path: Path) -> None:
    """The child: does operations to one database."""
    tell.send("ready")
    with MemDB.open(path, embedder=EMBEDDER, writer=WRITER) as database:
        report(tell, operations, lambda operation: do(database, operation))


def care(tell: Connection, operations: Sequence[Operation]) -> None:
    """The child: calls functions of `memdb.care`."""
    tell.send("ready")
    options: dict[str, Any] = {"repair": {"embedder": lambda: EMBEDDER}}
    report(
        tell,
        operations,
        lambda o: getattr(memdb, o["verb"])(*o["paths"], **options.get(o["verb"], {})),
    )


def report(
    tell: Connection, operations: Sequence[Operation], run: Callable[[Operation], object]
) -> None:
    """Do operations one by one, saying what is about to be done, and what has been."""
    for operation in operations:
        tell.send(f"begin {operation['verb']}")
        run(operation)
        tell.send("done")
    tell.send("end")
    signal.pause()


#: Each child is a fresh interpreter, forked where nothing was opened yet: so it is ready at once.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([__name__])


def killed(
    child: Callable[..., None],
    operations: Sequence[Operation],
    target: str,
    delay: float,
    *arguments: object,
) -> tuple[int, int]:
    """How many operations a child began and how many it finished before it was killed.

    Args:
        child: `write` or `care`.
        operations: what it does.
        target: what it says when the time begins to run: `ready`, or `begin` with a verb.
        delay: seconds from then to the kill.
        arguments: of the child.
    """
    listen, tell = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=child, args=(tell, operations, *arguments))
    timer = threading.Timer(delay, process.kill)
    said: list[str] = []
    with time_limit(120), listen:
        process.start()
        tell.close()
        with suppress(EOFError):
            while True:
                said.append(listen.recv())
                if not timer.ident and said[-1] in (target, "end"):
                    timer.start()
        process.join()
    assert process.exitcode == -signal.SIGKILL
    begun = sum(word.startswith("begin") for word in said)
    done = said.count("done")
    assert begun - done in (0, 1)
    return begun, done


#: Where the kills are aimed at, and up to how many seconds later they come: about as long as each
#: takes. Every second one comes at any moment.
TARGETS = {
    "begin compact": 0.1,
    "begin build": 0.06,
    "begin rewrite": 0.004,
    "begin load": 0.008,
    "begin delete": 0.003,
    "begin insert": 0.004,
    "begin relabel": 0.003,
    "begin warm": 0.004,
}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, State]:
    """A database of some 80 documents with an index file, and its state. Not to be changed."""
    path = tmp_path_factory.mktemp("kills") / "db"
    documents = Plan({}, 0).documents(80)
    with MemDB.create(
        path, embedder=EMBEDDER, writer=WRITER, codec="exact", keys=["year"], index="ivf"
    ) as database:
        database.load([batch(database, documents)])
        database.build_index()
    state = after({}, {"verb": "load", "documents": documents})
    return path, check(path, state)


def kill_again_and_again(path: Path, state: State, seed: int, times: int) -> Counter[str]:
    """Kill so many children, one after the other, on one database, and check it after each.

    Returns:
        How many were killed in the midst of which operation.
    """
    chance = random.Random(seed)
    interrupted: Counter[str] = Counter()
    aims = list(TARGETS.items())
    for turn in range(times):
        operations = Plan(state, seed * 1000 + turn).operations(250)
        target, most = aims[turn // 2 % len(aims)] if turn % 2 else ("ready", 0.35)
        begun, done = killed(write, operations, target, chance.uniform(0, most), path)
        if begun > done:
            interrupted[operations[done]["verb"]] += 1
        *_, before = accumulate(operations[:done], after, initial=state)
        *_, then = accumulate(operations[done:begun], after, initial=before)
        state = check(path, before, then)
    memdb.compact(path)
    (generation,) = (entry for entry in path.iterdir() if entry.name.startswith("gen-"))
    left = {entry.name for entry in (*path.iterdir(), *generation.iterdir())}
    left -= {"usage", "write.lock", "index.lock", "codec.lock", "lock.mdb"}
    assert left == {"CURRENT", "LOCK", generation.name, "data.mdb", "index.faiss"}
    check(path, state)
    return interrupted


def copied(template: tuple[Path, State], to: Path) -> tuple[Path, State]:
    memdb.restore(template[0], to)
    return to, template[1]


def test_twenty_kills_cost_nothing_that_was_acknowledged(
    tmp_path: Path, template: tuple[Path, State]
) -> None:
    path, state = copied(template, tmp_path / "db")
    interrupted = kill_again_and_again(path, state, seed=1, times=20)
    assert interrupted.total() >= 5, interrupted


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 6))
def test_two_hundred_kills_cost_nothing_that_was_acknowledged(
    tmp_path: Path, template: tuple[Path, State], seed: int
) -> None:
    path, state = copied(template, tmp_path / "db")
    interrupted = kill_again_and_again(path, state, seed, times=50)
    assert interrupted["compact"], interrupted
    assert interrupted["build"], interrupted
    assert interrupted.total() - interrupted["compact"] - interrupted["build"] >= 5, interrupted


# --- backup, restore, repair ----------------------------------------------------------------------


def is_whole_or_none(path: Path, state: State) -> bool:
    """Whether there is a database in that state; else there is none at all."""
    try:
        MemDB.open(path).close()
    except NotADatabaseError:
        return False
    check(path, state)
    return True


@pytest.mark.parametrize("verb", ["backup", "restore"])
def test_a_killed_copy_is_whole_or_not_there(
    tmp_path: Path, template: tuple[Path, State], verb: str
) -> None:
    source, state = template
    for turn in range(6):
        targets = [tmp_path / f"{turn}-{n}" for n in range(60)]
        operations = [{"verb": verb, "paths": [str(source), str(to)]} for to in targets]
        delay = random.Random(turn).uniform(0, 0.15)
        begun, done = killed(care, operations, "ready", delay)
        for to in targets[max(0, done - 2) : done]:
            assert is_whole_or_none(to, state)
        for to in targets[done:begun]:
            if not is_whole_or_none(to, state):
                getattr(memdb, verb)(source, to)  # what is left of the first is in nobody's way
                check(to, state)
        check(source, state)


def test_a_killed_restore_leaves_the_old_content_or_the_new(
    tmp_path: Path, template: tuple[Path, State]
) -> None:
    sources = []
    for turn in range(2):
        path, state = copied(template, tmp_path / f"source-{turn}")
        plan = Plan(state, turn)
        with MemDB.open(path, embedder=EMBEDDER, writer=WRITER) as database:
            for operation in plan.operations(30):
                do(database, operation)
        sources.append((path, check(path, plan.state)))
    target, state = copied(template, tmp_path / "target")
    for turn in range(6):
        used = [sources[(turn + n) % 2] for n in range(20)]
        operations = [{"verb": "restore", "paths": [str(path), str(target)]} for path, _ in used]
        delay = random.Random(turn).uniform(0, 0.2)
        begun, done = killed(care, operations, "begin restore", delay)
        states = [state, *(state for _, state in used)]
        state = check(target, *states[done : begun + 1])


def test_a_killed_repair_is_done_by_the_next(tmp_path: Path, template: tuple[Path, State]) -> None:
    path, state = copied(template, tmp_path / "db")
    derived = ["memories", "postings"], ["documents", "embeddings", "memories"]
    for turn in range(6):
        damage(path, derived[turn % 2], seed=turn)
        assert memdb.verify(path) != []
        operations = [{"verb": "repair", "paths": [str(path)]}]
        killed(care, operations, "begin repair", random.Random(turn).uniform(0, 0.15))
        state = check_repair(path, state)


def test_a_repair_mends_documents_and_postings_that_are_damaged_at_once(
    tmp_path: Path, template: tuple[Path, State]
) -> None:
    path, state = copied(template, tmp_path / "db")
    damage(path, ["documents", "postings"], seed=1)
    check_repair(path, state)


def check_repair(path: Path, state: State) -> State:
    """A repair mends everything; returns the state when memories are there again."""
    mended = memdb.repair(path, embedder=lambda: EMBEDDER)
    assert (mended.left, mended.dropped) == ([], [])
    with MemDB.open(path, embedder=EMBEDDER, writer=WRITER) as database:
        database.warm()  # also those that a damaged memory made cold
        database.build_index()  # a kill may have come between the index's removal and its building
    return check(path, {name: replace(document, warm=True) for name, document in state.items()})


def damage(path: Path, tables: Sequence[str], seed: int) -> None:
    """Damage some records of each table, and the index file."""
    chance = random.Random(seed)
    with raw(path) as (environment, handles), environment.begin(write=True) as transaction:
        for table in tables:
            records = list(transaction.cursor(handles[table]))
            for key, record in chance.sample(records, min(5, len(records))):
                broken = bytearray(record)
                broken[chance.randrange(len(broken))] ^= 1 << chance.randrange(8)
                transaction.put(key, bytes(broken), db=handles[table])
    index = path / "gen-000001" / "index.faiss"
    index.write_bytes(index.read_bytes()[: chance.randrange(1000)])
