"""Attention of one token by the kernels says what every other way says."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from memdb import PackedMemories, pack
from model_adapter import Context, LanguageModel, Stretch, Writer
from model_adapter.attention import one_token
from tests.adapter.every_model import tiny_of
from tests.helpers import ARCHITECTURES, MORE, SAMPLE, tiny_model, tiny_tokenizer

kernels = pytest.importorskip("memdb_kernels", reason="they need a C compiler")
if not kernels.supported():
    pytest.skip("this processor has not what the kernels need", allow_module_level=True)


@pytest.fixture(params=[True, False], ids=["kernels", "torch"])
def by_kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if not request.param:
        monkeypatch.setattr(one_token, "_KERNELS", None)
    return bool(request.param)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """One for each time that the kernel is called."""
    seen: list[int] = []
    called = kernels.attend

    def counting(*given: object) -> None:
        seen.append(1)
        called(*given)

    monkeypatch.setattr(kernels, "attend", counting)
    return seen


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 20])
@pytest.mark.parametrize(
    ("rows", "length", "memories", "context"),
    [
        (1, 64, 0, 1),
        (2, 8, 3, 1),
        (3, 80, 70, 33),
        (6, 128, 5, 300),
        (2, 24, 40, 8),
        (1, 256, 9, 7),
    ],
)
def test_the_kernel_is_a_softmax_over_what_is_filled(
    group: int, rows: int, length: int, memories: int, context: int
) -> None:
    draw = torch.Generator().manual_seed(group * 1000 + rows + length)
    size, begin, end = memories + context + 5, memories + 2, memories + 2 + context
    query = 3 * torch.randn(rows, group, length, generator=draw)
    keys, values = torch.randn(2, rows, size, length, generator=draw)
    mask = torch.randn(rows, size, generator=draw)
    mask[:, begin + 1 : end : 3] = -torch.inf  # of the context, too: filling
    filled = torch.randint(0, memories + 1, (rows,), generator=draw)
    filled[0] = 0
    places = torch.arange(size)
    hidden = (places < begin - filled[:, None]) | (places >= end)
    # What is not filled may be anything.
    keys[hidden], values[hidden], mask[hidden] = torch.nan, torch.nan, torch.nan

    out = torch.full((rows, group, length), torch.nan)
    given = (x.data_ptr() for x in (query, keys, values, mask, filled))
    kernels.attend(*given, rows, group, length, size, begin, end, 0.125, out.data_ptr())

    scores = query.double() @ keys.double().transpose(1, 2) * 0.125 + mask[:, None].double()
    weights = scores.masked_fill(hidden[:, None], -torch.inf).softmax(-1)
    expected = weights @ values.double().masked_fill(hidden[..., None], 0)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0])
def test_large_and_small_scores(scale: float) -> None:
    """None overflows, and what is far below the best counts nothing."""
    query, keys, values = (scale * torch.randn(1, n, 64) for n in (3, 200, 200))
    mask, out = torch.zeros(1, 200), torch.empty(1, 3, 64)
    addresses = [x.data_ptr() for x in (query, keys, values, mask)]
    kernels.attend(*addresses, None, 1, 3, 64, 200, 0, 200, 1.0, out.data_ptr())
    expected = (query.double() @ keys.double().mT).softmax(-1) @ values.double()
    torch.testing.assert_close(out.double(), expected, rtol=1e-3, atol=1e-5 * scale)


def _packed(writer: Writer, texts: list[str], biases: list[float]) -> PackedMemories:
    return pack(list(writer.write(texts)), writer.shape, biases)


def _read(model: LanguageModel) -> list[Tensor]:
    """Steps of prompts of several lengths with several memories, which change, and one without; in
    buffers that grow."""
    writer = Writer(model, framing="plain", budget=model.layers * model.kv_heads * 6)
    first = _packed(writer, ["Storms and whales.", SAMPLE[:150]], [0.5, -2.0])
    other = _packed(writer, ["The river Quill freezes."], [1.5])
    start = len(writer.shape.prefix) + 128
    context = Context(model, writer.shape.prefix, start, batch=3)
    prompts = [model.tokens(text) for text in ("Who keeps it?", "A much longer question.", "So?")]
    context.read(
        [
            [Stretch(tokens, memories)]
            for tokens, memories in zip(prompts, (first, None, other), strict=True)
        ]
    )
    logits = []
    for number in range(90):
        if number == 30:
            context.remember([None, first, other])
        if number == 60:
            context.remember([None, None, None])
        logits.append(context.step(torch.tensor([5, 6, 7]) + number))
    return logits


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_steps_by_kernels_equal_steps_without(
    architecture: str, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(architecture)
    by_kernels = _read(model)
    assert len(calls) >= 90 * model.layers
    monkeypatch.setattr(one_token, "_KERNELS", None)
    for one, other in zip(by_kernels, _read(model), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


#: Models whose attention reads others than its own keys, or in another form than it keeps them.
OTHERS = ("deepseek_v3", "gemma3n_text", "llama4_text", "mimo_v2_flash", "qwen3_5", "stablelm")


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *MORE, *OTHERS])
def test_steps_of_any_model_equal_a_pass_over_all(architecture: str, by_kernels: bool) -> None:
    if architecture in OTHERS:
        model = LanguageModel(tiny_of(architecture), tiny_tokenizer(), architecture)
    else:
        model = tiny_model(architecture)
    tokens = model.tokens(SAMPLE[:120])
    (expected,) = Context(model).read([[Stretch(tokens)]], every=True)
    context = Context(model)
    (first,) = context.read([[Stretch(tokens[:4])]])
    steps = [context.step(torch.tensor([token])) for token in tokens[4:]]
    torch.testing.assert_close(torch.cat([first, *steps]), expected[3:], rtol=1e-3, atol=2e-4)
