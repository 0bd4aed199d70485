"""A way to call the command line, and a database of facts made with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from cli.main import main
from tests.helpers import FACTS

Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Call `memdb` with arguments, in a folder of its own, against the database `db` there."""
    monkeypatch.setenv("MEMDB_PATH", str(tmp_path / "db"))
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str, code: int = 0, **options: Any) -> Result:
        result = CliRunner().invoke(main, list(arguments), **options)
        shown = f"{result.stdout}\n{result.stderr}\n{result.exception!r}"
        assert result.exit_code == code, shown
        assert "Traceback" not in result.output
        return result

    return call


def rows(result: Result) -> list[dict[str, Any]]:
    """The JSON lines that a command printed."""
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    lines = [
        {"id": fact.id, "text": fact.text, "metadata": {"kind": "fact", "rank": rank}}
        for rank, fact in enumerate(FACTS)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
