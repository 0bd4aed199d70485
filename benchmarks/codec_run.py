"""The measurements of benchmarks/codec.py: one codec on the memories of one budget."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from answering import Harness, Question, change
from numpy.typing import NDArray
from torch import Tensor

from memdb import Codec, ExplicitMemory, MemoryBatch, MemoryShape, to_float32
from memdb.codecs import (
    CODECS,
    FittedCodec,
    Layout,
    codec_named,
    codec_of,
    decode_into,
    decode_memory,
    encode_batch,
    memory_sizes,
    read_payload,
)
from memdb.memories.packing import room_for
from model_adapter import Writer
from model_adapter.selections import Contribution

_BATCH = 8  # references written or encoded at once
RETRIEVED = 5  # memories of a retrieval
_REPEATS = 30

Say = Callable[[str], None]


class _Ranked(Contribution):
    """Keeps the scores of what it chose: the best of them are the memory of a smaller budget."""

    def __init__(self, budget: int | None, rows: int, reference_length: int = 128) -> None:
        super().__init__(budget, rows, reference_length)
        self.kept: list[NDArray[np.float32]] = []

    def keep(self, scores: Tensor) -> Tensor:
        """See `Selection.keep`."""
        chosen = super().keep(scores)
        self.kept.append(scores[chosen].float().cpu().numpy())
        return chosen


@dataclass(frozen=True)
class Stock:
    """The memories of documents at one budget.

    Attributes:
        documents: of each, its memories' numbers.
        tokens: of all references together.
    """

    budget: int
    shape: MemoryShape
    documents: dict[str, range]
    tokens: int
    memories: list[ExplicitMemory]


def write(
    harness: Harness, documents: Sequence[str], budgets: Sequence[int], say: Say
) -> list[Stock]:
    """The memories of documents at every budget, the model run once."""
    writer = Writer(harness.model, framing=harness.framing)
    shape = writer.shape
    ranked = _Ranked(max(budgets), shape.rows, shape.reference_length)
    writer.selection = ranked
    texts: list[str] = []
    places: dict[str, range] = {}
    for document in documents:
        pieces = harness.pieces(document)
        places[document] = range(len(texts), len(texts) + len(pieces))
        texts += pieces
    memories: list[ExplicitMemory] = []
    for start in range(0, len(texts), _BATCH):
        memories += writer.write(texts[start : start + _BATCH])
        if start // _BATCH % 4 == 3 or len(memories) == len(texts):
            say(f"memories written: {len(memories)} of {len(texts)}")
    tokens = [harness.chunker.count(text) for text in texts]
    stocks = []
    for budget in budgets:
        selection = Contribution(budget, shape.rows, shape.reference_length)
        smaller = [
            _best(memory, scores, selection.pairs_of(length))
            for memory, scores, length in zip(memories, ranked.kept, tokens, strict=True)
        ]
        stocks.append(Stock(budget, shape, places, sum(tokens), smaller))
    return stocks


def _best(memory: ExplicitMemory, scores: NDArray[np.float32], pairs: int) -> ExplicitMemory:
    """What a memory is with fewer pairs."""
    chosen = np.sort(np.argsort(-scores, kind="stable")[:pairs])
    return ExplicitMemory(
        offsets=np.searchsorted(chosen, memory.offsets).astype(np.int32),
        positions=memory.positions[chosen],
        keys=memory.keys[chosen],
        values=memory.values[chosen],
    )


@dataclass
class Row:
    """What one codec does to the memories of one budget.

    Attributes:
        bytes_per_vector: of keys and values; positions and counts are not in it.
        ratio: how many times smaller than bfloat16.
        key_error: root of the squared error of keys over their squares.
        change: of the answers' NLL against the exact codec with the largest budget, a fraction;
            `low` and `high` are the ends of its 95 % interval.
        encode_rate: vectors a second, on one core; a key and a value are two.
        decode_ms: to decode five memories of full references into packed arrays, on one core.
        reference_bytes: of the whole payload of a reference of 128 tokens.
        parameter_bytes: of a fitted codec, once in a database.
        stood_in: share of memories that the codec does not suit and the stand-in keeps.
    """

    name: str
    budget: int
    bytes_per_vector: float
    ratio: float
    key_error: float
    value_error: float
    encode_rate: float
    decode_rate: float
    decode_ms: float
    reference_bytes: float
    parameter_bytes: int
    stood_in: float
    nll: float = 0.0
    right: float = 0.0
    change: float = 0.0
    low: float = 0.0
    high: float = 0.0


def fitted(name: str, stock: Stock, shape: MemoryShape) -> Codec:
    """The codec of that name; of a family, fitted to a uniform sample as a database does it."""
    found = codec_named(name)
    if isinstance(found, Codec):
        return found
    count = len(stock.memories)
    sample = np.unique(np.linspace(0, count - 1, min(found.sample, count)).astype(int))
    batch = MemoryBatch.of([stock.memories[i] for i in sample], shape)
    keys, values = (to_float32(part, shape.dtype) for part in (batch.keys, batch.values))
    return found.fit(keys, values, Layout.dense(batch.counts, batch.positions), shape)


def measure(
    name: str, codec: Codec, stock: Stock, shape: MemoryShape
) -> tuple[Row, list[ExplicitMemory]]:
    """All but what the model says, and the decoded memories. On one core.

    Args:
        name: what the row is called.
        codec: ready to use.
        stock: what it codes.
        shape: that it is told; the stock's, but perhaps for RoPE.
    """
    codecs = {**CODECS, codec.name: codec}
    with one_core():
        began = time.perf_counter()
        payloads: list[bytes] = []
        for start in range(0, len(stock.memories), _BATCH):
            batch = MemoryBatch.of(stock.memories[start : start + _BATCH], shape)
            payloads += [payload or b"" for payload in encode_batch(batch, shape, codec)]
        encoded = time.perf_counter()
        decoded = [decode_memory(payload, shape, codecs) for payload in payloads]
        ended = time.perf_counter()
        five = _full(payloads, codec)
        decode_ms = _median_ms(lambda: _decode_packed(five, shape, codecs)) if five else 0.0
    sizes = [memory_sizes(payload) for payload in payloads]
    vectors = 2 * sum(pairs for pairs, _ in sizes)
    each = sum(size for _, size in sizes) / vectors
    others = sum(codec_of(payload) != codec.name for payload in payloads)
    row = Row(
        name=name,
        budget=stock.budget,
        bytes_per_vector=each,
        ratio=2 * shape.head_dim / each,
        key_error=_error([m.keys for m in stock.memories], [m.keys for m in decoded], shape),
        value_error=_error([m.values for m in stock.memories], [m.values for m in decoded], shape),
        encode_rate=vectors / (encoded - began),
        decode_rate=vectors / (ended - encoded),
        decode_ms=decode_ms,
        reference_bytes=sum(map(len, payloads)) / stock.tokens * 128,
        parameter_bytes=len(codec.parameters) if isinstance(codec, FittedCodec) else 0,
        stood_in=others / len(payloads),
    )
    return row, decoded


def score(
    row: Row,
    memories: list[ExplicitMemory],
    stock: Stock,
    harness: Harness,
    questions: Sequence[Question],
    exact: NDArray[np.float64] | None,
) -> NDArray[np.float64]:
    """Fill in what the model says, and return the NLL of each question.

    Args:
        row: of the codec.
        memories: decoded.
        stock: which of them are a document's.
        harness: the model.
        questions: what it is asked.
        exact: NLL with the exact codec and the largest budget; None: this is it.
    """
    scores = []
    for question in questions:
        own = [memories[i] for i in stock.documents[question.document]]
        scores.append(harness.memory(question, own, stock.shape))
    nll: NDArray[np.float64] = np.array([likelihood for likelihood, _ in scores])
    row.nll, row.right = float(nll.mean()), float(np.mean([right for _, right in scores]))
    if exact is not None:
        row.change, row.low, row.high = change(nll, exact)
    return nll


def _full(payloads: Sequence[bytes], codec: Codec) -> list[bytes]:
    """Five memories with the most pairs, of those that the codec itself wrote."""
    own = [payload for payload in payloads if codec_of(payload) == codec.name]
    return sorted(own, key=lambda payload: -memory_sizes(payload)[0])[:RETRIEVED]


def _decode_packed(payloads: Sequence[bytes], shape: MemoryShape, codecs: dict[str, Codec]) -> None:
    """Decode memories as `pack` does: side by side, every layer as wide as its widest head."""
    coded = [read_payload(payload, shape) for payload in payloads]
    counts = np.stack([memory.counts for memory in coded]).astype(np.int64)
    positions = np.concatenate([memory.positions for memory in coded])
    widths = np.repeat(counts.sum(axis=0).reshape(-1, shape.kv_heads).max(axis=1), shape.kv_heads)
    layout = Layout(counts, positions, np.cumsum(widths) - widths)
    keys, values = room_for(int(widths.sum()), shape)
    decode_into(coded, layout, shape, codecs, keys, values)


def _median_ms(work: Callable[[], None]) -> float:
    seconds = []
    for _ in range(_REPEATS):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return float(np.median(seconds)) * 1000


def one_core() -> Any:
    """A context in which numpy computes on one core. (threadpoolctl comes with the embedder.)"""
    return importlib.import_module("threadpoolctl").threadpool_limits(1)


def _error(
    given: Sequence[NDArray[Any]], found: Sequence[NDArray[Any]], shape: MemoryShape
) -> float:
    lost, whole = 0.0, 0.0
    for one, other in zip(given, found, strict=True):
        x = to_float32(one, shape.dtype)
        lost += float(np.square(x - to_float32(other, shape.dtype), dtype=np.float64).sum())
        whole += float(np.square(x, dtype=np.float64).sum())
    return float((lost / whole) ** 0.5)
