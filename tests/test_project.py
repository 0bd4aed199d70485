"""The house as a whole: rooms keep to their direction."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import memdb
from memdb import __version__

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "memdb": {"memdb"},
    "model_adapter": {"model_adapter", "memdb"},
    "cli": {"cli", "model_adapter", "memdb"},
}


def imports(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_rooms_import_in_one_direction(room: str) -> None:
    for file in (ROOT / room).rglob("*.py"):
        for name in imports(file):
            top = name.split(".")[0]
            assert top not in MAY_IMPORT or top in MAY_IMPORT[room], f"{file} imports {name}"
            if room == "memdb":
                assert top not in {"torch", "transformers", "click"}, f"{file} imports {name}"
            if room != "memdb" and top == "memdb":  # the engine by its public names alone
                assert name == "memdb", f"{file} imports {name}"


#: The engine's rooms, from the ground up: each sees only those below its floor.
FLOORS = (
    {"errors"},
    {"types"},
    {"protocols"},
    {"storage", "codecs", "background", "cutting"},
    {"memories", "filters", "index", "keywords"},
    {"ingest"},
    {"retrieval", "care", "exchange", "files"},
    {"searchable"},
    {"readable", "namespaces"},
    {"writable", "maintainable"},
    {"transaction"},
    {"database"},
    {"importing"},
    {"__init__"},
)


#: The same of the adapter.
ADAPTER_FLOORS = (
    {"files", "attention", "gguf"},
    {"catalog"},
    {"models"},
    {"prompts", "selections"},
    {"writing"},
    {"generation"},
    {"api"},
    {"evaluation"},
    {"training"},
    {"calibration"},
    {"measuring", "warming"},
    {"__init__"},
)


@pytest.mark.parametrize(
    ("package", "rooms"), [("memdb", FLOORS), ("model_adapter", ADAPTER_FLOORS)]
)
def test_rooms_import_downwards(package: str, rooms: tuple[set[str], ...]) -> None:
    floors = {room: floor for floor, on_it in enumerate(rooms) for room in on_it}
    for file in (ROOT / package).rglob("*.py"):
        room = file.relative_to(ROOT / package).parts[0].removesuffix(".py")
        assert room in floors, f"{file} is on no floor"
        for name in imports(file):
            where = name.split(".")[1:2]
            if name.startswith(f"{package}.") and where != [room]:
                assert floors[where[0]] < floors[room], f"{file} imports {name}"
            assert name != package, f"{file} imports the package that it is part of"


def test_lmdb_stays_in_the_stores_own_room() -> None:
    for file in (ROOT / "memdb").rglob("*.py"):
        if file.relative_to(ROOT / "memdb").parts[0] != "storage":
            assert not any(name.split(".")[0] == "lmdb" for name in imports(file)), file
            assert "._inner" not in file.read_text(), file


def test_every_name_of_the_first_release_imports() -> None:
    assert memdb.Batch is memdb.DocumentBatch
    assert all(hasattr(memdb, name) for name in memdb.__all__)


def test_the_engine_runs_without_a_model_library() -> None:
    code = (
        "import sys, memdb; loaded = {'torch', 'transformers', 'sentence_transformers', "
        "'model_adapter', 'cli'} & set(sys.modules); sys.exit(str(loaded) if loaded else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_docs_name_files_that_there_are() -> None:
    for page in (ROOT / "docs").glob("*.md"):
        for name in re.findall(r"\b(?:memdb|model_adapter|cli)/[\w/]+\.py", page.read_text()):
            assert (ROOT / name).is_file(), f"{page.name} names {name}"


def test_one_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "memdb.__version__"}
    assert __version__ in (ROOT / "CHANGELOG.md").read_text()
