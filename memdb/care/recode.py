"""Recode: the memories of a whole database under another codec, from what is stored, without the
model. Each memory names its codec, so those that are done are known: an interrupted recode goes on,
and all can be read throughout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from memdb.codecs import codec_of, encode_batch
from memdb.errors import FormatError, MismatchError
from memdb.memories.codec_choice import CodecChoice
from memdb.protocols import Progress
from memdb.storage.record_layout import MEMORIES, integer_key, unseal
from memdb.storage.store import Store
from memdb.storage.transaction import Transaction, decoded
from memdb.types.memory import ExplicitMemory
from memdb.types.memory_batch import MemoryBatch
from memdb.types.shape import MemoryShape

_BATCH = 32  # memories between two commits


@dataclass(frozen=True)
class RecodeReport:
    """What a recode did.

    Attributes:
        codec: what memories are written with now.
        memories: how many there are.
        recoded: how many were written anew.
        before: bytes of those, before.
        after: bytes of the same, now.
    """

    codec: str
    memories: int
    recoded: int
    before: int
    after: int


@dataclass(frozen=True)
class _Found:
    number: int
    version: int
    payload: bytes
    memory: ExplicitMemory


def recode(
    store: Store, shape: MemoryShape, codec_choice: CodecChoice, progress: Progress
) -> RecodeReport:
    """Write every memory that another codec wrote anew, with the database's codec of now. One of
    another shape, or of a codec that is not known, stays as it is."""
    codec_choice.left = False  # from here on: what is written meanwhile may be left
    with store.read() as transaction:
        numbers = transaction.numbers(MEMORIES).tolist()
    recoded = before = after = 0
    for start in range(0, len(numbers), _BATCH):

        def go_on(done: int = start) -> None:
            progress("recoding memories", done, len(numbers))

        go_on()
        some = numbers[start : start + _BATCH]
        while (pairs := _recoded(store, shape, codec_choice, some, go_on)) is None:
            pass
        recoded += len(pairs)
        before += sum(old for old, _ in pairs)
        after += sum(new for _, new in pairs)
    progress("recoding memories", len(numbers), len(numbers))
    codec_choice.caught_up()
    return RecodeReport(codec_choice.codec.name, len(numbers), recoded, before, after)


def _recoded(
    store: Store,
    shape: MemoryShape,
    codec_choice: CodecChoice,
    numbers: list[int],
    go_on: Callable[[], None],
) -> list[tuple[int, int]] | None:
    """Write some memories anew; of those that were, the bytes before and now. None: somebody chose
    another codec meanwhile, and nothing was written."""
    with store.read() as transaction:
        codec_choice.refresh(transaction)
        target = codec_choice.codec
        batch = [
            found
            for number in numbers
            for found in _find(transaction, number, target.name, codec_choice)
        ]
    if not batch:
        return []
    memories = MemoryBatch.of([found.memory for found in batch], shape)
    payloads = encode_batch(memories, shape, target)
    written = []
    with store.write(waiting=go_on) as transaction:
        if MemoryShape.from_json(transaction.required_setting("shape")) != shape:
            raise MismatchError(
                "the database was rewritten for another model while it was open; open it again"
            )
        codec_choice.refresh(transaction)
        if codec_choice.codec is not target:
            return None
        for found, payload in zip(batch, payloads, strict=True):
            assert payload is not None
            # Where the codec does not suit it, it may be what it was; and meanwhile another
            # writer may have replaced or deleted it.
            if payload != found.payload and _is_still(transaction, found):
                transaction.replace_memory(found.number, found.version, payload)
                written.append((len(found.payload), len(payload)))
    return written


def _find(
    transaction: Transaction, number: int, target: str, codec_choice: CodecChoice
) -> Iterator[_Found]:
    """The memory, if it is to be recoded."""
    key = integer_key(number)
    record = transaction.record(MEMORIES, key)
    if record is None:
        return
    version, payload = unseal(MEMORIES, key, record)
    if decoded(MEMORIES, key, (1, payload), lambda _, p: codec_of(p)) == target:
        return
    try:
        memory = decoded(MEMORIES, key, (1, payload), lambda _, p: codec_choice.decode(p))
    except (MismatchError, FormatError):
        return
    yield _Found(number, version, bytes(payload), memory)


def _is_still(transaction: Transaction, found: _Found) -> bool:
    key = integer_key(found.number)
    record = transaction.record(MEMORIES, key)
    return record is not None and unseal(MEMORIES, key, record)[1] == found.payload
