"""Power cuts: what was acknowledged is there, as far as the durability promises, and nothing that
is derived (the index file, a new generation) is believed for a state that it was not derived from.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import xxhash
from numpy.typing import NDArray

import memdb
from memdb import Document, DocumentBatch, MemDB
from memdb.index.ann import FILE, AnnIndex, Built, write_index
from tests.engine.helpers import child, make_shape
from tests.engine.power import Event, cuts, put, recording
from tests.storage_format.databases import described, description

DIMENSION = 8
_NEAR = 2e-3  # of a score of float16 numbers


def vectors_of(texts: Sequence[str]) -> NDArray[np.float32]:
    """A vector for each text, drawn from the text's hash."""
    seeds = [xxhash.xxh3_64_intdigest(text.encode()) for text in texts]
    rows = [np.random.default_rng(seed).standard_normal(DIMENSION) for seed in seeds]
    vectors = np.array(rows, np.float32).reshape(-1, DIMENSION)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A closed database of 70 documents, without an index file."""
    path = tmp_path_factory.mktemp("power") / "template"
    texts = [f"text {n}" for n in range(70)]
    with MemDB.create(path, shape=make_shape(), dimension=DIMENSION, index="ivf") as database:
        documents = [Document(text, text.replace("text", "doc")) for text in texts]
        database.load([DocumentBatch(documents, vectors_of(texts))])
    return path


State = dict[str, str]  # texts by id


def state_of(path: Path) -> State:
    with MemDB.open(path) as database:
        return {document.id: document.text for document in database.documents()}


def require_right_hits(path: Path, state: State, others: Sequence[str]) -> None:
    """Each text is found by its own vector, and what any vector finds has the score that is due."""
    texts = [*state.values(), *others]
    queries = vectors_of(texts)
    with MemDB.open(path) as database:
        found = database.retrieve_batch(list(queries), 3, memories=False)
    for text, query, one in zip(texts, queries, found, strict=True):
        near = [hit.reference.text for hit in one.hits]
        assert (
            state.items()
            >= {hit.reference.document_id: hit.reference.text for hit in one.hits}.items()
        )
        np.testing.assert_allclose(
            [hit.score for hit in one.hits], vectors_of(near) @ query, atol=_NEAR
        )
        if text not in others:
            assert near[0] == text


def insert(text: str) -> Callable[[MemDB], Any]:
    name = text.replace("text", "doc")
    return lambda database: database.insert(text, id=name, embeddings=vectors_of([text]))


def update(name: str, text: str) -> Callable[[MemDB], Any]:
    return lambda database: database.update(name, text=text, embeddings=vectors_of([text]))


BUILD: Callable[[MemDB], Any] = lambda database: database.build_index()  # noqa: E731
COMPACT: Callable[[MemDB], Any] = lambda database: memdb.compact(database.path)  # noqa: E731
STEPS: list[Callable[[MemDB], Any]] = [
    insert("text a"),
    BUILD,
    insert("text b"),
    update("doc 3", "text c"),
    BUILD,
    lambda database: database.delete("doc 4", "doc a"),
    BUILD,
    insert("text d"),
]
AROUND_A_COMPACTION: list[Callable[[MemDB], Any]] = [
    insert("text a"),
    insert("text b"),
    COMPACT,
    insert("text c"),
    BUILD,
    lambda database: database.delete("doc 3"),
]
LOST = [f"text {letter}" for letter in "abcd"]


def run(
    path: Path, steps: list[Callable[[MemDB], Any]], durability: Any
) -> tuple[list[Event], list[tuple[int, State]]]:
    """What was written, and the states: each with how many events there were when it was
    acknowledged."""
    states = [(0, state_of(path))]
    with recording(path) as recorder, MemDB.open(path, durability=durability) as database:
        states = [(len(recorder.events), states[0][1])]
        for step in steps:
            step(database)
            state = {document.id: document.text for document in database.documents()}
            if state != states[-1][1]:
                states.append((len(recorder.events), state))
    return recorder.events, states


def check(path: Path, allowed: list[State]) -> None:
    """It opens, is in one of these states, and goes on right: the next writer gives the numbers
    that are lost again."""
    assert memdb.verify(path) == []
    state = state_of(path)
    assert state in allowed
    require_right_hits(path, state, LOST)
    with MemDB.open(path, durability="off") as database:
        for n in range(5):
            insert(f"text after {n}")(database)
            state[f"doc after {n}"] = f"text after {n}"
        database.delete("doc 9")
        del state["doc 9"]
    require_right_hits(path, state, LOST)
    assert memdb.verify(path) == []


@dataclass(frozen=True)
class Cut:
    """What one power cut left."""

    acknowledged: int  # number of the last state that was
    files: dict[str, bytes]


def different(
    events: list[Event], states: list[tuple[int, State]], most: int, checked: int
) -> list[Cut]:
    """The power cuts of a run, each once; of too many, some of every state."""
    found: dict[object, Cut] = {}
    for done, files in cuts(events, most, seed=0):
        acknowledged = sum(at <= done for at, _ in states) - 1
        if acknowledged >= 0:
            found.setdefault((acknowledged, frozenset(files.items())), Cut(acknowledged, files))
    assert {cut.acknowledged for cut in found.values()} == set(range(len(states)))
    some = random.Random(0).sample(list(found.values()), min(checked, len(found)))
    ends = {cut.acknowledged: cut for cut in found.values()}  # the last of each
    return [*ends.values(), *some]


@pytest.mark.parametrize(
    ("most", "checked"), [(3, 20), pytest.param(20, 10**6, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("steps", [STEPS, AROUND_A_COMPACTION], ids=["builds", "compaction"])
@pytest.mark.parametrize(("durability", "undone"), [("full", 0), ("normal", 1)])
def test_after_a_power_cut_everything_acknowledged_is_there_and_found(
    template: Path,
    tmp_path: Path,
    steps: list[Callable[[MemDB], Any]],
    durability: str,
    undone: int,
    most: int,
    checked: int,
) -> None:
    """With durability `normal` the last transaction may be undone, as a whole."""
    events, states = run(Path(shutil.copytree(template, tmp_path / "a")), steps, durability)
    for n, cut in enumerate(different(events, states, most, checked)):
        possible = states[max(0, cut.acknowledged - undone) : cut.acknowledged + 2]
        folder = put(cut.files, tmp_path / f"cut-{n}")
        check(folder, [state for _, state in possible])
        shutil.rmtree(folder)


WHAT_IS_LEFT = """
import sys
from pathlib import Path
import memdb
from tests.engine.test_power import check, state_of
for folder in sorted(Path(sys.argv[1]).iterdir()):
    try:
        whole = memdb.verify(folder) == []
    except memdb.MemDBError as error:
        whole = False
    if whole:
        check(folder, [state_of(folder)])
    print(folder.name, whole, flush=True)
"""


@pytest.mark.parametrize(
    ("most", "checked"), [(3, 30), pytest.param(20, 10**6, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("steps", [STEPS, AROUND_A_COMPACTION], ids=["builds", "compaction"])
def test_without_durability_what_verify_calls_whole_is_searched_right(
    template: Path, tmp_path: Path, steps: list[Callable[[MemDB], Any]], most: int, checked: int
) -> None:
    """With durability `off` the file may be damaged: then `verify` says so, or it is no database,
    and nothing ends the process that asks."""
    events, states = run(Path(shutil.copytree(template, tmp_path / "a")), steps, "off")
    folders = tmp_path / "cuts"
    for n, cut in enumerate(different(events, states, most, checked)):
        put(cut.files, folders / f"{n:06}")
    done = child(WHAT_IS_LEFT, folders)
    assert done.returncode == 0, done.stdout[-200:] + done.stderr
    told = [line.split()[1] for line in done.stdout.splitlines()]
    assert len(told) == n + 1
    assert {"True", "False"} == set(told)


# --- the index file against the embeddings --------------------------------------------------------


def index_file(path: Path) -> Path:
    (file,) = path.glob(f"gen-*/{FILE}")
    return file


@pytest.mark.parametrize("more", range(1, 6))
@pytest.mark.parametrize("trimmed", [False, True])
def test_an_index_of_changes_that_were_undone_is_never_believed(
    template: Path, tmp_path: Path, trimmed: bool, more: int
) -> None:
    """The data is a copy of before, the index file is not; then others get the numbers of the
    changes that are gone: fewer, as many and more of them."""
    path = Path(shutil.copytree(template, tmp_path / "a"))
    if trimmed:
        memdb.compact(path)
    (data,) = path.glob("gen-*/data.mdb")
    before = data.read_bytes()
    with MemDB.open(path) as database:
        for n in range(3):
            insert(f"text lost {n}")(database)
        assert database.build_index() is not None
    data.write_bytes(before)
    state = state_of(path)
    lost = [f"text lost {n}" for n in range(3)]
    assert [problem.table for problem in memdb.verify(path)] == ["index"]
    require_right_hits(path, state, lost)
    with MemDB.open(path) as database:
        for n in range(more):
            insert(f"text new {n}")(database)
            state[f"doc new {n}"] = f"text new {n}"
    require_right_hits(path, state, lost)
    (problem,) = memdb.verify(path)
    assert (problem.table, problem.key) == ("index", FILE)
    assert ("another change 4" in problem.what) == (more >= 3)
    assert memdb.repair(path).left == []
    assert index_file(path).exists()
    assert memdb.verify(path) == []
    require_right_hits(path, state, lost)


def test_an_index_of_a_copy_that_went_another_way_is_not_believed(
    template: Path, tmp_path: Path
) -> None:
    """Both have the database's id, and as many changes, after a compaction of each, too."""
    first = Path(shutil.copytree(template, tmp_path / "first"))
    second = Path(shutil.copytree(template, tmp_path / "second"))
    for n, path in enumerate((first, second)):
        with MemDB.open(path) as database:
            insert(f"text {n} of its own")(database)
            database.build_index()
    for _ in range(2):
        shutil.copy(index_file(second), index_file(first))
        (problem,) = memdb.verify(first)
        assert problem.table == "index"
        require_right_hits(first, state_of(first), ["text 1 of its own"])
        memdb.compact(first)
        memdb.compact(second)
        assert memdb.verify(first) == []


def test_an_index_file_of_a_release_that_named_no_change_is_no_damage(
    template: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(template, tmp_path / "a"))
    with MemDB.open(path) as database:
        database.build_index()
    file = index_file(path)
    content = file.read_bytes()
    file.write_bytes(
        described(content, {k: v for k, v in description(content).items() if k != "seal"})
    )
    assert memdb.verify(path) == []
    require_right_hits(path, state_of(path), LOST)
    with MemDB.open(path) as database:
        assert database.stats()["index"]["kind"] == "exact"
        database.build_index()
        assert database.stats()["index"]["kind"] == "ivf"


def other_vector(built: Built) -> None:
    """One number of one vector is another."""
    lists = built.index.invlists
    cluster = next(n for n in range(lists.nlist) if lists.list_size(n))
    codes = faiss.rev_swig_ptr(lists.get_codes(cluster), 2 * DIMENSION)
    codes.view("<f2")[3] += 0.01


def other_id(built: Built) -> None:
    built.ids[20] = 999


def swapped(built: Built) -> None:
    """Two rows in each other's place."""
    lists = built.index.invlists
    cluster = next(n for n in range(lists.nlist) if lists.list_size(n) > 1)
    rows = faiss.rev_swig_ptr(lists.get_ids(cluster), 2)
    rows[:] = rows[::-1].copy()


def twice(built: Built) -> None:
    built.ids[21] = built.ids[20]


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (other_vector, {"its vectors of reference "}),
        (other_id, {"it holds reference 999 that", "it lacks reference "}),
        (swapped, {"its vectors of references "}),
        (twice, {"more than once", "it lacks reference ", "its vectors of reference "}),
    ],
)
def test_verify_compares_the_index_with_the_embeddings(
    template: Path, tmp_path: Path, change: Callable[[Built], None], told: set[str], later: bool
) -> None:
    """A file with the right seals and another content; of now, and of a while ago."""
    path = Path(shutil.copytree(template, tmp_path / "a"))
    with MemDB.open(path) as database:
        info = database.build_index()
        assert info is not None
        if later:
            insert("text later")(database)
            database.delete("doc 1", "doc 69")
    assert memdb.verify(path) == []
    file = index_file(path)
    built = Built(faiss.read_index(str(file)), AnnIndex(file).ids.copy())
    change(built)
    write_index(built, info, file.parent)
    assert AnnIndex(file).info == info
    problems = memdb.verify(path)
    assert {(problem.table, problem.key) for problem in problems} == {("index", FILE)}
    assert len(problems) == len(told)
    assert all(any(part in problem.what for problem in problems) for part in told)
    assert memdb.repair(path).left == []
    assert memdb.verify(path) == []
    require_right_hits(path, state_of(path), LOST)


def test_an_index_of_what_is_nearly_all_deleted_is_right(template: Path, tmp_path: Path) -> None:
    """Whole clusters hold nothing that is still there."""
    path = Path(shutil.copytree(template, tmp_path / "a"))
    with MemDB.open(path) as database:
        database.build_index()
        database.delete(*(f"doc {n}" for n in range(2, 70)))
    assert memdb.verify(path) == []
    require_right_hits(path, {"doc 0": "text 0", "doc 1": "text 1"}, LOST)
    with MemDB.open(path) as database:
        database.delete("doc 0", "doc 1")
    assert memdb.verify(path) == []
