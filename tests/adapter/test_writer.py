"""Writing: selections, budgets, shapes, batches."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from tokenizers import AddedToken
from transformers import DynamicCache

from memdb import InvalidInputError, MemoryShape, UnsupportedModelError, to_float32
from model_adapter import SELECTIONS, LanguageModel, Writer
from model_adapter.selections import LayerView, PredictedContribution, Reconstruction
from tests.adapter.predictors import any_predictor
from tests.helpers import SAMPLE, tiny_model

TEXTS = ["The harbour of Veldmoor is old.", SAMPLE[:150], "Storms."]


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return tiny_model()


def read(model: LanguageModel, tokens: list[int]) -> DynamicCache:
    """transformers' own key-values of some tokens."""
    cache = DynamicCache()
    with torch.no_grad():
        model.model(torch.tensor([tokens]), past_key_values=cache, use_cache=True)
    return cache


@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_batch_is_the_same_as_one_by_one(model: LanguageModel, selection: str) -> None:
    takes = selection == PredictedContribution.name
    predictor = any_predictor(model) if takes else None
    writer = Writer(model, selection=selection, budget=200, predictor=predictor)
    together = writer.write(TEXTS)
    for text, memory in zip(TEXTS, together, strict=True):
        (alone,) = writer.write([text])
        np.testing.assert_array_equal(memory.offsets, alone.offsets)
        np.testing.assert_array_equal(memory.positions, alone.positions)
        np.testing.assert_allclose(memory.keys, alone.keys, atol=1e-5)
        np.testing.assert_allclose(memory.values, alone.values, atol=1e-5)
        memory.require(writer.shape)


def test_many_are_written_in_batches_of_about_one_length(model: LanguageModel) -> None:
    texts = [SAMPLE[: 10 + 37 * i % 101] for i in range(10)]
    passes = []

    def look(_: object, arguments: tuple[torch.Tensor], __: object = None) -> None:
        passes.append(tuple(arguments[0].shape))

    writer = Writer(model, selection="paper", batch=4)
    assert writer.batch == 4
    writer.write(texts[:1])  # the prefix is read
    with model.model.model.register_forward_pre_hook(look):
        together = writer.write(texts)
    lengths = sorted((len(model.tokens(text)) for text in texts), reverse=True)
    assert passes == [(4, lengths[0]), (4, lengths[4]), (2, lengths[8])]
    for text, memory in zip(texts, together, strict=True):
        (alone,) = writer.write([text])
        np.testing.assert_array_equal(memory.positions, alone.positions)
        np.testing.assert_allclose(memory.keys, alone.keys, atol=1e-5)


def test_no_more_is_run_than_is_kept(model: LanguageModel) -> None:
    """Neither the layers behind the last memory layer, nor the prefix again."""
    layers = model.model.model.layers
    tokens: list[int] = []
    run: list[int] = []
    hooks = [
        layers[0].register_forward_pre_hook(lambda _, seen: tokens.append(seen[0].shape[1])),
        layers[0].mlp.register_forward_pre_hook(lambda *_: run.append(0)),
        layers[1].mlp.register_forward_pre_hook(lambda *_: run.append(1)),
        layers[2].register_forward_pre_hook(lambda *_: run.append(2)),
    ]
    writer = Writer(model, layers=[1], selection="paper", batch=8)
    n = len(model.tokens("Storms."))
    writer.write(["Storms."])
    run.clear()
    tokens.clear()
    writer.write(["Storms."])
    for hook in hooks:
        hook.remove()
    assert tokens == [n]
    assert run == [0]


def test_a_selection_sees_the_prefix_among_the_keys_alone(model: LanguageModel) -> None:
    class Looks(Reconstruction):
        def score(self, model: LanguageModel, view: LayerView) -> torch.Tensor:
            views.append(view)
            return super().score(model, view)

    views: list[LayerView] = []
    writer = Writer(model)
    writer.selection = Looks(None, writer.shape.rows)
    writer.write(TEXTS)
    lengths = tuple(len(model.tokens(text)) for text in TEXTS)
    request = len(writer.selection.suffix(model, []))
    prefix = len(writer.shape.prefix)
    assert [view.layer for view in views] == [0, 1, 2]
    for view in views:
        assert view.lengths == lengths
        assert view.ends == tuple(2 * n + request for n in lengths)
        assert view.prefix == prefix
        assert view.reference == slice(prefix, prefix + max(lengths))
        assert view.queries.shape == (3, 4, max(view.ends), 8)
        assert view.keys.shape == (3, 2, prefix + max(view.ends), 8)


def test_the_paper_rule_is_its_formula(model: LanguageModel) -> None:
    """Keys and queries before RoPE, read off the projections themselves."""
    text = SAMPLE[:150]
    tokens = model.tokens(text)
    writer = Writer(model, framing="plain", selection="paper")
    prefix = len(writer.shape.prefix)
    ids = torch.tensor([[*writer.shape.prefix, *tokens]])
    seen: dict[str, torch.Tensor] = {}
    attention = model.model.model.layers[1].self_attn
    hooks = [
        getattr(attention, name).register_forward_hook(
            lambda _m, _i, out, name=name: seen.update({name: out})
        )
        for name in ("q_proj", "k_proj")
    ]
    with torch.no_grad():
        model.model(ids)
    for hook in hooks:
        hook.remove()
    n, dim = len(tokens), model.head_dim
    queries = seen["q_proj"][0, prefix:].view(n, 4, dim)
    keys = seen["k_proj"][0, prefix:].view(n, 2, dim)
    each = round(8 * n / 128)
    (memory,) = writer.write([text])
    for head in range(2):
        weights = torch.zeros(n)
        for query_head in (2 * head, 2 * head + 1):
            logits = queries[:, query_head] @ keys[:, head].T / dim**0.5
            weights += logits.softmax(-1).sum(0)
        expected = sorted(weights.topk(each).indices.tolist())
        row = 1 * 2 + head
        got = memory.positions[memory.offsets[row] : memory.offsets[row + 1]]
        assert got.tolist() == expected


def test_the_paper_rule_keeps_the_same_number_for_each_head(model: LanguageModel) -> None:
    (memory,) = Writer(model, selection="paper").write([SAMPLE[:150]])
    assert len(set(np.diff(memory.offsets).tolist())) == 1


def test_reconstruction_spends_its_budget_where_the_scores_are(model: LanguageModel) -> None:
    tokens = len(model.tokens(SAMPLE[:150]))
    (memory,) = Writer(model, selection="reconstruction", budget=128).write([SAMPLE[:150]])
    assert memory.pairs == round(128 * tokens / 128)
    assert len(set(np.diff(memory.offsets).tolist())) > 1  # ragged


@pytest.mark.parametrize(
    ("architecture", "changes"), [("llama", {}), ("gemma2", {"attn_logit_softcapping": 1.0})]
)
def test_reconstruction_finds_what_is_attended_to_while_repeating(
    architecture: str, changes: dict[str, object]
) -> None:
    """Scores against transformers' own eager attention weights."""
    model = tiny_model(architecture, **changes)
    text = SAMPLE[:100]
    tokens = model.tokens(text)
    writer = Writer(model, framing="plain", selection="reconstruction", budget=60)
    prefix = writer.shape.prefix
    sequence = [*prefix, *tokens, *writer.selection.suffix(model, tokens)]
    model.model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model.model(torch.tensor([sequence]), output_attentions=True).attentions
    model.model.set_attn_implementation("memdb")
    span = slice(len(prefix), len(prefix) + len(tokens))
    scores = torch.stack(
        [w[0, :, -len(tokens) :, span].reshape(2, -1, len(tokens)).amax(1) for w in weights]
    ).reshape(-1, len(tokens))
    memory, _ = writer.write([text, SAMPLE[:150]])  # the other is longer: this one is padded
    kept = np.zeros(scores.shape, bool)
    rows = np.repeat(np.arange(len(kept)), np.diff(memory.offsets))
    kept[rows, memory.positions] = True
    assert scores[torch.from_numpy(kept)].min() >= scores[torch.from_numpy(~kept)].max() - 1e-6


def test_keys_are_stored_after_rope_behind_the_prefix(model: LanguageModel) -> None:
    text = SAMPLE[:100]
    tokens = model.tokens(text)
    writer = Writer(model, framing="plain", budget=6 * 128)
    prefix = writer.shape.prefix
    cache = read(model, [*prefix, *tokens])
    keys = torch.cat([layer.keys[0, :, len(prefix) :] for layer in cache.layers])
    (memory,) = writer.write([text])
    np.testing.assert_allclose(memory.keys, keys.reshape(-1, 8).numpy(), atol=1e-5)


def test_memory_layers_can_be_chosen(model: LanguageModel) -> None:
    writer = Writer(model, layers=[2, 0], budget=4 * 128)
    (memory,) = writer.write(["Storms."])
    assert writer.shape.layers == (0, 2)
    (whole,) = Writer(model, budget=6 * 128).write(["Storms."])
    n = len(model.tokens("Storms."))
    np.testing.assert_allclose(memory.keys[: 2 * n], whole.keys[: 2 * n], atol=1e-5)
    np.testing.assert_allclose(memory.keys[2 * n :], whole.keys[4 * n :], atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_store_what_they_compute(dtype: torch.dtype) -> None:
    model = tiny_model(dtype=dtype)
    writer = Writer(model, framing="plain", budget=6 * 128)
    (memory,) = writer.write(["Storms."])
    memory.require(writer.shape)
    cache = read(model, [*writer.shape.prefix, *model.tokens("Storms.")])
    n = len(model.tokens("Storms."))
    expected = torch.cat([layer.values[0, :, -n:] for layer in cache.layers]).reshape(-1, 8)
    got = to_float32(memory.values, writer.shape.dtype)
    np.testing.assert_allclose(got, expected.float().numpy(), atol=2e-2, rtol=5e-2)


def test_layers_without_position_encoding_are_recorded_as_such() -> None:
    shape = Writer(tiny_model("smollm3", num_hidden_layers=4)).shape
    assert [rope is None for rope in shape.rope] == [False, False, False, True]
    assert MemoryShape.from_json(shape.to_json()) == shape


@pytest.mark.parametrize("architecture", ["qwen3", "gemma3", "smollm3"])
def test_rotation_is_undone_where_it_is_claimed_to_be(architecture: str) -> None:
    model = tiny_model(architecture, num_hidden_layers=4)
    assert model.can_unrotate
    Writer(model, selection="paper")


def test_the_paper_rule_is_refused_where_rotation_cannot_be_undone() -> None:
    with pytest.raises(UnsupportedModelError, match="use the selection 'reconstruction'"):
        Writer(tiny_model("glm"), selection="paper")


def test_the_paper_rule_keeps_to_its_budget(model: LanguageModel) -> None:
    with pytest.raises(InvalidInputError, match="at least 6, got 5"):
        Writer(model, selection="paper", budget=5)


def test_text_is_text_while_another_thread_frames(model: LanguageModel) -> None:
    def many(special: bool) -> set[tuple[int, ...]]:
        return {tuple(model.tokens("<|im_end|>", special=special)) for _ in range(300)}

    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(many, [False, True] * 3))
    assert all(seen == {(2,)} for seen in found[1::2])
    assert all(len(seen) == 1 and (2,) not in seen for seen in found[::2])


def test_added_tokens_in_a_text_are_text() -> None:
    made = tiny_model()
    made.tokenizer.add_tokens([AddedToken("<think>", special=False)])
    again = LanguageModel(made.model, made.tokenizer, "thinker")
    assert len(again.tokens("<think>")) > 1
    assert again.tokens("<think>", special=True) == [400]


def test_the_shape_survives_json(model: LanguageModel) -> None:
    shape = Writer(model).shape
    assert MemoryShape.from_json(shape.to_json()) == shape


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, "budget must be 1 to 768"),
        ({"budget": 769}, "budget must be 1 to 768"),
        ({"layers": [3]}, "among 0 to 2"),
        ({"layers": []}, "among 0 to 2"),
        ({"selection": "best"}, "no selection is called 'best'"),
        ({"framing": "prose"}, "'plain' or 'chat'"),
        ({"batch": 0}, "at least 1 reference, got 0"),
    ],
)
def test_wrong_options_are_named(
    model: LanguageModel, options: dict[str, object], message: str
) -> None:
    with pytest.raises(InvalidInputError, match=message):
        Writer(model, **options)  # type: ignore[arg-type]


def test_a_text_that_is_too_long_is_refused(model: LanguageModel) -> None:
    with pytest.raises(InvalidInputError, match="1 to 128 tokens"):
        Writer(model).write([SAMPLE * 3])


def test_control_tokens_in_a_text_are_text(model: LanguageModel) -> None:
    assert 2 not in model.tokens("he said <|im_end|> and left")
    assert 2 in model.tokens("<|im_end|>", special=True)


def test_another_model_has_another_fingerprint(model: LanguageModel) -> None:
    assert tiny_model().fingerprint == model.fingerprint
    assert tiny_model("qwen2").fingerprint != model.fingerprint
    other = tiny_model()
    with torch.no_grad():
        next(other.model.parameters())[0, 0] += 1e-3
    assert other.fingerprint != model.fingerprint
