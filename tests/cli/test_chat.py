"""`memdb chat`: from a pipe, and at a terminal."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import model_adapter
from memdb import InvalidInputError
from model_adapter import Chat, LanguageModel, Options, SentenceEmbedder, open_database
from tests.cli.conftest import Run, rows
from tests.cli.small import make_database, model_folder
from tests.cli.test_program import PROGRAM, TIMEOUT
from tests.helpers import FACTS

SHORT = ("--max-new-tokens", "8")
QUESTIONS = [fact.question for fact in FACTS[:3]]


@pytest.fixture(autouse=True)
def _database(run: Run, tmp_path: Path, minilm: SentenceEmbedder) -> None:
    make_database(tmp_path, minilm)


def expected(tmp_path: Path, questions: list[str], **options: Any) -> str:
    """What a conversation prints."""
    with open_database(tmp_path / "db") as database:
        chat = Chat(database, max_new_tokens=8, **options)
        return "".join(chat.say(question).result.text + "\n" for question in questions)


def test_lines_of_a_pipe_are_answered_on_stdout(run: Run, tmp_path: Path) -> None:
    run("warm")
    lines = "\n \n".join(QUESTIONS) + "\r\n"
    shown = run("chat", *SHORT, input=lines)
    assert (shown.stdout, shown.stderr) == (expected(tmp_path, QUESTIONS), "")
    alone = run("chat", "--no-memory", "--system", "Be brief.", *SHORT, input=lines).stdout
    assert alone == expected(tmp_path, QUESTIONS, mode="none", system="Be brief.")
    assert alone != shown.stdout
    assert run("chat", input="").stdout == ""


def test_options_are_those_of_the_adapter(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def refused(db: object, **options: Any) -> Any:
        seen.append(options)
        raise InvalidInputError("seen")

    monkeypatch.setattr(model_adapter, "Chat", refused)
    run("chat", code=2)
    own = {"window": 1024, "remember_turns": False, "system": None}
    assert {name: seen[0].pop(name) for name in own} == own
    assert Options(**seen[0]) == Options(cite=True)
    run("chat", "--window", "9", "--remember-turns", "--system", "s", "--no-memory", code=2)
    assert {name: seen[1].pop(name) for name in own} == {
        "window": 9,
        "remember_turns": True,
        "system": "s",
    }
    assert Options(**seen[1]) == Options(mode="none")
    more = ("--min-score", "0.25", "--no-weigh")
    run("chat", "--where", "rank=1", "--seed", "3", "--stop", "x", *more, code=2)
    assert (seen[2]["min_score"], seen[2]["weigh"]) == (0.25, False)
    assert seen[2]["where"] == {"rank": {"$eq": 1}}
    assert (seen[2]["seed"], seen[2]["stop"]) == (3, ("x",))


def test_commands(run: Run) -> None:
    lines = [
        "/remember The heron left.",
        FACTS[0].question,
        "/sources",
        "/forget pellonia",
        "/help",
        "  /a line that begins with a blank is said",
        "/exit",
        "Never said.",
    ]
    shown = run("chat", *SHORT, "--no-weigh", input="\n".join(lines))
    told = shown.stderr.splitlines()
    assert told[0].startswith("remembered as sha256:")
    assert told[1].startswith("sources, by their share")
    assert [line.split()[0] for line in told[2:7]] == ["1.", "2.", "3.", "4.", "5."]
    assert any("pellonia" in line for line in told[2:7])
    assert told[7] == "pellonia is forgotten"
    assert told[8].split()[0] == "/remember"
    assert told[-1] == "Ctrl-C stops its answer."
    listed = {row["id"]: row for row in rows(run("list", "--json"))}
    assert "pellonia" not in listed
    (kept,) = [row for id, row in listed.items() if id.startswith(told[0].split()[-1])]
    assert len(told[0].split()[-1]) == len("sha256:") + 8
    assert (kept["text"], kept["metadata"], kept["warm"]) == (
        "The heron left.",
        {"source": "chat"},
        1,
    )


def test_what_was_remembered_is_forgotten_by_a_few_letters(run: Run) -> None:
    texts = ["The heron left.", "The whale came.", "The owl stays."]
    told = run("chat", input="".join(f"/remember {text}\n" for text in texts)).stderr
    ids = [line.split()[-1] for line in told.splitlines()]
    kept = {row["text"] for row in rows(run("list", "--json", "--where", "source=chat"))}
    assert kept == set(texts)
    for text in texts:  # as they were, by their whole ids
        (row,) = [r for r in rows(run("list", "--json")) if r["text"] == text]
        run("delete", row["id"])
    remembered = [f"/remember {text}" for text in texts]
    letters = ids[0].removeprefix("sha256:")
    lines = [*remembered, "/forget last", "/forget last", f"/forget {letters}", "/forget last"]
    told = run("chat", input="\n".join(lines)).stderr.splitlines()[3:]
    assert told[:3] == [f"{id} is forgotten" for id in (ids[2], ids[1], ids[0])]
    assert "there is no document 'last'" in told[3]
    lines = [*remembered[:2], f"/forget {ids[1]}", "/forget sha256:", "/forget x", "/forget s"]
    told = run("chat", input="\n".join(lines)).stderr.splitlines()[2:]
    assert told[0] == f"{ids[1]} is forgotten"
    assert told[1] == f"{ids[0]} is forgotten"
    assert "there is no document 'x'" in told[2]
    again = ("/remember The heron left.", "/remember The whale came.", "/forget sha256:")
    told = run("chat", input="\n".join(again)).stderr.splitlines()
    assert told[2].startswith("'sha256:' is the beginning of sha256:")
    assert len(rows(run("list", "--json", "--where", "source=chat"))) == 2


def test_sources_and_timings_where_they_are_asked_for(run: Run) -> None:
    run("warm")
    lines = f"/remember {FACTS[0].question} Nobody knows.\n{FACTS[0].question}\n"
    told = run("chat", "-v", *SHORT, "--no-weigh", input=lines).stderr.splitlines()
    assert told[1].startswith("sources, by their share")
    assert "prompt tokens and 8 new ones; retrieve" in told[-1]
    short = told[0].split()[-1]
    assert any(f"  {short}  " in line for line in told[2:-1])
    alone = run("chat", "-v", "--no-memory", *SHORT, input="Hm?\n").stderr
    assert "prompt tokens and 8 new ones; retrieve 0.00 s" in alone


def test_a_mistake_is_a_line_and_the_session_goes_on(run: Run, tmp_path: Path) -> None:
    run("warm")
    lines = [
        "/nope",
        "/forget nobody",
        "/forget",
        "/remember",
        "/remember The heron left.",
        "/sources",
        "long " * 300,
        "Hi \xff",
        "/remember The heron left.",
        "/remember",
        "/forget " + "x" * 500,
        QUESTIONS[0],
    ]
    data = "\n".join(lines).encode("latin-1")
    shown = run("chat", *SHORT, "--window", "200", input=data)
    told = shown.stderr.splitlines()
    wanted = [
        "there is no command /nope",
        "there is no document 'nobody'",
        "/forget needs the id",
        "/remember needs a text",
        "remembered as sha256:",
        "there was no answer yet",
        "the message has ",
        "line 8 is not UTF-8 (byte 4)",
        "that is remembered already",
        "/remember needs a text",
        "no document can have the id",
    ]
    assert len(told) == len(wanted)
    for line, beginning in zip(told, wanted, strict=True):
        assert line.startswith(beginning)
    assert shown.stdout == expected(tmp_path, QUESTIONS[:1])


def test_without_memories_there_are_no_sources(run: Run) -> None:
    for without in (("--no-memory",), ("--min-score", "1")):
        shown = run("chat", *without, *SHORT, input="Hm?\n/sources\n")
        assert shown.stderr == "the last answer rests on no memory\n"


def test_turns_that_leave_are_remembered(run: Run) -> None:
    lines = "\n".join(["My whale is called Ottoline.", "Hm?", " ".join(QUESTIONS)])
    run("chat", *SHORT, "--window", "120", "--remember-turns", input=lines)
    found = rows(run("list", "--json", "--where", "source=chat"))
    assert found
    assert found[0]["text"].startswith("User: ")


def test_an_answer_that_is_stopped(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("warm")
    model_run = LanguageModel.run
    calls = 0

    def interrupted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt
        return model_run(*arguments, **options)

    monkeypatch.setattr(LanguageModel, "run", interrupted)
    shown = run("chat", *SHORT, input=f"{QUESTIONS[0]}\n/sources\n{QUESTIONS[1]}\n")
    assert shown.stderr.startswith("(stopped)\nsources, by")
    whole = expected(tmp_path, QUESTIONS[:1]).rstrip("\n")
    # What is said may hold line breaks of its own.
    pairs = enumerate(zip(shown.stdout, whole, strict=False))
    said = whole[: next((at for at, (one, other) in pairs if one != other), len(whole))]
    assert said
    assert said != whole
    answer = shown.stdout[len(said) :]
    assert answer.startswith("\n")
    assert answer.strip()


def test_what_a_chat_cannot_be_is_an_error(run: Run, minilm: SentenceEmbedder) -> None:
    assert "window must be a whole number" in run("chat", "--window", "0", code=2).stderr
    assert "temperature must be" in run("chat", "--temperature", "-1", code=2).stderr
    assert "KEY=VALUE" in run("chat", "--where", "x", code=2).stderr
    run("init", "--db", "plain", "--model", model_folder(minilm), "--framing", "plain")
    assert "the framing 'plain': it knows no turns" in run("chat", "--db", "plain", code=2).stderr


def test_at_a_terminal(run: Run) -> None:
    """There is a prompt; Ctrl-C stops an answer, and at the prompt ends all."""
    run("warm")
    ours, its = os.openpty()
    child = subprocess.Popen(
        [PROGRAM, "chat", "--max-new-tokens", "600", "--no-weigh"],
        stdin=its,
        stdout=its,
        stderr=its,
        env={**os.environ, "TERM": "xterm"},
    )
    os.close(its)
    shown = b""

    def wait_for(text: bytes) -> None:
        nonlocal shown
        end = time.monotonic() + TIMEOUT
        while text not in shown:
            ready, _, _ = select.select([ours], [], [], max(0, end - time.monotonic()))
            assert ready, shown
            shown += os.read(ours, 65536)
        shown = shown.partition(text)[2]

    try:
        wait_for(b"/help lists what can be typed")
        wait_for(b"> ")
        os.write(ours, b"Hm?\n")
        wait_for(b"remembering")
        wait_for(b"\x1b[?25h")  # the cursor is back: the answer has begun
        child.send_signal(signal.SIGINT)
        wait_for(b"(stopped)")
        wait_for(b"> ")
        os.write(ours, b"/sources\n")
        wait_for(b"sources, by their share")
        wait_for(b"> ")
        while child.poll() is None:  # readline may miss one that comes just before it waits
            child.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                child.wait(10)
        assert child.returncode == 0
    finally:
        child.kill()
        os.close(ours)


def test_without_a_standard_input() -> None:
    done = subprocess.run(
        f"{PROGRAM} chat <&-", shell=True, capture_output=True, text=True, timeout=TIMEOUT
    )
    assert (done.returncode, "there is no standard input" in done.stderr) == (2, True)
