"""The passes of a training step: a reference's keys and values, memories of them, and reading, all
with gradients. The numbers are those of `Writer` and `Context` (a test compares them)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from memdb import MemoryShape
from model_adapter.attention.function import run
from model_adapter.attention.sight import NOWHERE, LayerMemory, Sight, Stretches, additive
from model_adapter.models import observing
from model_adapter.models.observing import KeyValues
from model_adapter.training.examples import Row
from model_adapter.writing.kept_pairs import Kept


class Remembered:
    """Memories with gradients, all seen by each sequence of a pass; a `Memories`.

    Args:
        kept: the pairs.
        layers: the memory layers.
        kv_heads: of each.
        sequences: of the pass.
        biases: (sequences, pairs), added to the pairs' attention scores, in nats; their gradients
            say what each pair does for each sequence. None: no biases.
    """

    def __init__(
        self,
        kept: Kept,
        layers: Sequence[int],
        kv_heads: int,
        sequences: int,
        biases: Tensor | None = None,
    ) -> None:
        rows = len(layers) * kv_heads
        order = torch.argsort(kept.rows, stable=True)
        counts = kept.rows.bincount(minlength=rows)
        starts = counts.cumsum(0) - counts
        of = kept.rows[order]
        place = torch.arange(len(order), device=order.device) - starts[of]
        width = int(counts.max())
        # Where a row has fewer pairs than the others, the first pair again, which is not seen.
        pairs = order.new_zeros(rows, width)
        pairs[of, place] = order
        self._pairs = pairs.view(len(layers), kv_heads, width)
        self._counts = counts.view(len(layers), kv_heads)
        self._kept = kept
        self._at = {layer: number for number, layer in enumerate(layers)}
        self._sequences = sequences
        self._biases = biases

    def joined(self, layer: int) -> None:
        """See `Memories.joined`: they lie in no buffer."""

    def buffer(self, layer: int) -> None:
        """See `Memories.buffer`: likewise."""

    def sets(self, layer: int, like: Tensor) -> LayerMemory:
        """See `Memories.sets`; which memory and token a pair is of is left out, since nobody asks
        for it here."""
        number = self._at.get(layer)
        kv_heads, head_dim = like.shape[1], like.shape[3]
        if number is None:
            none = like.new_zeros(self._sequences, kv_heads, 0, head_dim)
            nowhere = torch.zeros(none.shape[:3], dtype=torch.int64, device=like.device)
            return LayerMemory(none, none, none[..., 0], nowhere, nowhere)
        counts = self._counts[number]
        width = int(counts.max())
        pairs = self._pairs[number, :, :width]
        real = torch.arange(width, device=like.device) < counts[:, None]
        mask = additive(real, like.dtype)
        several = (self._sequences, -1, -1)
        keys, values = (
            vectors[pairs].to(like.dtype).expand(*several, -1)
            for vectors in (self._kept.keys, self._kept.values)
        )
        mask = mask.expand(several)
        if self._biases is not None:
            mask = mask + self._biases[:, pairs].to(like.dtype)
        pairs = pairs.expand(several)
        return LayerMemory(keys, values, mask, pairs, pairs)


def read(
    model: Any,
    before: KeyValues,
    rows: Sequence[Row],
    start: int,
    memories: Remembered | None = None,
    *,
    prompts: bool = True,
) -> Tensor:
    """Logits for tokens of rows that are read side by side.

    Args:
        model: that reads; a causal language model of transformers.
        before: the key-values of what stands before each row, at positions 0 and on.
        rows: what is read.
        start: position of their first tokens.
        memories: seen by all of them.
        prompts: whether logits of prompts are wanted, too.

    Returns:
        (wanted, vocabulary): what is predicted for each wanted token, row after row: those of
        `targets`.
    """
    length = max(len(row.tokens) for row in rows)
    device = model.device
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    real = torch.zeros(len(rows), length, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row.tokens)] = torch.tensor(row.tokens)
        real[i, : len(row.tokens)] = True
    ids, real = ids.to(device), real.to(device)
    places = torch.arange(start, start + length, device=device).expand(len(rows), -1)
    queries = places.masked_fill(~real, NOWHERE)
    first = torch.arange(before.length, device=device)
    keys = torch.cat([first.expand(len(rows), -1), queries], 1)
    stretches = None
    if memories is not None:
        # Each row is a stretch of its own.
        tokens = torch.arange(ids.numel(), device=device)
        sequence = torch.arange(len(rows), device=device)
        stretches = Stretches(sequence, tokens.view_as(ids), tokens)
    where = [(i, at - 1) for i, row in enumerate(rows) for at in _wanted(row, prompts)]
    with _only(model, torch.tensor(where, device=device)):
        logits: Tensor = run(
            model,
            ids,
            position_ids=places.masked_fill(~real, 0),
            past_key_values=observing.cache_of(model, before, len(rows)),
            use_cache=True,
            explicit_memory=Sight(queries, keys, memories, stretches),
        ).logits
    return logits[0]


def read_behind(
    model: Any,
    prefix: KeyValues,
    kept: Kept,
    shape: MemoryShape,
    rows: Sequence[Row],
    *,
    prompts: bool,
    biases: Tensor | None = None,
) -> Tensor:
    """Logits as `read` gives them, of rows behind memories: at the position where a database of
    that shape has its context. For `biases` see `Remembered`."""
    memories = Remembered(kept, shape.layers, shape.kv_heads, len(rows), biases)
    start = len(shape.prefix) + shape.reference_length
    return read(model, prefix, rows, start, memories, prompts=prompts)


def targets(rows: Sequence[Row], *, prompts: bool = True) -> list[tuple[int, int, bool]]:
    """For each wanted token: which row it is in, its id, and whether it is of the answer."""
    return [
        (i, row.tokens[at], at >= len(row.tokens) - row.answer)
        for i, row in enumerate(rows)
        for at in _wanted(row, prompts)
    ]


def _wanted(row: Row, prompts: bool) -> range:
    """Places of a row's tokens that are predicted: of what stands before the row nobody asks."""
    return range(max(1, 0 if prompts else len(row.tokens) - row.answer), len(row.tokens))


@contextmanager
def _only(model: Any, where: Tensor) -> Iterator[None]:
    """Let the output head, the costliest layer, see only some tokens, (wanted, 2) row and place:
    as one sequence. What a model does behind its head, it does to those."""

    def gather(_: torch.nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (given[0][where[:, 0], where[:, 1]][None], *given[1:])

    hook = model.get_output_embeddings().register_forward_pre_hook(gather)
    try:
        yield
    finally:
        hook.remove()
