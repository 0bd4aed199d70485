"""Decoding by float16 copies of the weights: close, and nothing else changes."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from memdb import InvalidInputError
from model_adapter import Context, LanguageModel, Stretch, Writer, load_model
from model_adapter.models.fast import fast_passes, make_fast
from model_adapter.models.fingerprint import weights_fingerprint
from tests.helpers import SAMPLE, tiny_model

EXACT = {"atol": 0, "rtol": 0}


def has_kernel() -> bool:
    try:
        make_fast(torch.nn.Sequential(torch.nn.Linear(8, 8)), "float16")
    except InvalidInputError:
        return False
    return True


needs_kernel = pytest.mark.skipif(not has_kernel(), reason="no float16 kernel on this processor")


def read_and_step(model: LanguageModel, batch: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a prompt's tokens, and those of tokens that are read one by one."""
    context = Context(model, batch=batch)
    tokens = model.tokens(SAMPLE)[:60]
    read = context.read([[Stretch(tokens)]] * batch, every=True)
    steps = [context.step(torch.tensor([token] * batch)) for token in tokens[:10]]
    return torch.stack(read), torch.stack(steps)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["llama", "phi3", "gemma2", "qwen2"])
def test_decoding_is_close_and_reading_the_same(architecture: str, dtype: torch.dtype) -> None:
    exact, fast = (tiny_model(architecture, dtype=dtype) for _ in range(2))
    layers = sum(isinstance(module, torch.nn.Linear) for module in fast.model.modules())
    assert make_fast(fast.model, "float16") == layers > 10
    for batch in (1, 3):
        expected, got = read_and_step(exact, batch), read_and_step(fast, batch)
        torch.testing.assert_close(got[0], expected[0], **EXACT)
        if dtype == torch.float32:  # bfloat16 of about 1 is float16, too
            assert not torch.equal(got[1], expected[1])
        spread = float(expected[1].float().std())
        error = float((got[1] - expected[1]).float().abs().mean())
        # Rounding of the weights, or that of bfloat16, whichever is larger.
        assert error < (2e-3 if dtype == torch.float32 else 3e-2) * spread


@needs_kernel
def test_a_layer_is_its_weights_rounded_to_float16() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(40, 24))
    rounded = torch.nn.Linear(40, 24)
    rounded.weight.data = layer[0].weight.data.half().float()
    rounded.bias.data = layer[0].bias.data
    x = torch.randn(3, 1, 40)
    assert make_fast(layer, "float16") == 1
    with torch.no_grad():
        torch.testing.assert_close(layer(x), rounded(x))
    assert layer(x).requires_grad  # whoever trains trains the weights themselves


@needs_kernel
def test_which_passes_read_the_copies_can_be_chosen() -> None:
    exact, fast = tiny_model(), tiny_model()
    make_fast(fast.model, "float16")
    expected = read_and_step(exact)
    with fast_passes("none"):
        for got, wanted in zip(read_and_step(fast), expected, strict=True):
            torch.testing.assert_close(got, wanted, **EXACT)
    with fast_passes("all"):
        assert not torch.equal(read_and_step(fast)[0], expected[0])


@needs_kernel
def test_weights_names_ties_and_fingerprint_stay(tmp_path: Path) -> None:
    model = tiny_model(tie_word_embeddings=True).model
    before = weights_fingerprint(model)
    names = list(model.state_dict())
    weights = list(model.parameters())
    make_fast(model, "float16")
    assert weights_fingerprint(model) == before
    assert list(model.state_dict()) == names
    assert all(a is b for a, b in zip(weights, model.parameters(), strict=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    again = copy.deepcopy(model)
    with torch.no_grad():
        tokens = torch.tensor([[5]])
        torch.testing.assert_close(again(tokens).logits, model(tokens).logits)


@needs_kernel
def test_exact_takes_the_copies_away_again() -> None:
    exact, fast = tiny_model(), tiny_model()
    make_fast(fast.model, "float16")
    assert make_fast(fast.model, "exact") == 0
    for got, wanted in zip(read_and_step(fast), read_and_step(exact), strict=True):
        torch.testing.assert_close(got, wanted, **EXACT)


@needs_kernel
def test_weights_that_float16_cannot_hold_stay_as_they_are() -> None:
    layers = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    layers[0].weight.data[0, 0] = 1e5
    assert make_fast(layers, "float16") == 1


def test_what_cannot_be_made_fast_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="none of: exact, float16"):
        make_fast(tiny_model().model, "int3")  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="the model is on 'meta'"):
        make_fast(tiny_model().model.to("meta"), "float16")


@needs_kernel
def test_the_real_model_writes_the_same_memories_and_says_the_same(smollm: LanguageModel) -> None:
    fast = load_model(smollm.name, fast=True)
    assert fast is not smollm
    assert load_model(smollm.name, fast=True) is fast
    assert fast.fingerprint == smollm.fingerprint
    writers = [Writer(model, budget=1440) for model in (smollm, fast)]
    memories = [writer.write([SAMPLE[:300]])[0] for writer in writers]
    assert (memories[0].keys == memories[1].keys).all()
    assert (memories[0].positions == memories[1].positions).all()
    said = []
    for model in (smollm, fast):
        context = Context(model)
        (logits,) = context.read([[Stretch(model.tokens("The lighthouse keeper said that"))]])
        tokens: list[int] = []
        for _ in range(12):
            tokens.append(int(logits[0].argmax()))
            logits = context.step(torch.tensor(tokens[-1:]))
        said.append(tokens)
    assert said[0] == said[1]
