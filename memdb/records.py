"""The things a database holds: documents, references, explicit memories and their shape."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any, Literal

import numpy as np
import xxhash
from numpy.typing import NDArray

from memdb.canonical import json_payload
from memdb.errors import FormatError, InvalidInputError, MismatchError

DType = Literal["float32", "float16", "bfloat16"]
Framing = Literal["plain", "chat"]

#: How a value of each model dtype is held in numpy, which has no bfloat16: as its upper 16 bits.
STORAGE_DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
}
_LARGEST = {"float16": np.float32(65504), "bfloat16": np.float32(2.0**128 - 2.0**120)}


@dataclass(frozen=True)
class Document:
    """What a user ingests: one line of `corpus.jsonl`.

    Attributes:
        text: the text; not empty.
        id: at most 480 bytes of UTF-8. None: derived from the text, so that the same text is the
            same document.
        metadata: anything that JSON can hold.
    """

    text: str
    id: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StoredDocument:
    """A document as `MemDB.get` returns it.

    Attributes:
        id: the document's id.
        version: 1 at insertion, one more at each update.
        text: the whole text, exactly as it was given.
        metadata: as given.
        references: ids of its references, in the order of the text.
        warm: how many of them have a memory.
    """

    id: str
    version: int
    text: str
    metadata: dict[str, Any]
    references: tuple[int, ...]
    warm: int


@dataclass(frozen=True)
class Reference:
    """A piece of a document, short enough to become one memory (paper, 3.1: at most 128 tokens).

    Attributes:
        id: int64, never used again after the reference is deleted.
        version: the version of the document that wrote it.
        document_id: the document it belongs to.
        ordinal: its place in the document, from 0.
        tokens: its length in the model's tokens; 0 in a database without a tokenizer.
        text: its slice of the document, white space included: the slices joined are the document.
    """

    id: int
    version: int
    document_id: str
    ordinal: int
    tokens: int
    text: str

    @property
    def content(self) -> str:
        """The text without the white space around it: what is embedded and encoded."""
        return self.text.strip()


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding of one layer (the model's own parameters; None where a layer has
    no position encoding)."""

    base: float
    kind: str = "default"
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class MemoryShape:
    """What all memories of one database share; a memory of another shape is refused.

    Attributes:
        model: fingerprint of the weights that wrote the memories.
        adapter: fingerprint of a trained adapter on top of them, or None.
        layers: the memory layers, ascending, as indices into the model's layers.
        kv_heads: key-value heads of each layer.
        head_dim: length of a key and of a value.
        reference_length: most tokens of a reference; the context starts that far behind the prefix.
        dtype: what the model computes in.
        rope: one entry per memory layer; keys are stored after RoPE.
        framing: `plain`, or `chat` (the model's template).
        prefix: token ids that stand before every reference and before the context.
    """

    model: str
    layers: tuple[int, ...]
    kv_heads: int
    head_dim: int
    dtype: DType
    prefix: tuple[int, ...]
    framing: Framing = "plain"
    reference_length: int = 128
    rope: tuple[Rope | None, ...] = ()
    adapter: str | None = None

    def __post_init__(self) -> None:
        problems = []
        if self.dtype not in STORAGE_DTYPES:
            problems.append(f"dtype is {self.dtype!r}, not one of {', '.join(STORAGE_DTYPES)}")
        if not self.layers or list(self.layers) != sorted(set(self.layers)):
            problems.append(f"layers must be ascending and not empty, got {self.layers}")
        if min(self.kv_heads, self.head_dim) < 1:
            problems.append("kv_heads and head_dim must be at least 1")
        if not 1 <= self.reference_length <= 65535:
            problems.append(f"reference_length must be 1 to 65535, got {self.reference_length}")
        if self.rope and len(self.rope) != len(self.layers):
            problems.append(f"{len(self.rope)} RoPE entries for {len(self.layers)} memory layers")
        if problems:
            raise InvalidInputError("memory shape: " + "; ".join(problems))

    @property
    def rows(self) -> int:
        """(layer, kv head) pairs: row r is memory layer r // kv_heads, head r % kv_heads."""
        return len(self.layers) * self.kv_heads

    @property
    def storage_dtype(self) -> np.dtype[Any]:
        """numpy dtype of keys and values in RAM: bfloat16 is held as uint16."""
        return STORAGE_DTYPES[self.dtype]

    @property
    def position_dtype(self) -> np.dtype[Any]:
        """numpy dtype of token positions, the smallest that holds the reference length."""
        return np.dtype("u1") if self.reference_length <= 256 else np.dtype("<u2")

    @cached_property
    def fingerprint(self) -> int:
        """64 bits that differ where any part of the shape does: XXH3-64 of its canonical JSON.
        Every memory record carries them."""
        return xxhash.xxh3_64_intdigest(json_payload(self.to_json()))

    def to_json(self) -> dict[str, Any]:
        """The shape as JSON values; `from_json` is its inverse."""
        return json.loads(json.dumps(asdict(self)))  # type: ignore[no-any-return]

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> MemoryShape:
        """The shape that `to_json` gave.

        Raises:
            FormatError: a field is missing, or not one that this release knows.
        """
        if not isinstance(values, Mapping):
            raise FormatError("memory shape: it is no object")
        _require_fields(cls, values, "memory shape")
        try:
            for entry in values["rope"]:
                if entry is not None:
                    _require_fields(Rope, entry, "memory shape, RoPE of a layer")
            rope = tuple(None if r is None else Rope(**r) for r in values["rope"])
            lists = {name: tuple(values[name]) for name in ("layers", "prefix")}
            return cls(**{**values, **lists, "rope": rope})
        except (InvalidInputError, TypeError, ValueError) as error:
            raise FormatError(f"memory shape: {error}") from error

    def require_equal(self, other: MemoryShape, what: str) -> None:
        """Raise `MismatchError`, naming each part that differs, unless `other` equals this."""
        mine, theirs = self.to_json(), other.to_json()
        differences = [
            f"{name}: the database has {_short(mine[name])}, {what} has {_short(theirs[name])}"
            for name in mine
            if mine[name] != theirs[name]
        ]
        if differences:
            raise MismatchError(
                f"{what} does not fit this database. "
                + "; ".join(differences)
                + ". Open it with the model that it records (see `memdb stats`), or make a new "
                "database for this one."
            )


def _require_fields(kind: type[MemoryShape | Rope], values: Mapping[str, Any], what: str) -> None:
    due = [part.name for part in fields(kind)]
    for name in due:
        if name not in values:
            raise FormatError(f"{what}: the field '{name}' is missing")
    for name in values:
        if name not in due:
            raise FormatError(
                f"{what}: this release does not know the field '{name}'; use a newer release of "
                "explicit-memdb"
            )


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


@dataclass(frozen=True)
class ExplicitMemory:
    """The sparse key-values of one reference for one model. Ragged: every (layer, kv head) keeps
    its own number of tokens. Held as CSR over the rows of `MemoryShape` (paper, 3.1 and 3.2).

    Attributes:
        offsets: (rows + 1,) int32; row r holds the pairs offsets[r] to offsets[r + 1].
        positions: (pairs,) uint8 or uint16; token positions within the reference, ascending in
            each row.
        keys: (pairs, head_dim), after RoPE at prefix length + position; `shape.storage_dtype`.
        values: (pairs, head_dim), likewise.
    """

    offsets: NDArray[np.int32]
    positions: NDArray[np.unsignedinteger[Any]]
    keys: NDArray[Any]
    values: NDArray[Any]

    @property
    def pairs(self) -> int:
        """How many key-value pairs are kept, over all rows."""
        return len(self.positions)

    @property
    def nbytes(self) -> int:
        """Bytes in RAM."""
        return self.offsets.nbytes + self.positions.nbytes + self.keys.nbytes + self.values.nbytes

    def require(self, shape: MemoryShape) -> None:
        """Raise `MismatchError` unless this is a well-formed memory of that shape."""
        problem = self._problem(shape)
        if problem:
            raise MismatchError(f"explicit memory: {problem}")

    def _problem(self, shape: MemoryShape) -> str | None:
        n = self.pairs
        if self.offsets.shape != (shape.rows + 1,) or self.offsets.dtype != np.int32:
            return (
                f"offsets must be int32 of shape ({shape.rows + 1},), got {_describe(self.offsets)}"
            )
        counts = np.diff(self.offsets)
        if self.offsets[0] != 0 or self.offsets[-1] != n or (counts < 0).any():
            return f"offsets must rise from 0 to the number of pairs, {n}"
        if self.positions.shape != (n,) or self.positions.dtype != shape.position_dtype:
            return f"positions must be {shape.position_dtype}, got {_describe(self.positions)}"
        if n and int(self.positions.max()) >= shape.reference_length:
            return f"a position is outside the {shape.reference_length} tokens of a reference"
        steps = np.diff(self.positions.astype(np.int32))
        starts_row = np.zeros(n + 1, bool)
        starts_row[self.offsets] = True
        if n and (steps[~starts_row[1:n]] <= 0).any():
            return "positions must ascend within each row"
        for name, vectors in (("keys", self.keys), ("values", self.values)):
            if vectors.shape != (n, shape.head_dim) or vectors.dtype != shape.storage_dtype:
                return (
                    f"{name} must be {shape.storage_dtype} of shape ({n}, {shape.head_dim}) for a "
                    f"{shape.dtype} model, got {_describe(vectors)}"
                )
        return None


def _describe(array: NDArray[Any]) -> str:
    return f"{array.dtype} of shape {array.shape}"


def to_float32(vectors: NDArray[Any], dtype: DType) -> NDArray[np.float32]:
    """Stored vectors of a model dtype as float32, without loss."""
    if dtype == "bfloat16":
        return (vectors.astype(np.uint32) << 16).view(np.float32)
    return vectors.astype(np.float32, copy=False)


def from_float32(vectors: NDArray[np.float32], dtype: DType) -> NDArray[Any]:
    """Float32 vectors in the storage dtype of a model dtype, rounded to nearest even.

    What does not fit is set to the largest number that does; NaN stays NaN.
    """
    if dtype == "float32":
        return vectors
    largest = _LARGEST[dtype]
    # Two passes over the numbers say whether any needs more than rounding; most often none does.
    fits = vectors.max(initial=0) <= largest and vectors.min(initial=0) >= -largest
    limited = vectors if fits else np.clip(vectors, -largest, largest)
    if dtype == "float16":
        return limited.astype(np.float16)
    bits = limited.view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += bits
    rounded += 0x7FFF
    rounded >>= 16
    if not fits:
        rounded[np.isnan(vectors)] = 0x7FC0
    return rounded.astype(np.uint16)
