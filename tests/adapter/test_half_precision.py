"""No token is ever not a number, whatever the model computes in, and whoever has memories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from memdb import PackedMemories, pack
from model_adapter import (
    Context,
    LanguageModel,
    SentenceEmbedder,
    Stretch,
    Writer,
    create_database,
    generate,
)
from tests.adapter.every_model import tiny_of
from tests.helpers import FACTS, SAMPLE, tiny_model, tiny_tokenizer

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HYBRIDS = ["qwen3_next", "falcon_h1", "granitemoehybrid"]


def model_of(architecture: str, dtype: torch.dtype, loud: float = 1.0) -> LanguageModel:
    """A tiny model; `loud`: a factor of its queries and keys."""
    if architecture in HYBRIDS:
        made = tiny_of(architecture).to(dtype)
    else:
        made = tiny_model(architecture, dtype, initializer_range=0.1).model
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                weight *= loud
    return LanguageModel(made, tiny_tokenizer(), architecture)


class Watched:
    """What a witness is told."""

    def __init__(self) -> None:
        self.weights: list[torch.Tensor] = []

    def __call__(self, weights: torch.Tensor, memory: object) -> None:
        self.weights.append(weights)


def read(model: LanguageModel, watched: Watched | None) -> list[torch.Tensor]:
    """Logits of every token of a batch: with two sets of memories, with none, with a set that has
    none (what a filter leaves of it), and short; and then of three steps, between which the
    memories change places."""
    writer = Writer(model, framing="plain", budget=60)
    shape = writer.shape
    first, second = (
        pack([memory], shape, [bias])
        for memory, bias in zip(writer.write([SAMPLE[:150], SAMPLE[150:220]]), (0, -2), strict=True)
    )
    nothing = PackedMemories({})
    tokens = model.tokens(SAMPLE)
    context = Context(model, shape.prefix, len(shape.prefix) + 128, batch=4)
    sequences = [
        [Stretch(tokens[:9], first), Stretch(tokens[9:13], second)],
        [Stretch(tokens[20:27])],
        [Stretch(tokens[30:32], nothing), Stretch(tokens[32:37], nothing)],
        [Stretch(tokens[40:41], second)],
    ]
    got = context.read(sequences, every=True, witness=watched)
    for turn, memories in enumerate(
        ([second, None, nothing, first], [None, first, None, None], [None] * 4)
    ):
        context.remember(memories)
        step = context.step(torch.tensor(tokens[50 + turn : 54 + turn]), witness=watched)
        got = [torch.cat([old, new[None]]) for old, new in zip(got, step, strict=True)]
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt_oss", *HYBRIDS])
def test_rows_with_and_without_memories_are_numbers(architecture: str, dtype: torch.dtype) -> None:
    model = model_of(architecture, dtype)
    watched = Watched()
    plain, cited = read(model, None), read(model, watched)
    for one, other in zip(plain, cited, strict=True):
        assert one.isfinite().all()
        assert other.isfinite().all()
        far = 1e-4 if dtype == torch.float32 else 0.2  # rounding chooses other experts
        assert (one.float() - other.float()).norm() <= far * one.float().norm()
    assert watched.weights
    for weights in watched.weights:
        assert weights.dtype == torch.float32
        assert weights.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_without_memories_says_what_it_says_alone(dtype: torch.dtype) -> None:
    """Beside rows that have some, and longer than it is."""
    model = model_of("llama", dtype)
    beside = read(model, Watched())[1][:7]
    tokens = model.tokens(SAMPLE)[20:27]
    prefix = Writer(model, framing="plain").shape.prefix
    (alone,) = Context(model, prefix, len(prefix) + 128).read([[Stretch(tokens)]], every=True)
    far = 1e-4 if dtype == torch.float32 else 0.05
    assert (beside.float() - alone.float()).norm() <= far * alone.float().norm()


@pytest.mark.parametrize("cite", [False, True])
def test_scores_beyond_what_half_precision_holds_are_scores(cite: bool) -> None:
    """Queries times keys are beyond 65504 here: float16 has no such number."""
    model = model_of("llama", torch.float16, loud=1000.0)
    seen: list[torch.Tensor] = []

    def look(_: int, query: torch.Tensor, key: torch.Tensor, *__: object) -> None:
        seen.append(query @ key.repeat_interleave(2, 1).mT)

    model.observe([model.tokens(SAMPLE)], look)
    assert any(scores.isinf().any() for scores in seen)  # it is such a model
    for logits in read(model, Watched() if cite else None):
        assert logits.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_answers_where_a_filter_leaves_nothing(
    dtype: torch.dtype, tmp_path: Path, minilm: SentenceEmbedder
) -> None:
    model = model_of("llama", dtype)
    asked: dict[str, Any] = {"max_new_tokens": 10, "retrieve_every": 4, "cite": True}
    with create_database(tmp_path / "db", model=model, embedder=minilm) as database:
        for fact in FACTS:
            database.insert(fact.text, id=fact.id, metadata={"of": fact.id})
        prompts = ["Who?", FACTS[0].question, FACTS[1].text + " " + FACTS[2].question]
        for where in (None, {"of": "nobody"}):
            for answer in generate(prompts, database, where=where, **asked):
                assert answer.token_ids
                assert bool(answer.sources()) == (where is None)
                for source in answer.sources():
                    assert 0 < source.attention < 1
