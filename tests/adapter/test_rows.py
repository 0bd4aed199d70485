"""Attention of one token by rows, against a softmax of each row by itself. A GPU's kernel is not to
be had here: what it is given is looked at, and what happens where it does not work."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model_adapter.attention import merging, one_token, rows
from model_adapter.attention.merging import attend
from model_adapter.attention.rows import Rows

BATCH, KV_HEADS, ROOM, CAPACITY = 3, 2, 16, 32
FILLED = torch.tensor([[0, 16], [1, 7], [16, 3]])


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def buffer(length: int, values: int = 8) -> tuple[Rows, Tensor]:
    """A layer's buffer, in which everything that is not filled is not a number; its mask."""
    places = ROOM + CAPACITY
    keys, held = drawn(BATCH, KV_HEADS, places, 8), drawn(BATCH, KV_HEADS, places, values)
    mask = drawn(BATCH, KV_HEADS, 1, places)
    mask[2, :, :, ROOM + 2 : ROOM + 5] = -torch.inf  # what fills up a prompt
    places_ = torch.arange(places)
    empty = (places_ < ROOM - FILLED[..., None]) | (places_ >= ROOM + length)
    mask[empty[:, :, None]] = -torch.inf
    keys[empty], held[empty] = 1e4, 1e4
    made = Rows(keys, held, torch.zeros(BATCH * KV_HEADS, dtype=torch.int32))
    made.look(FILLED, ROOM, length, mask)
    return made, mask


def slowly(made: Rows, mask: Tensor, query: Tensor, length: int) -> Tensor:
    group = query.shape[1] // KV_HEADS
    found = torch.zeros(BATCH, 1, query.shape[1], made.values.shape[3])
    for row in range(BATCH):
        for head in range(query.shape[1]):
            own = head // group
            seen = slice(ROOM - int(FILLED[row, own]), ROOM + length)
            scores = made.keys[row, own, seen] @ query[row, head, 0] * 0.3 + mask[row, own, 0, seen]
            found[row, 0, head] = scores.softmax(-1) @ made.values[row, own, seen]
    return found


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("length", [6, CAPACITY])
@pytest.mark.parametrize("values", [8, 5])
def test_rows_are_a_softmax_over_what_each_has(length: int, group: int, values: int) -> None:
    made, mask = buffer(length, values)
    query = drawn(BATCH, KV_HEADS * group, 1, 8)
    got = made.attend(query, 0.3)
    assert got is not None
    torch.testing.assert_close(got, slowly(made, mask, query, length))


def test_a_token_that_comes_is_seen_without_another_look() -> None:
    made, mask = buffer(6)
    query = drawn(BATCH, KV_HEADS, 1, 8)
    made.keys[:, :, ROOM + 6], made.values[:, :, ROOM + 6] = drawn(8), drawn(8)
    mask[..., ROOM + 6] = 0
    made.lengths.add_(1)
    torch.testing.assert_close(made.attend(query, 0.3), slowly(made, mask, query, 7))


def test_without_memories_rows_begin_at_the_context() -> None:
    made, _ = buffer(6)
    made.look(None, ROOM, 6, torch.zeros(BATCH, KV_HEADS, 1, ROOM + CAPACITY))
    assert made.lengths.tolist() == [6] * 6
    assert made.starts[:-1].tolist() == [n * (ROOM + CAPACITY) + ROOM for n in range(6)]


def test_keys_that_a_model_made_others_of_are_not_those_of_the_buffer() -> None:
    made, _ = buffer(6)
    key, value = made.keys[:, :, ROOM:], made.values[:, :, ROOM:]
    assert one_token._lie_there(made, key, value)
    assert not one_token._lie_there(made, key.clone(), value)
    assert not one_token._lie_there(made, key, value * 1)


@pytest.mark.parametrize("group", [1, 7])
def test_pytorch_takes_what_the_kernel_is_given(
    group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On tensors that have a shape and nothing else: names, dtypes, and what comes back. To the
    kernel a row is a sequence: `starts[i]` and `seqlen_k[i]` are its keys, and its bias begins
    `stride(0)` times i behind the first one's."""
    made, _ = buffer(6)
    kernel, given = torch.ops.aten._efficient_attention_forward, []

    def called(*args: object, **options: object) -> object:
        given.append((args, options))
        meta = [x.to("meta") if isinstance(x, Tensor) else x for x in args]
        lengths = {n: x.to("meta") if isinstance(x, Tensor) else x for n, x in options.items()}
        return kernel(*meta, **lengths)

    monkeypatch.setattr(torch.ops.aten, "_efficient_attention_forward", called)
    query = drawn(BATCH, KV_HEADS * group, 1, 8)
    mixed = rows.by_kernel(made, query, 0.3)
    assert mixed.shape == (BATCH * KV_HEADS * group, 8)
    (queries, keys, values, bias, ends, starts, most, *_), options = given[0]
    assert (ends.dtype, starts.dtype, options["seqlen_k"].dtype) == (torch.int32,) * 3
    assert most == group
    found = torch.zeros(BATCH * KV_HEADS * group, 8)
    for row in range(BATCH * KV_HEADS):
        first, count = int(starts[row]), int(options["seqlen_k"][row])
        own = slice(int(ends[row]), int(ends[row + 1]))
        # As the kernel finds it: by pointers alone.
        flat = bias.as_strided((bias.untyped_storage().nbytes() // 4,), (1,), 0)
        added = flat[row * bias.stride(0) : row * bias.stride(0) + count]
        scores = queries[0, own, 0] @ keys[0, first : first + count, 0].T * 0.3 + added
        found[own] = scores.softmax(-1) @ values[0, first : first + count, 0]
    torch.testing.assert_close(found, rows.plain(made, query, 0.3))
    # It reads rows of biases that begin at multiples of 16 bytes.
    assert bias.stride(0) % 8 == bias.stride(2) == 0


def test_a_kernel_that_refuses_is_not_asked_again_and_that_is_said() -> None:
    given = torch.device("cpu"), torch.float32, 8, 8, 2
    rows.works.cache_clear()
    with pytest.warns(RuntimeWarning, match="attention by rows does not work on cpu") as said:
        tried = [rows.works(*given) for _ in range(2)]
    assert tried == [False, False]
    assert len(said) == 1
    rows.works.cache_clear()


def test_a_kernel_is_believed_only_if_it_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    given = torch.device("cpu"), torch.bfloat16, 8, 8, 2
    for off, believed in ((0.0, True), (0.5, False)):
        rows.works.cache_clear()
        monkeypatch.setattr(rows, "by_kernel", lambda *of, off=off: rows.plain(*of) + off)
        if believed:
            assert rows.works(*given)
        else:
            with pytest.warns(RuntimeWarning, match=r"off by 0\.5"):
                assert not rows.works(*given)
    rows.works.cache_clear()


def test_long_passes_go_on_where_a_kernel_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch has that kernel for no CPU, so it refuses."""
    query, keys, values = drawn(2, 4, 5, 8), drawn(2, 2, 9, 8), drawn(2, 2, 9, 8)
    expected = attend(query, keys, values, 0.3)
    merging._say_refused.cache_clear()
    monkeypatch.setattr(merging, "_ON_CPU", ())
    monkeypatch.setattr(merging, "_WITH_KERNEL", ("cpu",))
    with pytest.warns(RuntimeWarning, match="attention kernel does not work on cpu") as said:
        got = [attend(query, keys, values, 0.3) for _ in range(2)]
    assert len(said) == 1
    for one in got:
        torch.testing.assert_close(one.mixed, expected.mixed)
        torch.testing.assert_close(one.logs, expected.logs)
