"""The metadata index: for each value of a declared metadata key, the references whose document has
it. Sorted ids in blocks of at most 256, so that a new reference writes one block, not all of them.

A block's key is the metadata key's name behind its length (one byte), the value's `index_key` or
`OTHER`, and a lower bound of the block's ids (8 bytes, big-endian): LMDB's order is that of names,
values and ids.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from memdb.errors import CorruptRecordError, InvalidInputError
from memdb.filters.order import OTHER, Range, index_key
from memdb.storage.record_layout import POSTINGS, readable, unseal
from memdb.storage.transaction import Transaction

BLOCK = 256  # ids at most
MAX_NAME = 64  # bytes; name, value and bound must fit the 511 bytes of an LMDB key

_BOUND = struct.Struct(">Q")
_ID = np.dtype("<i8")
_NO_LIMIT = 2**63 - 1  # no reference has this id
_ALL = b"\0", b"\xff" * 512  # no LMDB key is outside


def check_key_name(name: object) -> None:
    """Raise `InvalidInputError` unless a metadata key of this name can be indexed."""
    if not isinstance(name, str):
        raise InvalidInputError(f"a metadata key is a string, got {name!r}")
    try:
        size = len(name.encode())
    except UnicodeEncodeError as error:
        raise InvalidInputError(f"the metadata key {name!r} has half a surrogate pair") from error
    if not 1 <= size <= MAX_NAME:
        raise InvalidInputError(
            f"the metadata key {name!r:.80} has {size} bytes of UTF-8; keys of 1 to {MAX_NAME} "
            "bytes can be indexed"
        )


class Postings:
    """The index as one transaction sees it. Any method that reads a damaged block raises
    `CorruptRecordError`.

    Args:
        transaction: the state to read, and to write to.
    """

    def __init__(self, transaction: Transaction) -> None:
        self._transaction = transaction

    def add(self, name: str, value: object, ids: Sequence[int]) -> None:
        """Enter references whose document has `value` under the key `name`; those that are there
        already stay."""
        prefix = _prefix(name, value)
        for key, held, new, last in self._places(prefix, ids):
            merged = np.union1d(held, new)
            if last and (not len(held) or held[-1] < new[0]):
                # Ids grow: what is appended comes to stay behind a full block.
                pieces = [merged[at : at + BLOCK] for at in range(0, len(merged), BLOCK)]
            else:
                pieces = np.array_split(merged, -(-len(merged) // BLOCK))
            self._put(key, pieces[0])
            for piece in pieces[1:]:
                self._put(prefix + _BOUND.pack(piece[0]), piece)

    def remove(self, name: str, value: object, ids: Sequence[int]) -> None:
        """Take references out again; those that are not there are passed over."""
        for key, held, gone, _ in self._places(_prefix(name, value), ids):
            self._take_out(key, held, gone)

    def discard(self, ids: Sequence[int]) -> None:
        """Take references out wherever they are. It reads the whole table: for documents whose
        metadata is lost."""
        gone = np.unique(np.asarray(ids, _ID))
        found = [
            (key, held.copy())  # a write makes the view invalid
            for key, held in self._blocks(*_ALL)
            if np.isin(gone, held, assume_unique=True).any()
        ]
        for key, held in found:
            self._take_out(key, held, gone)

    def drop(self, name: str) -> None:
        """Forget everything about a metadata key."""
        head = _head(name)
        end = head[:-1] + bytes([head[-1] + 1])  # a name's last byte is below 0xff: it is UTF-8
        blocks = self._transaction.records_between(POSTINGS, head, end)
        for key in [key for key, _ in blocks]:
            self._transaction.delete_record(POSTINGS, key)

    def within(self, name: str, ranges: Sequence[Range]) -> NDArray[np.int64]:
        """The references whose value under a metadata key lies in one of these ranges, ascending.

        Args:
            name: the metadata key; it is indexed.
            ranges: ascending, without overlap (`memdb.filters.order`).
        """
        head = _head(name)
        found = [ids for low, high in ranges for _, ids in self._blocks(head + low, head + high)]
        return _sorted(found)

    def count(self) -> int:
        """Blocks of the table."""
        return self._transaction.count(POSTINGS)

    def items(self) -> Iterator[tuple[str, bytes, NDArray[np.int64]]]:
        """Everything, by ascending key: a metadata key's name, a value's `index_key` or `OTHER`,
        and its ids, ascending. Nothing may be written meanwhile."""
        for prefix, blocks in groupby(self._blocks(*_ALL), key=lambda block: block[0][:-8]):
            ids = np.concatenate([ids for _, ids in blocks])
            end = 1 + prefix[0] if prefix else 0
            try:
                name = prefix[1:end].decode()
                check_key_name(name)
            except ValueError as error:
                raise _damaged(prefix, f"its key does not begin with a name: {error}") from error
            if len(prefix) <= end:
                raise _damaged(prefix, "its key holds no value")
            yield name, prefix[end:], ids

    # --- blocks ---

    def _places(
        self, prefix: bytes, ids: Sequence[int]
    ) -> Iterator[tuple[bytes, NDArray[np.int64], NDArray[np.int64], bool]]:
        """The blocks that ids belong to: key, ids that it holds (none if it has to be made), the
        ids for it, and whether it is the last of its value. The block may be written before the
        next is asked for."""
        left = np.unique(np.asarray(ids, _ID))
        while len(left):
            held, limit = np.empty(0, _ID), _NO_LIMIT
            key = prefix + _BOUND.pack(0)  # so that lower ids still to come have a block
            before, behind = self._transaction.neighbours(
                POSTINGS, prefix + _BOUND.pack(left[0] + 1)
            )
            if behind is not None and _is_of(prefix, behind):
                limit = _bound(behind)
            if before is not None and _is_of(prefix, before[0]):
                key = before[0]
                held = _read(*before)
                if held[-1] >= limit:
                    raise _damaged(key, "it reaches into the next block")
            here = left[: np.searchsorted(left, limit)]
            left = left[len(here) :]
            yield key, held, here, limit == _NO_LIMIT

    def _blocks(self, low: bytes, high: bytes) -> Iterator[tuple[bytes, NDArray[np.int64]]]:
        """Keys from `low` to below `high` and the ids there, which a write makes invalid."""
        before, last = b"", -1
        for key, record in self._transaction.records_between(POSTINGS, low, high):
            ids = _read(key, record)
            if key[:-8] == before and _bound(key) <= last:
                raise _damaged(key, "the block before reaches into it")
            before, last = key[:-8], ids[-1]
            yield key, ids

    def _take_out(self, key: bytes, held: NDArray[np.int64], gone: NDArray[np.int64]) -> None:
        left = np.setdiff1d(held, gone, assume_unique=True)
        if len(left) == len(held):
            return
        if len(left):
            self._put(key, left)
        else:
            self._transaction.delete_record(POSTINGS, key)

    def _put(self, key: bytes, ids: NDArray[np.int64]) -> None:
        self._transaction.put(POSTINGS, key, 1, ids.tobytes())


def _head(name: str) -> bytes:
    encoded = name.encode()
    return bytes([len(encoded)]) + encoded


def _prefix(name: str, value: object) -> bytes:
    return _head(name) + (index_key(value) or OTHER)


def _is_of(prefix: bytes, key: bytes) -> bool:
    if key.startswith(prefix) and len(key) != len(prefix) + 8:
        raise _damaged(key, "its key has a wrong length")
    return key.startswith(prefix)


def _bound(key: bytes) -> int:
    if len(key) <= 8:
        raise _damaged(key, "its key is too short")
    return int(_BOUND.unpack_from(key, len(key) - 8)[0])


def _read(key: bytes, record: memoryview) -> NDArray[np.int64]:
    """The ids of a block, as a view of the record."""
    _, payload = unseal(POSTINGS, key, record)
    if len(payload) % 8 or not 1 <= len(payload) // 8 <= BLOCK:
        raise _damaged(key, f"{len(payload)} bytes are not 1 to {BLOCK} ids")
    ids = np.frombuffer(payload, _ID)
    if np.count_nonzero(ids[1:] <= ids[:-1]):
        raise _damaged(key, "its ids do not ascend")
    if ids[0] < _bound(key):
        raise _damaged(key, "an id is below the bound in its key")
    return ids


def _sorted(blocks: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    if not blocks:
        return np.empty(0, np.int64)
    ids = np.concatenate(blocks)
    ids.sort(kind="stable")  # fast where it is sorted already: the blocks of one value
    return ids


def _damaged(key: bytes, problem: str) -> CorruptRecordError:
    return CorruptRecordError(POSTINGS, readable(POSTINGS, key), problem)
