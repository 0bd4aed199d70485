"""`manifest.json`: what an export is an export of, and how much of it there must be."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from memdb.codecs import fitted_codec
from memdb.errors import InvalidInputError, MemDBError
from memdb.exchange.files import (
    decoded,
    is_checksum,
    is_integer,
    is_regular,
    is_text,
    json_object,
    read_small,
    short,
)
from memdb.storage.durable import sync, write_file
from memdb.storage.record_layout import CALIBRATION, CUTTING, checked_setting
from memdb.types.canonical import json_payload
from memdb.types.cutting import Cutting
from memdb.types.shape import MemoryShape

FORMAT, VERSION = "memdb-export", 1
MANIFEST, TOKENIZER = "manifest.json", "tokenizer.json"
_SETTINGS = ("embedder", "model", "memory", CALIBRATION, CUTTING)
_REQUIRED = ("format", "version", "parts", "documents", "references")
_OPTIONAL: dict[str, Any] = {
    "shape": None,
    "settings": {},
    "keys": [],
    "tokenizer": False,
    "codecs": [],
    "checksum": None,
}


@dataclass(frozen=True)
class Manifest:
    """What all parts of an export share.

    Attributes:
        shape: of the memories; None: there are none.
        settings: the database's settings `embedder`, `model`, `memory`, `calibration` and
            `cutting`, those that there are.
        keys: metadata keys that the database has an index of.
        tokenizer: the text of tokenizer.json, or None.
        codecs: parameters of the fitted codecs that memories are stored with, by name.
        parts: how many pairs of files there are.
        documents: documents of all parts.
        references: references of all documents.
    """

    shape: MemoryShape | None
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    keys: tuple[str, ...] = ()
    tokenizer: str | None = None
    codecs: Mapping[str, bytes] = field(default_factory=dict)
    parts: int = 0
    documents: int = 0
    references: int = 0

    @property
    def dimension(self) -> int | None:
        """Length of an embedding, if the settings say."""
        dimension: int | None = self.settings.get("embedder", {}).get("dimension")
        return dimension

    def to_json(self) -> dict[str, Any]:
        """The values of manifest.json, with their checksum."""
        values = {
            "format": FORMAT,
            "version": VERSION,
            "shape": None if self.shape is None else self.shape.to_json(),
            "settings": {name: dict(value) for name, value in self.settings.items()},
            "keys": list(self.keys),
            "tokenizer": self.tokenizer is not None,
            **({"codecs": sorted(self.codecs)} if self.codecs else {}),
            "parts": self.parts,
            "documents": self.documents,
            "references": self.references,
        }
        return {**values, "checksum": checksum(values, self.tokenizer)}

    def require(self) -> None:
        """Raise `InvalidInputError` unless `read` would take it."""
        try:
            _checked(self.to_json())
        except (MemDBError, TypeError, ValueError) as error:
            raise InvalidInputError(f"the manifest of an export: {error}") from error

    def write(self, folder: Path) -> None:
        """Write tokenizer.json and then, in one step, manifest.json, durably."""
        if self.tokenizer is not None:
            write_file(folder / TOKENIZER, self.tokenizer.encode())
        for name, parameters in self.codecs.items():
            write_file(folder / codec_file(name), parameters)
        sync(folder)  # the parts' names are on disk before a manifest counts them
        new = folder / (MANIFEST + ".new")
        write_file(new, json.dumps(self.to_json(), indent=2, ensure_ascii=False).encode() + b"\n")
        new.rename(folder / MANIFEST)
        sync(folder)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a finished export.

        Raises:
            InvalidInputError: there is none, or it is wrong; file and field are named.
        """
        path = folder / MANIFEST
        if not is_regular(path):
            raise InvalidInputError(
                f"'{folder}' is no export, or one that was not finished: it has no {MANIFEST}. "
                "Export again into an empty folder"
            )
        data = read_small(path)
        try:
            values = json_object(data)
            filled, shape = _checked(values)
            tokenizer = decoded(read_small(folder / TOKENIZER)) if filled["tokenizer"] else None
            codecs = {name: _parameters(folder, name) for name in filled["codecs"]}
            if filled["checksum"] not in (None, checksum(values, tokenizer)):
                raise InvalidInputError(
                    f"it, or {TOKENIZER}, is damaged: the checksum does not match. Export again, "
                    "or, if it was changed on purpose, remove the field 'checksum'"
                )
        except (MemDBError, ValueError, RecursionError, OSError) as error:
            raise InvalidInputError(f"'{path}': {error}") from error
        return cls(
            shape=shape,
            settings=filled["settings"],
            keys=tuple(filled["keys"]),
            tokenizer=tokenizer,
            codecs=codecs,
            parts=filled["parts"],
            documents=filled["documents"],
            references=filled["references"],
        )


def checksum(values: Mapping[str, Any], tokenizer: str | None) -> str:
    """XXH3-64, in hexadecimal, of a manifest's canonical JSON without the field `checksum`,
    followed by the bytes of tokenizer.json."""
    rest = {name: value for name, value in values.items() if name != "checksum"}
    digest = xxhash.xxh3_64(json_payload(rest))
    digest.update((tokenizer or "").encode())
    return digest.hexdigest()


def codec_file(name: str) -> str:
    """The file of a fitted codec's parameters."""
    return f"codec-{name.replace(':', '-')}.bin"


def part_names(number: int) -> tuple[str, str]:
    """The file of a part's documents, and that of its tensors; parts count from 1."""
    return f"part-{number:05d}.jsonl", f"part-{number:05d}.safetensors"


# --- what is believed of a manifest ---------------------------------------------------------------


def _checked(values: dict[str, Any]) -> tuple[dict[str, Any], MemoryShape | None]:
    """The values with those that were left out, and the shape."""
    _check_fields(values)
    filled = {**_OPTIONAL, **values}
    _check_values(filled)
    return filled, None if filled["shape"] is None else _shape(filled["shape"])


def _check_fields(values: dict[str, Any]) -> None:
    for name in _REQUIRED:
        if name not in values:
            raise InvalidInputError(f"the field '{name}' is missing")
    if values["format"] != FORMAT:
        raise InvalidInputError(f"'format' is {short(values['format'])}, not {FORMAT!r}")
    if not is_integer(values["version"], VERSION, VERSION):
        raise InvalidInputError(
            f"'version' is {short(values['version'])}, and this release reads version {VERSION}; "
            "use a newer release of explicit-memdb"
        )
    for name in values:
        if name not in _OPTIONAL and name not in _REQUIRED:
            raise InvalidInputError(
                f"unknown field {short(name)}; fields are {', '.join((*_REQUIRED, *_OPTIONAL))}"
            )


def _check_values(values: dict[str, Any]) -> None:
    for name in ("parts", "documents", "references"):
        if not is_integer(values[name], 0, 1 << 62):
            raise InvalidInputError(f"'{name}' must be a number from 0, got {short(values[name])}")
    settings = values["settings"]
    if not isinstance(settings, dict) or not all(isinstance(v, dict) for v in settings.values()):
        raise InvalidInputError("'settings' must be an object of objects")
    for name in settings:
        if name not in _SETTINGS:
            raise InvalidInputError(
                f"unknown setting {short(name)}; there are {', '.join(_SETTINGS)}"
            )
    dimension = settings.get("embedder", {}).get("dimension")
    if dimension is not None and not is_integer(dimension, 1, 1 << 31):
        raise InvalidInputError(f"the embedder's dimension is {short(dimension)}, not 1 or more")
    for name in (CALIBRATION, CUTTING):
        if name in settings:
            checked_setting(name, settings[name])
    Cutting.from_json(settings.get(CUTTING))
    json_payload(settings)  # or a database cannot keep them: NaN, half a surrogate
    keys = values["keys"]
    if not isinstance(keys, list) or not all(is_text(key) and key for key in keys):
        raise InvalidInputError("'keys' must be an array of metadata keys")
    codecs = values["codecs"]
    if not isinstance(codecs, list) or not all(map(_is_codec, codecs)):
        raise InvalidInputError("'codecs' must be an array of names of fitted codecs")
    if not isinstance(values["tokenizer"], bool):
        raise InvalidInputError("'tokenizer' must be true or false")
    if values["checksum"] is not None and not is_checksum(values["checksum"]):
        raise InvalidInputError("'checksum' must be 16 hexadecimal digits, in lower case")


def _is_codec(value: object) -> bool:
    return (
        isinstance(value, str) and re.fullmatch(r"[a-z0-9]{1,64}:[0-9a-f]{16}", value) is not None
    )


def _parameters(folder: Path, name: str) -> bytes:
    """Those of a fitted codec, whose name is their hash: what is damaged is refused."""
    data = (folder / codec_file(name)).read_bytes()
    if fitted_codec(name, data) is None:
        raise InvalidInputError(
            f"this release does not know the codec '{name}'; use a newer release of explicit-memdb"
        )
    return data


def _are_integers(value: object) -> bool:
    return isinstance(value, list) and all(is_integer(item, 0, 1 << 31) for item in value)


def _is_rope(value: object) -> bool:
    return value is None or (
        isinstance(value, dict)
        and type(value.get("base")) in (int, float)
        and is_text(value.get("kind"))
        and isinstance(value.get("parameters"), dict)
    )


#: `MemoryShape` trusts that its fields have their types.
_SHAPE: dict[str, Callable[[Any], bool]] = {
    "model": is_text,
    "adapter": lambda value: value is None or is_text(value),
    "layers": lambda value: _are_integers(value) and len(value) <= 1 << 16,
    "kv_heads": lambda value: is_integer(value, 1, 1 << 16),
    "head_dim": lambda value: is_integer(value, 1, 1 << 16),
    "reference_length": lambda value: is_integer(value, 1, 65535),
    "dtype": is_text,
    "rope": lambda value: isinstance(value, list) and all(_is_rope(item) for item in value),
    "framing": lambda value: value in ("plain", "chat"),
    "prefix": _are_integers,
}


def _shape(values: object) -> MemoryShape:
    if not isinstance(values, dict):
        raise InvalidInputError(f"'shape' must be an object or null, got {short(values)}")
    for name, fits in _SHAPE.items():
        if name in values and not fits(values[name]):
            raise InvalidInputError(f"memory shape: '{name}' cannot be {short(values[name])}")
    json_payload(values)  # or it has no fingerprint: NaN, half a surrogate
    return MemoryShape.from_json(values)
