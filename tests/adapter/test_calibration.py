"""Calibration: what is asked, measured, chosen and recorded."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memdb import InvalidInputError, MemDB, MissingPartError, pack
from model_adapter import LanguageModel, SentenceEmbedder, calibrate, create_database
from model_adapter.attention.weighing import EVEN, SAFE, Weighing
from model_adapter.calibration import calibrate as calibrating
from model_adapter.calibration import measuring, questions
from model_adapter.calibration.duration import in_words
from model_adapter.calibration.grid import LIFTS, lower, simplest, slopes, wins
from model_adapter.calibration.measuring import Measuring
from model_adapter.generation.weighing_constants import weighing_of
from model_adapter.training import asking
from model_adapter.training.corpus import Question
from tests.helpers import SAMPLE, tiny_model

#: As questions are measured without a calibration, in the chat framing.
ASKED = SAFE.asking()
WORDS = SAMPLE.split()
TOPICS = [f"{WORDS[n].strip('.,')} {WORDS[3 * n + 5].strip('.,')}" for n in range(20)]


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return tiny_model(eos_token_id=None)


@pytest.fixture
def db(
    model: LanguageModel, minilm: SentenceEmbedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[MemDB]:
    """Twenty documents, half of them cold, and a model whose questions make sense."""
    said = iter(range(10**6))

    def first_lines(
        _: LanguageModel, context: Any, logits: Any, most: int, sampler: Any, end: str = "\n"
    ) -> list[str]:
        what = "is said of this harbour here?" if end == "?" else "Of {}: it is old"
        return [what.format(TOPICS[next(said) % len(TOPICS)]) for _ in range(len(logits))]

    monkeypatch.setattr(asking, "first_lines", first_lines)
    monkeypatch.setattr(questions, "_GAIN", -100.0)  # of a random model no text helps
    with create_database(tmp_path / "db", model=model, embedder=minilm, codec="exact") as database:
        for n, topic in enumerate(TOPICS):
            text = f"Of {topic}, it is old: " + " ".join(WORDS[n:] + WORDS[:n])[:260]
            database.insert(text, id=str(n), cold=n % 2 == 0)
        yield database


def tried(**means: float) -> dict[Weighing, Any]:
    """Losses of eight questions, the same spread for all."""
    spread = np.linspace(-0.1, 0.1, 8)
    names = {"even": 0, "mild": 5, "safe": 10, "strong": 40}
    return {replace(ASKED, slope=names[name]): mean + spread for name, mean in means.items()}


# --- the choice ---


def test_the_simplest_constants_are_chosen_among_those_as_good() -> None:
    exact = tried(even=2.0, mild=1.5, safe=1.5, strong=1.5)
    assert simplest(exact) == replace(ASKED, slope=5)
    assert simplest(tried(even=2.0, mild=1.5, strong=1.0)).slope == 40  # it wins clearly
    assert simplest(tried(even=2.0, safe=1.505, strong=1.5)) == ASKED  # by less than 1 %
    noisy = tried(even=1.01, strong=1.0)
    noise = np.array([0.2, -0.2] * 4)
    noisy[replace(ASKED, slope=0)] += noise
    assert simplest(noisy).slope == 0


def test_a_win_is_more_than_the_paired_standard_error() -> None:
    one = np.array([1.0, 2.0, 3.0, 4.0])
    assert wins(one, one + 0.01)  # the questions differ, the difference does not
    assert not wins(one, one)
    assert not wins(one, one + np.array([0.4, -0.3, 0.4, -0.3]))


def test_what_is_tried() -> None:
    assert len(set(slopes())) == 5
    assert ASKED in slopes()
    assert {one.lift for one in slopes()} == {ASKED.lift}
    assert list(lower(1.0)) == [1.0, 0.5, 0.0, -0.5, -1.0]
    assert list(lower(0.7)) == [0.7, 0.5, 0.0, -0.5, -1.0]
    assert list(lower(0.0)) == [0.0, -0.5, -1.0]


def test_durations_in_words() -> None:
    assert [in_words(n) for n in (0.2, 80, 100, 5000, 7200)] == [
        "1 seconds",
        "80 seconds",
        "2 minutes",
        "83 minutes",
        "2.0 hours",
    ]


def test_packed_memories_under_other_constants(db: MemDB) -> None:
    found = db.retrieve(SAMPLE, 4)
    scores = [0.9, 0.8, 0.85, 0.3]
    weighing = Weighing(0.5, 10, 1.5, reach=0.5)
    again = weighing.reweighed(EVEN.packed(found, db.shape), scores)
    stored = [hit.stored for hit in found.hits if hit.stored is not None]
    expected = pack(stored, db.shape, [0.5, -0.5, 0.0, 0.0])
    for number, layer in expected.layers.items():
        mask = np.where(layer.memory == 3, -np.inf, layer.mask)  # it is left out
        np.testing.assert_allclose(again.layers[number].mask, mask, rtol=1e-5, atol=1e-6)
        assert np.array_equal(again.layers[number].keys, layer.keys)


# --- the whole ---


def test_what_was_measured_is_recorded(db: MemDB, model: LanguageModel, tmp_path: Path) -> None:
    told: list[str] = []
    found = calibrate(
        db,
        questions=9,
        work=tmp_path / "work",
        notify=told.append,
        progress=lambda stage, *_: told.append(stage),
    )
    said = next(n for n, text in enumerate(told) if text.startswith(f"calibrating '{db.path}'"))
    assert told[said].endswith(" in all")
    assert set(told[:said]) == {"drawing references"}
    assert {"asking", "retrieving", "slope", "lift", "running text"} <= set(told[said:])
    assert found.questions == 9
    assert found.before == SAFE
    assert len(found.tried) == len(slopes()) + len(LIFTS) - 1
    assert {one.weighing for one in found.tried} >= set(slopes())
    assert found.changed == (found.weighing != SAFE)
    assert 0.0 in found.perplexities
    recorded = db.settings["calibration"]
    assert recorded == {
        "adapter": None,
        "date": datetime.date.today().isoformat(),
        "model": model.fingerprint,
        "questions": 9,
        "weighing": found.weighing.to_json(),
    }
    assert weighing_of(db, model) == found.weighing
    with MemDB.open(db.path) as another:
        assert another.settings["calibration"] == recorded


def test_an_interrupted_calibration_goes_on(
    db: MemDB, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[int] = []
    losses = measuring.losses

    def counting(_: LanguageModel, before: Sequence[Any], *rest: Any, **more: Any) -> list[float]:
        measured.append(len(before))
        return losses(_, before, *rest, **more)

    monkeypatch.setattr(measuring, "losses", counting)

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "slope" and done == 3 * 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(db, questions=9, work=tmp_path / "work", progress=stop)
    assert sum(measured) == 3 * 9
    assert "calibration" not in db.settings

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("asked again")

    with monkeypatch.context() as patched:
        patched.setattr(asking, "first_lines", never)
        told: list[str] = []
        first = calibrate(db, questions=9, work=tmp_path / "work", notify=told.append)
    assert told[0].endswith(" in all, less what was measured before")
    others = len(first.tried) - 5
    assert sum(measured[1:]) >= others * 9
    measured.clear()
    again = calibrate(db, questions=9, work=tmp_path / "work")
    assert measured == []
    assert again == first


def test_cold_memories_that_are_retrieved_are_written(db: MemDB, tmp_path: Path) -> None:
    cold = db.stats()["cold"]
    assert cold == 10
    calibrate(db, questions=8, work=tmp_path / "work")
    assert db.stats()["cold"] < cold


def test_the_path_of_a_database_will_do(
    db: MemDB, model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Any] = []

    class Opened:
        def __enter__(self) -> MemDB:
            return db

        def __exit__(self, *_: object) -> None:
            opened.append("closed")

    monkeypatch.setattr(calibrating, "open_database", lambda path, **_: Opened())
    assert calibrate(db.path, questions=8, work=tmp_path / "work").questions == 8
    assert opened == ["closed"]


def pretend(monkeypatch: pytest.MonkeyPatch, answers: Any, text: Any) -> None:
    """Losses that a function of the constants gives, those of running text another."""

    def measured(self: Measuring, given: Any, stage: str) -> dict[Weighing, Any]:
        loss = text if stage == "running text" else answers
        return {one: np.linspace(0, 1, 9) + loss(one) for one in given}

    monkeypatch.setattr(Measuring, "measured", measured)


def test_constants_that_are_better_are_taken(
    db: MemDB, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answers(one: Weighing) -> float:
        return -0.1 * (one.slope == 20) - 0.1 * (one.lift == 1.0)

    pretend(monkeypatch, answers, lambda one: 0.009 * max(one.lift, 0.0))
    found = calibrate(db, questions=9, work=tmp_path / "work")
    assert found.changed
    assert found.weighing == replace(SAFE, slope=20, lift=1.0, asked=0.0)
    assert found.perplexities.keys() == {-1.0, -0.5, 0.0, 0.5, 1.0}
    # Running text is worse by 1.5 %: the next lower lift is good enough. Messages keep theirs.
    pretend(monkeypatch, answers, lambda one: 0.015 * max(one.lift, 0.0))
    found = calibrate(db, questions=9, work=tmp_path / "work")
    assert (found.weighing.lift, found.weighing.asked) == (0.5, 0.5)
    assert db.settings["calibration"]["weighing"] == found.weighing.to_json()
    # Most of what is found only drowns the text: it counts less than it would by itself.
    pretend(monkeypatch, answers, lambda one: one.lift)
    found = calibrate(db, questions=9, work=tmp_path / "work")
    assert (found.weighing.lift, found.weighing.asked) == (-1.0, 2.0)


def test_a_lift_without_running_text_to_look_at_is_for_what_is_asked(
    db: MemDB, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, lambda one: -0.1 * (one.lift == 1.0), lambda one: 0.0)
    monkeypatch.setattr(Measuring, "find_behind", lambda *_: 0)
    found = calibrate(db, questions=9, work=tmp_path / "work")
    assert (found.weighing.lift, found.weighing.asked) == (-1.0, 2.0)
    assert not found.perplexities


def test_without_a_clear_gain_all_stays_as_it_was(
    db: MemDB, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, lambda one: 0.0, lambda one: 0.0)
    found = calibrate(db, questions=9, work=tmp_path / "work")
    assert not found.changed
    assert found.weighing == SAFE
    assert db.settings["calibration"]["weighing"] == SAFE.to_json()


def test_a_calibration_of_another_model_or_adapter_is_ignored(
    db: MemDB, model: LanguageModel
) -> None:
    other = Weighing(1.0, 20.0, 2.0)
    found = {
        "adapter": None,
        "date": "2026-11-30",
        "model": model.fingerprint,
        "questions": 9,
        "weighing": other.to_json(),
    }
    db.record_calibration(found)
    assert weighing_of(db, model) == other
    for changes in ({"model": "another"}, {"adapter": "another"}):
        db.record_calibration({**found, **changes})
        assert weighing_of(db, model) == SAFE
    db.record_calibration(None)
    assert weighing_of(db, model) == SAFE
    db.record_calibration({**found, "weighing": {"lift": 1, "later": 2}})
    with pytest.raises(InvalidInputError, match=r"memdb calibrate --reset"):
        weighing_of(db, model)


def test_no_more_is_asked_than_it_takes(db: MemDB, tmp_path: Path) -> None:
    calibrate(db, questions=8, work=tmp_path / "work")
    (file,) = (tmp_path / "work").glob("asked-*.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(lines) == 16  # eight of them are enough: no others were asked about
    assert all(re.fullmatch(r"\w+ is said of this harbour here\?", x["question"]) for x in lines)
    assert all(re.fullmatch(r"Of .*: it is old", answer) for x in lines for answer in x["answers"])


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ("It was founded in 1874.", True),
        ("It was founded by somebody else, before 1912 or later.", False),
        ("In 1874, by a lady, the lighthouse keeper", True),  # a quarter
        ("The town was founded.", False),  # the question says that
        ("Yes.", False),
    ],
)
def test_what_the_model_makes_up_is_not_kept(answer: str, told: bool) -> None:
    text = "Veldmoor is a town. Ottoline Brask founded it in 1874."
    asked = Question("When was the town founded?", answer)
    assert questions._is_told(text, asked) is told


# --- what is refused ---


def test_too_little_text(db: MemDB, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidInputError, match="at least 8 questions, and 7 are asked for"):
        calibrate(db, questions=7)
    monkeypatch.setattr(questions, "_GAIN", 100.0)
    with pytest.raises(InvalidInputError, match=r"of 20 .* the text answers 0: ingest more text"):
        calibrate(db, questions=8, work=tmp_path / "work")
    db.delete(*map(str, range(13)))
    with pytest.raises(InvalidInputError, match=r"has 7 documents with text .*: ingest more text"):
        calibrate(db, questions=8, work=tmp_path / "work")
    assert "calibration" not in db.settings


def test_a_database_without_its_model(db: MemDB) -> None:
    with MemDB.open(db.path) as bare, pytest.raises(MissingPartError):
        calibrate(bare)


# --- the real model ---


@pytest.mark.slow
def test_a_real_model_tells_memories_apart(
    smollm: LanguageModel, minilm: SentenceEmbedder, tmp_path: Path
) -> None:
    """Of forty towns that differ in everything, a memory of another town says nothing."""
    names = ["Vel", "Mar", "Ost", "Pin", "Har", "Quil", "Tarn", "Bras"]
    ends = ["moor", "gate", "holm", "dle", "bay"]
    trades = ["glass", "salted herring", "wool", "clocks", "paper", "church bells", "rope", "ink"]
    with create_database(tmp_path / "db", model=smollm, embedder=minilm) as database:
        for n in range(40):
            town, trade = names[n % 8] + ends[n // 8], trades[(3 * n + n // 8) % 8]
            person = f"{names[(n + 3) % 8]}a {names[(5 * n + 1) % 8]}{ends[(n + 2) % 5]}"
            database.insert(
                f"{town} is a town of {1000 + 37 * n} people on the river {names[(n + 5) % 8]}en. "
                f"It was founded in {1100 + 17 * n} by {person}. It is known for its {trade}, "
                f"which is sold at a market every {1 + n % 6} weeks.",
                id=town,
                cold=True,
            )
        found = calibrate(database, questions=16, work=tmp_path / "work")
        assert found.questions >= 8
        assert found.alone > found.text
        assert found.weighing.slope > 0
        assert weighing_of(database, smollm) == found.weighing
