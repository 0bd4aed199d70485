"""`memdb train`, and databases made with what it trained."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest

from model_adapter import LanguageModel, training
from tests.adapter.adapted import model_folder
from tests.cli.conftest import Run, rows
from tests.cli.test_program import PROGRAM, TIMEOUT
from tests.helpers import FACTS

QUICK = (
    *("--corpus", "corpus.jsonl", "--out", "out", "--model", "model"),
    *("--self-questions", "0", "--held-out", "0", "--budgets", "100,200"),
)


@pytest.fixture(autouse=True)
def _model(tmp_path: Path, corpus: Path) -> None:
    model_folder(tmp_path / "model")


def test_an_adapter_from_training_to_an_answer(run: Run, tmp_path: Path) -> None:
    trained = run("train", *QUICK, "--steps", "2", "--plot", "out/log.svg", "--framings", "plain")
    assert trained.stdout.strip() == "out/adapter"
    assert "2 steps in 0.00 hours" in trained.stderr
    assert (tmp_path / "out" / "log.svg").stat().st_size > 1000
    again = run("train", *QUICK, "--steps", "2", "--framings", "plain")  # it is done
    assert "2 steps" in again.stderr
    recipe = json.loads((tmp_path / "out" / "adapter" / "recipe.json").read_text())
    assert recipe["data"]["corpora"] == ["corpus.jsonl"]
    assert recipe["data"]["references"] == len(FACTS)
    language = LanguageModel.load(str(tmp_path / "model"))
    read = training.read(language, [tmp_path / "corpus.jsonl"])
    assert recipe["data"]["fingerprint"] == read.fingerprint
    assert recipe["recipe"]["budgets"] == [100, 200]

    made = run("init", "--model", "model", "--adapter", "out/adapter", "--codec", "exact")
    assert "with the adapter" in made.stderr
    run("ingest", "corpus.jsonl")
    (stats,) = rows(run("stats", "--json"))
    assert stats["memory"]["adapter"] == str(tmp_path / "out" / "adapter")
    assert stats["memories"] == len(FACTS)
    answer = run("generate", FACTS[0].question, "--max-new-tokens", "3", "--json")
    (row,) = rows(answer)
    assert row["chunks"][0]["references"]

    refused = run("generate", "x", "--adapter", "none", code=2)
    assert "memdb rewrite --db" in refused.stderr
    assert "--adapter none" in refused.stderr
    run("rewrite", "--adapter", "none")
    assert "adapter" not in rows(run("stats", "--json"))[0]["memory"]


def test_adapters_are_listed(run: Run) -> None:
    listed = run("model", "list").stdout
    assert "smollm2-135m-memory3" in listed
    assert "qwen2.5-coder-0.5b-memory3" in listed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give either steps or hours"),
        (("--steps", "1", "--hours", "1"), "give either steps or hours"),
        (("--steps", "1", "--budgets", "many"), "'many' is not of the form 360,720"),
        (("--steps", "1", "--references", "a-b"), "'a-b' is not of the form 1-5"),
        (("--steps", "1", "--budgets", "100000"), "budget must be 1 to 768"),
        (("--steps", "1", "--framings", "prose"), "framings are 'plain' and 'chat'"),
        (("--steps", "1", "--plot", "log.txt"), "a picture ends in .svg, .png, .pdf"),
        (("--steps", "1", "--corpus", "none.jsonl"), "cannot read 'none.jsonl'"),
        (("--steps", "1", "--exclude", "corpus.jsonl"), "nothing to learn from"),
        (
            ("--steps", "1", "--questions", "corpus.jsonl"),
            "line 1: the field 'question' is missing",
        ),
        (("--steps", "1", "--held-out", "9"), "9 passages cannot be held out of 4 documents"),
        (("--steps", "1", "--targets", "qkv"), "no linear layers called qkv"),
        (("--steps", "1", "--out", "corpus.jsonl"), "cannot write 'corpus.jsonl'"),
        (("--steps", "1", "--model", "nowhere"), "the model 'nowhere' cannot be loaded"),
    ],
)
def test_mistakes_are_named(run: Run, arguments: tuple[str, ...], message: str) -> None:
    assert message in run("train", *QUICK, *arguments, code=2).stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_goes_on(run: Run, tmp_path: Path, number: signal.Signals) -> None:
    began = subprocess.Popen(
        [PROGRAM, "train", *QUICK, "--steps", "100000"], cwd=tmp_path, stderr=subprocess.PIPE
    )
    log = tmp_path / "out" / "log.jsonl"
    until = time.monotonic() + TIMEOUT
    while not (log.exists() and len(log.read_text().splitlines()) > 2):
        assert began.poll() is None
        assert time.monotonic() < until
        time.sleep(0.1)
    began.send_signal(number)
    _, shown = began.communicate(timeout=TIMEOUT)
    assert began.returncode == 130
    assert b"the same command goes on from there" in shown
    done = len(log.read_text().splitlines())
    run("train", *QUICK, "--steps", str(done + 1))
    assert len(log.read_text().splitlines()) == done + 1


def test_memory_heads_from_measuring_to_a_database(run: Run, tmp_path: Path) -> None:
    measure = (
        *("heads", "--corpus", "corpus.jsonl", "--out", "heads.jsonl", "--model", "model"),
        *("--budget", "100", "--passages", "3", "--examples", "2"),
    )
    found = run(*measure)
    assert "of 6 heads left out" in found.stdout
    assert run(*measure).stdout == found.stdout  # it is done
    run("init", "--model", "model", "--heads", "heads.jsonl", "--spread", "layer")
    run("ingest", "corpus.jsonl")
    (stats,) = rows(run("stats", "--json"))
    assert stats["memory"]["spread"] == "layer"
    chosen = stats["memory"]["heads"]
    assert f"\n{6 - len(chosen)} of 6 heads" in found.stdout
    run("rewrite", "--budget", "90")  # the others stay as they are
    assert rows(run("stats", "--json"))[0]["memory"]["heads"] == chosen
    run("rewrite", "--layers", "0-2")
    assert "heads" not in rows(run("stats", "--json"))[0]["memory"]


def test_head_weights_from_measuring_to_a_database(run: Run, tmp_path: Path) -> None:
    measure = (
        *("head-weights", "--corpus", "corpus.jsonl", "--out", "weights.jsonl"),
        *("--model", "model", "--passages", "2", "--examples", "2"),
    )
    found = run(*measure)
    assert "kv head 1" in found.stdout
    assert run(*measure).stdout == found.stdout  # it is done
    run("init", "--model", "model", "--head-weights", "weights.jsonl")
    run("ingest", "corpus.jsonl")
    weights = rows(run("stats", "--json"))[0]["memory"]["weights"]
    assert len(weights) == 6
    assert "weights of 6 heads" in run("stats").stdout
    run("rewrite", "--budget", "90")  # the others stay as they are
    assert rows(run("stats", "--json"))[0]["memory"]["weights"] == weights
    run("rewrite", "--head-weights", "none")
    assert "weights" not in rows(run("stats", "--json"))[0]["memory"]
    refused = run("rewrite", "--head-weights", "corpus.jsonl", code=2)
    assert "line 1: it is not a file of head weights" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--corpus", "missing.jsonl"), "'missing.jsonl'"),
        (("--layers", "9"), "memory layers must be among 0 to 2"),
        (("--budget", "0"), "the budget must be 1 to"),
        (("--out", "corpus.jsonl"), "corpus.jsonl, line 1: it is not a file of memory heads"),
        (("--out", "no/heads.jsonl"), "cannot write 'no/heads.jsonl'"),
        (("--passages", "0"), "--passages"),
        (("--seed", "-1"), "seed is not below 0"),
    ],
)
def test_mistakes_of_measuring_heads(run: Run, arguments: tuple[str, ...], message: str) -> None:
    given = ("--corpus", "corpus.jsonl", "--out", "heads.jsonl", "--model", "model")
    assert message in run("heads", *given, *arguments, code=2).stderr
