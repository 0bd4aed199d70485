"""Generation as on a GPU, on the tensors of a CPU: memories decoded by torch, steps in fixed shapes
by rows. It says what it says without."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from memdb import MemDB, PackedMemories, pack_coded
from model_adapter import (
    LanguageModel,
    SentenceEmbedder,
    Stretch,
    create_database,
    generate,
)
from model_adapter.attention.decoding import DecodedMemories, DeviceDecoder
from model_adapter.attention.fixed import FixedSteps
from model_adapter.generation import reader
from model_adapter.generation.generate import Run
from model_adapter.generation.options import Options
from model_adapter.generation.sampling import likeliest
from tests.adapter.test_attention import Case
from tests.helpers import FACTS, tiny_model

#: Torch's functions that wait for a GPU: Python looks at numbers, or gives some from its memory.
LOOKS = {"item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero", "cpu"}
LOOKS |= {"numpy", "__contains__", "any_true", "equal", "unique"}


@pytest.fixture(scope="module")
def db(tmp_path_factory: pytest.TempPathFactory, minilm: SentenceEmbedder) -> Iterator[MemDB]:
    path = tmp_path_factory.mktemp("gpu") / "db"
    with create_database(path, model=tiny_model(eos_token_id=None), embedder=minilm) as database:
        for fact in FACTS:
            database.insert(fact.text, id=fact.id)
        yield database


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Everything is done as on one; how often memories were decoded, and steps fixed and taken."""
    count = {"decoded": 0, "fixed": 0, "steps": 0}
    make, begin, step = DeviceDecoder.__call__, FixedSteps.__init__, FixedSteps.step

    def decoder(model: LanguageModel) -> DeviceDecoder:
        return DeviceDecoder(model.device, model.model.dtype)

    def counted(name: str, function: Any) -> Any:
        def called(*given: Any, **options: Any) -> Any:
            count[name] += 1
            return function(*given, **options)

        return called

    monkeypatch.setattr(reader, "decoder_for", decoder)
    monkeypatch.setattr(reader, "records_steps", lambda device: True)
    monkeypatch.setattr(DeviceDecoder, "__call__", counted("decoded", make))
    monkeypatch.setattr(FixedSteps, "__init__", counted("fixed", begin))
    monkeypatch.setattr(FixedSteps, "step", counted("steps", step))
    return count


PROMPTS = [FACTS[0].question, FACTS[0].question + " " + FACTS[0].question]


@pytest.fixture(scope="module")
def expected(db: MemDB) -> dict[str, Any]:
    return {name: said(db, **options) for name, options in WAYS.items()}


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"max_new_tokens": 40},
    "beside decoding": {"max_new_tokens": 40, "prefetch": 4},
    "drawn": {"max_new_tokens": 40, "temperature": 0.8, "seed": 3, "n": 2},
    "the likeliest": {"max_new_tokens": 40, "temperature": 0.8, "seed": 3, "top_p": 0.9},
    "no repetition": {"max_new_tokens": 40, "repetition_penalty": 1.3},
    "with citations": {"max_new_tokens": 24, "cite": True},
    "short": {"max_new_tokens": 12},
    "without": {"max_new_tokens": 24, "mode": "none"},
}


def said(db: MemDB, **options: Any) -> list[list[int]]:
    given = generate(PROMPTS, db, memories=2, retrieve_every=16, **options)
    flat = [one for each in given for one in (each if isinstance(each, list) else [each])]
    return [one.token_ids for one in flat]


@pytest.mark.parametrize("way", WAYS)
def test_answers_are_those_of_a_cpu(
    db: MemDB, expected: dict[str, Any], on_a_gpu: dict[str, int], way: str
) -> None:
    assert said(db, **WAYS[way]) == expected[way]
    assert (on_a_gpu["decoded"] > 0) == (way != "without")
    # Who looks on is told by other steps; and what is over soon is not worth a recording.
    fixed = way not in ("with citations", "short")
    assert (on_a_gpu["fixed"] > 0) == fixed
    assert (on_a_gpu["steps"] > 8) == fixed


def test_steps_are_fixed_again_once_a_sequence_left(db: MemDB, on_a_gpu: dict[str, int]) -> None:
    first = said(db, max_new_tokens=60)
    # One of the answers ends where it has this text, early.
    texts = [one.text for one in generate(PROMPTS, db, memories=2, retrieve_every=16)]
    stop = next(texts[0][at : at + 4] for at in range(20) if texts[0][at : at + 4] not in texts[1])
    on_a_gpu.update(fixed=0, steps=0)
    again = said(db, max_new_tokens=60, stop=stop)
    assert len(again[0]) < len(again[1]) - 16
    assert again == [first[0][: len(again[0])], first[1]]
    assert on_a_gpu["fixed"] >= 2
    assert on_a_gpu["steps"] == len(again[1]) - 1


class Waits(TorchFunctionMode):
    """Counts what a GPU would be waited for by."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = getattr(function, "__name__", "")
        if name in LOOKS:
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("way", ["greedy", "drawn", "no repetition"])
def test_a_step_is_waited_for_once(
    db: MemDB, on_a_gpu: dict[str, int], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For its tokens. (Where memories change, their shapes are looked at on the CPU alone.)"""
    taken: list[int] = []
    step = reader.Reader.step

    def counted(self: reader.Reader, tokens: Sequence[int]) -> Tensor:
        taken.append(1)
        return step(self, tokens)

    monkeypatch.setattr(reader.Reader, "step", counted)
    run = Run(PROMPTS, db, Options(**WAYS[way], memories=2, retrieve_every=64))
    pieces = iter(run)
    next(pieces)
    taken.clear()
    with Waits() as waits:
        for _ in pieces:
            pass
    assert on_a_gpu["steps"] > 8
    assert waits.seen == ["tolist"] * len(taken)


@pytest.mark.parametrize("top_p", [0.1, 0.7, 0.95])
def test_all_tokens_are_sorted_where_to_look_is_to_wait(top_p: float) -> None:
    scores = torch.randn(3, 700, generator=torch.Generator().manual_seed(1)) * 3
    with Waits() as waits:
        probabilities, ids = likeliest(scores, top_p, ())
    assert not waits.seen
    few, places = likeliest(scores, top_p, (256,))
    torch.testing.assert_close(probabilities[:, : few.shape[1]], few)
    assert torch.equal(ids[:, : few.shape[1]], places)


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "glm", "smollm3"])
def test_a_context_reads_memories_of_either_kind(architecture: str) -> None:
    """Those that lie on the device already, others, and both at once; in a prompt and in steps."""
    case = Case(architecture)

    def read(kinds: str) -> list[Tensor]:
        decoder = DeviceDecoder(torch.device("cpu"), torch.float32)
        sets: list[PackedMemories | DecodedMemories] = []
        for kind, numbers in zip(kinds, ((0, 1), (2,), (3, 1)), strict=True):
            packed = case.packed(case.set(*numbers))
            assert packed is not None
            sets.append(packed if kind == "p" else decoded(case, decoder, numbers))
        context = case.context(2)
        logits = context.read(
            [
                [Stretch(case.tokens(0, 9), sets[0]), Stretch(case.tokens(9, 5), sets[1])],
                [Stretch(case.tokens(30, 4), sets[2])],
            ]
        )
        logits.append(context.step(torch.tensor([5, 6])))
        context.remember([sets[2], None])
        return [*logits, context.step(torch.tensor([7, 8]))]

    expected = read("ppp")
    for kinds in ("ddd", "pdp", "dpd"):
        for got, due in zip(read(kinds), expected, strict=True):
            torch.testing.assert_close(got, due, atol=1e-5, rtol=1e-5)


def decoded(case: Case, decoder: DeviceDecoder, numbers: tuple[int, ...]) -> DecodedMemories:
    memories, biases = zip(*case.set(*numbers), strict=True)
    return decoder(pack_coded(memories, case.shape, biases))
