"""Forward passes that look on: each layer's queries, keys and values. With gradients, unless the
caller turns them off."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from model_adapter.attention.carried import (
    KeyValues,
    asked_layers,
    give_state,
    has_keys,
    has_state,
    layers_of,
    state_of,
)
from model_adapter.attention.function import Observer, run

__all__ = ["KeyValues", "cache_of", "encode", "key_values", "observe"]


class _SeenEnough(Exception):  # noqa: N818 (no error: what comes is not needed)
    """Nobody looks at the layers behind."""


def key_values(model: Any, tokens: Sequence[int]) -> KeyValues:
    """Keys and values of tokens at positions 0 and on.

    Args:
        model: a causal language model of transformers whose attention is `memdb`.
        tokens: ids.
    """
    if not tokens:
        return KeyValues()
    cache = _cache(model)
    ids = torch.tensor([list(tokens)], device=model.device)
    model.base_model(ids, past_key_values=cache, use_cache=True)
    each = enumerate(cache.layers)
    pairs = {i: (layer.keys, layer.values) for i, layer in each if has_keys(layer)}
    states = {i: state_of(layer) for i, layer in enumerate(cache.layers) if has_state(layer)}
    return KeyValues({i: pair for i, pair in pairs.items() if pair[0] is not None}, states)


def cache_of(model: Any, before: KeyValues, batch: int) -> DynamicCache:
    """A cache for a model that holds the same key-values for each of several sequences."""
    cache = _cache(model)
    for layer, (keys, values) in before.pairs.items():
        several = (batch, -1, -1, -1)
        cache.update(keys.expand(several), values.expand(several), layer)
    for layer, state in before.states.items():
        give_state(cache.layers[layer], state.rows([0] * batch))
    return cache


def _cache(model: Any) -> DynamicCache:
    cache = DynamicCache()  # made without the configuration: a window would cut it
    cache.layers = layers_of(asked_layers(model.config.get_text_config()))
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
        run(
            model.base_model,
            torch.tensor(padded, device=model.device),
            position_ids=positions.expand(len(sequences), -1),
            past_key_values=cache_of(model, before, len(sequences)),
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
    start = prefix.length

    def look(layer: int, _: Tensor, key: Tensor, value: Tensor, __: float) -> None:
        if layer in wanted:
            seen.append((key[:, :, start:], value[:, :, start:]))

    observe(model, references, look, prefix, start, max(layers))
    keys, values = (torch.cat(parts, 1) for parts in zip(*seen, strict=True))
    return keys, values
