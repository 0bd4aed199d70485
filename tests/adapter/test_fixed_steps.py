"""Steps in shapes that do not change, against the loops of `tests/adapter/slow.py`. What a GPU
records is the same code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from model_adapter import Context, Stretch
from model_adapter.attention import fixed
from model_adapter.attention.fixed import FixedSteps
from model_adapter.attention.rows import Rows
from tests.adapter.slow import Part, slow_logits
from tests.adapter.test_attention import Case
from tests.helpers import tiny_model


def check(
    case: Case,
    sequences: Sequence[Sequence[Part]],
    turns: Sequence[Sequence[Sequence[int]]],
    *,
    room: int,
    windows: bool = False,
) -> Context:
    """Read sequences in one pass, then tokens in fixed steps. In each turn, each sequence has the
    memories of these numbers, for seven tokens."""
    context = case.context(len(sequences), windows)
    context.read([[case.stretch(part) for part in parts] for parts in sequences])
    whole = [list(parts) for parts in sequences]
    got: list[list[Tensor]] = [[] for _ in sequences]
    assert context.fix(room)
    for turn, chosen in enumerate(turns):
        sets = [case.set(*numbers) for numbers in chosen]
        context.remember([case.packed(one) for one in sets])
        for place in range(7):
            tokens = [5 + turn * 7 + place, 300 - place][: len(sequences)]
            logits = context.step(torch.tensor(tokens))
            for number, token in enumerate(tokens):
                got[number].append(logits[number].clone())
                whole[number].append(([token], sets[number]))
    count = 7 * len(turns)
    for number, parts in enumerate(whole):
        expected = slow_logits(case.model, case.shape, parts, start=case.start, windows=windows)
        torch.testing.assert_close(
            torch.stack(got[number]), expected[-count:], atol=1e-4, rtol=1e-4
        )
    return context


def two(case: Case) -> list[list[Part]]:
    first = [(case.tokens(0, 9), case.set(0, 1)), (case.tokens(9, 5), case.set(2))]
    return [first, [(case.tokens(30, 4), case.set(3))]]


TURNS = [[[2], [3]], [[0, 1], []], [[], [1, 2, 3]], [[], []], [[0, 1, 2, 3], [0]]]


@pytest.mark.parametrize("by_rows", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2", "smollm3", "glm"])
@pytest.mark.parametrize("room", [1, 40])
def test_steps_and_new_memories_equal_a_loop(
    architecture: str, room: int, by_rows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With little room buffers are made anew between, with much they stay. By rows, or, as where
    the kernel for them does not work, through a mask."""
    calls: list[int] = []
    attend = Rows.attend

    def counted(self: Rows, *given: Any) -> Tensor | None:
        calls.append(1)
        return attend(self, *given) if by_rows else None

    monkeypatch.setattr(Rows, "attend", counted)
    case = Case(architecture)
    check(case, two(case), TURNS, room=room)
    # Gemma 2's scores have a cap, which the kernel has not.
    assert len(calls) == (0 if architecture == "gemma2" else 7 * len(TURNS) * case.model.layers)


@pytest.mark.parametrize("windows", [True, False])
@pytest.mark.parametrize("architecture", ["mistral", "gemma3"])
def test_sliding_windows_hold(architecture: str, windows: bool) -> None:
    case = Case(architecture, sliding_window=12)
    check(case, two(case), TURNS[:3], room=30, windows=windows)


def test_without_memories_and_then_with() -> None:
    case = Case("llama")
    check(case, [[(case.tokens(0, 9), [])]], [[[]], [[1]], [[]]], room=50)


def test_other_passes_go_on_from_fixed_steps_and_these_from_others() -> None:
    case = Case("llama")
    context, plain = case.context(1), case.context(1)
    parts = [(case.tokens(0, 9), case.set(0, 1))]
    seen: list[tuple[Tensor, Tensor]] = []

    def both(call: str, *given: object) -> None:
        one, other = (getattr(each, call)(*given) for each in (context, plain))
        if call in ("read", "step"):
            seen.append((one[0].clone(), other[0].clone()))

    both("read", [[case.stretch(part) for part in parts]])
    for round_ in range(2):
        assert context.fix(8)
        for token in range(5):
            both("step", torch.tensor([token + 3 + round_]))
        both("take_back", 2)
        both("step", torch.tensor([7]))
        assert context.fix(4)
        both("step", torch.tensor([9]))
        both("read", [[case.stretch((case.tokens(20, 70), case.set(2)))]])
        assert context.fix(3)
        both("step", torch.tensor([11]))
        told: list[Tensor] = []
        context.step(torch.tensor([12]), witness=lambda weights, _, told=told: told.append(weights))
        plain.step(torch.tensor([12]))
        assert len(told) == 4
        context, plain = (each.branches([0, 0]) for each in (context, plain))
        both("step", torch.tensor([13, 14]))
        context, plain = (each.branches([1]) for each in (context, plain))
    for got, expected in seen:
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_a_step_looks_at_no_number_and_changes_no_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that it can be recorded: the same operations on tensors of the same shapes, none of which
    is read by Python."""
    case = Case("gemma2", sliding_window=12)
    context = case.context(2)
    context.read([[case.stretch(part) for part in parts] for parts in two(case)])
    assert context.fix(30)
    shapes: list[list[tuple[int, ...]]] = []

    class Look(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            name = getattr(function, "__name__", "")
            assert name not in ("item", "tolist", "__bool__", "__int__", "__index__", "nonzero")
            made = function(*args, **(kwargs or {}))
            if isinstance(made, Tensor):
                shapes[-1].append(tuple(made.shape))
            return made

    once = FixedSteps._once

    def watched(self: FixedSteps) -> Tensor:
        shapes.append([])
        with Look():
            return once(self)

    monkeypatch.setattr(FixedSteps, "_once", watched)
    for token in (5, 6, 7):
        context.step(torch.tensor([token, token + 1]))
    context.remember([case.packed(case.set(1)), None])
    context.step(torch.tensor([8, 9]))
    assert len(shapes) == 4
    assert len(shapes[0]) > 100
    assert all(one == shapes[0] for one in shapes)


def test_where_a_gpu_refuses_to_record_steps_go_on_as_they_did(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = Case("llama")
    context, plain = case.context(2), case.context(2)
    for one in (context, plain):
        one.read([[case.stretch(part) for part in parts] for parts in two(case)])

    def refused(self: FixedSteps) -> None:
        self._once()
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(fixed, "_RECORDING", ("cpu",))
    monkeypatch.setattr(FixedSteps, "_record", refused)
    with pytest.warns(RuntimeWarning, match="not recorded.*: operation not permitted.*capturing$"):
        assert not context.fix(8)
    assert not context.fix(8)  # not tried again
    for token in range(4):
        tokens = torch.tensor([token + 5, token + 9])
        torch.testing.assert_close(context.step(tokens), plain.step(tokens))


def test_what_cannot_be_fixed_says_so() -> None:
    model = tiny_model("llama")
    context = Context(model)
    assert not context.fix(4)  # nothing was read
    context.read([[Stretch([5, 6])]])
    assert context.fix(4)
