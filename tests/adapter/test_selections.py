"""Selections against what they say they are, and where a budget is spent."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cli.commands.init import SELECTION_NAMES
from memdb import InvalidInputError
from model_adapter import SELECTIONS, LanguageModel, Writer
from model_adapter.selections import LayerView
from tests.helpers import SAMPLE, tiny_model

TEXT = SAMPLE[:150]


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return tiny_model()


def views(model: LanguageModel, selection: str, text: str = TEXT) -> tuple[Writer, list[LayerView]]:
    """What a selection sees of one reference, layer by layer."""
    writer = Writer(model, framing="plain", selection=selection, budget=200)
    tokens = model.tokens(text)
    suffix = writer.selection.suffix(model, tokens)
    seen: list[LayerView] = []
    model.observe(
        [[*tokens, *suffix]],
        lambda layer, query, key, value, scaling: seen.append(
            LayerView(
                layer, query, key, value, (len(tokens),), (len(tokens) + len(suffix),), scaling
            )
        ),
        prefix=writer.shape.prefix,
    )
    return writer, seen


def looked_at(view: LayerView, first: int) -> np.ndarray:
    """Largest attention of each kv head's keys of the reference, from the tokens `first` and on:
    one query at a time."""
    _, heads, tokens, _ = view.queries.shape
    kv_heads = view.keys.shape[1]
    best = np.zeros((kv_heads, view.longest))
    for head in range(heads):
        kv_head = head // (heads // kv_heads)
        for token in range(first, tokens):
            seen = view.keys[0, kv_head, : view.prefix + token + 1]
            weights = (seen @ view.queries[0, head, token] * view.scaling).softmax(0)
            mine = weights[view.reference].numpy()
            best[kv_head] = np.maximum(best[kv_head], mine)
    return best


def lengths_of(view: LayerView) -> np.ndarray:
    return view.values[0, :, view.reference].norm(dim=-1).numpy()


@pytest.mark.parametrize(
    ("architecture", "normalizes"),
    [("llama", False), ("qwen3", False), ("gemma2", True), ("gemma3", True), ("olmo2", True)],
)
def test_scales_that_the_model_takes_out_again_do_not_count(
    architecture: str, normalizes: bool
) -> None:
    """Values of a layer 30 times as long."""
    model = tiny_model(architecture)
    assert model.normalizes_attention == normalizes
    selection = Writer(model, framing="plain").selection
    keys, values = torch.randn(2, 2, 12, 8), torch.randn(2, 2, 12, 8)
    about = ((7, 4), (7, 4), 1.0)
    view = LayerView(0, torch.randn(2, 4, 7, 8), keys, values, *about)
    longer = LayerView(0, view.queries, keys, 30 * values, *about)
    factor = 1 if normalizes else 30
    found = selection.value_lengths(model, view)
    torch.testing.assert_close(selection.value_lengths(model, longer), factor * found)
    # A shorter reference has the same in a batch as alone.
    alone = LayerView(
        0, view.queries[1:, :, :4], keys[1:, :, :9], values[1:, :, :9], (4,), (4,), 1.0
    )
    torch.testing.assert_close(selection.value_lengths(model, alone), found[1:, :, :4])


def test_the_command_line_knows_all_selections() -> None:
    assert set(SELECTION_NAMES) == set(SELECTIONS)


@pytest.mark.parametrize("selection", ["reconstruction", "contribution", "questions"])
def test_looking_back(model: LanguageModel, selection: str) -> None:
    writer, seen = views(model, selection)
    for view in seen:
        (scores,) = writer.selection.score(model, view)
        first = view.lengths[0]
        if selection != "questions":  # what asks for the repetition does not look
            first = view.ends[0] - view.lengths[0]
        expected = looked_at(view, first)
        if selection != "reconstruction":
            expected *= lengths_of(view)
        np.testing.assert_allclose(scores.numpy(), expected, atol=1e-5)


def test_expected_attention_is_that_of_the_same_queries_further_on(model: LanguageModel) -> None:
    """The model itself turns the queries: those of the same text, a reference's length later."""
    writer, seen = views(model, "expected")
    tokens = model.tokens(TEXT)
    # Layer 0's queries depend on the token and its position alone.
    later: list[torch.Tensor] = []
    model.observe(
        [tokens],
        lambda layer, query, *_: later.append(query[0]) if layer == 0 else None,
        start=len(writer.shape.prefix) + 128,
    )
    (scores,) = writer.selection.score(model, seen[0])
    keys = seen[0].keys[0]
    expected = np.zeros(scores.shape)
    for head in range(model.heads):
        kv_head = head // (model.heads // model.kv_heads)
        weights = (later[0][head] @ keys[kv_head].T * seen[0].scaling).softmax(-1)
        expected[kv_head] += weights[:, seen[0].reference].sum(0).numpy() / len(tokens)
    expected *= lengths_of(seen[0])
    np.testing.assert_allclose(scores.numpy(), expected, atol=1e-5)


def test_diversity_keeps_what_is_unlike_the_rest(model: LanguageModel) -> None:
    writer, seen = views(model, "diversity")
    keys = seen[0].keys[0, :, seen[0].reference]
    unlike = torch.zeros_like(keys)
    unlike[:, :, 0] = 1.0
    unlike[:, 7, 0], unlike[:, 7, 1] = 0.0, 1.0
    whole = seen[0].keys.clone()
    whole[0, :, seen[0].reference] = unlike
    view = LayerView(**{**vars(seen[0]), "keys": whole})
    (scores,) = writer.selection.score(model, view)
    assert scores.argmax(1).tolist() == [7] * model.kv_heads


@pytest.mark.parametrize(("spread", "parts"), [("uniform", 6), ("layer", 3), ("all", 1)])
def test_a_budget_is_spent_where_it_is_spread(
    model: LanguageModel, spread: str, parts: int
) -> None:
    writer = Writer(model, budget=60, spread=spread)
    assert writer.settings["spread"] == spread
    scores = (
        torch.rand(6, 128, generator=torch.Generator().manual_seed(1)) + torch.arange(6)[:, None]
    )
    kept = writer.selection.keep(scores)
    counts = kept.view(parts, -1).sum(1).tolist()
    assert counts == [60 // parts] * parts
    for part, mine in zip(scores.view(parts, -1), kept.view(parts, -1), strict=True):
        assert part[mine].min() > part[~mine].max()


def test_a_spread_that_cannot_be(model: LanguageModel) -> None:
    with pytest.raises(InvalidInputError, match="there is no 'even'"):
        Writer(model, spread="even")  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="each of the 3 layers keeps at least one token"):
        Writer(model, budget=2, spread="layer")


def test_a_short_reference_keeps_as_many_pairs_as_the_floor_says(model: LanguageModel) -> None:
    def pairs(text: str, **how: int) -> int:
        (memory,) = Writer(model, framing="plain", budget=128, **how).write([text])
        return memory.pairs

    short, long = " ".join(TEXT.split()[:7]), TEXT
    few, many = len(model.tokens(short)), len(model.tokens(long))
    assert few < 20 < 30 < many
    assert pairs(short, floor=0) == few  # a pair for each token: 128 for 128 tokens
    assert pairs(short, floor=20) == 20
    rows = Writer(model, framing="plain").shape.rows
    assert pairs(short, floor=128) == min(128, rows * few)  # as far as there are pairs
    assert pairs(long, floor=20) == pairs(long, floor=0) == many
    assert pairs(short) == 40  # the default


@pytest.mark.parametrize("floor", [-1, True, 1.5, "40"])
def test_a_floor_that_cannot_be(model: LanguageModel, floor: object) -> None:
    with pytest.raises(InvalidInputError, match="floor"):
        Writer(model, floor=floor)  # type: ignore[arg-type]
