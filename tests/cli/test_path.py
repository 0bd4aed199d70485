"""The whole path through the command line, with the real model and the real embedder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from cli.commands import COMMANDS
from tests.cli.conftest import Run, rows
from tests.helpers import FACTS, tiny_model

PELLONIA = FACTS[0]
TIMEOUT = 300  # seconds for a program to end; it takes a few


def answer(run: Run, *options: str) -> str:
    (row,) = rows(run("generate", PELLONIA.question, "--json", "--max-new-tokens", "24", *options))
    return str(row["text"])


def test_it_knows_what_it_read(run: Run, corpus: Path) -> None:
    # With the default selection, so small a model fumbles one of them.
    run("init", "--selection", "reconstruction")
    run("ingest", str(corpus), "--cold")
    right = {"with": 0, "without": 0}
    for fact in FACTS:
        for name, options in (("with", ()), ("without", ("--no-memory",))):
            (row,) = rows(
                run("generate", fact.question, "--json", "--max-new-tokens", "24", *options)
            )
            right[name] += fact.answer in row["text"]
    assert right == {"with": len(FACTS), "without": 0}


def test_it_forgets_what_is_deleted_and_learns_what_is_updated(run: Run, corpus: Path) -> None:
    run("ingest", str(corpus))
    assert "Marrowgate" in answer(run)

    changed = PELLONIA.text.replace("Marrowgate", "Tillyport")
    (row,) = rows(run("update", PELLONIA.id, "--text", changed, "--json"))
    assert (row["version"], row["warm"]) == (2, 1)
    assert "Tillyport" in answer(run)
    assert "Marrowgate" not in answer(run)

    run("delete", PELLONIA.id)
    assert "Tillyport" not in answer(run)
    assert PELLONIA.id not in [row["id"] for row in rows(run("list", "--json"))]


def test_every_command(run: Run, corpus: Path, tmp_path: Path) -> None:
    made = run("init", "--framing", "plain", "--budget", "720", "--codec", "exact")
    assert "plain framing" in made.stderr
    (report,) = rows(run("ingest", str(corpus), "--cold", "--json"))
    assert report == {
        "inserted": 4, "updated": 0, "unchanged": 0, "references": 4, "memories": 0, "deleted": 0,
        "kinds": {"jsonl": 4}, "passed_over": {}, "blank_rows": 0, "notes": [],
    }  # fmt: skip
    assert "4 unchanged; 0 references and 0 memories" in run("ingest", str(corpus), "--cold").stdout

    found = rows(run("query", "animals and capitals", "-k", "2", "--json"))
    assert len(found) == 2
    assert found[0]["document"] == "pellonia"
    assert found[0]["metadata"] == {"kind": "fact", "rank": 0}
    assert "pellonia" in run("query", "animals and capitals").stdout
    assert "keyword_score" not in found[0]
    found = rows(run("query", "marrowgate!", "--mode", "keyword", "--json"))
    assert [row["document"] for row in found] == ["pellonia"]
    assert found[0]["score"] == found[0]["keyword_score"] > 0
    found = rows(run("query", "animals, marrowgate", "--mode", "hybrid", "--json"))
    assert found[0]["document"] == "pellonia"
    assert found[0]["keyword_score"] > 0
    assert found[0]["score"] <= 1
    assert [row["keyword_score"] for row in found[1:]] == [0, 0, 0]

    more = json.dumps({"text": "A line without an id."}) + "\n"
    assert "1 document inserted" in run("ingest", "-", "--cold", input=more).stdout
    assert len(rows(run("list", "--json"))) == 5
    assert [row["id"] for row in rows(run("list", "--json", "--where", "rank=2"))] == ["zintle"]
    assert len(run("list", "--limit", "2").stdout.splitlines()) == 2

    assert run("warm", "zintle").stdout == "1 memory written\n"
    assert rows(run("get", "zintle", "--json"))[0]["warm"] == 1
    assert "eleven vowels" in run("get", "zintle").stdout

    (stats,) = rows(run("stats", "--json"))
    assert (stats["documents"], stats["memories"], stats["cold"]) == (5, 1, 4)
    assert len(stats["memory"].pop("weights")) == 30 * 3  # the catalogue's, of each head
    assert stats["memory"] == {
        "codec": "exact",
        "selection": "contribution",
        "budget": 720,
        "floor": 40,
        "spread": "all",
        "precision": "exact",
    }
    assert "plain framing; budget 720, codec exact" in run("stats").stdout

    text = tmp_path / "new.txt"
    text.write_text("The heron left Pellonia.")
    run("update", "pellonia", "--file", str(text), "--metadata", '{"kind": "news"}', "--cold")
    (row,) = rows(run("get", "pellonia", "--json"))
    assert (row["text"], row["metadata"]) == ("The heron left Pellonia.", {"kind": "news"})

    run("generate", "Say something.", "--max-new-tokens", "3", "--rag", "--temperature", "1")
    shown = run("generate", "Say something.", "--max-new-tokens", "3", "--memories", "1", "-v")
    assert "prompt, from token 0, with:" in shown.stderr

    run("delete", "--where", "kind=fact", code=2)
    assert len(rows(run("delete", "--where", "kind=fact", "--yes", "--json"))) == 3
    assert len(rows(run("list", "--json"))) == 2


def test_a_pipe_as_a_corpus(run: Run, corpus: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)  # what `memdb ingest <(zcat corpus.jsonl.gz)` passes
    writer = threading.Thread(target=pipe.write_bytes, args=(corpus.read_bytes(),), daemon=True)
    writer.start()
    assert "4 documents inserted" in run("ingest", str(pipe), "--cold").stdout
    writer.join(TIMEOUT)


def test_models_are_listed_and_pulled(run: Run) -> None:
    listed = run("model", "list").stdout
    assert "smollm2-135m" in listed
    assert "Apache-2.0" in listed
    assert Path(run("model", "pull", "all-minilm-l6-v2").stdout.strip()).is_dir()


def test_every_help_ends_with_an_example(run: Run) -> None:
    names = [[str(command.name)] for command in COMMANDS if command.name != "model"]
    for name in [*names, ["model", "pull"], ["model", "list"]]:
        text = run(*name, "--help").stdout
        assert "Example:" in [line.strip() for line in text.splitlines()[-5:]], text
        assert text.splitlines()[-1].strip().startswith(("memdb", "cat")), text


def test_as_a_program(run: Run, corpus: Path) -> None:
    """The installed command, in a process of its own, with its progress on a terminal."""
    program = str(Path(sys.executable).parent / "memdb")
    master, slave = os.openpty()
    parts: list[bytes] = []

    def read() -> None:  # while it runs: a terminal that is full makes it wait
        with suppress(OSError):  # all read, and no one there to write more
            while part := os.read(master, 65536):
                parts.append(part)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        done = subprocess.run(
            [program, "ingest", str(corpus)],
            stdout=subprocess.PIPE,
            stderr=slave,
            text=True,
            check=True,
            timeout=TIMEOUT,
        )
    finally:
        os.close(slave)
        reader.join(TIMEOUT)
        os.close(master)
    shown = b"".join(parts)
    assert "4 documents inserted" in done.stdout
    assert "4 references and 4 memories written" in done.stdout
    assert b"references/s" in shown
    assert b"writing memories" in shown
    version = subprocess.run(
        [program, "--version"], capture_output=True, text=True, check=True, timeout=TIMEOUT
    )
    assert version.stdout.startswith("memdb, version")


def test_an_interrupted_ingest_says_so_and_goes_on(run: Run, tmp_path: Path) -> None:
    many = tmp_path / "many.jsonl"
    lines = [{"id": f"ship {i}", "text": f"Ship {i} has {i} masts. " * 3} for i in range(40)]
    many.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run("init")
    child = subprocess.Popen(
        [str(Path(sys.executable).parent / "memdb"), "ingest", str(many)],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        end = time.monotonic() + TIMEOUT
        while rows(run("stats", "--json"))[0]["memories"] == 0 and child.poll() is None:
            assert time.monotonic() < end
            time.sleep(0.05)
        child.send_signal(signal.SIGINT)  # all texts are in, some memories are
        _, shown = child.communicate(timeout=TIMEOUT)
    finally:
        child.kill()
    assert child.returncode == 130, shown
    assert "interrupted; what was written stays" in shown
    assert "Traceback" not in shown
    (stats,) = rows(run("stats", "--json"))
    assert stats["documents"] == 40
    assert 0 < stats["memories"] < 40
    (report,) = rows(run("ingest", str(many), "--json"))
    assert (report["inserted"], report["unchanged"]) == (0, 40)
    assert report["memories"] == stats["cold"]


def test_a_model_that_moved_can_be_named(run: Run, corpus: Path, tmp_path: Path) -> None:
    model = tiny_model()
    model.model.save_pretrained(tmp_path / "here")
    model.tokenizer.save_pretrained(tmp_path / "here")
    run("ingest", str(corpus), "--cold", "--model", "here")
    (tmp_path / "here").rename(tmp_path / "there")
    assert "cannot be loaded" in run("warm", "zintle", code=2).stderr
    assert run("warm", "zintle", "--model", "there").stdout == "1 memory written\n"
    refused = run("warm", "--model", "smollm2-135m", code=2).stderr
    assert "does not fit this database" in refused


def test_a_corpus_and_its_database_in_step(run: Run, corpus: Path) -> None:
    """`ingest --prune` deletes what the file no longer has; `warm --top` writes the memories that
    are asked for most; `query --where` finds among some; `rewrite` writes all anew."""
    run("init", "--key", "rank", "--selection", "paper", "--budget", "90")
    run("ingest", str(corpus), "--cold")
    lines = corpus.read_text().splitlines(keepends=True)
    corpus.write_text("".join(lines[:3]))
    result = run("ingest", str(corpus), "--cold", "--prune")
    assert "3 unchanged, 1 deleted" in result.stdout
    assert len(rows(run("list", "--json"))) == 3

    found = rows(run("query", PELLONIA.question, "--json", "--where", "rank>=1"))
    assert [row["metadata"]["rank"] >= 1 for row in found] == [True, True]

    assert run("warm", "--top", "1").stdout == "0 memories written\n"  # none was asked for yet
    assert "--all goes with neither" in run("warm", "--all", "--top", "1", code=2).stderr
    assert run("warm", "zintle").stdout == "1 memory written\n"
    result = run("rewrite", "--budget", "180", "--codec", "exact")
    assert result.stdout == "3 documents; 1 memory written\n"
    (stats,) = rows(run("stats", "--json"))
    assert (stats["memory"]["budget"], stats["memory"]["codec"]) == (180, "exact")
    assert run("warm", "--all").stdout == "2 memories written\n"
    run("verify")
