"""Trying a model out: is it one that memories can be written and read for, and in which layers?

Architectures are many and change; a few tokens tell more than a list of names. They are read as the
model reads them by itself, and then in all the ways that memories ask for: behind a prefix, token
by token, side by side with a shorter text, and a part of them as a memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from memdb import PackedLayer, PackedMemories, UnsupportedModelError
from model_adapter.attention.context import Context, ReadingModel, Stretch
from model_adapter.attention.function import SOURCE, Observer
from model_adapter.catalog import in_brief

_PREFIX, _REFERENCE, _CONTEXT = 3, 4, 5  # tokens of the text that is tried
_LENGTH = _PREFIX + _REFERENCE + _CONTEXT
_SHIFT = 17  # positions between the two readings
_NEAR = 0.05  # relative difference of keys up to which they are the same but for rounding
# By weights of 8 bits what is rounded differs more from one place to another (0.07 at most of three
# real models); farther apart, keys that turn differ more, too (0.2 at least).
_ROUNDED_SHIFT, _ROUNDED_NEAR = 1001, 0.12
#: How far logits may be from what they should be, as a share of their length: by rounding alone
#: they are a thousand times nearer in float32.
_FAR, _FAR_IN_HALF = 0.01, 0.3


@dataclass(frozen=True)
class Found:
    """What a model turned out to be.

    Attributes:
        memory_layers: those that memories can be of: they attend, to keys of their own, of the
            shape that most layers' have.
        attending: how many layers attend.
        heads: query heads of a memory layer.
        kv_heads: its key-value heads.
        head_dim: length of its keys.
        every_head: query heads of all layers that attend.
        turning: the memory layers whose keys depend on their position.
        sources: of each layer that attends to the keys of another one, which.
        keeps_state: whether a layer carries a state on (linear attention, Mamba).
    """

    memory_layers: tuple[int, ...]
    attending: int
    heads: int
    kv_heads: int
    head_dim: int
    every_head: int
    turning: frozenset[int]
    sources: dict[int, int]
    keeps_state: bool

    @property
    def whole(self) -> bool:
        """Whether all that a text leaves behind can be a memory."""
        return not self.keeps_state and self.attending == len(self.memory_layers) + len(
            self.sources
        )

    @property
    def noted(self) -> dict[str, Any]:
        """As a JSON object."""
        return {**asdict(self), "turning": sorted(self.turning)}

    @classmethod
    def read(cls, noted: Mapping[str, Any]) -> Found:
        """As `noted` has it."""
        sources = {int(layer): source for layer, source in noted["sources"].items()}
        layers, turning = tuple(noted["memory_layers"]), frozenset(noted["turning"])
        return cls(**{**noted, "memory_layers": layers, "turning": turning, "sources": sources})


class Probed(ReadingModel, Protocol):
    """What is asked of a `LanguageModel`."""

    name: str
    model: Any
    config: Any

    @property
    def is_exact(self) -> bool:
        """Whether it reads by its exact weights."""

    @property
    def max_positions(self) -> int:
        """Longest sequence it was made for."""

    def observe(
        self,
        sequences: Sequence[Sequence[int]],
        observer: Observer,
        *,
        prefix: Sequence[int] = (),
        start: int | None = None,
        what: Literal["read"] = "read",
    ) -> None:
        """Run sequences and look on."""

    def unrotate(self, vectors: Tensor, layer: int, start: int) -> Tensor:
        """Keys before RoPE."""


def some_tokens(model: Probed) -> list[int]:
    """The text that is tried."""
    return [(3 + 5 * number) % int(model.config.vocab_size) for number in range(_LENGTH)]


@torch.no_grad()
def own_logits(model: Probed, plain: Callable[[], Any]) -> Tensor:
    """(tokens, vocabulary) what the model says by its own attention.

    Args:
        model: that is tried.
        plain: gives the model of transformers that it is.

    Raises:
        UnsupportedModelError: it does not run.
    """
    try:
        ids = torch.tensor([some_tokens(model)], device=model.device)
        logits: Tensor = plain()(ids, use_cache=False).logits[0]
    except Exception as error:  # whatever an unknown architecture stumbles over
        raise _refused(model, f"cannot be run on text alone: {in_brief(error)}") from error
    return logits.float()


def find_out(model: Probed) -> Found:
    """Run a few tokens at two places and look at every layer's queries, keys and values.

    Raises:
        UnsupportedModelError: no layer attends through transformers' interface, or one does so in a
            way that memories do not fit.
    """
    try:
        here, there = (_seen(model, start) for start in (0, _shift(model)))
        cache = model.new_cache(0)
    except UnsupportedModelError as error:
        raise _refused(model, str(error)) from error
    except Exception as error:
        raise _refused(
            model, f"cannot be run with attention over memories: {in_brief(error)}"
        ) from error
    if not here:
        raise _refused(model, "has layers that do not use transformers' attention interface")
    kinds: Counter[tuple[int, int, int]] = Counter()
    sources: dict[int, int] = {}
    for layer, seen in here.items():
        earlier = (i for i, other in here.items() if i < layer and i not in sources)
        source = next((i for i in earlier if seen.is_of(here[i])), None)
        if source is not None:
            sources[layer] = source
        elif seen.shape is not None:
            kinds[seen.shape] += 1
    if not kinds:
        raise _refused(model, f"has {next(iter(here.values()))}, which memories cannot be made of")
    shape = kinds.most_common(1)[0][0]
    layers = tuple(i for i, seen in here.items() if i not in sources and seen.shape == shape)
    sources = {layer: source for layer, source in sources.items() if source in layers}
    heads, kv_heads, head_dim = shape
    return Found(
        layers,
        len(here),
        heads,
        kv_heads,
        head_dim,
        sum(seen.query.shape[1] for seen in here.values()),
        frozenset(i for i in layers if not _close(model, here[i].key, there[i].key)),
        sources,
        cache.has_state,
    )


def note_sources(model: Any, sources: dict[int, int]) -> None:
    """Let layers that attend to the keys of another one read its memories, too."""
    for module in model.modules():
        source = sources.get(getattr(module, "layer_idx", None))  # type: ignore[arg-type]
        if source is not None:
            setattr(module, SOURCE, source)


@torch.no_grad()
def require_right(model: Probed, found: Found, own: Tensor) -> None:
    """Raise `UnsupportedModelError` unless the model says the same however the text is read.

    Args:
        model: with its attention exchanged.
        found: what it is.
        own: what it said before that, see `own_logits`.
    """
    text = some_tokens(model)
    prefix, reference = text[:_PREFIX], text[_PREFIX : _PREFIX + _REFERENCE]
    rest = text[_PREFIX + _REFERENCE :]
    float32 = own.dtype == torch.float32 and model.model.dtype == torch.float32
    far = _FAR if float32 and model.is_exact else _FAR_IN_HALF

    def check(what: str, got: Iterable[Tensor], wanted: Iterable[Tensor]) -> None:
        for one, other in zip(got, wanted, strict=True):
            apart = float((one.float() - other).norm() / other.norm())
            if not apart <= far:  # NaN, too
                raise _refused(model, f"{what} ({apart:.2f} apart)")

    try:
        # Side by side with a shorter text, then token by token.
        shorter = _PREFIX + 3
        if found.keeps_state:
            (whole,) = Context(model).read([[Stretch(text)]], every=True)
            check("says other things with this attention than with its own", whole, own)
            (whole,) = Context(model, prefix).read([[Stretch(text[_PREFIX:])]], every=True)
            check(
                "has layers that keep a state, and do not go on from it with several tokens at "
                "once: in this version of transformers they forget what stood before",
                whole,
                own[_PREFIX:],
            )
        context = Context(model, prefix, batch=2)
        read = context.read([[Stretch(text[_PREFIX:-1])], [Stretch(text[_PREFIX:shorter])]])
        check(
            "says other things with this attention than with its own",
            [read[0][0], read[1][0]],
            [own[-2], own[shorter - 1]],
        )
        step = context.step(torch.tensor([text[-1], text[shorter]], device=model.device))
        check("says other things token by token than in one pass", step, [own[-1], own[shorter]])
        memory = _memory(model, found, prefix, reference)
        context = Context(model, prefix, _PREFIX + _REFERENCE, windows=True)
        (said,) = context.read([[Stretch(rest, memory)]], every=True)
    except UnsupportedModelError:
        raise
    except Exception as error:
        raise _refused(
            model, f"cannot be run with attention over memories: {in_brief(error)}"
        ) from error
    if found.whole:
        wanted = own[_PREFIX + _REFERENCE :]
        check("says other things with a text as memory than in its prompt", said, wanted)
    elif not said.isfinite().all():
        raise _refused(model, "says nothing with a memory (not a number)")


def _memory(
    model: Probed, found: Found, prefix: Sequence[int], reference: Sequence[int]
) -> PackedMemories:
    """All that a reference leaves behind in the memory layers."""
    layers: dict[int, PackedLayer] = {}

    def observe(layer: int, _: Tensor, key: Tensor, value: Tensor, __: float) -> None:
        if layer in found.memory_layers:
            places = np.broadcast_to(
                np.arange(len(reference)), (found.kv_heads, len(reference))
            ).copy()
            layers[layer] = PackedLayer(
                key[0, :, len(prefix) :].float().cpu().numpy(),
                value[0, :, len(prefix) :].float().cpu().numpy(),
                np.zeros(places.shape, np.float32),
                np.zeros(places.shape, np.int32),
                places.astype(np.uint8),
            )

    model.observe([reference], observe, prefix=prefix, what="read")
    return PackedMemories(layers)


def unrotation_is_right(model: Probed) -> bool:
    """Whether `unrotate` gives the same keys wherever the tokens stood."""
    try:
        shift = _shift(model)
        here, there = _seen(model, 0), _seen(model, shift)
        return all(
            _close(model, model.unrotate(here[i].key, i, 0), model.unrotate(there[i].key, i, shift))
            for i in here
        )
    except Exception:  # its rotary embedding is called otherwise, or lies elsewhere
        return False


def _shift(model: Probed) -> int:
    if model.is_exact:
        return _SHIFT
    return max(_SHIFT, min(_ROUNDED_SHIFT, model.max_positions - _LENGTH))


def _close(model: Probed, one: Tensor, other: Tensor) -> bool:
    """Whether keys differ by no more than rounding, which in half precision adds up over layers."""
    difference = (one.float() - other.float()).abs().mean() / one.float().abs().mean()
    return bool(difference < (_NEAR if model.is_exact else _ROUNDED_NEAR))


@dataclass(frozen=True)
class _Seen:
    """Queries (1, heads, tokens, head_dim), keys and values (kv heads, tokens, head_dim)."""

    query: Tensor
    key: Tensor
    value: Tensor

    @property
    def shape(self) -> tuple[int, int, int] | None:
        """Query heads, kv heads and head_dim; None: memories cannot be of these."""
        heads, kv_heads, head_dim = self.query.shape[1], *self.key.shape[::2]
        fits = self.value.shape == self.key.shape and heads % kv_heads == 0
        return (heads, kv_heads, head_dim) if fits else None

    def is_of(self, other: _Seen) -> bool:
        """Whether keys and values are those of another layer."""
        return torch.equal(self.key, other.key) and torch.equal(self.value, other.value)

    def __str__(self) -> str:
        return (
            f"queries of shape {tuple(self.query.shape[1:])}, keys of shape "
            f"{tuple(self.key.shape)} and values of shape {tuple(self.value.shape)}"
        )


@torch.no_grad()
def _seen(model: Probed, start: int) -> dict[int, _Seen]:
    found: dict[int, _Seen] = {}

    def observe(layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> None:
        if layer in found:
            raise UnsupportedModelError(f"attends several times in one layer ({layer})")
        found[layer] = _Seen(query, key[0], value[0])

    model.observe([some_tokens(model)], observe, start=start, what="read")
    return dict(sorted(found.items()))


def _refused(model: Probed, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"the model '{model.name}' ({class_of(model.model)}) {why}")


def class_of(model: Any) -> str:
    """What transformers calls a model's class."""
    return str(getattr(model, "kind", type(model).__name__))
