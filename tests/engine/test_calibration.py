"""A calibration is kept: by the handle that recorded it, on disk, in copies and exports."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from memdb import (
    InvalidInputError,
    MemDB,
    MismatchError,
    StorageError,
    backup,
    compact,
    import_database,
    repair,
    restore,
    rewrite,
    verify,
)
from memdb.storage.record_layout import seal
from tests.engine.helpers import TokenWriter, WordEmbedder, make_shape, raw

FOUND: dict[str, Any] = {
    "adapter": None,
    "date": "2026-11-30",
    "model": "m",
    "questions": 24,
    "weighing": {"lift": 0.5, "slope": 10},
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "db"
    with MemDB.create(path, embedder=WordEmbedder(), writer=TokenWriter(8)) as database:
        database.insert("The harbour of Veldmoor is old.", id="a")
    return path


def recorded(path: Path) -> Any:
    with MemDB.open(path) as database:
        assert database.stats()["calibration"] == database.settings.get("calibration")
        return database.settings.get("calibration")


def record(path: Path, found: Any = FOUND) -> None:
    with MemDB.open(path) as database:
        database.record_calibration(found)


def test_a_calibration_is_seen_at_once_and_after_opening(path: Path) -> None:
    assert recorded(path) is None
    with MemDB.open(path) as database:
        database.record_calibration(FOUND)
        assert database.settings["calibration"] == FOUND
        changed = {**FOUND, "questions": 8}
        database.record_calibration(changed)
        assert database.stats()["calibration"] == changed
    assert recorded(path) == changed
    with MemDB.open(path) as database:
        database.record_calibration(None)
        assert "calibration" not in database.settings
        database.record_calibration(None)
    assert recorded(path) is None
    assert verify(path) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"date": 2026}, "'date' is missing, or of a wrong type"),
        ({"weighing": {"lift": "0.5"}}, "'weighing' has a value that is no number"),
        ({"weighing": {"lift": float("nan")}}, "'weighing' has a value that is no number"),
        ({"weighing": {"lift": True}}, "'weighing' has a value that is no number"),
        ({"weighing": {"lift": 10**400}}, "'weighing' has a value that is no number"),
    ],
)
def test_what_is_no_calibration_is_refused(
    path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidInputError, match=message):
        record(path, {**FOUND, **changes})
    assert recorded(path) is None


def test_a_closed_database_records_nothing(path: Path) -> None:
    database = MemDB.open(path)
    database.close()
    with pytest.raises(StorageError, match="closed"):
        database.record_calibration(FOUND)


def _compacted(path: Path, folder: Path) -> Path:
    compact(path)
    return path


def _backed_up(path: Path, folder: Path) -> Path:
    backup(path, folder / "copy")
    return folder / "copy"


def _restored(path: Path, folder: Path) -> Path:
    restore(_backed_up(path, folder), folder / "restored")
    return folder / "restored"


def _exported(path: Path, folder: Path) -> Path:
    with MemDB.open(path) as database:
        database.export(folder / "export")
    import_database(folder / "export", folder / "imported")
    return folder / "imported"


@pytest.mark.parametrize("copied", [_compacted, _backed_up, _restored, _exported])
def test_a_calibration_goes_with_the_database(
    path: Path, tmp_path: Path, copied: Callable[[Path, Path], Path]
) -> None:
    record(path)
    copy = copied(path, tmp_path)
    assert recorded(copy) == FOUND
    assert verify(copy) == []


def test_an_export_without_one_is_as_it_was(path: Path, tmp_path: Path) -> None:
    copy = _exported(path, tmp_path)
    manifest = json.loads((tmp_path / "export" / "manifest.json").read_text())
    assert manifest["settings"].keys() == {"embedder", "model", "memory", "cutting"}
    assert recorded(copy) is None


def test_an_import_leaves_the_calibration_of_a_database_that_is_there(
    path: Path, tmp_path: Path
) -> None:
    record(path)
    copy = _exported(path, tmp_path)
    record(copy, {**FOUND, "questions": 99})
    import_database(tmp_path / "export", copy)
    assert recorded(copy)["questions"] == 99


def test_a_rewrite_for_another_model_removes_it(path: Path) -> None:
    record(path)
    before = MemDB.open(path)
    rewrite(path, TokenWriter(8), embedder=WordEmbedder)
    assert recorded(path) == FOUND

    other = TokenWriter(8)
    other.shape = make_shape(reference_length=8, model="another")
    rewrite(path, other, embedder=WordEmbedder)
    assert recorded(path) is None
    with pytest.raises(MismatchError, match="rewritten"):
        before.record_calibration(FOUND)
    before.close()


def test_a_damaged_calibration_is_named_and_removed(path: Path) -> None:
    record(path)
    with raw(path) as (environment, tables), environment.begin(write=True) as transaction:
        bad = json.dumps({**FOUND, "questions": "many"}).encode()
        transaction.put(
            b"calibration", seal("settings", b"calibration", 1, bad), db=tables["settings"]
        )
    (problem,) = verify(path)
    assert (problem.table, problem.key) == ("settings", "'calibration'")
    assert "'questions'" in problem.what
    assert repair(path).mended == ["the calibration was damaged: removed, to be made anew"]
    assert verify(path) == []
    assert recorded(path) is None
