"""Databases that all tests here read, and none changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.storage_format.databases import (
    CALIBRATION,
    LONG,
    create,
    few_are_enough,
    filled,
    grown,
    insert_unlike,
)
from tests.storage_format.reader import Database, read_database


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Database:
    path = tmp_path_factory.mktemp("sound") / "a.memdb"
    with create(path, "float32", "int8") as db:
        db.insert(LONG, id="a", metadata={"year": 2024, "é": "x"})
        db.insert("Short.", id="b", cold=True)
        db.insert("Gone.", id="c", metadata={"year": 2024})
        db.insert("Last.", id="d", metadata={"year": 2024, "é": "x"})
        db.delete("c")
        db.record_calibration(CALIBRATION)
    return read_database(path)


@pytest.fixture(scope="session")
def indexed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("indexed") / "a.memdb"
    with filled(path) as db:
        db.build_index()
    return path


@pytest.fixture(scope="session")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Database:
    """Its memories are under a fitted codec, but for one that this does not suit."""
    path = tmp_path_factory.mktemp("fitted") / "a.memdb"
    with few_are_enough("klt8"), grown(path, "float32", "klt8") as db:
        db.recode()
        insert_unlike(db)
        db.record_calibration(CALIBRATION)
    return read_database(path)
