"""Memory equals prompt, and chunks equal a loop: what everything else rests on."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config

from memdb import CODECS, PackedMemories, UnsupportedModelError, pack
from memdb.codecs import decode_memory, encode_memory
from model_adapter import Context, LanguageModel, Stretch, Writer, memory_attention
from tests.adapter.every_model import tiny_of
from tests.adapter.slow import Part, Weighed, slow_logits
from tests.helpers import ARCHITECTURES, MORE, SAMPLE, tiny_model, tiny_tokenizer

CONTEXT = "\n\nQuestion: who keeps the lighthouse?\nAnswer:"
TEXTS = ("Storms and whales.", SAMPLE[:150], "The river Quill freezes.", SAMPLE[150:260])
BIASES = (0.5, -2.0, 1.5, -0.75)  # of their memories


def reference_of_128_tokens(model: LanguageModel) -> tuple[str, list[int]]:
    text = SAMPLE * 3
    while len(model.tokens(text)) > 128:
        text = text[:-1]
    tokens = model.tokens(text)
    assert len(tokens) == 128
    return text, tokens


def plain_logits(model: LanguageModel, tokens: list[int]) -> torch.Tensor:
    """What transformers' own attention computes."""
    model.model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            return model.model(torch.tensor([tokens])).logits[0]
    finally:
        model.model.set_attn_implementation("memdb")


def largest_difference(model: LanguageModel, framing: str) -> float:
    """Between a whole reference as memory and the same text in the prompt; windows hold."""
    writer = Writer(model, framing=framing, budget=model.layers * model.kv_heads * 128)
    text, reference = reference_of_128_tokens(model)
    context = model.tokens(CONTEXT)
    (memory,) = writer.write([text])
    shape = writer.shape
    assert memory.pairs == model.layers * model.kv_heads * 128
    stored = encode_memory(memory, shape, CODECS["exact"])
    packed = pack([decode_memory(stored, shape, CODECS)], shape)

    reading = Context(model, shape.prefix, len(shape.prefix) + 128, windows=True)
    (got,) = reading.read([[Stretch(context, packed)]], every=True)
    expected = plain_logits(model, [*shape.prefix, *reference, *context])[-len(context) :]
    return float((got - expected).abs().max())


@pytest.mark.parametrize("framing", ["plain", "chat"])
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *MORE])
def test_memory_equals_prompt_on_tiny_models(architecture: str, framing: str) -> None:
    assert largest_difference(tiny_model(architecture), framing) < 1e-4


@pytest.mark.parametrize("architecture", ["mistral", "gemma2", "gemma3", "phi3", "gpt_oss"])
def test_memory_equals_prompt_with_sliding_windows(architecture: str) -> None:
    model = tiny_model(architecture, sliding_window=40, num_hidden_layers=4)
    assert largest_difference(model, "plain") < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_memory_equals_prompt_in_half_precision(architecture: str, dtype: torch.dtype) -> None:
    model = tiny_model(architecture, dtype=dtype, initializer_range=0.05)
    assert largest_difference(model, "plain") < 0.03


@pytest.mark.parametrize("framing", ["plain", "chat"])
def test_memory_equals_prompt_on_the_real_model(smollm: LanguageModel, framing: str) -> None:
    assert largest_difference(smollm, framing) < 1e-4


# --- chunks and batches, against a loop -----------------------------------------------------------


class Case:
    """Sequences of stretches with memories, of a tiny model. Each memory has a bias of its own."""

    def __init__(self, architecture: str, **changes: object) -> None:
        self.model = tiny_model(architecture, num_hidden_layers=4, **changes)
        writer = Writer(self.model, framing="plain", budget=200)
        self.shape = writer.shape
        self.memories = writer.write(TEXTS)
        self.start = len(self.shape.prefix) + 128

    def tokens(self, start: int, count: int) -> list[int]:
        return self.model.tokens(SAMPLE)[start : start + count]

    def set(self, *numbers: int) -> list[Weighed]:
        return [(self.memories[number], BIASES[number]) for number in numbers]

    def context(self, batch: int, windows: bool = False) -> Context:
        return Context(self.model, self.shape.prefix, self.start, batch=batch, windows=windows)

    def stretch(self, part: Part) -> Stretch:
        tokens, memories = part
        return Stretch(tokens, self.packed(memories))

    def packed(self, weighed: Sequence[Weighed]) -> PackedMemories | None:
        if not weighed:
            return None
        memories, biases = zip(*weighed, strict=True)
        return pack(memories, self.shape, biases)

    def check(
        self,
        sequences: Sequence[Sequence[Part]],
        steps: Sequence[Sequence[int]] = (),
        windows: bool = False,
    ) -> None:
        """Read sequences in one pass, then tokens one by one with the memories of the last."""
        context = self.context(len(sequences), windows)
        stretches = [[self.stretch(part) for part in parts] for parts in sequences]
        got = context.read(stretches, every=True)
        for tokens in steps:
            step = context.step(torch.tensor(tokens))
            got = [torch.cat([old, new[None]]) for old, new in zip(got, step, strict=True)]
        for number, parts in enumerate(sequences):
            said = [tokens[number] for tokens in steps]
            whole = [*parts, (said, parts[-1][1])]
            expected = slow_logits(self.model, self.shape, whole, start=self.start, windows=windows)
            torch.testing.assert_close(got[number], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *MORE])
def test_chunks_of_several_prompts_in_one_pass_equal_a_loop(architecture: str) -> None:
    case = Case(architecture)
    long = [(case.tokens(0, 9), case.set(0, 1)), (case.tokens(9, 5), case.set(2, 3, 1))]
    short = [(case.tokens(30, 4), case.set(3))]
    bare = [
        (case.tokens(40, 3), []),
        (case.tokens(43, 8), case.set(1, 0)),
        (case.tokens(3, 2), []),
    ]
    case.check([long, short, bare], [[5, 6, 7], [8, 9, 10], [11, 12, 13]])


@pytest.mark.parametrize("windows", [True, False])
@pytest.mark.parametrize("architecture", ["mistral", "gemma2", "gemma3", "phi3", "gpt_oss"])
def test_sliding_windows_hold_for_the_context_and_if_asked_for_memories(
    architecture: str, windows: bool
) -> None:
    case = Case(architecture, sliding_window=12)
    first = [(case.tokens(0, 10), case.set(0, 1)), (case.tokens(10, 9), case.set(2))]
    second = [(case.tokens(30, 4), case.set(3))]
    case.check([first, second], [[5, 6], [8, 9]], windows)


def test_one_chunk_for_each_prompt_equals_a_loop() -> None:
    case = Case("llama")
    case.check(
        [
            [(case.tokens(0, 9), case.set(0, 1))],
            [(case.tokens(9, 2), case.set(2))],
            [(case.tokens(20, 5), [])],
        ],
        [[5, 6, 7], [8, 9, 10]],
    )


def test_memories_are_exchanged_between_steps_and_buffers_grow() -> None:
    case = Case("qwen3")
    context = case.context(2)
    parts: list[list[Part]] = [[], []]
    got: list[list[torch.Tensor]] = [[], []]
    sets = [([0], [1]), ([0, 1, 2, 3], []), ([2], [3, 0])]
    for turn, chosen in enumerate(sets):
        memories = [case.set(*numbers) for numbers in chosen]
        context.remember([case.packed(m) for m in memories])
        for place in range(60):
            tokens = [3 + turn * 60 + place, 300 - place]
            for number, logits in enumerate(context.step(torch.tensor(tokens))):
                got[number].append(logits)
                parts[number].append(([tokens[number]], memories[number]))
    for number in range(2):
        expected = slow_logits(case.model, case.shape, parts[number], start=case.start)
        torch.testing.assert_close(torch.stack(got[number]), expected, atol=1e-4, rtol=1e-4)


def test_tokens_are_taken_back() -> None:
    case = Case("mistral", sliding_window=12)
    context = case.context(1)
    parts = [(case.tokens(0, 9), case.set(0, 1)), (case.tokens(9, 5), case.set(2))]
    context.read([[case.stretch(part) for part in parts]])
    context.take_back(7)
    assert context.positions == [case.start + 7]
    rest = (case.tokens(50, 6), case.set(3))
    (got,) = context.read([[case.stretch(rest)]], every=True)
    whole = [(case.tokens(0, 7), case.set(0, 1)), rest]
    expected = slow_logits(case.model, case.shape, whole, start=case.start)[7:]
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="cannot take back 14"):
        context.take_back(14)


def test_memory_layers_may_be_few() -> None:
    case = Case("llama")
    writer = Writer(case.model, framing="plain", budget=40, layers=[1, 2])
    case.shape, case.memories = writer.shape, writer.write(TEXTS)
    parts = [(case.tokens(0, 9), case.set(0, 1)), (case.tokens(9, 5), case.set(2))]
    case.check([parts], [[5]])
    case.check([parts[:1]], [[5]])


def test_what_memories_get_is_what_the_softmax_says() -> None:
    """In a pass of stretches and in a step; the sum over heads of what is not the context's."""
    case = Case("llama")
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def witness(weights: torch.Tensor, memory: object) -> None:
        seen.append((weights, memory.memory))  # type: ignore[attr-defined]

    parts = [(case.tokens(0, 9), case.set(0, 1)), (case.tokens(9, 5), case.set(2))]
    stretches = [[case.stretch(part) for part in parts]]
    watched, plain = case.context(1), case.context(1)
    for got, expected in (
        (watched.read(stretches, witness=witness)[0], plain.read(stretches)[0]),
        (watched.step(torch.tensor([5]), witness=witness), plain.step(torch.tensor([5]))),
    ):
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert len(seen) == 8
    for number, (weights, memory) in enumerate(seen):
        sets, _, tokens, width = weights.shape
        assert (sets, tokens) == ((2, 9) if number < 4 else (1, 1))
        assert memory.shape == (sets, 2, width)
        assert (weights >= 0).all()
        assert (weights.sum(-1) < 1).all()
        hidden = (memory < 0).repeat_interleave(2, 1)[:, :, None].expand_as(weights)
        assert (weights[hidden] == 0).all()
        assert set(memory[0].unique().tolist()) <= {-1, 0, 1}


# --- plain attention ------------------------------------------------------------------------------


def test_without_memory_it_is_plain_attention() -> None:
    model = tiny_model()
    tokens = model.tokens(SAMPLE)
    (got,) = Context(model).read([[Stretch(tokens)]], every=True)
    torch.testing.assert_close(got, plain_logits(model, tokens), atol=1e-4, rtol=1e-4)


def test_padding_is_not_seen() -> None:
    """By transformers' own means: a model with this attention is still one of its models."""
    model = tiny_model()
    ids = torch.tensor([model.tokens("The harbour of Veldmoor is old.")])
    length = ids.shape[1]
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), ids], 1)
    mask = torch.cat([torch.zeros(1, 5, dtype=torch.long), torch.ones_like(ids)], 1)
    positions = torch.cat([torch.zeros(5, dtype=torch.long), torch.arange(length)])[None]
    with torch.no_grad():
        alone = model.model(ids).logits
        beside = model.model(padded, attention_mask=mask, position_ids=positions).logits[:, 5:]
    torch.testing.assert_close(beside, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_transformers_own_generate_still_works(architecture: str) -> None:
    model = tiny_model(architecture, eos_token_id=None).model
    ids = torch.tensor([[5, 6, 7]])
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    got = model.generate(ids, **options)
    model.set_attn_implementation("eager")
    assert got.tolist() == model.generate(ids, **options).tolist()


def test_what_a_token_reads_in_steps_equals_one_pass() -> None:
    model = tiny_model()
    tokens = model.tokens(SAMPLE)[:40]
    (whole,) = Context(model).read([[Stretch(tokens)]], every=True)
    context = Context(model)
    steps = [context.step(torch.tensor([token]))[0] for token in tokens]
    torch.testing.assert_close(torch.stack(steps), whole, atol=1e-4, rtol=1e-4)


# --- what is not supported ------------------------------------------------------------------------


def test_a_model_without_rope_is_refused() -> None:
    config = GPT2Config(vocab_size=400, n_embd=32, n_layer=2, n_head=4)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UnsupportedModelError, match="rotary"):
        LanguageModel(model, tiny_tokenizer(), "tiny-gpt2")


def test_a_model_that_does_not_attend_this_way_is_refused_at_loading() -> None:
    with pytest.raises(UnsupportedModelError, match="do not use transformers'"):
        LanguageModel(tiny_of("bloom"), tiny_tokenizer(), "tiny-bloom")


def test_a_bias_by_position_is_refused() -> None:
    module = torch.nn.Module()
    module.layer_idx = 0
    x = torch.zeros(1, 1, 1, 8)
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    with pytest.raises(UnsupportedModelError, match="position_bias"):
        memory_attention(module, x, x, x, mask, position_bias=torch.zeros(1))
