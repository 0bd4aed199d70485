"""Codecs from the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from memdb import MemDB
from memdb.codecs import FAMILIES
from tests.cli.conftest import Run, rows
from tests.engine.helpers import keep_whatever_is_lost, make_memory, make_shape, unit


@pytest.fixture
def db(tmp_path: Path) -> Path:
    """A database without parts, of twelve memories."""
    path = tmp_path / "db"
    shape = make_shape()
    with MemDB.create(path, shape=shape, dimension=2) as database:
        for n in range(12):
            database.insert(f"Text {n}.", embeddings=unit(1, n), memories=[make_memory(shape, n)])
    return path


def test_recode_says_what_it_did(run: Run, db: Path) -> None:
    result = run("recode", "--codec", "int4")
    assert result.stdout.startswith("12 of 12 memories recoded with int4: ")
    assert run("recode").stdout == "0 of 12 memories recoded with int4\n"
    (stats,) = rows(run("stats", "--json"))
    assert stats["memory"]["codec"] == "int4"
    assert stats["memory_bytes"]["codecs"] == {"int4": 12}
    assert "written by (of a sample): 12 int4" in run("stats").stdout
    assert run("verify").stdout == "nothing is wrong\n"


def test_a_codec_that_has_to_be_fitted(run: Run, db: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run("recode", "--codec", "klt5", code=2)
    assert "'klt5' is fitted to at least 256 memories, and the database has fewer" in result.stderr
    keep_whatever_is_lost(monkeypatch)
    monkeypatch.setattr(FAMILIES["klt5"], "enough", 12)
    first = run("recode", "--codec", "klt5").stdout
    assert "12 memories recoded with klt5:" in first
    assert run("recode", "--codec", "klt5").stdout.startswith("0 of 12")
    assert "12 klt5:" in run("stats").stdout


def test_a_codec_that_there_is_not(run: Run, db: Path) -> None:
    result = run("recode", "--codec", "zip", code=2)
    assert "'zip' is not one of 'exact', 'int8', 'int4'" in result.stderr
