"""Hybrids: some layers carry a state on instead of keys and values. It has no places, so it must
never be cut, never see what fills up a shorter sequence, and begin with the prefix."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from memdb import InvalidInputError, UnsupportedModelError, pack
from model_adapter import (
    Chat,
    Context,
    LanguageModel,
    SentenceEmbedder,
    Stretch,
    Writer,
    create_database,
    generate,
)
from tests.adapter.every_model import tiny_of
from tests.adapter.slow import slow_logits
from tests.helpers import FACTS, SAMPLE, tiny_tokenizer

#: A gated delta net, Mamba 2 beside attention in one layer, Mamba 2, short convolutions.
HYBRIDS = ["qwen3_next", "falcon_h1", "granitemoehybrid", "lfm2"]


@cache
def hybrid(name: str) -> LanguageModel:
    return LanguageModel(tiny_of(name), tiny_tokenizer(), f"tiny-{name}")


@pytest.fixture(params=HYBRIDS)
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return hybrid(request.param)


def test_memories_are_of_the_layers_that_attend(model: LanguageModel) -> None:
    every = "falcon_h1" in model.name
    assert model.memory_layers == ((0, 1, 2, 3) if every else (1, 3))
    assert not model.reads_whole_memories
    assert Writer(model).shape.layers == model.memory_layers
    if not every:
        with pytest.raises(InvalidInputError, match="among 1, 3, got"):
            Writer(model, layers=[0, 1])


class Case:
    """Sequences of stretches with memories, behind a prefix."""

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        writer = Writer(model, framing="chat", budget=60)
        self.shape = writer.shape
        self.memories = writer.write([SAMPLE[:150], SAMPLE[150:220], SAMPLE[220:300]])
        self.start = len(self.shape.prefix) + 128
        self.text = model.tokens(SAMPLE)

    def context(self, batch: int) -> Context:
        return Context(self.model, self.shape.prefix, self.start, batch=batch)

    def stretch(self, first: int, last: int, *memories: int) -> Stretch:
        chosen = [self.memories[number] for number in memories]
        return Stretch(self.text[first:last], pack(chosen, self.shape) if chosen else None)

    def sequences(self) -> list[list[Stretch]]:
        return [
            [self.stretch(0, 9, 0, 1), self.stretch(9, 14, 2)],
            [self.stretch(30, 32)],
            [self.stretch(40, 46, 1), self.stretch(46, 49, 0), self.stretch(49, 51)],
        ]


def test_a_batch_of_different_lengths_and_its_steps_equal_a_loop(model: LanguageModel) -> None:
    """One token at a time, one head at a time."""
    case = Case(model)
    steps = [[5, 6, 7], [8, 9, 10], [11, 12, 13]]
    context = case.context(3)
    got = context.read(case.sequences(), every=True)
    for tokens in steps:
        step = context.step(torch.tensor(tokens))
        got = [torch.cat([old, new[None]]) for old, new in zip(got, step, strict=True)]
    again = context.read(
        [[case.stretch(60, 64, 1)], [case.stretch(64, 66)], [case.stretch(66, 71)]]
    )
    parts = [
        [([*range(0, 9)], (0, 1)), ([*range(9, 14)], (2,))],
        [([*range(30, 32)], ())],
        [([*range(40, 46)], (1,)), ([*range(46, 49)], (0,)), ([*range(49, 51)], ())],
    ]
    more = [(range(60, 64), (1,)), (range(64, 66), ()), (range(66, 71), ())]
    for row, of_row in enumerate(parts):
        whole = [
            ([case.text[at] for at in places], [(case.memories[n], 0.0) for n in numbers])
            for places, numbers in of_row
        ]
        whole.append(([tokens[row] for tokens in steps], whole[-1][1]))
        places, numbers = more[row]
        whole.append(([case.text[at] for at in places], [(case.memories[n], 0.0) for n in numbers]))
        expected = slow_logits(model, case.shape, whole, start=case.start)
        read = len(got[row])
        torch.testing.assert_close(got[row], expected[:read], atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(again[row][0], expected[-1], atol=1e-3, rtol=1e-3)


def test_what_a_witness_is_told_of_a_batch_is_what_it_is_told_of_each(model: LanguageModel) -> None:
    case = Case(model)
    seen: dict[str, list[torch.Tensor]] = {"batch": [], "each": []}

    def witness(name: str) -> Callable[[torch.Tensor, object], None]:
        return lambda weights, memory: seen[name].append(weights)

    sequences = case.sequences()
    case.context(3).read(sequences, witness=witness("batch"))
    for row in (0, 2):
        case.context(1).read([sequences[row]], witness=witness("each"))
    layers = len(model.memory_layers)
    alone = seen["each"][:layers], seen["each"][layers:]
    # Row after row, layer after layer; sets 0 and 1 are of the first, 3 to 5 of the last.
    told = seen["batch"]
    for layer in range(layers):
        one, last = told[layer], told[-layers:][layer]
        assert len(one) == len(last) == 6
        torch.testing.assert_close(one[:2], alone[0][layer], atol=1e-5, rtol=1e-4)
        assert not one[2:].any()
        length = alone[1][layer].shape[2]
        torch.testing.assert_close(last[3:, :, :length], alone[1][layer], atol=1e-5, rtol=1e-4)
        assert not last[:3].any()


def test_continuations_of_one_text_do_not_reach_each_other(model: LanguageModel) -> None:
    case = Case(model)
    trunk = case.context(2)
    trunk.read([[case.stretch(0, 9, 0)], [case.stretch(9, 14, 1)]])
    branches = trunk.branches([1, 0, 1])
    branches.read([[case.stretch(20, 23, 1)], [case.stretch(23, 28)], [case.stretch(28, 29)]])
    (got, _) = trunk.step(torch.tensor([5, 6]))
    alone = case.context(1)
    alone.read([[case.stretch(0, 9, 0)]])
    torch.testing.assert_close(got, alone.step(torch.tensor([5]))[0], atol=1e-4, rtol=1e-4)
    first = case.context(1)
    first.read([[case.stretch(9, 14, 1)]])
    (expected,) = first.read([[case.stretch(20, 23, 1)]])
    again = trunk.branches([1, 1])
    assert again.positions == trunk.positions[1:] * 2
    fresh = case.context(2)
    fresh.read([[case.stretch(0, 9, 0)], [case.stretch(9, 14, 1)]])
    (branch,) = fresh.branches([1]).read([[case.stretch(20, 23, 1)]])
    torch.testing.assert_close(branch, expected, atol=1e-4, rtol=1e-4)


def test_nothing_is_taken_back_from_a_state(model: LanguageModel) -> None:
    case = Case(model)
    context = case.context(1)
    context.read([[case.stretch(0, 9, 0)]])
    assert context.can_take_back(0)
    assert not context.can_take_back(1)
    with pytest.raises(ValueError, match="cannot take back 1"):
        context.take_back(1)


def test_a_conversation_goes_on_and_starts_anew_where_it_must(
    model: LanguageModel, tmp_path: Path, minilm: SentenceEmbedder
) -> None:
    with create_database(tmp_path / "db", model=model, embedder=minilm) as database:
        for fact in FACTS:
            database.insert(fact.text, id=fact.id)
        options = {"max_new_tokens": 6, "retrieve_every": 4, "memories": 2, "cite": True}
        chat = Chat(database, **options)
        answers = []
        for fact in FACTS[:2]:
            stream = chat.say(fact.question)
            for _ in stream:
                pass
            answers.append(stream.result)
        going_on = answers[-1]
        anew = generate(chat.messages[:-1], database, **options)
        assert going_on.token_ids == anew.token_ids
        several = generate([FACTS[0].question, "Who?", FACTS[2].text], database, **options)
        for prompt, answer in zip([FACTS[0].question, "Who?", FACTS[2].text], several, strict=True):
            alone = generate(prompt, database, **options)
            assert answer.token_ids == alone.token_ids


@pytest.mark.parametrize("name", ["jamba", "recurrent_gemma"])
def test_those_that_forget_what_stood_before_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match="forget what stood before"):
        LanguageModel(tiny_of(name), tiny_tokenizer(), name)
