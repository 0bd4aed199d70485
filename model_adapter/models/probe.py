"""Trying a model out: is it one that memories can be written and read for?

Architectures are many and change; a few tokens tell more than a list of names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from memdb import UnsupportedModelError
from model_adapter.attention.function import Observer
from model_adapter.catalog import in_brief

_TOKENS = 8
_SHIFT = 17  # positions between the two readings


class Probed(Protocol):
    """What is asked of a `LanguageModel`."""

    name: str
    model: Any

    @property
    def layers(self) -> int:
        """Number of layers."""

    @property
    def heads(self) -> int:
        """Query heads of a layer."""

    @property
    def kv_heads(self) -> int:
        """Key-value heads of a layer."""

    @property
    def head_dim(self) -> int:
        """Length of a key."""

    def observe(
        self, sequences: Sequence[Sequence[int]], observer: Observer, *, start: int | None = None
    ) -> None:
        """Run sequences and look on."""

    def unrotate(self, vectors: Tensor, layer: int, start: int) -> Tensor:
        """Keys before RoPE."""


def turning_layers(model: Probed) -> frozenset[int]:
    """Run a few tokens at two places and look at every layer's queries, keys and values.

    Returns:
        The layers whose keys depend on their position (RoPE); the others have none.

    Raises:
        UnsupportedModelError: a layer does not attend through the interface, or in other shapes.
    """
    try:
        here, there = (_keys(model, start) for start in (0, _SHIFT))
    except UnsupportedModelError:
        raise
    except Exception as error:  # whatever an unknown architecture stumbles over
        raise UnsupportedModelError(
            f"{_name(model)} cannot be run with attention over memories: {in_brief(error)}"
        ) from error
    expected = (model.kv_heads, _TOKENS, model.head_dim)
    for layer in range(model.layers):
        if layer not in here:
            raise UnsupportedModelError(
                f"{_name(model)} has layers without attention (layer {layer}), or such that do not "
                "use transformers' attention interface"
            )
        if here[layer].shape != expected:
            raise UnsupportedModelError(
                f"{_name(model)} has keys of shape {tuple(here[layer].shape)} in layer {layer}, "
                f"not (kv heads, tokens, head dim) = {expected}"
            )
    return frozenset(layer for layer in here if not _close(here[layer], there[layer]))


def unrotation_is_right(model: Probed) -> bool:
    """Whether `unrotate` gives the same keys wherever the tokens stood."""
    try:
        here, there = _keys(model, 0), _keys(model, _SHIFT)
        return all(
            _close(model.unrotate(here[i], i, 0), model.unrotate(there[i], i, _SHIFT)) for i in here
        )
    except Exception:  # its rotary embedding is called otherwise, or lies elsewhere
        return False


def _close(one: Tensor, other: Tensor) -> bool:
    """Whether keys differ by no more than rounding, which in half precision adds up over layers."""
    difference = (one.float() - other.float()).abs().mean() / one.float().abs().mean()
    return bool(difference < 0.05)


@torch.no_grad()
def _keys(model: Probed, start: int) -> dict[int, Tensor]:
    found: dict[int, Tensor] = {}

    def observe(layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> None:
        if query.shape[1] != model.heads or value.shape != key.shape:
            raise UnsupportedModelError(
                f"{_name(model)} has queries of shape {tuple(query.shape)} and values of shape "
                f"{tuple(value.shape)} in layer {layer}, which memories cannot be made of"
            )
        found[layer] = key[0]

    ids = [token % model.model.config.vocab_size for token in range(3, 3 + _TOKENS)]
    model.observe([ids], observe, start=start)
    return found


def _name(model: Probed) -> str:
    return f"the model '{model.name}' ({type(model.model).__name__})"
