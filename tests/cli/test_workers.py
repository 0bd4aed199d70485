"""`--workers`: several processes write memories, and all of them end when they should."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Run, rows

PROGRAM = str(Path(sys.executable).parent / "memdb")
TIMEOUT = 300
LINES = 40


def memories(run: Run) -> int:
    return int(rows(run("stats", "--json"))[0]["memories"])


def wait_until(truth: Callable[[], bool]) -> None:
    end = time.monotonic() + TIMEOUT
    while not truth():
        assert time.monotonic() < end
        time.sleep(0.3)


def alive(group: int) -> list[str]:
    """The processes of a group, but for those that nobody has buried yet."""
    done = subprocess.run(
        ["ps", "-A", "-o", "pgid=,stat=,args="], capture_output=True, text=True, check=True
    )
    found = [line.split(None, 2) for line in done.stdout.splitlines()]
    return [args for pgid, stat, *args in found if int(pgid) == group and stat[0] != "Z"]


def start(*arguments: str) -> subprocess.Popen[str]:
    """The program, in a process group of its own, as a terminal has it."""
    return subprocess.Popen(
        [PROGRAM, *arguments],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def ships(path: Path, *more: str) -> str:
    """A corpus, and texts behind it."""
    texts = [*(f"Ship {i} has {i} masts. " * 3 for i in range(LINES)), *more]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def test_an_interruption_ends_them_and_the_command_goes_on(run: Run, tmp_path: Path) -> None:
    corpus = tmp_path / "many.jsonl"
    run("init", "--selection", "paper")
    child = start("ingest", ships(corpus), "--workers", "2")
    try:
        wait_until(lambda: memories(run) > 0 or child.poll() is not None)
        os.killpg(child.pid, signal.SIGINT)  # Ctrl-C: all texts are in, some memories are
        _, shown = child.communicate(timeout=TIMEOUT)
    finally:
        child.kill()
    assert child.returncode == 130, shown
    assert "interrupted; what was written stays" in shown
    assert "Traceback" not in shown
    wait_until(lambda: not alive(child.pid))
    (stats,) = rows(run("stats", "--json"))
    assert stats["documents"] == LINES
    assert 0 < stats["memories"] < LINES
    assert run("warm").stdout == f"{stats['cold']} memories written\n"

    more = ships(corpus, "One more.")
    (report,) = rows(run("ingest", more, "--json", "--workers", "2"))
    assert (report["unchanged"], report["references"], report["memories"]) == (LINES, 1, 1)
    assert run("warm", "--workers", "2").stdout == "0 memories written\n"
    run("verify")


@pytest.mark.slow
def test_they_end_when_nobody_asks_them_any_more(run: Run, tmp_path: Path) -> None:
    run("init", "--selection", "paper")
    run("ingest", ships(tmp_path / "many.jsonl"), "--cold")
    child = start("warm", "--workers", "2")
    try:
        wait_until(lambda: memories(run) > 0 or child.poll() is not None)
        child.kill()
        wait_until(lambda: not alive(child.pid))
    finally:
        child.kill()
        _, shown = child.communicate(timeout=TIMEOUT)
    assert child.returncode == -signal.SIGKILL
    assert "Traceback" not in shown
    assert 0 < memories(run) < LINES
    run("verify")


@pytest.mark.parametrize("command", ["warm", "ingest"])
def test_workers_are_counted_from_one(run: Run, command: str) -> None:
    assert "0 is not in the range" in run(command, "x", "--workers", "0", code=2).stderr


def test_cold_means_no_workers(run: Run, corpus: Path) -> None:
    run("init", "--selection", "paper")
    result = run("ingest", str(corpus), "--cold", "--workers", "2")
    assert "4 references and 0 memories written" in result.stdout
