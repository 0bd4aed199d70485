"""Calibration from the command line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import model_adapter
from memdb import MemDB, verify
from model_adapter import Calibration, SentenceEmbedder
from model_adapter.attention.weighing import SAFE, Weighing
from model_adapter.calibration.found import Tried
from tests.cli.conftest import Run, rows
from tests.cli.small import make_database

OTHER = Weighing(lift=1.0, slope=20.0, most=2.0)


def found(weighing: Weighing, perplexities: dict[float, float]) -> Calibration:
    tried = [Tried(SAFE, 1.25, 0.0, 0.0), Tried(OTHER, 1.125, 0.125, 0.03125)]
    return Calibration(weighing, SAFE, 40, 24, 3.5, 0.5, tried, perplexities)


@pytest.fixture
def db(minilm: SentenceEmbedder, tmp_path: Path) -> Path:
    make_database(tmp_path, minilm)
    return tmp_path / "db"


def record(path: Path, **changes: Any) -> None:
    with MemDB.open(path) as database:
        database.record_calibration(
            {
                "adapter": None,
                "date": "2026-11-30",
                "model": database.shape.model,
                "questions": 24,
                "weighing": OTHER.to_json(),
                **changes,
            }
        )


def test_calibrate_says_what_it_found(run: Run, db: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def calibrate(database: MemDB, **options: Any) -> Calibration:
        given.update(options, path=database.path)
        options["notify"]("calibrating: about 2 minutes in all")
        return found(OTHER, {0.0: 20.0, 1.0: 20.125})

    monkeypatch.setattr(model_adapter, "calibrate", calibrate)
    result = run("calibrate", "--questions", "30", "--seed", "7", "--work", "w")
    assert (given["questions"], given["seed"], given["path"]) == (30, 7, db)
    assert given["work"] == Path("w")
    assert result.stderr.startswith("calibrating: about 2 minutes in all\n")
    assert "+0.1250 ± 0.0312" in result.stdout
    assert "40 references asked about, 24 questions kept" in result.stdout
    assert "3.500 nats a token without anything, 0.500 behind the text" in result.stdout
    assert "perplexity 20.00 with lift 0, 20.12 with lift 1\n" in result.stdout
    assert result.stdout.endswith("recorded: asked 0, lift 1, most 2, reach 0.5, slope 20\n")

    monkeypatch.setattr(model_adapter, "calibrate", lambda *_, **__: found(SAFE, {}))
    result = run("calibrate")
    assert "there was no running text to look at" in result.stdout
    assert (
        "nothing is clearly better; kept and recorded: asked 1.5, lift -1, most 2" in result.stdout
    )
    (values,) = rows(run("calibrate", "--json"))
    assert values["weighing"] == SAFE.to_json()
    assert values["tried"][1] == {
        "weighing": OTHER.to_json(),
        "nll": 1.125,
        "better": 0.125,
        "error": 0.03125,
    }


def test_an_interruption_says_that_it_goes_on(
    run: Run, db: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(model_adapter, "calibrate", interrupted)
    assert "the same command goes on from there" in run("calibrate", code=130).stderr


def test_stats_says_what_is_recorded_and_reset_removes_it(run: Run, db: Path) -> None:
    assert "weighing   the model's constants, or safe ones" in run("stats").stdout
    assert rows(run("stats", "--json"))[0]["calibration"] is None
    assert run("calibrate", "--reset").stdout == "no calibration was recorded\n"
    record(db)
    assert (
        "weighing   asked 0, lift 1, most 2, reach 0.5, slope 20 "
        "(calibrated 2026-11-30, 24 questions)\n" in run("stats").stdout
    )
    assert rows(run("stats", "--json"))[0]["calibration"]["weighing"] == OTHER.to_json()
    record(db, adapter="another")
    assert "calibration of 2026-11-30 is of another model: ignored" in run("stats").stdout
    assert run("calibrate", "--reset").stdout == "the calibration was removed\n"
    assert "safe ones" in run("stats").stdout
    assert verify(db) == []


def test_too_little_text_is_said_in_a_line(run: Run, db: Path) -> None:
    result = run("calibrate", "--work", "work", code=2)
    assert re.match(r"calibrating '.*': about \d+ seconds in all\nError: ", result.stderr)
    assert "the text answers 0: ingest more text and calibrate then" in result.stderr
    run("delete", "other 1")
    result = run("calibrate", code=2)
    assert "has 7 documents with text to ask about" in result.stderr
    result = run("calibrate", "--questions", "3", code=2)
    assert "at least 8 questions, and 3 are asked for" in result.stderr


def test_a_database_without_a_model_cannot_be_calibrated(run: Run, tmp_path: Path) -> None:
    from tests.engine.helpers import make_shape

    MemDB.create(tmp_path / "db", shape=make_shape(), dimension=2).close()
    assert "Error: " in run("calibrate", code=2).stderr


def test_constants_of_a_later_release_say_the_way_out(run: Run, db: Path) -> None:
    record(db, weighing={"later": 1})
    result = run("generate", "Who?", code=2)
    assert "memdb calibrate --reset" in result.stderr
    assert "later" in run("stats").stdout
