"""Memory equals prompt: the equivalence that everything else rests on."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, GPT2Config

from memdb import CODECS, UnsupportedModelError, pack
from memdb.codecs import decode_memory, encode_memory
from model_adapter import LanguageModel, Writer, memory_attention, memory_tensors
from tests.helpers import ARCHITECTURES, SAMPLE, tiny_model, tiny_tokenizer

CONTEXT = "\n\nQuestion: who keeps the lighthouse?\nAnswer:"


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
    writer = Writer(model, framing=framing, budget=model.layers * model.kv_heads * 128)
    text, reference = reference_of_128_tokens(model)
    context = model.tokens(CONTEXT)
    (memory,) = writer.write([text])
    shape = writer.shape
    assert memory.pairs == model.layers * model.kv_heads * 128
    stored = encode_memory(memory, shape, CODECS["exact"])
    packed = pack([decode_memory(stored, shape, CODECS)], shape)

    cache = model.prefix_cache(shape.prefix)  # the prefix's own queries see no memory
    start = len(shape.prefix) + shape.reference_length
    memories = memory_tensors(packed, shape, model.device)
    got = model.forward(context, start, cache, memories, last=False)
    expected = plain_logits(model, [*shape.prefix, *reference, *context])[-len(context) :]
    return float((got - expected).abs().max())


@pytest.mark.parametrize("framing", ["plain", "chat"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_memory_equals_prompt_on_tiny_models(architecture: str, framing: str) -> None:
    model = tiny_model(architecture)
    assert largest_difference(model, framing) < 1e-4


@pytest.mark.parametrize("framing", ["plain", "chat"])
def test_memory_equals_prompt_on_the_real_model(smollm: LanguageModel, framing: str) -> None:
    assert largest_difference(smollm, framing) < 1e-4


def test_without_memory_it_is_plain_attention() -> None:
    model = tiny_model()
    tokens = model.tokens(SAMPLE)
    got = model.forward(tokens, 0, model.prefix_cache(()), last=False)
    torch.testing.assert_close(got, plain_logits(model, tokens), atol=1e-4, rtol=1e-4)


def test_padding_is_not_seen() -> None:
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


def test_one_softmax_over_ragged_memories_and_context() -> None:
    """Against a loop over heads, each with its own number of memory tokens."""
    torch.manual_seed(1)
    batch, heads, kv_heads, tokens, dim, width = 2, 4, 2, 3, 8, 5
    kept = [5, 2]
    query = torch.randn(batch, heads, tokens, dim)
    key, value = torch.randn(2, batch, kv_heads, tokens, dim)
    memory_keys, memory_values = torch.randn(2, 1, kv_heads, width, dim)
    visible = torch.tensor([[i < n for i in range(width)] for n in kept])[None, :, None]
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()[None, None]

    from model_adapter import LayerMemory

    module = torch.nn.Module()
    module.layer_idx = 7
    got, _ = memory_attention(
        module,
        query,
        key,
        value,
        causal.expand(batch, 1, tokens, tokens),
        explicit_memory={7: LayerMemory(memory_keys, memory_values, visible)},
    )
    for b in range(batch):
        for h in range(heads):
            g = h // 2
            for t in range(tokens):
                keys = torch.cat([memory_keys[0, g, : kept[g]], key[b, g, : t + 1]])
                values = torch.cat([memory_values[0, g, : kept[g]], value[b, g, : t + 1]])
                weights = (keys @ query[b, h, t] / dim**0.5).softmax(0)
                torch.testing.assert_close(got[b, t, h], weights @ values, atol=1e-5, rtol=1e-5)


def test_what_a_token_reads_in_steps_equals_one_pass() -> None:
    model = tiny_model()
    tokens = model.tokens(SAMPLE)[:40]
    whole = model.forward(tokens, 0, model.prefix_cache(()), last=False)
    cache: DynamicCache = model.prefix_cache(())
    steps = [model.forward([token], i, cache)[0] for i, token in enumerate(tokens)]
    torch.testing.assert_close(torch.stack(steps), whole, atol=1e-4, rtol=1e-4)


def test_a_model_without_rope_is_refused() -> None:
    config = GPT2Config(vocab_size=400, n_embd=32, n_layer=2, n_head=4)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UnsupportedModelError, match="rotary"):
        LanguageModel(model, tiny_tokenizer(), "tiny-gpt2")


@pytest.mark.parametrize(
    ("architecture", "reason"), [("gemma2", "softcap"), ("nemotron", "do not use transformers'")]
)
def test_a_model_that_does_not_attend_this_way_is_refused_at_loading(
    architecture: str, reason: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        tiny_model(architecture)


def test_soft_capped_attention_is_refused() -> None:
    module = torch.nn.Module()
    module.layer_idx = 0
    x = torch.zeros(1, 1, 1, 8)
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    with pytest.raises(UnsupportedModelError, match="softcap"):
        memory_attention(module, x, x, x, mask, softcap=50.0)
