"""Attention in parts and in groups of heads, against loops in float64 over what each token sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.profiler import profile
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

from memdb import PackedLayer, PackedMemories
from model_adapter import Context, Stretch, memory_attention
from model_adapter.attention import sight
from model_adapter.attention.context import _cut
from model_adapter.attention.groups import grouped
from model_adapter.attention.merging import BLOCK, LOWEST, attend
from model_adapter.attention.sight import NOWHERE, LayerMemory, Rule, Sight
from model_adapter.attention.stacking import stacked
from tests.adapter.test_attention import Case
from tests.helpers import SAMPLE, tiny_model

DIM = 8
DTYPES = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


# --- one part -------------------------------------------------------------------------------------


def softmax_of(
    query: Tensor, keys: Tensor, values: Tensor, added: Tensor, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """(rows, queries, heads, ...) of one softmax, and the logarithms of its sums, in float64."""
    group = query.shape[1] // keys.shape[1]
    keys, values = (x.double().repeat_interleave(group, 1) for x in (keys, values))
    scores = query.double() @ keys.transpose(2, 3) * 0.3
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + added
    logs = scores.logsumexp(-1)
    return (scores.softmax(-1) @ values).transpose(1, 2), logs.transpose(1, 2)


def given(queries: int, count: int, length: int = DIM) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(queries + count)
    shapes = ((2, 6, queries, DIM), (2, 2, count, DIM), (2, 2, count, length))
    return tuple(torch.randn(*shape) for shape in shapes)  # type: ignore[return-value]


def causal(queries: int, count: int) -> Tensor:
    hidden = torch.arange(count) > torch.arange(queries)[:, None]
    return torch.zeros(queries, count).masked_fill(hidden, LOWEST)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("length", [DIM, 5])
@pytest.mark.parametrize("queries", [1, 7, BLOCK + 30])
def test_a_part_is_a_softmax_and_knows_its_sum(
    queries: int, length: int, softcap: float | None
) -> None:
    for count, mask in (
        (queries, "causal"),
        (9, None),
        (40, torch.randn(2, 6, 1, 40).masked_fill(torch.rand(2, 6, 1, 40) < 0.5, LOWEST)),
        (12, torch.randn(1, 1, queries, 12)),
    ):
        query, keys, values = given(queries, count, length)
        is_causal = isinstance(mask, str)
        added = causal(queries, count) if isinstance(mask, str) else mask
        got = attend(
            query,
            keys,
            values,
            0.3,
            mask=None if is_causal else added,  # type: ignore[arg-type]
            causal=is_causal,
            softcap=softcap,
        )
        added = torch.zeros(1) if added is None else added
        mixed, logs = softmax_of(query, keys, values, added, softcap)
        torch.testing.assert_close(got.mixed.double(), mixed, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(got.logs.double(), logs, atol=1e-5, rtol=1e-5)


def test_parts_together_are_one_softmax_over_the_keys_of_all() -> None:
    query, keys, values = given(11, 50)
    added = torch.randn(2, 6, 1, 50)
    added[0, :, :, 10:30] = LOWEST  # of one part nothing is seen
    sinks = torch.randn(6)
    parts = [
        attend(query, keys[:, :, a:b], values[:, :, a:b], 0.3, mask=added[..., a:b])
        for a, b in ((0, 10), (10, 30), (30, 50))
    ]
    mixed, logs = softmax_of(query, keys, values, added)
    for order in ((0, 1, 2), (1, 2, 0)):
        first, *others = (parts[number] for number in order)
        whole = first
        for other in others:
            whole = whole + other
        torch.testing.assert_close(whole.mixed.double(), mixed, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(whole.logs.double(), logs, atol=1e-5, rtol=1e-5)
        sunk = whole.beside(sinks)
        share = logs.exp() / (logs.exp() + sinks.double().exp())
        torch.testing.assert_close(
            sunk.mixed.double(), mixed * share[..., None], atol=1e-5, rtol=1e-5
        )


def test_a_row_that_sees_nothing_is_a_number_and_counts_for_nothing() -> None:
    query, keys, values = given(3, 6)
    blind = attend(query, keys, values, 0.3, mask=torch.full((1, 1, 1, 6), LOWEST))
    assert blind.mixed.isfinite().all()
    seen = attend(query, keys, values, 0.3)
    for whole in (seen + blind, blind + seen):
        assert torch.equal(whole.mixed, seen.mixed)


# --- groups ---------------------------------------------------------------------------------------


def test_groups_are_the_cheapest_way_to_attend_to_all_heads() -> None:
    random = np.random.default_rng(0)
    for _ in range(60):
        heads, rows = int(random.integers(1, 7)), int(random.integers(1, 9))
        widths = (random.integers(0, 400, heads) * random.integers(0, 2, heads)).tolist()
        groups = grouped(widths, rows, 256)
        ends = [0, *(group.end for group in groups)]
        assert [group.first for group in groups] == ends[:-1]
        assert ends[-1] == heads

        def cost(cuts: Sequence[int], widths: list[int] = widths, rows: int = rows) -> int:
            parts = [widths[a:b] for a, b in pairwise(cuts)]
            return sum(256 + rows * len(part) * max(part) for part in parts)

        assert all(group.width == max(widths[group.first : group.end]) for group in groups)
        ways = product((False, True), repeat=heads - 1)
        best = min(cost([0, *(n + 1 for n, cut in enumerate(way) if cut), heads]) for way in ways)
        assert cost(ends) == best


# --- the function, against a loop -----------------------------------------------------------------


@dataclass
class Seen:
    """What a pass sees: everything that `memory_attention` is given, at random.

    Attributes:
        sets: for each stretch (or sequence) its memories.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    rule: Rule
    sight: Sight
    sets: list[PackedLayer | None]
    window: int | None

    @property
    def memory(self) -> LayerMemory:
        return stacked(self.sets, self.key)


class Held:
    """A `Memories` of which each sequence, or each stretch, has a set."""

    def __init__(self, of: Callable[[], LayerMemory]) -> None:
        self._of = of

    def joined(self, layer: int) -> None:
        return None

    def buffer(self, layer: int) -> None:
        """See `Memories.buffer`: likewise."""

    def sets(self, layer: int, like: Tensor) -> LayerMemory:
        return self._of()


def packed_layer(random: np.random.Generator, widths: Sequence[int]) -> PackedLayer:
    """Two memories at random; the pairs of each head stand first, as `memdb.pack` has them."""
    heads, width = len(widths), max(widths)
    real = np.arange(width) < np.array(widths)[:, None]
    keys, values = random.standard_normal((2, heads, width, DIM)).astype(np.float32)
    memory = np.where(real, random.integers(0, 2, (heads, width)), -1).astype(np.int16)
    bias = np.array([0.5, -1.5, -np.inf], np.float32)[memory]
    positions = np.where(real, random.integers(0, 128, (heads, width)), 0).astype(np.int16)
    return PackedLayer(
        np.where(real[..., None], keys, 0), np.where(real[..., None], values, 0), bias, memory,
        positions,
    )  # fmt: skip


def pass_of(
    lengths: Sequence[Sequence[int]],
    *,
    cached: int = 0,
    hole: int = 0,
    window: int | None = None,
    windows: bool = False,
    heads: tuple[int, int] = (6, 2),
    dtype: torch.dtype = torch.float32,
    bare: bool = False,
) -> Seen:
    """Sequences of stretches of these lengths, behind `cached` tokens of which the first sequence
    lacks the last `hole`."""
    random = np.random.default_rng(len(lengths) + cached)
    torch.manual_seed(len(lengths) + cached)
    counts = [sum(parts) for parts in lengths]
    batch, tokens = len(lengths), max(counts)
    query = torch.randn(batch, heads[0], tokens, DIM).to(dtype)
    key, value = torch.randn(2, batch, heads[1], cached + tokens, DIM).to(dtype)
    keys = torch.full((batch, cached + tokens), NOWHERE)
    keys[:, :cached] = torch.arange(cached)
    for row, count in enumerate(counts):
        start = cached + 128
        if row == 0 and hole:
            keys[row, cached - hole : cached] = NOWHERE
            start -= hole
        keys[row, cached : cached + count] = torch.arange(start, start + count)
    several = [parts for parts in lengths if len(parts) > 1]
    sets: list[PackedLayer | None] = []
    for number, _ in enumerate(part for parts in lengths for part in parts):
        widths = [int(random.integers(0, 40)), int(random.integers(1, 7))] * heads[1]
        nothing = bare or number % 3 == 2
        sets.append(None if nothing else packed_layer(random, widths[: heads[1]]))
    stretches = [[Stretch([0] * part) for part in parts] for parts in lengths]
    cut = _cut(stretches, tokens, torch.device("cpu")) if several else None
    function_of = (
        causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    )
    made = Seen(
        query,
        key,
        value,
        Rule(function_of, window is None),
        Sight(keys[:, cached:], keys, None, cut, 0 if windows else None),
        sets,
        window,
    )
    if cut is not None:
        made.sight.memories = Held(lambda: made.memory)
    return made


class Layer(torch.nn.Module):
    layer_idx = 0


def slow(
    seen: Seen,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, dict[tuple[int, int, int], float]]:
    """(batch, tokens, heads, dim) in float64, by loops, zeros for padding; and how much attention
    memories get from each token: by sequence, token and head."""
    batch, heads, tokens, _ = query.shape
    group = heads // key.shape[1]
    mixed, shares = torch.zeros(batch, tokens, heads, DIM, dtype=torch.float64), {}
    cut = seen.sight.stretches
    places = list(range(batch)) if cut is None else cut.places.tolist()
    length = 1 if cut is None else cut.tokens.shape[1]
    out = []
    for row in range(batch):
        for token in range(tokens):
            place = int(seen.sight.queries[row, token])
            if place == NOWHERE:
                out.append(torch.zeros(heads, DIM, dtype=torch.float64))
                continue
            number = row if cut is None else places[row * tokens + token] // length
            packed = seen.sets[number]
            of_heads = []
            for head in range(heads):
                own, some = head // group, []
                for at, where in enumerate(seen.sight.keys[row].tolist()):
                    far = seen.window is not None and place - where >= seen.window
                    if where <= place and not far:
                        some.append((key[row, own, at], value[row, own, at], 0.0, False))
                for pair in range(0 if packed is None else packed.mask.shape[1]):
                    assert packed is not None
                    if packed.memory[own, pair] < 0:
                        continue
                    far = seen.window is not None and seen.sight.windows is not None
                    if far and place - int(packed.positions[own, pair]) >= (seen.window or 0):
                        continue
                    pair_key, pair_value = (
                        torch.from_numpy(x[own, pair]) for x in (packed.keys, packed.values)
                    )
                    some.append((pair_key, pair_value, float(packed.mask[own, pair]), True))
                scores = torch.stack(
                    [k.double() @ query[row, head, token].double() for k, *_ in some]
                )
                scores = scores * 0.3
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                scores = scores + torch.tensor([bias for _, _, bias, _ in some])
                if sinks is not None:
                    scores = torch.cat([scores, sinks[head].double()[None]])
                weights = scores.softmax(0)[: len(some)]
                of_heads.append(weights @ torch.stack([v.double() for _, v, _, _ in some]))
                is_memory = torch.tensor([memory for *_, memory in some])
                shares[row, token, head] = float(weights.detach()[is_memory].sum())
            out.append(torch.stack(of_heads))
    mixed = torch.stack(out).view(batch, tokens, heads, DIM)
    return mixed, shares


def called(seen: Seen, **options: Any) -> Tensor:
    mixed, _ = memory_attention(
        Layer(),
        seen.query,
        seen.key,
        seen.value,
        seen.rule,  # type: ignore[arg-type]
        scaling=0.3,
        explicit_memory=seen.sight,
        **options,
    )
    return mixed


def check(seen: Seen, softcap: float | None = None, sinks: Tensor | None = None) -> None:
    expected, _ = slow(seen, seen.query, seen.key, seen.value, softcap=softcap, sinks=sinks)
    real = seen.sight.queries != NOWHERE
    limit = DTYPES[seen.query.dtype]
    for with_gradients in (False, True):  # in parts, and in one softmax
        with torch.set_grad_enabled(with_gradients):
            got = called(seen, softcap=softcap, s_aux=sinks)
        assert got[real].isfinite().all()
        torch.testing.assert_close(got[real].double(), expected[real], atol=limit, rtol=limit)


TWO = [[5, 3, 6], [4]]  # sequences of different lengths, of which one has one stretch
CASES: dict[str, dict[str, Any]] = {
    "stretches": {"lengths": TWO},
    "behind a prefix": {"lengths": TWO, "cached": 6},
    "behind much": {"lengths": TWO, "cached": 80},
    "behind padding": {"lengths": TWO, "cached": 9, "hole": 3},
    "one sequence": {"lengths": [[7, 7, 2]], "cached": 4},
    "many": {"lengths": [[2, 3], [4, 4, 4], [1, 1], [9]], "cached": 3},
    "no memories": {"lengths": TWO, "bare": True},
    "as many kv heads": {"lengths": TWO, "heads": (3, 3), "cached": 2},
    "one kv head": {"lengths": TWO, "heads": (4, 1), "cached": 2},
}


@pytest.mark.parametrize(("window", "windows"), [(None, False), (6, False), (6, True)])
@pytest.mark.parametrize("name", CASES)
def test_stretches_equal_a_loop(name: str, windows: bool, window: int | None) -> None:
    check(pass_of(**CASES[name], window=window, windows=windows))


@pytest.mark.parametrize("name", ["behind padding", "many"])
def test_soft_capped_scores_and_sinks_equal_a_loop(name: str) -> None:
    for window in (None, 6):
        for softcap, sinks in ((1.5, None), (None, torch.randn(6)), (1.5, torch.randn(6))):
            check(pass_of(**CASES[name], window=window), softcap, sinks)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_half_precision_equals_a_loop(name: str, dtype: torch.dtype) -> None:
    check(pass_of(**CASES[name], dtype=dtype))


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("cached", [0, 5, 90])
def test_long_passes_without_stretches_equal_a_loop(
    cached: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sight, "_SMALL", 0)
    check(pass_of([[BLOCK + 20]], cached=cached, window=window, heads=(2, 1), bare=True))
    check(pass_of([[9], [30]], cached=cached, hole=cached // 3, window=window, bare=True))


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "mistral"])
def test_long_passes_of_one_stretch_with_memories_equal_a_loop(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sight, "_SMALL", 0)
    case = Case(architecture, sliding_window=12)
    for windows in (False, True):
        first = [(case.tokens(0, 14), case.set(0, 1))]
        second = [(case.tokens(9, 2), case.set(2))]
        case.check([first, second, [(case.tokens(20, 5), [])]], [[5, 6, 7], [8, 9, 10]], windows)


def test_gradients_are_those_of_a_loop() -> None:
    """To queries, keys and values; the memories' own are in the training tests."""
    seen = pass_of(TWO, cached=5, window=None)
    seen.query, seen.key, seen.value = (
        x.detach().requires_grad_() for x in (seen.query, seen.key, seen.value)
    )
    given = [seen.query, seen.key, seen.value]
    real = seen.sight.queries != NOWHERE
    factors = torch.randn(*real.shape, 6, DIM)[real]
    got = torch.autograd.grad((called(seen)[real] * factors).sum(), given)
    expected, _ = slow(seen, *given)
    wanted = torch.autograd.grad((expected[real] * factors).sum(), given)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other.float(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_a_witness_is_told_what_the_loop_says(softcap: float | None) -> None:
    seen = pass_of(TWO, cached=5)
    told: list[Tensor] = []
    seen.sight.witness = lambda weights, memory: told.append(weights)
    cut = seen.sight.stretches
    assert cut is not None
    _, shares = slow(seen, seen.query, seen.key, seen.value, softcap=softcap)
    for with_gradients in (False, True):
        with torch.set_grad_enabled(with_gradients):
            called(seen, softcap=softcap)
        got = told.pop().sum(-1)  # (sets, heads, tokens)
        tokens, length = seen.query.shape[2], cut.tokens.shape[1]
        for (row, token, head), share in shares.items():
            place = int(cut.places[row * tokens + token])
            assert float(got[place // length, head, place % length]) == pytest.approx(
                share, abs=1e-5
            )


# --- a step ---------------------------------------------------------------------------------------


def test_memories_of_each_head_stand_right_before_the_context() -> None:
    """So that a group of heads reads no slots that none of them fills."""
    random = np.random.default_rng(3)
    layers = [packed_layer(random, widths) for widths in ([7, 300], [2, 280], [9, 310])]
    like = torch.zeros(1, 2, 0, DIM)
    memory = stacked([layers[0], None, layers[1], layers[2]], like)
    assert [(g.first, g.end, g.width) for g in memory.groups] == [(0, 1, 9), (1, 2, 310)]
    for number, packed in ((0, layers[0]), (2, layers[1]), (3, layers[2])):
        for head in range(2):
            count = int((packed.memory[head] >= 0).sum())
            for made, was in (
                (memory.keys, packed.keys),
                (memory.values, packed.values),
                (memory.mask, packed.mask),
                (memory.memory, packed.memory),
                (memory.token, packed.positions),
            ):
                assert (made[number, head, -count:].numpy() == was[head, :count]).all()
            assert not memory.mask[number, head, :-count].isfinite().any()
    assert not memory.mask[1].isfinite().any()


def test_pairs_that_are_hidden_between_others_stay_hidden() -> None:
    """Memories may be weighed anew, and some be left out."""
    packed = packed_layer(np.random.default_rng(4), [6, 4])
    hidden = packed.mask.copy()
    hidden[:, 1] = -np.inf
    hidden[0, 5] = -np.inf
    memory = stacked([replace(packed, mask=hidden)], torch.zeros(1, 2, 0, DIM))
    assert memory.mask[0, 0].isfinite().tolist() == [True, False, True, True, True, False]
    assert memory.mask[0, 1].isfinite().tolist()[2:] == [True, False, True, True]


# --- what it takes --------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
@pytest.mark.parametrize("cut", [True, False])
def test_what_a_long_prompt_takes_grows_with_its_length_not_with_its_square(
    architecture: str, cut: bool
) -> None:
    """Neither a mask of tokens times tokens, nor the context once more for each stretch."""
    model = tiny_model(architecture, max_position_embeddings=8192, sliding_window=64)
    tokens = model.tokens(SAMPLE) * 20
    heads = [int(model.kv_heads)] * model.layers
    random = np.random.default_rng(0)
    dim = model.head_dim

    def memories() -> Any:
        layers = {}
        for layer, count in enumerate(heads):
            made = packed_layer(random, [4] * count)
            wide = np.zeros((count, 4, dim), np.float32)
            layers[layer] = replace(made, keys=wide, values=wide)
        return PackedMemories(layers)

    def largest(length: int) -> int:
        parts = [tokens[at : at + 32] for at in range(0, length, 32)]
        stretches = [Stretch(part, memories()) for part in parts]
        if not cut:
            stretches = [Stretch(tokens[:length])]
        context = Context(model, capacity=length)
        with profile(profile_memory=True) as watched:
            context.read([stretches])
        return max(event.self_cpu_memory_usage for event in watched.events())

    assert largest(2048) < 2.5 * largest(1024)
