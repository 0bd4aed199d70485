"""A codec that is not fitted because the database's memories would lose too much under it: why, and
when it is worth another try. The database remembers it, so that no handle tries in vain."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from memdb.codecs import Family, FittedCodec, Layout, Part, share
from memdb.storage.record_layout import MEMORIES, UNFITTED
from memdb.storage.transaction import Transaction
from memdb.types.memory_batch import MemoryBatch
from memdb.types.shape import MemoryShape

_TRIED = 128  # memories of the sample that a new codec has to show itself on
_AGAIN = 2  # times as many memories, and it is tried again
_PARTS: tuple[Part, Part] = ("keys", "values")
_log = logging.getLogger("memdb")


def problem(codec: FittedCodec, family: Family, sample: MemoryBatch, shape: MemoryShape) -> str:
    """Why a codec is not to be used, though it was fitted to this sample; empty: it is."""
    chosen = np.unique(np.linspace(0, len(sample) - 1, min(_TRIED, len(sample))).astype(int))
    own = np.repeat(np.isin(np.arange(len(sample)), chosen), sample.sizes)
    layout = Layout.dense(sample.counts[chosen], sample.positions[own])
    vectors = sample.keys[own], sample.values[own]
    coded = [codec.encode(part, x, layout, shape) for part, x in zip(_PARTS, vectors, strict=True)]
    lost = sum(None in memory for memory in zip(*coded, strict=True))
    if 2 * lost <= len(chosen):
        return ""
    keys, values = (f"{share(family.name, part):.0%}" for part in _PARTS)
    return (
        f"the codec '{family.name}' is not fitted: {lost} of {len(chosen)} memories would lose "
        f"more than {keys} of their keys, or {values} of their values (of the squared length). "
        "They are too unlike each other to be kept in so few bytes, and stay as they are"
    )


def note(transaction: Transaction, family: Family, shape: MemoryShape, why: str) -> None:
    """Remember that the database's own codec was not fitted, and say so."""
    count = transaction.count(MEMORIES)
    told = {"codec": family.name, "memories": count, "shape": _of(shape), "why": why}
    transaction.put_setting(UNFITTED, told)
    _log.warning("%s; it is tried again once there are %d", why, _AGAIN * count)


def enough(transaction: Transaction, family: Family, shape: MemoryShape) -> int:
    """Memories there have to be before a codec of this family is fitted without being asked for."""
    told = _noted(transaction, family.name, shape)
    return family.enough if told is None else max(family.enough, _AGAIN * told["memories"])


def reason(
    transaction: Transaction, memory: Mapping[str, Any], shape: MemoryShape
) -> dict[str, Any] | None:
    """Of the codec that the setting `memory` names: `memories`, how many there were when it was
    found that it cannot be fitted, and `why`. None: it is fitted, or it was not tried."""
    told = None if "fitted" in memory else _noted(transaction, memory["codec"], shape)
    return None if told is None else {name: told[name] for name in ("memories", "why")}


def _noted(transaction: Transaction, codec: str, shape: MemoryShape) -> dict[str, Any] | None:
    """What was remembered of this codec, for memories of this shape."""
    told = transaction.setting(UNFITTED)
    is_whole = isinstance(told, dict) and isinstance(told.get("memories"), int) and "why" in told
    if not is_whole or (told.get("codec"), told.get("shape")) != (codec, _of(shape)):
        return None
    return dict(told)


def _of(shape: MemoryShape) -> str:
    return f"{shape.fingerprint:016x}"
