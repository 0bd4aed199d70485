"""Which codec the memories of an open database are written with, and all that they are read with.

A family of codecs (`memdb.codecs.Family`) is fitted to the database's own memories: until enough
are there, they are kept by a codec that needs no fitting, and then the fitted one takes over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
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
from memdb.storage.record_layout import (
    MEMORIES,
    RECODING,
    SETTINGS,
    UNFITTED,
    codec_key,
    integer_key,
)
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


@dataclass(frozen=True)
class _Chosen:
    """The setting `memory`, read.

    Attributes:
        wanted: a codec, or what one is fitted from.
        fitted: the name of the fitted one.
        as_stored: the setting's bytes.
    """

    wanted: Codec | Family
    fitted: str | None
    as_stored: bytes

    @classmethod
    def of(cls, memory: Mapping[str, Any]) -> _Chosen:
        return cls(codec_named(memory["codec"]), memory.get("fitted"), json_payload(memory))


class CodecChoice:
    """How one open database codes memories. Threads may share it.

    Attributes:
        codecs: all that its memories may be read with.
        when_due: called when the codec is to be fitted, or memories that were written before are to
            be recoded; it has that done by and by, and never raises.
        left: whether memories were written with another codec while this one took over.
    """

    def __init__(self, store: Store, shape: MemoryShape, memory: Mapping[str, Any]) -> None:
        def parameters(name: str) -> bytes:
            with store.read() as transaction:
                return transaction.codec_parameters(name)

        self.codecs = KnownCodecs(parameters)
        self.when_due: Callable[[], None] = lambda: None
        self.left = False
        self._store = store
        self._shape = shape
        self._chosen = _Chosen.of(memory)  # replaced as a whole
        self._problem = ""  # of the last fit: why the codec is not used
        self._enough = 0  # memories there have to be, where so many were too few to fit to

    @property
    def codec(self) -> Codec:
        """What new memories are written with."""
        chosen = self._chosen
        if isinstance(chosen.wanted, Codec):
            return chosen.wanted
        return STAND_IN if chosen.fitted is None else self.codecs[chosen.fitted]

    @property
    def is_fitted(self) -> bool:
        """Whether new memories are written with a fitted codec."""
        return self.family is not None and self._chosen.fitted is not None

    @property
    def family(self) -> Family | None:
        """What the codec is fitted from, if it is."""
        wanted = self._chosen.wanted
        return wanted if isinstance(wanted, Family) else None

    def refresh(self, transaction: Transaction) -> None:
        """Take over what another handle decided."""
        if transaction.payload(SETTINGS, _SETTING.encode()) != self._chosen.as_stored:
            self._chosen = _Chosen.of(transaction.required_setting(_SETTING))

    # --- what is due ---

    def written(self, with_codec: str) -> None:
        """Memories were committed that were coded by that codec: have done what that makes due
        (`when_due`). It never raises, since they are on the disk."""
        with suppress(Exception):  # whatever it is, the next read or write tells of it
            if with_codec != self.codec.name:
                self.left = True  # it took over between the coding and the writing
            if self.left or (self.family is not None and not self.is_fitted):
                self.look()

    def look(self) -> None:
        """Have done what is due (`when_due`)."""
        if self.is_due():
            self.when_due()

    def is_due(self) -> bool:
        """Whether the codec is to be fitted, or memories are to be recoded."""
        if self.left:
            return True
        with self._store.read() as transaction:
            return self.is_recoding(transaction) or self._fit_is_due(transaction)

    def _fit_is_due(self, transaction: Transaction) -> bool:
        family = self.family
        if family is None or self._chosen.fitted is not None:
            return False
        enough = unfitted.enough(transaction, family, self._shape)
        return transaction.count(MEMORIES) >= max(enough, self._enough)

    def is_recoding(self, transaction: Transaction) -> bool:
        """Whether the codec took over, and not all that was written before is recoded yet."""
        found = transaction.setting(RECODING)
        return found is not None and found == {"codec": self.codec.name}

    def caught_up(self) -> None:
        """All that was written before the codec took over is recoded."""
        with self._store.read() as transaction:
            if not self.is_recoding(transaction):
                return
        with self._store.write() as transaction:
            self.refresh(transaction)
            if self.is_recoding(transaction):
                transaction.delete_setting(RECODING)

    def decode(self, payload: bytes | memoryview) -> ExplicitMemory:
        """A stored memory, whichever codec wrote it."""
        return decode_memory(payload, self._shape, self.codecs)

    # --- fitting ---

    def fit_if_due(self, progress: Progress = no_progress) -> bool:
        """Fit the codec, if it has to be and enough memories are there; whether it did. What was
        written before is then to be recoded, and the database says so until it is."""
        with self._store.read() as transaction:
            self.refresh(transaction)
            due = self._fit_is_due(transaction)
        family = self.family
        return due and family is not None and self._fit(family, progress, chosen=False)

    def _fit(self, family: Family, progress: Progress, *, chosen: bool) -> bool:
        """Fit a codec of a family to the memories there are, and make it the one that new memories
        are written with; False if there are not enough, or if most of them would lose too much.

        Args:
            family: the family.
            progress: told of the work.
            chosen: somebody asked for it, and recodes what is there himself.
        """
        self._problem = ""
        stage = f"fitting codec {family.name}"
        progress(stage, 0, 0)
        with self._store.read() as transaction:
            count = transaction.count(MEMORIES)
            sample = self._sample(transaction, family, lambda: progress(stage, 0, 0))
        if len(sample) < family.enough:
            self._enough = count + family.enough - len(sample)
            return False
        batch = MemoryBatch.of(sample, self._shape)
        codec = family.fit(
            to_float32(batch.keys, self._shape.dtype),
            to_float32(batch.values, self._shape.dtype),
            Layout.dense(batch.counts, batch.positions),
            self._shape,
            lambda done, total: progress(stage, done, total),
        )
        self._problem = unfitted.problem(codec, family, batch, self._shape)
        with self._store.write(waiting=lambda: progress(stage, 0, 0)) as transaction:
            stored = transaction.required_setting("shape")
            if MemoryShape.from_json(stored) != self._shape:
                return False  # it was rewritten for another model meanwhile
            self.refresh(transaction)
            if not chosen and not self._fit_is_due(transaction):
                return False  # somebody else was faster
            memory = transaction.required_setting(_SETTING)
            if self._problem:
                if memory["codec"] == family.name and "fitted" not in memory:
                    unfitted.note(transaction, family, self._shape, self._problem)
                return False
            transaction.delete_setting(UNFITTED)
            transaction.put_codec_parameters(codec.name, codec.parameters)
            memory = {**memory, "codec": family.name, "fitted": codec.name}
            transaction.put_setting(_SETTING, memory)
            if chosen:
                transaction.delete_setting(RECODING)
            else:
                transaction.put_setting(RECODING, {"codec": codec.name})
        self._chosen = _Chosen.of(memory)
        return True

    def use(self, name: str | None, refit: bool, progress: Progress) -> None:
        """Write new memories with the codec of that name, or the one that is recorded; see
        `MemDB.recode`."""
        with self._store.read() as transaction:
            self.refresh(transaction)
        now = self._chosen.wanted
        wanted = now if name is None else codec_named(name)
        if isinstance(wanted, Codec):
            if wanted is not now:
                self._choose(wanted)
            return
        due = refit or wanted is not now or not self.is_fitted
        if due and not self._fit(wanted, progress, chosen=True):
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
            transaction.delete_setting(RECODING)
        self._chosen = _Chosen.of(memory)

    def _sample(
        self, transaction: Transaction, family: Family, go_on: Callable[[], None]
    ) -> list[ExplicitMemory]:
        """Memories to fit to, drawn evenly from all of this shape; the same ones each time."""
        numbers = transaction.numbers(MEMORIES)
        found: list[ExplicitMemory] = []
        size = 0
        for number in np.random.default_rng(0).permutation(numbers).tolist():
            go_on()
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
