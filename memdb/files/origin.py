"""Where a document came from: in its metadata, so that a later run knows its own."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from memdb.files.found import Converted, Found
from memdb.types.checks import MAX_ID_BYTES
from memdb.types.document import Document

#: The key in a document's metadata. A field of a table that has this name is kept as `origin_`.
ORIGIN = "origin"

_HASHED = 16  # hexadecimal digits


@dataclass(frozen=True)
class Origin:
    """The file that a document came from.

    Attributes:
        root: the folder that was given, resolved.
        path: of the file, from there.
    """

    root: str
    path: str

    @classmethod
    def of(cls, metadata: Mapping[str, Any]) -> Origin | None:
        """A document's, if it came from a file."""
        said = metadata.get(ORIGIN)
        if not isinstance(said, Mapping):
            return None
        root, path = said.get("root"), said.get("path")
        return cls(root, path) if isinstance(root, str) and isinstance(path, str) else None


def document_from(found: Found, converted: Converted, recorded: bool) -> Document:
    """What a converter gave as a document, with its id and, where that is `recorded`, its
    origin."""
    metadata = dict(converted.metadata)
    if recorded:
        own = metadata.pop(ORIGIN, None)
        if own is not None:
            metadata[f"{ORIGIN}_"] = own
        metadata[ORIGIN] = {"root": found.root, "path": found.name, "kind": found.kind}
    id = converted.own_id or None
    if converted.own_id is None:
        id = short_id(found.name if converted.key is None else f"{found.name}#{converted.key}")
    return Document(converted.text, id, metadata, converted.parts)


def short_id(name: str) -> str:
    """A name as an id. Of one that is too long, the end is a hash of it."""
    data = name.encode("utf-8", "replace")
    if len(data) <= MAX_ID_BYTES:
        return name
    digest = hashlib.sha256(data).hexdigest()[:_HASHED]
    return data[: MAX_ID_BYTES - _HASHED - 1].decode("utf-8", "ignore") + "~" + digest
