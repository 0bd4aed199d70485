"""Which codec the memories of an open database are written with, and all that they are read with.

A family of codecs (`memdb.codecs.Family`) is fitted to the database's own memories: until enough
are there, they are kept by a codec that needs no fitting, and then the fitted one takes over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from memdb.codecs import (
    CODECS,
    FAMILIES,
    STAND_IN,
    Codec,
    Family,
    Layout,
    codec_named,
    decode_memory,
    fitted_codec,
)
from memdb.errors import FormatError, InvalidInputError, MismatchError
from memdb.memories import unfitted
from memdb.protocols import Progress, no_progress
from memdb.storage.record_layout import MEMORIES, SETTINGS, UNFITTED, codec_key, integer_key
from memdb.storage.store import Store
from memdb.storage.transaction import Transaction, decoded
from memdb.types.canonical import json_payload
from memdb.types.memory import ExplicitMemory, to_float32
from memdb.types.memory_batch import MemoryBatch
from memdb.types.shape import MemoryShape

_SETTING = "memory"
_NUMBERS = 1 << 26  # of keys, or of values, that a codec is fitted to at most


class KnownCodecs(Mapping[str, Codec]):
    """Codecs by name: those that are ready, and the fitted ones of a database, each of which is
    loaded when it is first asked for.

    Args:
        parameters: gives those of a fitted codec; `CorruptRecordError` if they are not there.
    """

    def __init__(self, parameters: Callable[[str], bytes]) -> None:
        self._parameters = parameters
        self._loaded: dict[str, Codec] = dict(CODECS)

    def __getitem__(self, name: str) -> Codec:
        codec = self._loaded.get(name)
        if codec is None:
            if name.partition(":")[0] not in FAMILIES or ":" not in name:
                raise KeyError(name)
            key = codec_key(name)
            found = decoded(
                SETTINGS, key, (1, self._parameters(name)), lambda _, p: fitted_codec(name, p)
            )
            codec = self._loaded[name] = found
        return codec

    def __iter__(self) -> Iterator[str]:
        return iter(self._loaded)

    def __len__(self) -> int:
        return len(self._loaded)


class CodecChoice:
    """How one open database codes memories.

    Attributes:
        codecs: all that its memories may be read with.
        took_over: whether a codec was fitted by this, and what was written before is left as it is.
    """

    def __init__(self, store: Store, shape: MemoryShape, memory: Mapping[str, Any]) -> None:
        def parameters(name: str) -> bytes:
            with store.read() as transaction:
                return transaction.codec_parameters(name)

        self.codecs = KnownCodecs(parameters)
        self.took_over = False
        self._store = store
        self._shape = shape
        self._problem = ""  # of the last fit: why the codec is not used
        self._take(memory)

    def _take(self, memory: Mapping[str, Any]) -> None:
        self._wanted = codec_named(memory["codec"])
        self._fitted: str | None = memory.get("fitted")
        self._as_stored = json_payload(memory)

    @property
    def codec(self) -> Codec:
        """What new memories are written with."""
        if isinstance(self._wanted, Codec):
            return self._wanted
        return STAND_IN if self._fitted is None else self.codecs[self._fitted]

    @property
    def is_fitted(self) -> bool:
        """Whether new memories are written with a fitted codec."""
        return isinstance(self._wanted, Family) and self._fitted is not None

    @property
    def family(self) -> Family | None:
        """What the codec is fitted from, if it is."""
        return self._wanted if isinstance(self._wanted, Family) else None

    def refresh(self, transaction: Transaction) -> None:
        """Take over what another handle decided."""
        if transaction.payload(SETTINGS, _SETTING.encode()) != self._as_stored:
            self._take(transaction.required_setting(_SETTING))

    def decode(self, payload: bytes | memoryview) -> ExplicitMemory:
        """A stored memory, whichever codec wrote it."""
        return decode_memory(payload, self._shape, self.codecs)

    # --- fitting ---

    def fit_if_due(self, progress: Progress = no_progress) -> bool:
        """Fit the codec, if it has to be and enough memories are there; whether it did."""
        family = self.family
        if family is None or self._fitted is not None:
            return False
        with self._store.read() as transaction:
            if transaction.count(MEMORIES) < unfitted.enough(transaction, family, self._shape):
                return False
            self.refresh(transaction)
        if self.family is not family or self._fitted is not None:
            return False
        return self.fit(family, progress)

    def fit(self, family: Family, progress: Progress = no_progress) -> bool:
        """Fit a codec of a family to the memories there are, and make it the one that new memories
        are written with; False if there are not enough, or if most of them would lose too much."""
        self._problem = ""
        progress(f"fitting codec {family.name}", 0, 0)
        with self._store.read() as transaction:
            sample = self._sample(transaction, family)
        if len(sample) < family.enough:
            return False
        batch = MemoryBatch.of(sample, self._shape)
        codec = family.fit(
            to_float32(batch.keys, self._shape.dtype),
            to_float32(batch.values, self._shape.dtype),
            Layout.dense(batch.counts, batch.positions),
            self._shape,
        )
        self._problem = unfitted.problem(codec, family, batch, self._shape)
        with self._store.write() as transaction:
            stored = transaction.required_setting("shape")
            if MemoryShape.from_json(stored) != self._shape:
                return False  # it was rewritten for another model meanwhile
            memory = transaction.required_setting(_SETTING)
            if self._problem:
                if memory["codec"] == family.name and "fitted" not in memory:
                    unfitted.note(transaction, family, self._shape, self._problem)
                return False
            transaction.delete_setting(UNFITTED)
            transaction.put_codec_parameters(codec.name, codec.parameters)
            memory = {**memory, "codec": family.name, "fitted": codec.name}
            transaction.put_setting(_SETTING, memory)
        self._take(memory)
        self.took_over = True
        return True

    def use(self, name: str | None, refit: bool, progress: Progress) -> None:
        """Write new memories with the codec of that name, or the one that is recorded; see
        `MemDB.recode`."""
        with self._store.read() as transaction:
            self.refresh(transaction)
        wanted = self._wanted if name is None else codec_named(name)
        if isinstance(wanted, Codec):
            if wanted is not self._wanted:
                self._choose(wanted)
            return
        due = refit or wanted is not self._wanted or not self.is_fitted
        if due and not self.fit(wanted, progress):
            if self._problem:
                raise InvalidInputError(f"{self._problem}. Take another codec, for example 'int8'")
            raise InvalidInputError(
                f"the codec '{wanted.name}' is fitted to at least {wanted.enough} memories, and "
                f"the database has fewer. Take one that needs none ({', '.join(CODECS)}), or warm "
                "more references first"
            )

    def _choose(self, codec: Codec) -> None:
        with self._store.write() as transaction:
            memory = transaction.required_setting(_SETTING)
            memory.pop("fitted", None)
            memory["codec"] = codec.name
            transaction.put_setting(_SETTING, memory)
        self._take(memory)

    def _sample(self, transaction: Transaction, family: Family) -> list[ExplicitMemory]:
        """Memories to fit to, drawn evenly from all of this shape; the same ones each time."""
        numbers = transaction.numbers(MEMORIES)
        found: list[ExplicitMemory] = []
        size = 0
        for number in np.random.default_rng(0).permutation(numbers).tolist():
            key = integer_key(number)
            payload = transaction.payload(MEMORIES, key)
            try:
                memory = decoded(MEMORIES, key, (1, payload), lambda _, p: self.decode(p))
            except (MismatchError, FormatError):  # of another shape, or of a later release
                continue
            found.append(memory)
            size += memory.keys.size
            enough = len(found) >= family.enough
            if len(found) == family.sample or (enough and size >= _NUMBERS):
                break
        return found
