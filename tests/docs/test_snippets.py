"""Every block of Python, and every line of `sh`, in the documentation runs as it stands there."""

from __future__ import annotations

import contextlib
import io
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cli.main import main
from memdb import MemDB
from tests.docs.pages import PAGES, ROOT, Block, blocks, name_of, whole
from tests.engine.helpers import TokenWriter, WordEmbedder, make_memory

LIGHTHOUSE = "The keeper of the lighthouse of Veldmoor is Ottoline Brask."
FACTS = [
    {"id": "lighthouse", "text": LIGHTHOUSE},
    {"id": "fair", "text": "The spring fair of Veldmoor opens on the second Sunday of May."},
]
QUESTIONS = [
    {"question": "Who keeps the lighthouse?", "answers": ["Brask"], "document": "lighthouse"},
    {"question": "When does the fair open?", "answers": ["May"], "document": "fair"},
]
#: What a machine is made ready by, which the tests' own is.
READY = (".venv/bin/pip", "pip", "python3", ".", "make")


def run(page: Path, names: dict[str, Any], changed: Callable[[str], str] = str) -> list[str]:
    """Run a page's blocks in order, in the folder that is the current one; what each printed."""
    return [_run(block, names, changed) for block in blocks(page)]


def _run(block: Block, names: dict[str, Any], changed: Callable[[str], str]) -> str:
    if block.title:
        Path(block.title).parent.mkdir(parents=True, exist_ok=True)
        Path(block.title).write_text(block.text)
        return ""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        if block.kind == "python":
            exec(compile(changed(block.text), "<page>", "exec"), names)
        elif block.kind == "sh":
            for line in whole(changed(block.text)):
                program, *arguments = shlex.split(line)
                if program not in READY:
                    assert program == "memdb", line
                    main.main(arguments, standalone_mode=False)
    return printed.getvalue()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, with a corpus and questions in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MEMDB_PATH", raising=False)
    for name, lines in (("corpus.jsonl", FACTS), ("questions.jsonl", QUESTIONS)):
        Path(name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_the_readme_and_asking(folder: Path) -> None:
    names: dict[str, Any] = {}
    shell, python, *_ = run(ROOT / "README.md", names)
    assert "Brask" in shell
    with_memory, without, updated = python.splitlines()
    assert "Marrowgate" in with_memory
    assert "Marrowgate" not in without
    assert "Tillyport" in updated

    (asked,) = run(ROOT / "docs" / "asking.md", names)
    first, source, *_, last = asked.splitlines()
    assert "Tillyport" in first
    assert source.strip() == "100% pellonia"
    assert "Ines Wold" in last


def test_the_tutorial(folder: Path) -> None:
    printed = run(ROOT / "docs" / "tutorial.md", {})
    (asked,) = (text for text in printed if "harbour.md" in text and "Brask" in text)
    assert "Ottoline Brask" in asked
    assert "Ada Quist" in printed[-2]
    assert "fair.md" not in printed[-2].splitlines()[-1]
    answer, source, *_ = printed[-1].splitlines()
    assert "Ada Quist" in answer
    assert source.endswith("harbour.md")


def test_the_engine(folder: Path) -> None:
    writer = TokenWriter(reference_length=64)
    memory = make_memory(writer.shape, 1)
    names: dict[str, Any] = {
        "counts": np.diff(memory.offsets)[None],
        "positions": memory.positions,
        "keys": memory.keys,
        "values": memory.values,
    }
    with MemDB.create(folder / "db", embedder=WordEmbedder(), writer=writer) as db:
        names |= {"db": db, "embeddings": WordEmbedder().embed(["The heron is blue."])}
        first, second = (
            block for block in blocks(ROOT / "docs" / "engine.md") if block.kind == "python"
        )
        counts, filtered, found, changes = _run(first, names, str).splitlines()
        assert counts == "2 True heron"
        assert filtered == "1 ['heron']"
        assert found.endswith("heron The blue heron stands in the reeds.")
        assert changes == "[(4, 'deleted')]"
        db.delete("heron")
        _run(second, names, str)
        assert db.get("heron").text == "The heron is blue."


def test_files_and_folders(folder: Path) -> None:
    Path("docs").mkdir()
    for name in ("a.md", "b.txt", "drafts.py"):
        Path("docs", name).write_text(f"This is {name}.")
    Path("notes.md").write_text("Notes.")
    Path("faq.csv").write_text("slug,answer\ntide,Twice a day.\n")
    writer = TokenWriter(reference_length=64)
    with MemDB.create(folder / "db", embedder=WordEmbedder(), writer=writer) as db:
        (printed,) = run(ROOT / "docs" / "ingest.md", {"db": db})
        gathered, *documents = printed.splitlines()
        assert gathered == "{'markdown': 2, 'text': 1, 'code': 1} []"
        assert documents == ["a.md markdown 13", "b.txt text 14", "drafts.py code 18"]
        assert {*db} == {"a.md", "b.txt", "drafts.py", "notes.md", "faq.csv#tide"}


def test_a_generation() -> None:
    names: dict[str, Any] = {}
    run(ROOT / "docs" / "generation.md", names)
    assert isinstance(names["next_token"], int)


def test_an_evaluation(folder: Path) -> None:
    names: dict[str, Any] = {}
    run(ROOT / "docs" / "evaluation.md", names)
    assert names["found"].best.share is not None


def test_a_training(folder: Path) -> None:
    storms = [
        {"id": str(year), "text": "\n\n".join([f"{LIGHTHOUSE} So it was in {year}."] * 12)}
        for year in range(1800, 1804)
    ]
    Path("corpus.jsonl").write_text("".join(json.dumps(line) + "\n" for line in storms))

    def short(code: str) -> str:
        assert "hours=8" in code
        return code.replace("hours=8", "steps=1, self_questions=0, held_out=1")

    run(ROOT / "docs" / "training.md", {}, short)
    assert Path("trained/adapter/adapter_model.safetensors").is_file()


def test_every_page_with_code_is_run_here() -> None:
    with_code = {
        name_of(page)
        for page in PAGES
        if any(block.kind in ("python", "sh") for block in blocks(page))
    }
    here = Path(__file__).read_text()
    missing = {name for name in with_code if f'"{Path(name).name}"' not in here}
    assert not missing
