"""Predictors: what they foresee, how they are fitted, and that databases keep them."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from memdb import InvalidInputError, MemDB, StorageError
from model_adapter import (
    CATALOG,
    LanguageModel,
    SentenceEmbedder,
    Writer,
    create_database,
    open_database,
    rewrite_database,
)
from model_adapter.measuring.fit_predictor import Fit, fit_predictor, observed
from model_adapter.selections import Contribution, LayerView, PredictedContribution
from model_adapter.selections.predicted import features
from model_adapter.training import Corpus, Reference
from model_adapter.writing import predictor
from model_adapter.writing.predictor import read_predictor, write_predictor
from tests.adapter.predictors import any_predictor
from tests.helpers import SAMPLE, tiny_model

TEXT = SAMPLE[:150]
ROWS = 3 * 2  # layers, kv heads


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return tiny_model()


def corpus_of(model: LanguageModel, references: int = 60) -> Corpus:
    """References of some 40 to 100 tokens."""
    made = []
    for number in range(references):
        text = SAMPLE[7 * number : 7 * number + 60 + number]
        made.append(Reference(number, 0, text, tuple(model.tokens(text))))
    names = tuple(str(number) for number in range(references))
    return Corpus(names, tuple((one,) for one in made), {})


@pytest.fixture(scope="module")
def fitted(model: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Fit]:
    path = tmp_path_factory.mktemp("fitted") / "new" / "predictor.safetensors"
    return path, fit_predictor(model, corpus_of(model), path, framing="plain")


def looked(model: LanguageModel, tokens: list[int]) -> list[tuple[LayerView, Tensor]]:
    """What a pass sees of a reference, layer by layer, with its contributions."""
    seen: list[tuple[LayerView, Tensor]] = []
    writer = Writer(model, framing="plain", selection="contribution")
    with torch.no_grad():
        observed(writer, [tokens], lambda view, scores: seen.append((view, scores)))
    return seen


# --- what it foresees ---


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3"])
def test_scores_are_a_linear_function_of_what_is_seen(architecture: str) -> None:
    model = tiny_model(architecture)
    kept = any_predictor(model)
    writer = Writer(model, selection="predicted", predictor=kept)
    assert writer.predictor is not None
    by_layer = writer.predictor.by_layer(range(model.layers))
    for view, _ in looked(model, model.tokens(TEXT)):
        seen = features(writer.selection, model, view)
        coefficients = by_layer[view.layer]
        expected = torch.einsum("bhtf,hf->bht", seen, coefficients[:, :-1])
        expected = (expected + coefficients[None, :, -1:]).exp()
        torch.testing.assert_close(writer.selection.score(model, view), expected)


def test_a_short_reference_is_repeated(model: LanguageModel) -> None:
    """In a batch with a long one, too; at most 40 tokens."""
    predicted = Writer(model, framing="plain", predictor=any_predictor(model))
    measured = Writer(model, framing="plain", selection="contribution")
    tokens = model.tokens(TEXT)
    for short in (tokens[:40], tokens[:41]):
        (_, found), (_, truth) = (
            writer.scores([tokens, short])[:, :, : len(short)] for writer in (predicted, measured)
        )
        assert torch.allclose(found, truth, atol=1e-5) == (len(short) == 40)
    (alone,) = predicted.scores([tokens])
    torch.testing.assert_close(predicted.scores([tokens, tokens[:40]])[0], alone)


def test_what_is_seen_does_not_depend_on_what_follows(model: LanguageModel) -> None:
    """Fitted to a pass that repeats the text, used on one that does not."""
    tokens = model.tokens(TEXT)
    writer = Writer(model, framing="plain", selection="predicted", predictor=any_predictor(model))
    plain: list[Tensor] = []

    def see(layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> None:
        view = LayerView(layer, query, key, value, (len(tokens),), (len(tokens),), scaling)
        plain.append(features(writer.selection, model, view))

    model.observe([tokens], see, prefix=writer.shape.prefix)
    for (view, _), alone in zip(looked(model, tokens), plain, strict=True):
        torch.testing.assert_close(features(writer.selection, model, view), alone)


def test_a_writer_takes_the_rows_of_its_layers(
    model: LanguageModel, fitted: tuple[Path, Fit]
) -> None:
    path, fit = fitted
    writer = Writer(model, layers=[2, 0], predictor=path)
    assert writer.selection.name == "predicted"
    assert writer.predictor is not None
    expected = fit.coefficients[[0, 2]].flatten(0, 1)
    torch.testing.assert_close(writer.predictor.coefficients, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_half_precision(dtype: torch.dtype) -> None:
    model = tiny_model(dtype=dtype)
    writer = Writer(model, predictor=any_predictor(model), budget=120)
    (memory,) = writer.write([TEXT])
    assert memory.pairs == writer.selection.pairs_of(len(model.tokens(TEXT)))


# --- fitting ---


def test_fitting_finds_the_function_where_there_is_one(
    model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The contributions are such a function, with coefficients at random."""
    known = Writer(model, predictor=any_predictor(model)).selection
    assert isinstance(known, PredictedContribution)
    with monkeypatch.context() as patch:
        patch.setattr(Contribution, "score", lambda _, *seen: known.predict(*seen))
        fit = fit_predictor(model, corpus_of(model), tmp_path / "out", framing="plain")
    assert fit.held_out == 10
    assert fit.captured > 0.99


def test_a_random_model_is_foreseen_in_part(fitted: tuple[Path, Fit]) -> None:
    assert 0.5 < fitted[1].captured < 0.99


def test_the_sums_give_the_regression_of_all_tokens_at_once(
    model: LanguageModel, fitted: tuple[Path, Fit]
) -> None:
    """A ridge regression by other means: as least squares with a row for each coefficient."""
    _, fit = fitted
    corpus = corpus_of(model)
    drawn = random.Random("predictor 0").sample([list(r.tokens) for r in corpus.references], 60)
    writer = Writer(model, framing="plain", selection="contribution")
    x, y = [], []
    for tokens in drawn[10:]:
        view, scores = looked(model, tokens)[1]
        x.append(features(writer.selection, model, view)[0, 1].double().numpy())
        y.append((scores[0, 1].double() + 1e-6).log().numpy())
    seen, truth = np.concatenate(x), np.concatenate(y)
    centred = seen - seen.mean(0)
    ridge = np.diag(np.sqrt(len(seen) * (3e-3 * seen.var(0) + 1e-9)))
    rows = np.concatenate([centred, ridge])
    wanted = np.concatenate([truth - truth.mean(), np.zeros(len(ridge))])
    expected = np.linalg.lstsq(rows, wanted, rcond=None)[0]
    np.testing.assert_allclose(fit.coefficients[1, 1, :-1].numpy(), expected, rtol=1e-3, atol=1e-4)


def test_fitting_goes_on_where_it_was(
    model: LanguageModel, fitted: tuple[Path, Fit], tmp_path: Path
) -> None:
    whole, _ = fitted
    path = tmp_path / "parts.safetensors"
    told: list[int] = []

    def interrupt(_: str, done: int, __: int) -> None:
        told.append(done)
        if done == 24 and told.count(24) == 1:
            raise KeyboardInterrupt

    how: dict[str, Any] = {"framing": "plain", "progress": interrupt}
    with pytest.raises(KeyboardInterrupt):
        fit_predictor(model, corpus_of(model), path, **how)
    assert not path.exists()
    fit_predictor(model, corpus_of(model), path, **how)
    assert told.count(0) == 1  # the references before were not looked at again
    assert path.read_bytes() == whole.read_bytes()
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    # Of another text the same file begins anew.
    (tmp_path / f".{path.name}.making").write_bytes(b"cut off")
    fit_predictor(model, corpus_of(model, 40), path, **how)
    assert told.count(0) == 2
    assert path.read_bytes() != whole.read_bytes()


def test_too_little_text(model: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"to 12 references or more, and there are 3"):
        fit_predictor(model, corpus_of(model, 3), tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        fit_predictor(model, corpus_of(model, 12), tmp_path / "file" / "out")


# --- which is taken ---


@pytest.fixture
def catalogued(
    model: LanguageModel, fitted: tuple[Path, Fit], monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The tiny model has a predictor in the catalogue."""
    path, _ = fitted
    entry = SimpleNamespace(predictor=path)
    monkeypatch.setattr(predictor, "CATALOG", {model.name: entry})
    return path


def test_a_predictor_that_is_given_is_used_and_the_catalogues_when_it_is_asked_for(
    model: LanguageModel, catalogued: Path
) -> None:
    assert Writer(model).selection.name == "contribution"
    assert Writer(model, predictor=catalogued).selection.name == "predicted"
    asked = Writer(model, selection="predicted")
    assert asked.predictor is not None
    torch.testing.assert_close(
        asked.predictor.coefficients, read_predictor(catalogued)[0].flatten(0, 1)
    )
    other = tiny_model(dtype=torch.bfloat16)  # the same model by name, with another fingerprint
    assert Writer(other, selection="predicted").predictor is not None


def test_files_that_cannot_be(
    model: LanguageModel, fitted: tuple[Path, Fit], tmp_path: Path
) -> None:
    path, fit = fitted
    with pytest.raises(InvalidInputError, match="none comes with the model 'tiny-llama'"):
        Writer(model, selection="predicted")
    with pytest.raises(InvalidInputError, match=r"there is no .*`memdb predictor` makes one"):
        Writer(model, predictor=tmp_path / "none")
    with pytest.raises(InvalidInputError, match="'predicted', not for 'paper'"):
        Writer(model, selection="paper", predictor=path)
    with pytest.raises(InvalidInputError, match="was fitted to the model 'tiny-llama', not to"):
        Writer(tiny_model("qwen3"), predictor=path)
    for name, content in (("half", path.read_bytes()[:400]), ("text", b"no")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InvalidInputError, match="is not a predictor, or damaged"):
            Writer(model, predictor=tmp_path / name)
    write_predictor(tmp_path / "anonymous", fit.coefficients, {})
    with pytest.raises(InvalidInputError, match="is not a predictor, or damaged"):
        Writer(model, predictor=tmp_path / "anonymous")
    about = {"model": model.name, "fingerprint": model.fingerprint}
    write_predictor(tmp_path / "small", fit.coefficients[:2], about)
    with pytest.raises(InvalidInputError, match=r"shape \(2, 2, 18\), and 'tiny-llama' takes"):
        Writer(model, predictor=tmp_path / "small")
    for text in (any_predictor(model)[:-8], "no base64!"):
        with pytest.raises(InvalidInputError, match="has 6 x 18 numbers, and this one has not"):
            Writer(model, predictor=text)


def test_the_catalogues_files_are_whole() -> None:
    found = [entry for entry in CATALOG.values() if entry.predictor is not None]
    assert found
    for entry in found:
        assert entry.predictor is not None
        coefficients, about = read_predictor(entry.predictor)
        assert about["model"] == entry.name
        assert coefficients.isfinite().all()
        assert about["captured"] > 0.9


# --- a database with a predictor ---


def recorded(path: Path) -> tuple[str, str | None]:
    with MemDB.open(path) as database:
        memory = database.settings["memory"]
        return memory["selection"], memory.get("predictor")


def test_a_database_goes_on_with_its_predictor(
    model: LanguageModel, tmp_path: Path, minilm: SentenceEmbedder
) -> None:
    path, mine = tmp_path / "db", any_predictor(model, seed=1)
    how: dict[str, Any] = {"model": model, "embedder": minilm, "codec": "exact", "budget": 120}
    with create_database(path, predictor=mine, **how) as database:
        database.insert(TEXT, id="a")
    assert recorded(path) == ("predicted", mine)
    with open_database(path, model=model, embedder=minilm) as database:
        assert isinstance(database.writer, Writer)
        assert database.writer.predictor is not None
        assert database.writer.predictor.to_json() == mine
        database.insert(TEXT, id="b")
        ((_, one),), ((_, other),) = database.memories("a"), database.memories("b")
        assert one is not None
        assert other is not None
        np.testing.assert_array_equal(one.memory.positions, other.memory.positions)


def test_rewriting_keeps_the_predictor_where_it_fits(
    model: LanguageModel, catalogued: Path, tmp_path: Path, minilm: SentenceEmbedder
) -> None:
    path, mine = tmp_path / "db", any_predictor(model, seed=1)
    how: dict[str, Any] = {"model": model, "embedder": minilm, "budget": 120}
    create_database(path, predictor=mine, **how).close()
    rewrite_database(path, model=model, budget=100)
    assert recorded(path) == ("predicted", mine)
    rewrite_database(path, model=model, layers=[0, 2])  # other rows: those of the catalogue
    of_two = Writer(model, layers=[0, 2], selection="predicted").predictor
    assert of_two is not None
    assert recorded(path) == ("predicted", of_two.to_json())
    rewrite_database(path, model=model, selection="contribution", layers=[0, 1, 2])
    assert recorded(path) == ("contribution", None)
    rewrite_database(path, model=model)  # stays what it is
    assert recorded(path) == ("contribution", None)
    rewrite_database(path, model=model, predictor=catalogued)
    whole = Writer(model, selection="predicted").predictor
    assert whole is not None
    assert recorded(path) == ("predicted", whole.to_json())
    rewrite_database(path, model=tiny_model("qwen3"))  # which has no predictor
    assert recorded(path) == ("contribution", None)
