"""Forward passes that look on: each layer's queries, keys and values. With gradients, unless the
caller turns them off."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from model_adapter.attention.function import Observer

#: Keys and values of some tokens, (1, kv heads, tokens, head_dim), layer by layer.
KeyValues = list[tuple[Tensor, Tensor]]


class _SeenEnough(Exception):  # noqa: N818 (no error: what comes is not needed)
    """Nobody looks at the layers behind."""


def key_values(model: Any, tokens: Sequence[int]) -> KeyValues:
    """Keys and values of tokens at positions 0 and on.

    Args:
        model: a causal language model of transformers whose attention is `memdb`.
        tokens: ids.
    """
    if not tokens:
        return []
    cache = DynamicCache()  # without the configuration: a window would cut it
    ids = torch.tensor([list(tokens)], device=model.device)
    model.base_model(ids, past_key_values=cache, use_cache=True)
    return [(layer.keys, layer.values) for layer in cache.layers]


def cache_of(before: KeyValues, batch: int) -> DynamicCache:
    """A cache that holds the same key-values for each of several sequences."""
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(before):
        several = (batch, -1, -1, -1)
        cache.update(keys.expand(several), values.expand(several), layer)
    return cache


def observe(
    model: Any,
    sequences: Sequence[Sequence[int]],
    observer: Observer,
    before: KeyValues,
    start: int,
    last_layer: int,
) -> None:
    """Run several sequences side by side behind the same key-values, padded at their ends (which no
    token before sees), and show each layer's queries, keys and values to the observer.

    Args:
        model: as for `key_values`.
        sequences: token ids.
        observer: see `Observer`; the keys and values that it sees begin with those before.
        before: what stands before each of them.
        start: position of their first tokens.
        last_layer: behind its keys and values nothing is computed.
    """
    length = max(map(len, sequences))
    padded = [[*tokens, *[0] * (length - len(tokens))] for tokens in sequences]
    positions = torch.arange(start, start + length, device=model.device)

    def look(layer: int, *seen: Any) -> None:
        observer(layer, *seen)
        if layer == last_layer:
            raise _SeenEnough

    with suppress(_SeenEnough):
        # The layers alone, without the output head.
        model.base_model(
            torch.tensor(padded, device=model.device),
            position_ids=positions.expand(len(sequences), -1),
            past_key_values=cache_of(before, len(sequences)),
            use_cache=True,
            observer=look,
        )


def encode(
    model: Any,
    prefix: KeyValues,
    references: Sequence[Sequence[int]],
    layers: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Keys and values of references behind a prefix, (references, rows, longest, head_dim).

    Args:
        model: whose; a causal language model of transformers.
        prefix: the key-values of what stands before each.
        references: token ids.
        layers: the memory layers; rows are these with their kv heads.
    """
    wanted = set(layers)
    seen: list[tuple[Tensor, Tensor]] = []
    start = prefix[0][0].shape[2] if prefix else 0

    def look(layer: int, _: Tensor, key: Tensor, value: Tensor, __: float) -> None:
        if layer in wanted:
            seen.append((key[:, :, start:], value[:, :, start:]))

    observe(model, references, look, prefix, start, max(layers))
    keys, values = (torch.cat(parts, 1) for parts in zip(*seen, strict=True))
    return keys, values
