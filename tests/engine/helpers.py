"""Small real parts for the engine: shapes, memories, a tokenizer, an embedder, a writer."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
import xxhash
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from memdb import CODECS, DType, ExplicitMemory, MemoryShape, from_float32
from memdb.codecs import FAMILIES
from memdb.storage.record_layout import INTEGER_TABLES, TABLES

ROOT = Path(__file__).parents[2]

PAGE = """The harbour of Veldmoor is old. Ships from many countries come to the harbour, and the
lighthouse shows them the way. In winter the river Quill freezes, and nobody can leave the town!
Is there a bridge? No: the last one fell in 1874, and the town never built another.

The keeper of the lighthouse writes down what he sees: how many ships, from where, and with what on
board. His book is long. "It tells of storms," he says, "of whales, of a green light in the north."
The day when the whole fleet came home has a page of its own; the ink is still blue… 港は古い。
"""


def make_shape(dtype: DType = "float32", **changes: Any) -> MemoryShape:
    """A shape of 3 memory layers with 2 heads of 4 numbers."""
    fields: dict[str, Any] = {
        "model": "model-1",
        "layers": (0, 2, 5),
        "kv_heads": 2,
        "head_dim": 4,
        "prefix": (1, 7),
    }
    return MemoryShape(dtype=dtype, **{**fields, **changes})


def make_memory(shape: MemoryShape, seed: int, most: int = 5) -> ExplicitMemory:
    """A random ragged memory; each head keeps 0 to `most` tokens."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, most + 1, shape.rows)
    rows = [np.sort(rng.choice(shape.reference_length, n, replace=False)) for n in counts]
    size = int(counts.sum()), shape.head_dim
    return ExplicitMemory(
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
        positions=np.concatenate(rows).astype(shape.position_dtype),
        keys=from_float32(rng.standard_normal(size, np.float32), shape.dtype),
        values=from_float32(rng.standard_normal(size, np.float32), shape.dtype),
    )


def same_memory(one: ExplicitMemory, other: ExplicitMemory) -> bool:
    """Whether two memories are the same bit by bit."""
    return all(
        a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
        for a, b in (
            (one.offsets, other.offsets),
            (one.positions, other.positions),
            (one.keys, other.keys),
            (one.values, other.values),
        )
    )


def unit(*numbers: float) -> NDArray[np.float32]:
    """One embedding, (1, dimension), as `insert` takes it."""
    return np.array([numbers], np.float32)


@cache
def tokenizer_json() -> str:
    """A byte-level BPE tokenizer of 500 tokens, learned from `PAGE`; <|im_end|> is special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|endoftext|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([PAGE], trainer)
    return str(tokenizer.to_str())


class WordEmbedder:
    """Bag of words by hashing: texts with the same words are near; the order does not matter."""

    name = "words"
    fingerprint = "words-64"
    dimension = 64

    def embed(self, texts: Sequence[str], *, query: bool = False) -> NDArray[np.float32]:
        vectors = np.zeros((len(texts), self.dimension), np.float32)
        for row, text in enumerate(texts):
            for word in re.findall(r"\w+", text.lower()) or [text]:
                vectors[row, xxhash.xxh3_64_intdigest(word.encode()) % self.dimension] += 1
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


class TokenWriter:
    """Memories that follow from the tokens alone: row r keeps each third token from r on, and its
    keys and values are waves of the token's id."""

    name = "tokens"
    settings: Mapping[str, Any] = {"selection": "third"}
    tokenizer = tokenizer_json()

    def __init__(self, reference_length: int = 16, dtype: DType = "float32") -> None:
        self.shape = make_shape(dtype, reference_length=reference_length)
        self._tokenizer = Tokenizer.from_str(self.tokenizer)
        self._tokenizer.encode_special_tokens = True

    def write(self, texts: Sequence[str]) -> list[ExplicitMemory]:
        return [self._write(text) for text in texts]

    def _write(self, text: str) -> ExplicitMemory:
        tokens = self._tokenizer.encode(text, add_special_tokens=False).ids
        if not 1 <= len(tokens) <= self.shape.reference_length:
            raise ValueError(f"{len(tokens)} tokens: {text!r}")
        rows = [range(row % 3, len(tokens), 3) for row in range(self.shape.rows)]
        phases = [tokens[place] * (row + 1.0) for row, kept in enumerate(rows) for place in kept]
        angles = np.array(phases)[:, None] + np.arange(self.shape.head_dim)
        return ExplicitMemory(
            offsets=np.cumsum([0, *map(len, rows)]).astype(np.int32),
            positions=np.concatenate([np.array(r, int) for r in rows]).astype(
                self.shape.position_dtype
            ),
            keys=from_float32(np.sin(angles).astype(np.float32), self.shape.dtype),
            values=from_float32(np.cos(angles).astype(np.float32), self.shape.dtype),
        )


def keep_whatever_is_lost(patch: pytest.MonkeyPatch, share: float = 1e4) -> None:
    """Let codecs keep what they lose most of, too: a few random numbers are like no others, and a
    test of something else needs no better ones."""
    shares = dict.fromkeys([*CODECS, *FAMILIES], (share, share))
    patch.setattr("memdb.codecs.floor._SHARES", shares)


def write_corpus(path: Path, lines: Iterable[Mapping[str, Any]]) -> Path:
    """A corpus of these lines."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return path


def child(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a script in a new interpreter that can import this module; `sys.argv[1:]` are the
    arguments."""
    return subprocess.run(command(script, *arguments), cwd=ROOT, capture_output=True, text=True)


def command(script: str, *arguments: object) -> list[str]:
    """The command line that `child` runs."""
    return [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]


class TookTooLongError(BaseException):
    """What hangs is stopped with; no `except Exception` catches it."""


@contextmanager
def time_limit(seconds: int = 20) -> Iterator[None]:
    """Fail what would otherwise hang for ever."""

    def stop(*_: object) -> None:
        raise TookTooLongError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def raw(path: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The LMDB environment of a closed database, and its tables, behind the engine's back."""
    environment = lmdb.open(str(path / "gen-000001"), max_dbs=16, map_size=1 << 26)
    try:
        yield (
            environment,
            {
                name: environment.open_db(name.encode(), integerkey=name in INTEGER_TABLES)
                for name in TABLES
            },
        )
    finally:
        environment.close()
