"""Which of what is near become hits: a least score, documents left out, hits that differ, a
reranker's order, and exact search."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from memdb import Document, Hit, InvalidInputError, MemDB, Reference
from tests.engine.helpers import TokenWriter, WordEmbedder, make_shape, unit

SHAPE = make_shape()
MANY, DIMENSION = 400, 8


def vectors(count: int, seed: int = 0) -> NDArray[np.float32]:
    """Of length 1, (count, DIMENSION)."""
    found = np.random.default_rng(seed).standard_normal((count, DIMENSION)).astype(np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


@pytest.fixture(scope="module", params=["exact", "ivf", "ivf and a tail"])
def many(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """400 documents of a reference, by each kind of index; each seventh is deleted."""
    path = tmp_path_factory.mktemp("many") / "db"
    kind = request.param
    index = kind.split()[0]
    built = {"exact": 0, "ivf": MANY, "ivf and a tail": 300}[kind]
    with MemDB.create(path, shape=SHAPE, dimension=DIMENSION, index=index) as db:
        made = vectors(MANY)
        for start, end in ((0, built), (built, MANY)):
            db.insert_many(
                [Document(f"text {n}", str(n), {"even": n % 2 == 0}) for n in range(start, end)],
                embeddings=made[start:end],
            )
            if start == 0 and built:
                assert db.build_index() is not None
        db.delete(*(str(n) for n in range(0, MANY, 7)))
        assert db.stats()["index"]["kind"] == index
        yield db


@pytest.fixture
def full(tmp_path: Path, full_template: Path) -> Iterator[MemDB]:
    path = shutil.copytree(full_template, tmp_path / "full")
    with MemDB.open(path, embedder=WordEmbedder(), writer=TokenWriter()) as database:
        yield database


@pytest.fixture
def bare(tmp_path: Path, bare_template: Path) -> Iterator[MemDB]:
    with MemDB.open(shutil.copytree(bare_template, tmp_path / "bare")) as database:
        yield database


def ranking(query: NDArray[np.float32]) -> list[tuple[int, float]]:
    """What is there by brute force, best first: the number of the document, and its score."""
    scores = vectors(MANY) @ query
    return [(n, float(scores[n])) for n in np.argsort(-scores) if n % 7]


def numbers(found: Any) -> list[int]:
    return [int(hit.document_id) for hit in found]


# --- exact ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", [None, {"even": True}])
@pytest.mark.parametrize("k", [1, 5, 100, 1000])
def test_exact_search_finds_the_nearest_of_all(many: MemDB, k: int, where: Any) -> None:
    for seed in range(5):
        query = vectors(1, seed=100 + seed)[0]
        due = [one for one in ranking(query) if where is None or one[0] % 2 == 0][:k]
        found = many.retrieve(query, k, where=where, exact=True)
        assert numbers(found) == [n for n, _ in due]
        assert [hit.score for hit in found] == pytest.approx([score for _, score in due], abs=1e-6)


def test_exact_search_asks_no_index(many: MemDB, monkeypatch: pytest.MonkeyPatch) -> None:
    from memdb.index.ann import AnnIndex

    def refuses(*_: object, **__: object) -> None:
        raise AssertionError("the index was asked")

    for name in ("nearest", "scan"):
        monkeypatch.setattr(AnnIndex, name, refuses)
    query = vectors(1, seed=3)[0]
    assert numbers(many.retrieve(query, exact=True)) == [n for n, _ in ranking(query)[:5]]
    with many.snapshot() as moment:
        assert len(moment.retrieve_batch([query, -query], 3, exact=True)) == 2


# --- min_score ------------------------------------------------------------------------------------


@pytest.mark.parametrize("least", [-1, 0.2, 0.6, 0.999, np.float32(0.5), 2])
def test_no_hit_is_less_similar_than_asked_for(many: MemDB, least: Any) -> None:
    query = vectors(1, seed=7)[0]
    all_of_them = many.retrieve(query, 50, exact=True)
    due = [hit.document_id for hit in all_of_them if hit.score >= least]
    found = many.retrieve(query, 50, min_score=least, exact=True)
    assert [hit.document_id for hit in found] == due
    asked: list[str] = []

    def accept(reference: Reference) -> bool:
        asked.append(reference.document_id)
        return len(asked) % 2 == 0

    many.retrieve(query, 50, min_score=least, accept=accept, exact=True)
    near = [str(n) for n, score in ranking(query) if score >= least]
    assert asked[: len(due)] == due
    assert set(asked) <= set(near)  # nobody is asked about what is too far


def test_memories_of_what_is_too_far_are_not_written(full: MemDB) -> None:
    full.insert("whale harbour", id="near", cold=True)
    full.insert("lighthouse storm", id="far", cold=True)
    found = full.retrieve("whale harbour", min_score=0.9)
    assert [hit.document_id for hit in found] == ["near"]
    assert (full.get("near").warm, full.get("far").warm) == (1, 0)
    assert list(full.usage()) == [found[0].id]


# --- exclude --------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", [None, {"even": True}])
@pytest.mark.parametrize("left_out", [0, 1, 5, 60, MANY])
def test_the_nearest_of_the_others_are_found(many: MemDB, left_out: int, where: Any) -> None:
    query = vectors(1, seed=11)[0]
    near = [n for n, _ in ranking(query)]
    out = {str(n) for n in near[:left_out]}
    due = [n for n in near[left_out:] if where is None or n % 2 == 0][:5]
    for exclude in (out, list(out), iter(out)):
        found = many.retrieve(query, 5, exclude=exclude, where=where, exact=True)
        assert numbers(found) == due
    found = many.retrieve(query, 5, exclude=out, where=where)
    assert len(found) == len(due)
    assert not {hit.document_id for hit in found} & out


def test_all_references_of_a_document_are_left_out(full: MemDB) -> None:
    full.insert("harbour " * 60, id="long")
    full.insert("harbour town", id="short")
    assert len(full.get("long").references) > 3
    assert {hit.document_id for hit in full.query("harbour", 3)} == {"long"}
    assert [hit.document_id for hit in full.query("harbour", exclude=["long"])] == ["short"]
    assert len(full.query("harbour", exclude=["long", "short", "nobody", ""])) == 0


# --- diversity ------------------------------------------------------------------------------------


def slow_mmr(query: NDArray[np.float32], k: int, diversity: float) -> list[int]:
    """The formula as it stands in the docstring."""
    pool = ranking(query)[: max(4 * k, 20)]
    every = vectors(MANY)
    chosen: list[int] = []
    while len(chosen) < min(k, len(pool)):
        best, most = -1, -np.inf
        for n, score in pool:
            if n in chosen:
                continue
            like = max((float(every[n] @ every[other]) for other in chosen), default=0.0)
            worth = (1 - diversity) * score - diversity * like
            if not chosen and n == pool[0][0]:
                worth = np.inf
            if worth > most:
                best, most = n, worth
        chosen.append(best)
    return chosen


@pytest.mark.parametrize("diversity", [0, 0.3, 0.5, 1])
@pytest.mark.parametrize("k", [1, 3, 10])
def test_diverse_hits_are_those_of_the_formula(many: MemDB, k: int, diversity: float) -> None:
    for seed in range(3):
        query = vectors(1, seed=seed + 50)[0]
        found = many.retrieve(query, k, diversity=diversity, exact=True)
        assert numbers(found) == slow_mmr(query, k, diversity)
        score = dict(ranking(query))  # scores stay similarities
        assert [hit.score for hit in found] == pytest.approx(
            [score[n] for n in numbers(found)], abs=1e-6
        )
    if diversity == 0:
        assert numbers(found) == [n for n, _ in ranking(query)[:k]]


def test_the_same_text_again_makes_room_for_another(bare: MemDB) -> None:
    near, apart = unit(1, 0.1), unit(1, -0.6)
    bare.insert_many([f"same {n}" for n in range(4)], embeddings=np.repeat(near, 4, axis=0))
    bare.insert("other", id="other", embeddings=apart)
    query = unit(1, 0)[0]
    assert "other" not in [hit.document_id for hit in bare.retrieve(query, 2)]
    assert "other" in [hit.document_id for hit in bare.retrieve(query, 2, diversity=0.5)]
    assert len(bare.retrieve(query, 50, diversity=1.0)) == 5
    assert len(bare.retrieve(query, 2, diversity=1, where={"x": 1})) == 0


# --- rerank ---------------------------------------------------------------------------------------


def test_a_reranker_is_told_the_query_and_what_is_near(many: MemDB) -> None:
    query = vectors(1, seed=21)[0]
    told: list[Any] = []

    def rerank(text: str | None, hits: list[Hit]) -> list[float]:
        told.append((text, numbers(hits), [hit.score for hit in hits]))
        return [-hit.score for hit in hits]

    found = many.retrieve(query, 6, rerank=rerank, exact=True)
    ((text, near, scores),) = told
    assert text is None  # an embedding says nothing in words
    assert near == [n for n, _ in ranking(query)[:24]]
    assert numbers(found) == near[::-1][:6]
    assert [hit.score for hit in found] == pytest.approx([-score for score in scores[::-1][:6]])


def test_a_reranker_of_texts_puts_first_what_it_prefers(full: MemDB) -> None:
    for n, text in enumerate(("harbour", "harbour old", "harbour whale", "storm")):
        full.insert(text, id=str(n), cold=True)

    def whales(text: str | None, hits: list[Hit]) -> NDArray[np.float64]:
        assert text == "old harbour"
        return np.array([hit.text.count("whale") for hit in hits])

    (hit,) = full.retrieve("old harbour", 1, rerank=whales)
    assert (hit.document_id, hit.score) == ("2", 1.0)
    assert hit.memory is not None
    assert [full.get(str(n)).warm for n in range(4)] == [0, 0, 1, 0]  # of hits alone
    found = full.retrieve_batch(["old harbour"] * 2, 2, rerank=whales, memories=False)
    assert [[hit.document_id for hit in one] for one in found] == [["2", "1"]] * 2  # stable


def test_a_reranker_may_give_hits(many: MemDB) -> None:
    query = vectors(1, seed=22)[0]
    near = ranking(query)[:20]
    orders: list[Callable[[list[Hit]], Any]] = [
        lambda hits: hits[::-1],
        lambda hits: tuple(hits[2:5]),
        lambda hits: [],
    ]
    dues = [near[::-1][:3], near[2:5], []]
    for order, due in zip(orders, dues, strict=True):
        found = many.retrieve(query, 3, rerank=lambda _, hits, o=order: o(hits), exact=True)
        assert numbers(found) == [n for n, _ in due]
        assert [hit.score for hit in found] == pytest.approx([s for _, s in due], abs=1e-6)


def test_a_reranker_sees_only_what_may_be_a_hit(many: MemDB) -> None:
    query = vectors(1, seed=23)[0]
    seen: list[int] = []

    def rerank(_: str | None, hits: list[Hit]) -> list[Hit]:
        seen.extend(numbers(hits))
        return hits

    first = ranking(query)[0][0]
    many.retrieve(query, 2, exclude=[str(first)], min_score=0.1, where={"even": True},
                  accept=lambda one: int(one.document_id) % 4 == 0, rerank=rerank)  # fmt: skip
    assert seen
    assert all(n % 4 == 0 and n != first for n in seen)
    seen.clear()
    many.retrieve(query, 2, where={"even": 7}, rerank=rerank)
    assert seen == []  # nothing is near: it is not asked


@pytest.mark.parametrize(
    "gives",
    [
        lambda hits: [1.0],
        lambda hits: [float("nan")] * len(hits),
        lambda hits: ["x"] * len(hits),
        lambda hits: None,
        lambda hits: 1.0,
        lambda hits: [*hits[:3], 1.0],
        lambda hits: [hits[0], hits[0]],
        lambda hits: [Hit(10**6, 1.0, (b"", b""))],
        lambda hits: np.ones((len(hits), 1)),
    ],
)
def test_what_is_no_order_and_no_scores_is_refused(many: MemDB, gives: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"a reranker (gave|gives)"):
        many.retrieve(vectors(1)[0], 2, rerank=lambda _, hits: gives(hits))


def test_what_a_reranker_raises_comes_out(full: MemDB) -> None:
    full.insert("The harbour.", id="a", cold=True)

    def rerank(text: str | None, hits: list[Hit]) -> list[float]:
        raise KeyError(text)

    with pytest.raises(KeyError, match="harbour"):
        full.retrieve("harbour", rerank=rerank)
    assert full.get("a").warm == 0


# --- wrong arguments ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"min_score": "0.5"}, "min_score must be a number"),
        ({"min_score": float("nan")}, "min_score must be a number"),
        ({"min_score": True}, "min_score must be a number"),
        ({"diversity": -0.1}, "diversity must be a number from 0 to 1"),
        ({"diversity": 1.1}, "diversity must be a number from 0 to 1"),
        ({"diversity": "much"}, "diversity must be a number from 0 to 1"),
        ({"exclude": "abc"}, "exclude must be several document ids"),
        ({"exclude": 5}, "exclude must be several document ids"),
        ({"exclude": ["a", 5]}, "an id in exclude must be a str"),
        ({"diversity": 0.5, "rerank": lambda _, hits: hits}, "not both"),
        ({"rerank": "model"}, "rerank must be a function"),
        ({"exact": "yes"}, "exact must be True or False"),
        ({"exact": None}, "exact must be True or False"),
    ],
)
def test_wrong_arguments_are_named(many: MemDB, arguments: dict[str, Any], says: str) -> None:
    query = vectors(1)[0]
    with pytest.raises(InvalidInputError, match=says):
        many.retrieve(query, **arguments)
    with pytest.raises(InvalidInputError, match=says), many.snapshot() as moment:
        moment.retrieve_batch([query], **arguments)
