"""Sampling is transformers' own, and each sequence has a stream of its own."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from memdb import InvalidInputError
from model_adapter.generation.sampling import Sampler, likely

VOCABULARY = 5000


def random_logits(rows: int, spread: float, vocabulary: int = VOCABULARY) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(1)) * spread


def warped(scores: torch.Tensor, temperature: float, top_k: Any, top_p: float, min_p: float) -> Any:
    """As transformers' `generate` does it."""
    ids = torch.zeros(len(scores), 0, dtype=torch.int64)
    warpers: list[Any] = [TemperatureLogitsWarper(temperature)]
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    warpers += [MinPLogitsWarper(min_p)] if min_p else []
    for warper in warpers:
        scores = warper(ids, scores)
    return scores.softmax(-1)


@pytest.mark.parametrize("spread", [0.3, 3.0, 12.0])
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    list(product([None, 1, 50, VOCABULARY, 9999], [1.0, 0.9, 0.3], [0, 0.1])),
)
def test_what_may_be_drawn_is_what_transformers_keeps(
    top_k: int | None, top_p: float, min_p: float, spread: float
) -> None:
    logits = random_logits(3, spread)
    expected = warped(logits, 0.7, top_k, top_p, min_p)
    probabilities, ids = likely(logits / 0.7, top_k, top_p, min_p)
    found = torch.zeros_like(logits)
    if ids is None:
        found = probabilities
    else:
        assert (probabilities.diff(dim=-1) <= 0).all()
        found.scatter_(-1, ids, probabilities)
    assert torch.equal(found > 0, expected > 0)
    torch.testing.assert_close(found / found.sum(-1, keepdim=True), expected)


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    logits = random_logits(1, 2.0, 40).expand(2000, -1)
    for options in ({}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.05}, {"top_k": 9, "top_p": 0.7}):
        sampler = Sampler(2000, temperature=1.0, seed=4, **options)  # type: ignore[arg-type]
        drawn = torch.tensor(sampler.choose(logits, [[]] * 2000)).bincount(minlength=40) / 2000
        how = {"top_k": None, "top_p": 1.0, "min_p": 0.0, **options}
        expected = warped(logits[:1], 1.0, **how)[0]  # type: ignore[arg-type]
        assert (drawn[expected == 0] == 0).all()
        assert (drawn - expected).abs().max() < 0.04


def test_the_repetition_penalty_grows_with_the_text() -> None:
    logits = random_logits(3, 1.0, 60)
    before = [[3, 4, 4], [1, 2, 49], [7, 8, 9]]
    sampler = Sampler(3, repetition_penalty=1.7)
    penalty = RepetitionPenaltyLogitsProcessor(1.7)
    for _ in range(20):
        chosen = sampler.choose(logits, before)
        assert chosen == penalty(torch.tensor(before), logits.clone()).argmax(-1).tolist()
        before = [[*tokens, token] for tokens, token in zip(before, chosen, strict=True)]
    # Of those that go on; and of another text.
    some = sampler.choose(logits[[0, 2]], [before[0], before[2]], [0, 2])
    assert some == penalty(torch.tensor(before), logits.clone()).argmax(-1)[[0, 2]].tolist()
    fresh = Sampler(3, repetition_penalty=1.7).choose(logits, [[5], [6], []])
    assert sampler.choose(logits, [[5], [6], []]) == fresh


def drawn(rows: list[int], batch: int, answers: int = 1, seed: int | None = 7) -> list[list[int]]:
    sampler = Sampler(batch, answers=answers, temperature=1.0, seed=seed)
    logits = random_logits(1, 1.0).expand(len(rows), -1)
    return [sampler.choose(logits, [[]] * len(rows), rows) for _ in range(8)]


def test_each_sequence_has_its_own_stream_whatever_the_others_are() -> None:
    together = list(zip(*drawn([0, 1, 2, 3], 4), strict=True))
    assert len(set(together)) == 4
    for row in range(4):
        assert [tuple(tokens) for tokens in zip(*drawn([row], 4), strict=True)] == [together[row]]
    assert list(zip(*drawn([0, 1], 2), strict=True)) == together[:2]
    # The first answer to each prompt is the same, however many there are.
    three = list(zip(*drawn(list(range(6)), 6, answers=3), strict=True))
    assert len(set(three)) == 6
    assert [three[0], three[3]] == together[:2]
    assert drawn([0], 1, seed=8) != drawn([0], 1)
    assert drawn([0], 1, seed=None) != drawn([0], 1, seed=None)


def test_nothing_is_drawn_that_has_no_probability() -> None:
    logits = torch.full((1, 300), -1e4)
    logits[0, 17] = 0.0
    logits[0, 299] = -torch.inf
    for options in ({}, {"top_k": 7}, {"top_p": 0.999}, {"min_p": 1.0}):
        sampler = Sampler(1, temperature=0.5, seed=0, **options)  # type: ignore[arg-type]
        assert {sampler.choose(logits, [[]])[0] for _ in range(50)} == {17}
    half = logits.to(torch.bfloat16)
    assert Sampler(1, temperature=1.0, top_p=0.9, seed=0).choose(half, [[]]) == [17]


@pytest.mark.parametrize("min_p", [-0.1, 1.1, float("nan")])
def test_min_p_is_a_share(min_p: float) -> None:
    with pytest.raises(InvalidInputError, match="min_p must be at least 0 and at most 1"):
        Sampler(min_p=min_p)
