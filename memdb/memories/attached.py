"""The parts that a database is given: its embedder and its memory writer, checked against what it
records, and made when they are first needed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

from memdb.errors import InvalidInputError, MismatchError, MissingPartError
from memdb.protocols import Embedder, MemoryWriter
from memdb.types.shape import MemoryShape

_WAY_OUT = "or open the database with `model_adapter.open_database`"


class Attached:
    """Embedder and writer of one open database.

    Args:
        recorded: the database's `embedder` setting.
        shape: the database's memory shape.
        embedder: the embedder, a function that makes it, or None: there is none.
        writer: likewise.

    Raises:
        MismatchError: one that is given is not the one recorded.
    """

    def __init__(
        self,
        recorded: Mapping[str, Any],
        shape: MemoryShape,
        embedder: Embedder | Callable[[], Embedder] | None,
        writer: MemoryWriter | Callable[[], MemoryWriter] | None,
    ) -> None:
        self._recorded = recorded
        self._shape = shape
        self._embedder: Any = embedder
        self._writer: Any = writer
        self._checked_embedder: Embedder | None = None
        self._checked_writer: MemoryWriter | None = None
        self._guard = threading.Lock()
        for part, protocol in ((embedder, Embedder), (writer, MemoryWriter)):
            if part is not None and not _is_made(part, protocol):
                require_part(part, protocol, or_maker=True)
        if _is_made(embedder, Embedder):
            self.embedder()
        if _is_made(writer, MemoryWriter):
            self.writer()

    @property
    def has_embedder(self) -> bool:
        """Whether texts can be embedded."""
        return self._embedder is not None

    @property
    def has_writer(self) -> bool:
        """Whether memories can be written."""
        return self._writer is not None

    def embedder(self) -> Embedder:
        """The embedder, made if it was not; `MissingPartError` if there is none."""
        with self._guard:
            if self._checked_embedder is None:
                if self._embedder is None:
                    raise MissingPartError(
                        f"this database was opened without an embedder: pass embeddings, {_WAY_OUT}"
                    )
                made = _is_made(self._embedder, Embedder)
                embedder: Embedder = self._embedder if made else self._embedder()
                require_part(embedder, Embedder)
                self._check_embedder(embedder)
                self._checked_embedder = embedder
            return self._checked_embedder

    def writer(self) -> MemoryWriter:
        """The memory writer, made if it was not; `MissingPartError` if there is none."""
        with self._guard:
            if self._checked_writer is None:
                if self._writer is None:
                    raise MissingPartError(
                        "this database was opened without a memory writer: pass memories, "
                        f"{_WAY_OUT}"
                    )
                made = _is_made(self._writer, MemoryWriter)
                writer: MemoryWriter = self._writer if made else self._writer()
                require_part(writer, MemoryWriter)
                self._shape.require_equal(writer.shape, f"the model '{writer.name}'")
                self._checked_writer = writer
            return self._checked_writer

    def _check_embedder(self, embedder: Embedder) -> None:
        recorded = self._recorded
        if recorded["dimension"] != embedder.dimension or (
            recorded["fingerprint"] not in (None, embedder.fingerprint)
        ):
            raise MismatchError(
                f"the embedder '{embedder.name}' (fingerprint {embedder.fingerprint}, dimension "
                f"{embedder.dimension}) is not the one that this database records: "
                f"'{recorded['name']}' (fingerprint {recorded['fingerprint']}, dimension "
                f"{recorded['dimension']}). Its vectors cannot be compared with those stored; open "
                "the database with the embedder that it records, or make a new one."
            )


def require_part(part: object, protocol: type, *, or_maker: bool = False) -> None:
    """Raise `InvalidInputError` unless this has what a protocol says, or may make what has."""
    if _is_made(part, protocol) or (or_maker and callable(part)):
        return
    due = [name for name in vars(protocol) if not name.startswith("_")]
    raise InvalidInputError(
        f"this is no {protocol.__name__}, which has {', '.join(due)}"
        + (", nor a function that makes one" if or_maker else "")
        + f": {part!r:.60}"
    )


def _is_made(part: object, protocol: type) -> bool:
    """Whether a part is there, rather than a function, or a class, that makes it."""
    return isinstance(part, protocol) and not isinstance(part, type)
