"""The command line as a process: signals, closed pipes, libraries that do not fit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAM = str(Path(sys.executable).parent / "memdb")
TIMEOUT = 300


def writing_end(pipe: Path, child: subprocess.Popen[str]) -> int:
    """A named pipe's writing end, as soon as the child reads it."""
    end = time.monotonic() + TIMEOUT
    while True:
        try:
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            assert child.poll() is None
            assert time.monotonic() < end
            time.sleep(0.02)


@pytest.mark.parametrize(
    ("command", "goes_on"), [(("update", "x", "--file"), False), (("ingest",), True)]
)
def test_only_what_goes_on_says_so_when_interrupted(
    tmp_path: Path, command: tuple[str, ...], goes_on: bool
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    child = subprocess.Popen([PROGRAM, *command, str(pipe)], stderr=subprocess.PIPE, text=True)
    try:
        writer = writing_end(pipe, child)  # it is there, and waits for more
        child.send_signal(signal.SIGINT)
        _, shown = child.communicate(timeout=TIMEOUT)
        os.close(writer)
    finally:
        child.kill()
    assert child.returncode == 130, shown
    words = "interrupted; what was written stays, and the same command goes on from there"
    assert shown.strip() == (words if goes_on else "interrupted")


def test_a_reader_that_left_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [PROGRAM, "list", "--help"], stdout=writing, stderr=subprocess.PIPE, timeout=TIMEOUT
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize(
    ("code", "messages"),
    [
        ("import no_such_library", ["no_such_library is not installed"]),
        ("", ["cannot be loaded", "transformers>=", "pip install -U 'explicit-memdb[adapter]'"]),
    ],
    ids=["missing", "too old"],
)
def test_an_adapter_that_cannot_be_loaded(tmp_path: Path, code: str, messages: list[str]) -> None:
    """In place of transformers: a package without the modules that are asked of it."""
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").write_text(code)
    done = subprocess.run(
        [PROGRAM, "init", "--db", str(tmp_path / "db")],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 2, done.stderr
    for message in messages:
        assert message in done.stderr
    assert ("not installed" in done.stderr) == bool(code)


def loaded_by(*arguments: str) -> set[str]:
    """The packages that a command loads."""
    code = (
        "import sys\nfrom cli.main import main\ntry:\n    main()\nfinally:\n"
        "    print(*{name.split('.')[0] for name in sys.modules}, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=TIMEOUT
    )
    assert done.returncode == 0, done.stderr
    return set(done.stderr.splitlines()[-1].split())


def test_a_help_loads_no_engine_and_a_query_no_model(tmp_path: Path) -> None:
    """What takes seconds to load is loaded by what needs it."""
    assert not loaded_by("--help") & {"memdb", "numpy", "torch", "transformers"}
    db = str(tmp_path / "db")
    subprocess.run(
        [PROGRAM, "ingest", "-", "--db", db, "--cold"],
        input=b'{"id": "a", "text": "The blue heron stands in the reeds."}',
        check=True,
        timeout=TIMEOUT,
    )
    model = {"torch", "transformers", "sentence_transformers"}
    assert not loaded_by("query", "a bird", "--db", db) & model
    assert not loaded_by("stats", "--db", db) & model
    assert not loaded_by("get", "a", "--db", db) & model
