"""Head weights: a budget goes where they say, and measuring finds what answers lose."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from memdb import InvalidInputError, MemDB
from model_adapter import (
    CATALOG,
    LanguageModel,
    SentenceEmbedder,
    Writer,
    create_database,
    open_database,
    rewrite_database,
)
from model_adapter.evaluation.likelihood import likelihoods
from model_adapter.measuring.head_weights import measure_head_weights, pair_gradients
from model_adapter.models import observing
from model_adapter.training import Corpus
from model_adapter.training.examples import Row
from model_adapter.training.passes import read_behind
from model_adapter.writing import head_weight_file
from model_adapter.writing.head_weight_file import HeadWeights, fitted
from model_adapter.writing.kept_pairs import Choice, Kept, kept_pairs
from tests.adapter.asked import facts_corpus
from tests.helpers import SAMPLE, tiny_model

TEXT = SAMPLE[:150]
WEIGHTS = [1.0, 0.5, 2.0, 0.125, 3.0, 7.0]
HOW: dict[str, Any] = {"framing": "plain", "passages": 3, "examples": 3}


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return tiny_model()


@pytest.fixture
def corpus(model: LanguageModel, tmp_path: Path) -> Corpus:
    return facts_corpus(model, tmp_path)


# --- gradients ---


class Read:
    """Two answers behind a memory of the whole text, or of a part of it."""

    def __init__(self, model: LanguageModel) -> None:
        self.model, self.writer = model, Writer(model, framing="plain")
        prefix = model.prefix(self.writer.shape.prefix)
        tokens = model.tokens(TEXT)
        with torch.no_grad():
            self._pairs = observing.encode(model.model, prefix, [tokens], (0, 1, 2))
        self.every = torch.ones(6, len(tokens), dtype=torch.bool)
        asked = ("\nWhere do ships come from? From many", "\nThe harbour of Veldmoor")
        self.rows = [Row(tuple(model.tokens(text)), 3) for text in asked]

    def kept(self, chosen: torch.Tensor) -> Kept:
        return kept_pairs(*self._pairs, [Choice(chosen)])

    def nll(self, chosen: torch.Tensor, biases: torch.Tensor | None = None) -> list[float]:
        """Of each answer, in nats a token."""
        prefix = self.model.prefix(self.writer.shape.prefix)
        with torch.no_grad():
            logits = read_behind(
                self.model.model,
                prefix,
                self.kept(chosen),
                self.writer.shape,
                self.rows,
                prompts=False,
                biases=biases,
            )
        tokens = [token for row in self.rows for token in row.tokens[-3:]]
        return likelihoods(logits, tokens).view(2, 3).mean(1).tolist()


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2"])
def test_a_gradient_is_the_slope_of_what_a_bias_does(architecture: str) -> None:
    one = Read(tiny_model(architecture))
    kept = one.kept(one.every)
    nll, gradients = pair_gradients(one.model, one.writer, kept, one.rows)
    assert nll == pytest.approx(np.mean(one.nll(one.every)), abs=1e-5)
    assert gradients.shape == (2, one.every.numel())
    step = 0.1
    for place in gradients.abs().sum(0).topk(3).indices.tolist():
        up, down = torch.zeros_like(gradients), torch.zeros_like(gradients)
        up[0, place], down[0, place] = step, -step
        above, below = one.nll(one.every, up), one.nll(one.every, down)
        slope = (above[0] - below[0]) / (2 * step)
        assert slope == pytest.approx(float(gradients[0, place]), rel=0.05, abs=2e-5)
        assert above[1] == pytest.approx(below[1], abs=1e-6)  # the other answer has its own


def test_a_bias_is_on_the_pair_that_it_is_for(model: LanguageModel) -> None:
    """Rows keep different numbers of pairs here; without a pair is with a bias of -inf."""
    one = Read(model)
    chosen = one.every.clone()
    chosen[1, 3:], chosen[4, ::2] = False, False
    kept = one.kept(chosen)
    for place in (2, len(chosen[0]) + 1, len(kept.rows) - 1):
        biases = torch.zeros(2, len(kept.rows))
        biases[:, place] = -torch.inf
        without = chosen.clone()
        without[kept.rows[place], kept.tokens[place]] = False
        np.testing.assert_allclose(one.nll(chosen, biases), one.nll(without), atol=1e-5)
        assert np.abs(np.subtract(one.nll(chosen), one.nll(without))).max() > 1e-5


# --- a writer with weights ---


@pytest.mark.parametrize(("spread", "moves"), [("all", True), ("layer", True), ("uniform", False)])
def test_weights_move_the_budget(model: LanguageModel, spread: Any, moves: bool) -> None:
    how: dict[str, Any] = {"framing": "plain", "budget": 120, "spread": spread}
    plain, weighted = Writer(model, **how), Writer(model, head_weights=WEIGHTS, **how)
    assert "weights" not in plain.settings
    assert weighted.settings["weights"] == WEIGHTS
    scores = plain.scores([model.tokens(TEXT)])[0]
    factors = torch.tensor(WEIGHTS)[:, None]
    kept = weighted.selection.keep(scores)
    assert torch.equal(kept, plain.selection.keep(scores * factors))
    assert torch.equal(kept, plain.selection.keep(scores)) != moves
    (memory,) = weighted.write([TEXT])
    assert np.diff(memory.offsets).tolist() == kept.sum(1).tolist()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (WEIGHTS[:5], "a weight for each of the 6 .layer, kv head. pairs, got 5"),
        ([], "a weight for each of the 6 .*, got 0"),
        ([*WEIGHTS[:5], float("nan")], r"more than 0; that of \(layer, kv head\) pair 5 is nan"),
        ([float("inf"), *WEIGHTS[1:]], "pair 0 is inf"),
        ([1, 0, 1, 1, 1, 1], "pair 1 is 0.0"),
        (["a"] * 6, "head weights are numbers: could not convert"),
        ("weights.jsonl", "numbers, a Path, or 'none', not 'weights.jsonl'"),
    ],
)
def test_weights_that_cannot_be(model: LanguageModel, weights: Any, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        Writer(model, head_weights=weights)


# --- a database with weights ---


def recorded(path: Path) -> list[float] | None:
    with MemDB.open(path) as database:
        weights: list[float] | None = database.settings["memory"].get("weights")
        return weights


@pytest.fixture
def catalogued(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[float]:
    """The tiny model has weights in the catalogue."""
    file = tmp_path / "tiny.json"
    weights = [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]
    file.write_text(json.dumps({"weights": weights}))
    entry = SimpleNamespace(head_weights=file)
    monkeypatch.setattr(head_weight_file, "CATALOG", {"tiny-llama": entry})
    return [weight for layer in weights for weight in layer]


def test_a_database_goes_on_with_its_weights(
    model: LanguageModel, catalogued: list[float], tmp_path: Path, minilm: SentenceEmbedder
) -> None:
    path = tmp_path / "db"
    how: dict[str, Any] = {"model": model, "embedder": minilm, "codec": "exact", "budget": 120}
    with create_database(path, head_weights=WEIGHTS, **how) as database:
        database.insert(TEXT)
    assert recorded(path) == WEIGHTS
    with open_database(path, model=model, embedder=minilm) as database:
        assert isinstance(database.writer, Writer)
        assert database.writer.head_weights == tuple(WEIGHTS)
    rewrite_database(path, model=model, budget=100)
    assert recorded(path) == WEIGHTS
    rewrite_database(path, model=model, head_weights="none")
    assert recorded(path) is None
    rewrite_database(path, model=model, layers=[0, 2])  # none stays none
    assert recorded(path) is None
    rewrite_database(path, model=model, layers=[0, 1, 2], head_weights=WEIGHTS)
    rewrite_database(path, model=model, layers=[2, 1])  # other rows: those of the catalogue
    assert recorded(path) == catalogued[2:]
    rewrite_database(path, model=model, selection="paper")
    assert recorded(path) is None
    rewrite_database(path, model=model, selection="contribution")
    assert recorded(path) == catalogued[2:]


def test_the_catalogues_weights_are_those_of_a_new_database_alone(
    model: LanguageModel, catalogued: list[float], tmp_path: Path, minilm: SentenceEmbedder
) -> None:
    how: dict[str, Any] = {"model": model, "embedder": minilm}
    create_database(tmp_path / "new", **how).close()
    assert recorded(tmp_path / "new") == catalogued
    create_database(tmp_path / "none", head_weights="none", **how).close()
    with open_database(tmp_path / "none", **how) as database:
        assert isinstance(database.writer, Writer)
        assert database.writer.head_weights is None
    assert Writer(model, selection="reconstruction").head_weights is None
    assert Writer(tiny_model("qwen3")).head_weights is None


def test_the_catalogues_files_are_whole() -> None:
    found = [entry for entry in CATALOG.values() if entry.head_weights is not None]
    assert found
    for entry in found:
        assert entry.head_weights is not None
        told = json.loads(entry.head_weights.read_text())
        assert told["model"] == entry.name
        weights = np.array(told["weights"])
        assert weights.ndim == 2
        assert np.isfinite(weights).all()
        assert (weights > 0).all()


# --- measuring ---


def test_weights_make_up_for_scores() -> None:
    """A head whose scores are ten times too large has a tenth of the weight, to the power; one that
    answers lose nothing without, the smallest; and none is out of bounds."""
    losses = np.array([1.0, 2.0, 4.0, 0.0])
    even = fitted(np.array([1.0, 2.0, 4.0, 1.0]), losses)
    assert even == [1.0] * 4
    assert np.prod(even) == pytest.approx(1)
    a, b, c, none = fitted(np.array([10.0, 2.0, 4.0, 1.0]), losses)
    assert b == c
    assert a / b == pytest.approx(10**-head_weight_file.EXPONENT, rel=1e-3)
    assert none == a
    bounded = fitted(np.array([1e-9, *[1.0] * 7]), np.array([1e9, *[1.0] * 7]))
    assert bounded[0] == 100
    assert fitted(np.ones(2), np.zeros(2)) == [1.0, 1.0]


def test_a_head_that_nobody_listens_to_has_the_smallest_weight(
    corpus: Corpus, tmp_path: Path
) -> None:
    """Its outputs are multiplied by 0."""
    deaf = tiny_model()
    group = deaf.heads // deaf.kv_heads * deaf.head_dim
    with torch.no_grad():
        deaf.model.model.layers[1].self_attn.o_proj.weight[:, :group] = 0
    found = measure_head_weights(deaf, corpus, tmp_path / "weights.jsonl", **HOW)
    assert list(found.weights) == [(layer, head) for layer in range(3) for head in range(2)]
    gradients = np.array([passage["gradients"] for passage in found.passages])
    assert (gradients[:, 2] == 0).all()
    assert (np.delete(gradients, 2, axis=1).max(axis=0) > 0).all()
    assert found.weights[1, 0] == min(found.weights.values())
    writer = Writer(deaf, framing="plain", head_weights=tmp_path / "weights.jsonl")
    assert writer.head_weights == tuple(found.weights.values())
    some = Writer(deaf, layers=[1], head_weights=tmp_path / "weights.jsonl")
    assert some.head_weights == tuple(found.weights.values())[2:4]


def test_measuring_goes_on_where_it_was(
    model: LanguageModel, corpus: Corpus, tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    measured = measure_head_weights(model, corpus, whole, **HOW)
    told: list[tuple[str, int]] = []

    def interrupt(stage: str, done: int, _: int) -> None:
        told.append((stage, done))
        if told[-1] == ("measuring", 2) and told.count(("measuring", 2)) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_head_weights(model, corpus, parts, progress=interrupt, **HOW)
    with parts.open("a") as file:
        file.write('{"answers": 1')  # cut off
    with pytest.raises(InvalidInputError, match=r"is not finished .2 of 3 .* same command again"):
        Writer(model, framing="plain", head_weights=parts)
    measure_head_weights(model, corpus, parts, progress=interrupt, **HOW)
    assert parts.read_bytes() == whole.read_bytes()
    assert told.count(("measuring", 0)) == 1
    kept_nowhere = measure_head_weights(model, corpus, **HOW)
    assert kept_nowhere.weights == measured.weights


def test_files_that_cannot_be(model: LanguageModel, corpus: Corpus, tmp_path: Path) -> None:
    file = tmp_path / "weights.jsonl"
    with pytest.raises(InvalidInputError, match=r"there is no .*`memdb head-weights` makes one"):
        Writer(model, head_weights=file)
    measure_head_weights(model, corpus, file, layers=[0, 2], **HOW)
    with pytest.raises(InvalidInputError, match="holds head weights measured with another seed"):
        measure_head_weights(model, corpus, file, layers=[0, 2], seed=1, **HOW)
    with pytest.raises(InvalidInputError, match="no weight of head 0 of layer 1: measure these"):
        Writer(model, head_weights=file)
    with pytest.raises(InvalidInputError, match="for the selection 'contribution', not for 'paper"):
        Writer(model, layers=[0, 2], selection="paper", head_weights=file)
    with pytest.raises(InvalidInputError, match="were measured with the model 'tiny-llama', not"):
        Writer(tiny_model("qwen3"), layers=[0, 2], head_weights=file)
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:-1], '{"scores": [1, 2]}', ""]))
    with pytest.raises(InvalidInputError, match="is damaged: a passage has no scores"):
        HeadWeights(file).weights  # noqa: B018
    file.write_text('{"id": "a"}\n')
    with pytest.raises(InvalidInputError, match="line 1: it is not a file of head weights"):
        Writer(model, head_weights=file)
