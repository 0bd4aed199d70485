"""How a model is loaded, on the command line: one group of options for all that load one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import pytest
import torch

from cli.commands import COMMANDS
from memdb import MemDB
from model_adapter import SentenceEmbedder
from tests.cli.conftest import Run, rows
from tests.cli.small import make_database, model_folder

LOADING = {
    "device",
    "dtype",
    "threads",
    "revision",
    "quantization_config",
    "trust_remote_code",
}


def every_command(command: click.Command) -> list[click.Command]:
    if isinstance(command, click.Group):
        return [each for one in command.commands.values() for each in every_command(one)]
    return [command]


def test_what_loads_a_model_says_how() -> None:
    assert COMMANDS
    loads = set()
    for command in (each for entry in COMMANDS for each in every_command(entry.load())):
        names = {parameter.name for parameter in command.params}
        if "model" in names:
            assert names >= LOADING, command.name
            loads.add(command.name)
        else:
            assert not names & LOADING, command.name
        assert ("embedder" in names) == ("embedder_device" in names), command.name
    assert loads >= {"init", "ingest", "warm", "generate", "chat", "eval", "train", "rewrite"}


@pytest.fixture
def folder(tmp_path: Path, minilm: SentenceEmbedder) -> str:
    make_database(tmp_path, minilm)
    return model_folder(minilm)


def answer(run: Run, *options: str) -> dict[str, Any]:
    (found,) = rows(run("generate", "Who?", "--max-new-tokens", "4", "--json", *options))
    return found


def test_an_answer_in_other_numbers(run: Run, folder: str, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        for options in (
            ["--dtype", "bfloat16"],
            ["--dtype", "float16", "--device", "cpu", "--embedder-device", "cpu"],
            ["--threads", str(before + 1)],
        ):
            assert answer(run, *options)["text"] is not None
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
    with MemDB.open(tmp_path / "db") as database:
        assert database.shape.dtype == "float32"  # still


def test_a_database_is_made_and_written_in_the_numbers_asked_for(
    run: Run, folder: str, tmp_path: Path, corpus: Path
) -> None:
    path = str(tmp_path / "other")
    how = ["--model", folder, "--dtype", "bfloat16"]
    run("init", "--db", path, *how)
    run("ingest", "--db", path, str(corpus), "--dtype", "float32")
    run("ingest", "--db", str(tmp_path / "third"), str(corpus), "--cold", *how)
    run("warm", "--db", str(tmp_path / "third"), "--workers", "2", "--threads", "1")
    for name in ("other", "third"):
        with MemDB.open(tmp_path / name) as database:
            assert database.shape.dtype == "bfloat16"
            assert database.stats()["memories"] == 4
    run("rewrite", "--db", path, "--dtype", "float16")
    with MemDB.open(path) as database:
        assert database.shape.dtype == "float16"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "nowhere"], "there is no device 'nowhere' here"),
        (["--embedder-device", "nowhere"], "there is no device 'nowhere' here"),
        (["--revision", "main"], "a revision ('main') is one of a model of a hub"),
    ],
)
def test_what_cannot_be_is_named(run: Run, folder: str, options: list[str], message: str) -> None:
    assert message in run("generate", "Who?", *options, code=2).stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dtype", "int8"], "'int8' is not one of"),
        (["--threads", "0"], "0 is not in the range"),
        (["--quantization-config", "{"], "not JSON"),
        (
            ["--quantization-config", json.dumps({"bits": 4})],
            "not a JSON object with a quant_method",
        ),
    ],
)
def test_what_is_no_such_option_is_named(
    run: Run, folder: str, options: list[str], message: str
) -> None:
    assert message in run("generate", "Who?", *options, code=2).stderr


def test_the_environment_says_where(run: Run, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMDB_DEVICE", "nowhere")
    assert "there is no device 'nowhere'" in run("generate", "Who?", code=2).stderr
    assert answer(run, "--device", "cpu")
    assert run("query", "Who?").stdout  # it loads no model
