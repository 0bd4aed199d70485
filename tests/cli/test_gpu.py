"""benchmarks/gpu.py: the whole program, on a CPU and a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from tests.cli.test_scripts import script

TINY = ["--device", "cpu", "--shapes", "tiny", "--steps", "6", "--rounds", "1"]


def test_each_way_has_a_row_and_what_is_missing_a_reason(tmp_path: Path) -> None:
    out, rows = tmp_path / "table.txt", tmp_path / "rows.json"
    options = [*TINY, "--batches", "1,2", "--model", str(tmp_path / "none"), "--out", str(out)]
    result = CliRunner().invoke(script("benchmarks/gpu.py").main, [*options, "--json", str(rows)])
    assert result.exit_code == 0, result.output
    assert out.read_text() == result.output
    figures = json.loads(rows.read_text())
    measured = [(row["batch"], row["what"]) for row in figures if not row["reason"]]
    ways = ["transformers", "RAG", "memory", "memory, graph", "memory, CPU's"]
    ways += ["5 memories", "5, by the CPU"]
    assert measured == [(batch, what) for batch in (1, 2) for what in ways]
    assert all(row["first"] > 0 for row in figures if not row["reason"])
    assert all((row["decoding"] > 0) == ("5" not in row["what"]) for row in figures if row["first"])
    lacking, *_, vllm = (row for row in figures if row["reason"])
    assert lacking["model"] == str(tmp_path / "none")
    assert "InvalidInputError" in lacking["reason"]
    assert vllm["what"] == "vLLM"


def test_a_row_that_fails_costs_only_itself_and_what_came_before_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = script("benchmarks/gpu.py")
    seen: list[str] = []

    def fails(self: object, batch: int) -> tuple[float, float]:
        seen.append((tmp_path / "table.txt").read_text())
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(program.run.Bench, "_rag", fails)
    options = [*TINY, "--batches", "1", "--out", str(tmp_path / "table.txt")]
    result = CliRunner().invoke(program.main, options)
    assert result.exit_code == 0, result.output
    assert "transformers" in seen[0]
    assert "RAG             OutOfMemoryError: no room" in result.output
    assert "memory" in result.output.partition("no room")[2]


def test_no_row_begins_when_the_time_is_over() -> None:
    result = CliRunner().invoke(script("benchmarks/gpu.py").main, [*TINY, "--seconds", "0"])
    assert result.exit_code == 0, result.output
    assert "no time was left" in result.output


def test_an_unknown_shape_and_a_missing_gpu_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    program = script("benchmarks/gpu.py")
    result = CliRunner().invoke(program.main, ["--device", "cpu", "--shapes", "9B"])
    assert "there is no shape '9B'; there are tiny, 0.5B, 1.5B, 8B" in result.output
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(program.main, [])
    assert "there is no GPU here" in result.output
