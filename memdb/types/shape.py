"""What all memories of one database share."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
import xxhash

from memdb.errors import FormatError, InvalidInputError, MismatchError
from memdb.types.arguments import a, number, one_of, some, whole_number
from memdb.types.canonical import json_payload
from memdb.types.shown import shown

DType = Literal["float32", "float16", "bfloat16"]
Framing = Literal["plain", "chat"]

#: How a value of each model dtype is held in numpy, which has no bfloat16: as its upper 16 bits.
STORAGE_DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
}


@dataclass(frozen=True, repr=False)
class Rope:
    """Rotary position embedding of one layer (the model's own parameters; None where a layer has
    no position encoding)."""

    base: float
    kind: str = "default"
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        more = f", parameters={len(self.parameters)}" if self.parameters else ""
        return f"Rope(base={self.base}, kind={self.kind!r}{more})"

    def __post_init__(self) -> None:
        base = number(self.base, "RoPE: base", 0, sys.float_info.max)
        if isinstance(self.base, np.generic):  # else as it was written: JSON tells 1 from 1.0
            object.__setattr__(self, "base", base)
        a(str, self.kind, "RoPE: kind")
        a(Mapping, self.parameters, "RoPE: parameters")  # type: ignore[type-abstract]


@dataclass(frozen=True, repr=False)
class MemoryShape:
    """What all memories of one database share; a memory of another shape is refused.

    Attributes:
        model: fingerprint of the weights that wrote the memories.
        adapter: fingerprint of a trained adapter on top of them, or None.
        layers: the memory layers, ascending, as indices into the model's layers.
        kv_heads: key-value heads of each layer.
        head_dim: length of a key and of a value.
        reference_length: most tokens of a reference; the context starts that far behind the prefix.
        dtype: what memories are stored in; a model may compute in another.
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

    def __repr__(self) -> str:
        return (
            f"MemoryShape({shown(self.model, 16)}, layers={len(self.layers)}, "
            f"kv_heads={self.kv_heads}, head_dim={self.head_dim}, dtype={self.dtype!r}, "
            f"framing={self.framing!r})"
        )

    def __post_init__(self) -> None:
        self._take_types()
        problems = []
        if self.dtype not in STORAGE_DTYPES:
            problems.append(f"dtype is {self.dtype!r}, not one of {', '.join(STORAGE_DTYPES)}")
        if not self.layers or list(self.layers) != sorted(set(self.layers)):
            problems.append(f"layers must be ascending and not empty, got {self.layers}")
        if self.rope and len(self.rope) != len(self.layers):
            problems.append(f"{len(self.rope)} RoPE entries for {len(self.layers)} memory layers")
        if problems:
            raise InvalidInputError("memory shape: " + "; ".join(problems))

    def _take_types(self) -> None:
        """Refuse fields of wrong types; numbers of numpy become Python's, lists tuples."""
        what = "memory shape: "
        a(str, self.model, what + "model")
        a(str, self.dtype, what + "dtype")
        one_of(self.framing, what + "framing", get_args(Framing))
        if self.adapter is not None:
            a(str, self.adapter, what + "adapter")
        taken: dict[str, Any] = {
            "kv_heads": whole_number(self.kv_heads, what + "kv_heads", 1),
            "head_dim": whole_number(self.head_dim, what + "head_dim", 1),
            "reference_length": whole_number(
                self.reference_length, what + "reference_length", 1, 65535
            ),
        }
        for name in ("layers", "prefix"):
            given = some(getattr(self, name), what + name, "numbers")
            taken[name] = tuple(whole_number(one, what + name, 0) for one in given)
        taken["rope"] = tuple(some(self.rope, what + "rope", "entries, one for each layer"))
        for one in taken["rope"]:
            if one is not None:
                a(Rope, one, what + "an entry of rope")
        for name, value in taken.items():
            object.__setattr__(self, name, value)

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
        a(MemoryShape, other, what)
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
