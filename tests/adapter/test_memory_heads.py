"""Memory heads: only they keep pairs, and measuring finds those that are worth it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from memdb import InvalidInputError
from model_adapter import LanguageModel, Writer
from model_adapter.measuring.memory_heads import measure_heads
from model_adapter.training import Corpus
from model_adapter.writing.memory_head_file import HeadFile, heads_of
from tests.adapter.asked import facts_corpus
from tests.helpers import SAMPLE, tiny_model

TEXT = SAMPLE[:150]
HOW: dict[str, Any] = {"framing": "plain", "passages": 3, "examples": 3}


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return tiny_model()


@pytest.fixture
def corpus(model: LanguageModel, tmp_path: Path) -> Corpus:
    return facts_corpus(model, tmp_path)


# --- a writer with memory heads ---


@pytest.mark.parametrize(("spread", "parts"), [("uniform", 3), ("layer", 2), ("all", 1)])
def test_only_memory_heads_keep_pairs(model: LanguageModel, spread: Any, parts: int) -> None:
    writer = Writer(
        model, framing="plain", heads=[(2, 1), (0, 0), (0, 1)], budget=120, spread=spread
    )
    assert writer.settings["heads"] == [[0, 0], [0, 1], [2, 1]]
    (memory,) = writer.write([TEXT])
    counts = np.diff(memory.offsets)
    assert counts[[2, 3, 4]].tolist() == [0, 0, 0]
    tokens = len(model.tokens(TEXT))
    assert counts.sum() == parts * max(1, round(120 * tokens / 128 / parts))
    if spread == "uniform":
        assert counts[0] == counts[1] == counts[5]
    if spread == "layer":
        assert counts[0] + counts[1] == counts[5]


def test_they_keep_all_that_there_is(model: LanguageModel) -> None:
    writer = Writer(model, framing="plain", heads=[(1, 0)], budget=128)
    (memory,) = writer.write([TEXT])
    assert np.diff(memory.offsets).tolist() == [0, 0, len(model.tokens(TEXT)), 0, 0, 0]
    with pytest.raises(InvalidInputError, match="the budget must be 1 to 128 "):
        Writer(model, heads=[(1, 0)], budget=129)


def test_a_default_budget_is_by_the_heads_there_are(model: LanguageModel) -> None:
    assert Writer(model, heads=[(1, 0), (1, 1)]).selection.budget == 2 * 16


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ([(0, 2)], "kv heads 0 to 1; there is no head 2 of layer 0"),
        ([(1, 0)], "there is no head 0 of layer 1"),
        ([], "there has to be a memory head"),
    ],
)
def test_heads_that_cannot_be(model: LanguageModel, heads: Any, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        Writer(model, layers=[0, 2], heads=heads)


# --- measuring ---


def test_a_head_that_nobody_listens_to_is_worth_nothing(corpus: Corpus, tmp_path: Path) -> None:
    """Its outputs are multiplied by 0. All pairs are kept, so no other head has more for it."""
    deaf = tiny_model()
    group = deaf.heads // deaf.kv_heads * deaf.head_dim
    with torch.no_grad():
        deaf.model.model.layers[1].self_attn.o_proj.weight[:, :group] = 0
    found = measure_heads(deaf, corpus, tmp_path / "heads.jsonl", budget=6 * 128, **HOW)
    worths = {worth.head: worth for worth in found.worths}
    assert list(worths) == [(layer, head) for layer in range(3) for head in range(2)]
    assert abs(worths[1, 0].worth) < 1e-5
    assert all(abs(one.worth) > 1e-5 for head, one in worths.items() if head != (1, 0))
    assert {worth.pairs for worth in found.worths} == {worths[0, 0].pairs}
    assert set(found.chosen) == {head for head, one in worths.items() if one.earns}
    assert found.check is not None


def test_measuring_goes_on_where_it_was(
    model: LanguageModel, corpus: Corpus, tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    measure_heads(model, corpus, whole, budget=100, **HOW)
    told: list[tuple[int, int]] = []

    def interrupt(_: str, done: int, total: int) -> None:
        told.append((done, total))
        if len(told) in (9, 20):
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            measure_heads(model, corpus, parts, budget=100, progress=interrupt, **HOW)
        with parts.open("a") as file:
            file.write('{"all": 1.')  # cut off
    with pytest.raises(InvalidInputError, match=r"is not finished .* same command again"):
        Writer(model, framing="plain", heads=parts)
    measure_heads(model, corpus, parts, budget=100, progress=interrupt, **HOW)
    assert parts.read_bytes() == whole.read_bytes()
    assert told[-1] == (3 * 8, 3 * 8)


def test_another_measurement_is_refused(
    model: LanguageModel, corpus: Corpus, tmp_path: Path
) -> None:
    file = tmp_path / "heads.jsonl"
    measure_heads(model, corpus, file, budget=100, **HOW)
    with pytest.raises(InvalidInputError, match="another budget"):
        measure_heads(model, corpus, file, budget=101, **HOW)
    other = tiny_model("qwen3")
    with pytest.raises(InvalidInputError, match="measured with the model"):
        heads_of(file, other.fingerprint, other.name)
    assert Writer(model, framing="plain", heads=file).heads == tuple(HeadFile(file).chosen)


def test_what_is_no_file_of_heads(model: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="`memdb heads` makes one"):
        Writer(model, heads=tmp_path / "missing")
    other = tmp_path / "corpus.jsonl"
    other.write_text('{"id": "a"}\n')
    with pytest.raises(InvalidInputError, match="line 1: it is not a file of memory heads"):
        Writer(model, heads=other)
    other.write_text("{\n")
    with pytest.raises(InvalidInputError, match=r"corpus.jsonl, line 1: "):
        Writer(model, heads=other)
