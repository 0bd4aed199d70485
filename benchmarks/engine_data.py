"""What benchmarks/engine.py stores: seeded, and the same bytes for every engine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import faiss
import numpy as np
from numpy.typing import NDArray

from memdb import CODECS, Document, MemoryBatch, MemoryShape
from memdb.codecs import encode_batch

Vectors = NDArray[np.float32]

DIMENSION = 384
K = 5  # the paper's number of memories

#: Of SmolLM2-135M, the default model: 30 layers of 3 key-value heads, head dim 64.
SHAPE = MemoryShape(
    model="0" * 16,
    layers=tuple(range(30)),
    kv_heads=3,
    head_dim=64,
    dtype="bfloat16",
    prefix=(1, 2, 3),
)

_BATCH_BYTES = 64 << 20  # written at once, and synced
_PRELOADED = 12  # batches that are made, outside every engine's clock, before they are written
_POOL = 1 << 24  # random numbers that memories are slices of
_PATTERNS = 64  # ways in which a memory's pairs are spread over its rows
_TEXT = 480  # characters of a reference, about 128 tokens
_BLOCK = 1 << 16

# The generator's constants, calibrated as `embeddings` says.
_MANIFOLD = 10  # dimensions that the vectors really vary in
_CLUSTER, _MEMBER, _UNEVEN, _COMMON = 0.40, 0.40, 0.87, 0.10
_MEMBERS = 5  # of a cluster, on average


def embeddings(references: int, queries: int, seed: int = 0) -> tuple[Vectors, Vectors]:
    """(references, 384) and (queries, 384), each row of length 1, drawn alike.

    Clusters of uneven number and width (the references of a document, say) on a curved manifold of
    ten dimensions in 384: as in real embeddings, more references lie closer together, so that the
    search for the nearest grows little harder with their number. Calibrated to all-MiniLM-L6-v2 on
    2,918 docstrings and topics of Python's documentation. Percentiles 5, 50 and 95 there, and here
    with as many references:

        cosine of the nearest neighbour      0.57, 0.78, 0.99      0.51, 0.76, 0.96
        of the fifth                         0.46, 0.61, 0.83      0.39, 0.64, 0.92
        of random pairs                     -0.03, 0.11, 0.33     -0.01, 0.12, 0.39
        participation ratio of the spectrum         70                    73

    and with 2,600 references and 203 IVF lists, those that have to be looked at for recall@5 0.95
    and 0.99: 8 and 28 there, 13 and 29 here.
    """
    random = np.random.default_rng([seed, 0])
    frequencies = random.standard_normal((_MANIFOLD, DIMENSION), np.float32)
    phases = random.uniform(0, 2 * np.pi, DIMENSION).astype(np.float32)
    common = _COMMON * random.standard_normal(DIMENSION, np.float32)
    clusters = max(40, references // _MEMBERS)
    centres = _CLUSTER * random.standard_normal((clusters, _MANIFOLD), np.float32)
    widths = _MEMBER * np.exp(_UNEVEN * random.standard_normal((clusters, 1), np.float32))
    np.minimum(widths, _CLUSTER, out=widths)
    sizes = random.zipf(2.0, clusters).clip(1, 50)
    bounds = np.cumsum(sizes / sizes.sum())

    found = np.empty((references + queries, DIMENSION), np.float32)
    for at in range(0, len(found), _BLOCK):
        block = found[at : at + _BLOCK]
        own = np.random.default_rng([seed, 1, at])
        chosen = np.searchsorted(bounds, own.random(len(block))).clip(max=clusters - 1)
        places = own.standard_normal((len(block), _MANIFOLD), np.float32)
        places = centres[chosen] + widths[chosen] * places
        np.cos(places @ frequencies + phases, out=block)
        block += common
        block /= np.linalg.norm(block, axis=1, keepdims=True)
    return found[:references], found[references:]


def nearest(vectors: Vectors, queries: Vectors) -> NDArray[np.int64]:
    """(queries, K) row numbers of the nearest vectors, by exact search in float32."""
    best_scores = np.empty((len(queries), 0), np.float32)
    best = np.empty((len(queries), 0), np.int64)
    for at in range(0, len(vectors), _BLOCK):
        block = np.ascontiguousarray(vectors[at : at + _BLOCK])
        scores, rows = faiss.knn(queries, block, min(K, len(block)), faiss.METRIC_INNER_PRODUCT)
        best_scores = np.concatenate([best_scores, scores], axis=1)
        best = np.concatenate([best, rows + at], axis=1)
        order = np.argsort(-best_scores, axis=1)[:, :K]
        best_scores = np.take_along_axis(best_scores, order, axis=1)
        best = np.take_along_axis(best, order, axis=1)
    return best


@dataclass(frozen=True)
class Records:
    """References in a row. The payload of each is its memory, as memdb's codec has it."""

    first: int
    ids: list[str]
    texts: list[str]
    embeddings: Vectors
    memories: MemoryBatch
    payloads: list[bytes]

    @property
    def documents(self) -> list[Document]:
        return [Document(text, id) for id, text in zip(self.ids, self.texts, strict=True)]

    @cached_property
    def size(self) -> int:
        """Bytes of ids, texts, embeddings and memories."""
        strings = sum(map(len, self.ids)) + sum(map(len, self.texts))
        return strings + self.embeddings.nbytes + sum(map(len, self.payloads))


@dataclass(frozen=True)
class Corpus:
    """How to make the records of one run: small enough to hand to another process as JSON.

    Attributes:
        references: how many.
        pairs: key-value pairs of each memory.
        codec: of memdb.
        embeddings: a file of (references, 384) float32.
    """

    references: int
    pairs: int
    codec: str
    embeddings: str

    @cached_property
    def vectors(self) -> Vectors:
        mapped: Vectors = np.load(Path(self.embeddings), mmap_mode="r")
        return mapped

    @cached_property
    def batch(self) -> int:
        """References of a batch."""
        memory = 2 * SHAPE.head_dim * (2 if self.codec == "exact" else 1) * self.pairs
        return max(1, _BATCH_BYTES // (memory + 4 * DIMENSION + _TEXT))

    def preloaded(self) -> Iterator[list[Records]]:
        """All records in order, some batches at a time."""
        starts = range(0, self.references, self.batch)
        for at in range(0, len(starts), _PRELOADED):
            yield [self._records(first) for first in starts[at : at + _PRELOADED]]

    def _records(self, first: int) -> Records:
        end = min(first + self.batch, self.references)
        random = np.random.default_rng([2, first])
        memories = self._memories(random, end - first)
        encoded = encode_batch(memories, SHAPE, CODECS[self.codec])
        texts = random.integers(0, len(self._letters) - _TEXT, end - first).tolist()
        return Records(
            first,
            [reference_id(number) for number in range(first, end)],
            [self._letters[at : at + _TEXT] for at in texts],
            np.array(self.vectors[first:end]),
            memories,
            [payload for payload in encoded if payload is not None],
        )

    def _memories(self, random: np.random.Generator, count: int) -> MemoryBatch:
        counts, positions = self._patterns
        chosen = random.integers(0, _PATTERNS, count)
        length = self.pairs * SHAPE.head_dim
        keys, values = (
            np.concatenate([self._pool[at : at + length] for at in starts]).reshape(
                -1, SHAPE.head_dim
            )
            for starts in random.integers(0, _POOL - length, (2, count)).tolist()
        )
        return MemoryBatch(counts[chosen], positions[chosen].ravel(), keys, values)

    @cached_property
    def _patterns(self) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        """Pairs of each row, (patterns, rows), and their positions, (patterns, pairs)."""
        random = np.random.default_rng(3)
        counts = random.multinomial(self.pairs, np.full(SHAPE.rows, 1 / SHAPE.rows), _PATTERNS)
        positions = [
            np.concatenate(
                [np.sort(random.choice(SHAPE.reference_length, n, replace=False)) for n in row]
            )
            for row in counts
        ]
        return counts, np.array(positions, np.uint8)

    @cached_property
    def _pool(self) -> NDArray[np.uint16]:
        """bfloat16 numbers that no codec or compressor makes smaller than it is meant to."""
        random = np.random.default_rng(4)
        if self.codec == "exact":
            bits = random.integers(0, 1 << 16, _POOL, np.uint16)
            infinite = np.uint16(0x7F80)
            return np.where(bits & infinite == infinite, bits ^ np.uint16(0x4000), bits)
        levels = random.uniform(-1, 1, _POOL).astype(np.float32)
        return (levels.view(np.uint32) >> 16).astype(np.uint16)

    @cached_property
    def _letters(self) -> str:
        letters = np.frombuffer(b"etaoinshrdlucmfwypvbgk     ", np.uint8)
        return np.random.default_rng(5).choice(letters, 1 << 20).tobytes().decode("ascii")


def pairs_of(kib: int) -> int:
    """Key-value pairs of an exact memory of about that size."""
    return max(1, round(((kib << 10) - 2 * SHAPE.rows) / (4 * SHAPE.head_dim + 1)))


def reference_id(number: int) -> str:
    return f"document-{number:08d}"


def reference_number(id: str) -> int:
    return int(id.removeprefix("document-"))
