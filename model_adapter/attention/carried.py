"""What a model's layers carry on from pass to pass: keys and values, a state, both, or nothing.

Attention keeps keys and values of every token. Linear attention and state-space layers (Mamba,
gated delta nets, short convolutions) keep a state of fixed size instead, which has no places: it
cannot be cut, and what fills up a shorter sequence would go into it. Some layers do both, side by
side, and some neither.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, cache_utils
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from memdb import UnsupportedModelError


class _Stateless:
    """Stands where transformers knows no layers that keep a state."""


# Older releases of transformers have none of these; models with such layers are refused there.
_STATE: Any = getattr(cache_utils, "LinearAttentionCacheLayerMixin", ())
_BOTH: Any = getattr(cache_utils, "LinearAttentionAndFullAttentionLayer", None)
_NOTHING: Any = getattr(cache_utils, "DummyLayer", ())
#: The base of a layer that keeps a state beside keys and values of another kind.
StateLayer: Any = getattr(cache_utils, "LinearAttentionLayer", _Stateless)
# Sliding ones among them: a window is a matter of the mask here, so that nothing is cut off.
_KNOWN = (
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer",
)


@dataclass(frozen=True)
class State:
    """The states of one layer, by their number: there may be several.

    Attributes:
        conv: (batch, channels, kernel): the last inputs of a convolution.
        recurrent: (batch, ...).
    """

    conv: dict[int, Tensor]
    recurrent: dict[int, Tensor]

    def rows(self, rows: Any) -> State:
        """Those of some sequences: whatever picks them out of a first axis."""
        return State(
            {number: one[rows] for number, one in self.conv.items()},
            {number: one[rows] for number, one in self.recurrent.items()},
        )


@dataclass(frozen=True)
class KeyValues:
    """What a model carries on from some tokens, by layer.

    Attributes:
        pairs: keys and values, (batch, kv heads, tokens, head_dim), of the layers that have them.
        states: of those that have one.
    """

    pairs: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    states: dict[int, State] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """How many tokens."""
        return max((keys.shape[2] for keys, _ in self.pairs.values()), default=0)


def beside(parts: Sequence[KeyValues]) -> KeyValues:
    """Those of several sequences side by side, the shorter ones filled up at their end."""
    length = max(part.length for part in parts)

    def filled(x: Tensor) -> Tensor:
        return pad(x, (0, 0, 0, length - x.shape[2]))

    pairs = {
        layer: (
            torch.cat([filled(part.pairs[layer][0]) for part in parts]),
            torch.cat([filled(part.pairs[layer][1]) for part in parts]),
        )
        for layer in parts[0].pairs
    }
    states = {
        layer: State(
            {n: torch.cat([part.states[layer].conv[n] for part in parts]) for n in state.conv},
            {
                n: torch.cat([part.states[layer].recurrent[n] for part in parts])
                for n in state.recurrent
            },
        )
        for layer, state in parts[0].states.items()
    }
    return KeyValues(pairs, states)


def has_state(layer: Any) -> bool:
    """Whether a layer of a cache keeps one."""
    return isinstance(layer, _STATE)


def has_keys(layer: Any) -> bool:
    """Whether a layer of a cache keeps keys and values."""
    return isinstance(layer, CacheLayerMixin)


def state_of(layer: Any) -> State:
    """What a layer's state is now."""
    return State(
        {number: one for number, one in layer.conv_states.items() if one is not None},
        {number: one for number, one in layer.recurrent_states.items() if one is not None},
    )


def give_state(layer: Any, state: State) -> None:
    """Let a layer go on from a copy of this state."""
    for number, one in state.conv.items():
        layer.lazy_initialization(conv_states=one, state_idx=number)
        layer.conv_states[number].copy_(one)
        layer.has_previous_state[number] = True
    for number, one in state.recurrent.items():
        layer.lazy_initialization(recurrent_states=one, state_idx=number)
        layer.recurrent_states[number].copy_(one)
        layer.has_previous_state[number] = True


def asked_layers(config: Any) -> list[Any]:
    """The layers of the cache that transformers makes for a model: what each layer carries on.

    Args:
        config: of the model (of its text, if it reads more).

    Raises:
        UnsupportedModelError: a layer carries on what no such cache holds.
    """
    try:
        made: list[Any] = DynamicCache(config=config).layers
    except Exception as error:  # whatever an unknown architecture stumbles over
        raise UnsupportedModelError(
            f"has layers that carry on what transformers' cache does not hold ({error!r:.80})"
        ) from error
    return made


def layers_of(
    asked: Sequence[Any],
    plain: Callable[[], Any] = DynamicLayer,
    both: Callable[[int], Any] | None = None,
) -> list[Any]:
    """A layer of a cache for each layer of a model.

    Args:
        asked: see `asked_layers`; they stay empty.
        plain: makes a layer of keys and values.
        both: makes one that keeps a state, too, given how many; default: transformers' own.

    Raises:
        UnsupportedModelError: a layer keeps something else.
    """
    made = []
    for layer in asked:
        name = type(layer).__name__
        if isinstance(layer, _NOTHING) or (has_state(layer) and not has_keys(layer)):
            made.append(deepcopy(layer))
        elif name not in _KNOWN:
            raise UnsupportedModelError(
                f"has layers that carry on more than keys and values from token to token ({name})"
            )
        elif has_state(layer):
            states = layer.number_of_states
            made.append(_BOTH(number_of_states=states) if both is None else both(states))
        else:
            made.append(plain())
    return made
