"""Decoded memories in RAM: neighbouring chunks often retrieve the same ones (paper, 3.1)."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

from memdb.types.memory import ExplicitMemory

#: What tells a stored memory from all others: its reference's id and its record's seal.
Key = tuple[int, bytes]

_REMEMBERED = 100  # memories that are known to have been decoded, at least


@dataclass(frozen=True)
class CacheStats:
    """What a cache holds, and what it was good for.

    Attributes:
        memories: how many it holds.
        bytes: of their arrays.
        capacity: bytes that it may hold.
        hits: memories that were found in it.
        misses: memories that had to be decoded.
    """

    memories: int
    bytes: int
    capacity: int
    hits: int
    misses: int


class MemoryCache:
    """The most recently used memories, up to a number of bytes. Threads may share it.

    Once it is full, a memory takes another's place when it is decoded for the second time within a
    while: so what is asked for once drives nothing out that is asked for again. One of 1,440 pairs
    of SmolLM2-135M, kept by `klt8` and packed with four others, takes 0.8 ms from its record and
    0.08 from the cache; but to copy it there takes 0.1 to 0.4, which is lost where it goes unused.
    What is kept is the decoded memory (737 KB) and not its record (48 KB): that lies in the
    system's own cache of the file, and to have it at hand would save 0.03 ms. (Inflated, 95 KB, it
    would save 0.13: in a simulation with those costs, to keep some memories so was worth less than
    a tenth, whether uses were even, skewed or in bursts.)

    A memory is kept under its record's seal, whose checksum covers every byte of it. A reader
    compares that with the record it sees in its own transaction: so what was updated, deleted or
    rewritten, by whichever process, is never taken for what it was.

    Attributes:
        capacity: bytes; 0 keeps nothing.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._kept: OrderedDict[Key, ExplicitMemory] = OrderedDict()
        self._decoded: OrderedDict[Key, None] = OrderedDict()  # lately, and not kept
        self._bytes = 0
        self._hits = 0
        self._misses = 0
        self._guard = threading.Lock()

    def get(self, key: Key) -> ExplicitMemory | None:
        """The memory of that record, or None."""
        if not self.capacity:
            return None
        with self._guard:
            memory = self._kept.get(key)
            if memory is None:
                self._misses += 1
            else:
                self._hits += 1
                self._kept.move_to_end(key)
            return memory

    def wants(self, key: Key, size: int) -> bool:
        """Whether a memory that was just decoded, of so many bytes, is worth its place."""
        if size > self.capacity:
            return False
        with self._guard:
            if key in self._kept:
                return False
            if self._bytes + size <= self.capacity:
                return True
            if key in self._decoded:
                del self._decoded[key]
                return True
            self._decoded[key] = None
            while len(self._decoded) > max(_REMEMBERED, len(self._kept)):
                self._decoded.popitem(last=False)
            return False

    def put(self, key: Key, memory: ExplicitMemory) -> None:
        """Keep a memory; those not used for longest go."""
        if memory.nbytes > self.capacity:
            return
        with self._guard:
            if key in self._kept:
                return
            self._kept[key] = memory
            self._bytes += memory.nbytes
            while self._bytes > self.capacity:
                self._bytes -= self._kept.popitem(last=False)[1].nbytes

    def stats(self) -> CacheStats:
        """What it holds now, and its hits and misses since it was made."""
        with self._guard:
            return CacheStats(len(self._kept), self._bytes, self.capacity, self._hits, self._misses)
