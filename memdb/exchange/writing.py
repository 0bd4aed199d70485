"""Writing an export, a part at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import save_file

from memdb.errors import InvalidInputError, MemDBError, StorageError
from memdb.exchange.lines import encode_line
from memdb.exchange.manifest import MANIFEST, TOKENIZER, Manifest, part_names
from memdb.ingest.chunking import Piece
from memdb.storage.durable import sync, write_file
from memdb.types.document import Document
from memdb.types.memory_batch import MemoryBatch
from memdb.types.shape import MemoryShape


class ExportWriter:
    """Writes an export into an empty folder. Use as a context manager: the manifest is written at
    its end, and not if there was an error; then the files are removed again.

    It holds one part in memory at a time.

    Args:
        folder: made if it is missing.
        shape: of the memories; None: all references are cold.
        settings: the database's settings `embedder`, `model` and `memory`, those that there are.
        keys: metadata keys that the database has an index of.
        tokenizer: the text of the model's tokenizer.json, or None.
        codecs: parameters of the fitted codecs that memories are stored with, by name.
        part_bytes: about how long either file of a part may become; a document that needs more
            gets a part of its own.

    Raises:
        InvalidInputError: the folder is not empty, or an argument is not what it should be.
        StorageError: the folder cannot be written to.
    """

    def __init__(
        self,
        folder: Path,
        *,
        shape: MemoryShape | None,
        settings: Mapping[str, Mapping[str, Any]] | None = None,
        keys: Sequence[str] = (),
        tokenizer: str | None = None,
        codecs: Mapping[str, bytes] | None = None,
        part_bytes: int = 1 << 26,
    ) -> None:
        self._manifest = Manifest(shape, settings or {}, tuple(keys), tokenizer, codecs or {})
        self._manifest.require()
        self._dimension = self._manifest.dimension
        self._folder = folder
        self._part_bytes = part_bytes
        self._part = _Buffer(part_bytes)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            there = min((entry.name for entry in folder.iterdir()), default=None)
        except OSError as error:
            raise self._cannot_write(error) from error
        if there is not None:
            raise InvalidInputError(
                f"'{folder}' is not empty (it holds '{there}'): an export needs a folder of its "
                "own. Choose another path, or delete what is there"
            )

    def __enter__(self) -> ExportWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._flush()
                self._write_manifest()
        except BaseException:
            self._remove()
            raise
        if kind is not None:
            self._remove()

    def add(
        self,
        document: Document,
        pieces: Sequence[Piece],
        embeddings: NDArray[np.float32],
        memories: Sequence[bytes | None] | MemoryBatch | None = None,
        version: int | None = None,
    ) -> None:
        """Add a document.

        Args:
            document: one without an id gets the id derived from its text when it is read.
            pieces: what its references are made of.
            embeddings: (pieces, dimension) float32.
            memories: for each piece its payload as in the table `memories`, or None if it is cold;
                or a batch of as many; or None: all are cold.
            version: the document's version, or None.

        Raises:
            InvalidInputError: one of them is not what it should be; nothing was added.
            MismatchError: the batch is not of the export's shape.
            StorageError: a part cannot be written.
        """
        line = encode_line(document, pieces, version)
        n = len(pieces)
        dimension = self._dimension or embeddings.size // n
        if embeddings.dtype != np.float32 or embeddings.shape != (n, dimension) or not dimension:
            raise InvalidInputError(
                f"embeddings must be float32 of shape ({n}, {self._dimension or 'dimension'}), got "
                f"{embeddings.dtype} of shape {embeddings.shape}"
            )
        if memories is not None:
            self._require_memories(memories, n)
        size = embeddings.nbytes + _size(memories)
        if not self._part.takes(len(line), size, memories):
            self._flush()
        self._dimension = dimension
        self._part.add(line, n, embeddings, memories, self._manifest.shape)
        self._manifest = replace(
            self._manifest,
            documents=self._manifest.documents + 1,
            references=self._manifest.references + n,
        )

    def _require_memories(self, memories: Sequence[bytes | None] | MemoryBatch, n: int) -> None:
        if self._manifest.shape is None:
            raise InvalidInputError(
                "this export has no memory shape, so it can hold no memories: give it a shape"
            )
        if len(memories) != n:
            raise InvalidInputError(
                f"{len(memories)} memories for {n} pieces: pass one for each, None where it is cold"
            )
        if isinstance(memories, MemoryBatch):
            memories.require(self._manifest.shape)
        elif not all(payload is None or payload for payload in memories):
            raise InvalidInputError("a memory of 0 bytes; pass None for a reference that is cold")

    def _flush(self) -> None:
        """Write the part that is held, if there is anything in it."""
        if not self._part.references:
            return
        number = self._manifest.parts + 1
        self._manifest = replace(self._manifest, parts=number)
        lines, tensors = (self._folder / name for name in part_names(number))
        try:
            write_file(lines, self._part.lines)
            save_file(*self._part.tensors(self._manifest.shape, tensors))
            sync(tensors)
        except (OSError, SafetensorError) as error:
            raise self._cannot_write(error) from error
        self._part = _Buffer(self._part_bytes)

    def _write_manifest(self) -> None:
        try:
            self._manifest.write(self._folder)
        except OSError as error:
            raise self._cannot_write(error) from error

    def _remove(self) -> None:
        parts = range(1, self._manifest.parts + 1)
        names = [name for number in parts for name in part_names(number)]
        for name in (MANIFEST, MANIFEST + ".new", TOKENIZER, *names):
            with suppress(OSError):
                (self._folder / name).unlink()

    def _cannot_write(self, error: Exception) -> MemDBError:
        return StorageError(f"cannot write an export to '{self._folder}': {error}")


@dataclass
class _Buffer:
    """A part while it grows: the bytes of its lines and of each of its tensors.

    Attributes:
        most: bytes of either file.
        arrays: whether its memories are arrays; None: they have all been cold.
    """

    most: int
    references: int = 0
    arrays: bool | None = None
    dimension: int = 0
    lines: bytearray = field(default_factory=bytearray)
    embeddings: bytearray = field(default_factory=bytearray)
    memories: bytearray = field(default_factory=bytearray)
    offsets: list[int] = field(default_factory=lambda: [0])
    counts: bytearray = field(default_factory=bytearray)
    positions: bytearray = field(default_factory=bytearray)
    keys: bytearray = field(default_factory=bytearray)
    values: bytearray = field(default_factory=bytearray)
    warm: bytearray = field(default_factory=bytearray)

    def takes(
        self, line: int, size: int, memories: Sequence[bytes | None] | MemoryBatch | None
    ) -> bool:
        """Whether there is room for a document of so many bytes, and its memories have the form
        of those that are here. An empty part has room for all."""
        parts = self.embeddings, self.memories, self.counts, self.positions, self.keys, self.values
        held = sum(map(len, parts)) + 9 * self.references
        other = memories is not None and self.arrays is (not isinstance(memories, MemoryBatch))
        full = len(self.lines) + line > self.most or held + size > self.most
        return self.references == 0 or not (other or full)

    def add(
        self,
        line: bytes,
        n: int,
        embeddings: NDArray[np.float32],
        memories: Sequence[bytes | None] | MemoryBatch | None,
        shape: MemoryShape | None,
    ) -> None:
        """Take a document's bytes; all was checked."""
        self.lines += line
        self.references += n
        self.dimension = embeddings.shape[1]
        self.embeddings += embeddings.astype("<f4", copy=False).tobytes()
        if isinstance(memories, MemoryBatch):
            self.arrays = True
            self.counts += memories.counts.astype("<i4").tobytes()
            self.positions += memories.positions.tobytes()
            self.keys += memories.keys.tobytes()
            self.values += memories.values.tobytes()
            self.warm += b"\1" * n if memories.warm is None else memories.warm.tobytes()
        elif memories is None and shape is not None:  # cold, if this becomes a part of arrays
            self.counts += bytes(4 * shape.rows * n)
            self.warm += bytes(n)
        if memories is None or isinstance(memories, MemoryBatch):
            self.offsets += [len(self.memories)] * n
            return
        self.arrays = False
        for payload in memories:
            self.memories += payload or b""
            self.offsets.append(len(self.memories))

    def tensors(
        self, shape: MemoryShape | None, path: Path
    ) -> tuple[dict[str, NDArray[Any]], Path, dict[str, str]]:
        """What `save_file` takes."""
        n = self.references
        made = {"embeddings": np.frombuffer(self.embeddings, "<f4").reshape(n, self.dimension)}
        metadata = {"xxh3.documents": xxhash.xxh3_64_hexdigest(self.lines)}
        tensors: dict[str, NDArray[Any]] = {**made}
        if self.arrays is False:
            tensors["memories"] = np.frombuffer(self.memories, np.uint8)
            tensors["memory_offsets"] = np.array(self.offsets, "<i8")
        elif self.arrays and shape is not None:
            tensors["counts"] = np.frombuffer(self.counts, "<i4").reshape(n, shape.rows)
            tensors["positions"] = np.frombuffer(self.positions, shape.position_dtype)
            for name, data in (("keys", self.keys), ("values", self.values)):
                vectors = np.frombuffer(data, shape.storage_dtype)
                tensors[name] = vectors.reshape(-1, shape.head_dim)
            tensors["warm"] = np.frombuffer(self.warm, np.uint8)
            metadata["dtype"] = shape.dtype  # of keys and values: numpy has no bfloat16
        for name, tensor in tensors.items():
            metadata[f"xxh3.{name}"] = xxhash.xxh3_64_hexdigest(
                tensor.reshape(-1).view(np.uint8).data
            )
        return tensors, path, metadata


def _size(memories: Sequence[bytes | None] | MemoryBatch | None) -> int:
    if memories is None:
        return 0
    if isinstance(memories, MemoryBatch):
        arrays = memories.positions, memories.keys, memories.values
        return 4 * memories.counts.size + sum(array.nbytes for array in arrays)
    return sum(len(payload or b"") for payload in memories)
