"""Reading an export: its documents with their embeddings and memories, a few at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import xxhash
from numpy.typing import NDArray

from memdb.errors import CorpusError, InvalidInputError
from memdb.exchange.files import cannot_read, require_regular, short
from memdb.exchange.lines import LINE_LIMIT, Entry, decode_line
from memdb.exchange.manifest import MANIFEST, Manifest, part_names
from memdb.exchange.memories import memories_of
from memdb.exchange.tensors import TensorFile
from memdb.ingest.chunking import Piece
from memdb.types.memory_batch import MemoryBatch

_BLOCK = 1 << 20
# What one `ExportPart` has at most, if it is not a single document.
_MOST_REFERENCES = 4096
_MOST_LINE_BYTES = 1 << 24
_MOST_TENSOR_BYTES = 1 << 26


@dataclass(frozen=True)
class ExportPart:
    """Consecutive documents of an export: those that fit into 64 MiB, or a single larger one.

    Attributes:
        file: the name of the .jsonl file they come from, for `CorpusError`.
        entries: the documents.
        embeddings: (n, dimension) float32, as stored; n are the pieces of all entries.
        memories: n encoded memories, None where one is cold; or a batch of n, checked against the
            manifest's shape; or None: all are cold. Encoded ones are bytes that nobody looked
            into, and of neither is it known whether the numbers are finite.
    """

    file: str
    entries: list[Entry]
    embeddings: NDArray[np.float32]
    memories: list[bytes | None] | MemoryBatch | None


def read_export(
    folder: Path, split: Callable[[str], list[Piece]] | None = None
) -> tuple[Manifest, Iterator[ExportPart]]:
    """What `ExportWriter`, or somebody else, wrote.

    The parts are read as the iterator goes on, so that an error may come behind parts that were
    fine; to know that all are, go through them once before. Ids may come more than once.

    Args:
        folder: the export.
        split: cuts the texts of lines that do not say how theirs was cut. None: such a text is
            one piece of 0 tokens.

    Raises:
        InvalidInputError: the manifest (here), a part (while iterating) is missing or wrong; a
            wrong line is a `CorpusError`. The message names file, and line, field or tensor.
    """
    manifest = Manifest.read(folder)
    return manifest, _parts(folder, manifest, split or (lambda text: [Piece(text, 0)]))


def _parts(
    folder: Path, manifest: Manifest, split: Callable[[str], list[Piece]]
) -> Iterator[ExportPart]:
    documents = references = 0
    dimension = manifest.dimension
    for number in range(1, manifest.parts + 1):
        lines, tensors = (folder / name for name in part_names(number))
        with TensorFile(tensors) as file:
            for part in _file_parts(lines, file, manifest, dimension, split):
                documents += len(part.entries)
                references += len(part.embeddings)
                dimension = part.embeddings.shape[1]
                yield part
    due = manifest.documents, manifest.references
    if due != (documents, references):
        raise InvalidInputError(
            f"the parts in '{folder}' hold {documents} documents with {references} references, "
            f"{MANIFEST} says {due[0]} with {due[1]}. Copy the whole folder, or export again"
        )


def _file_parts(
    path: Path,
    tensors: TensorFile,
    manifest: Manifest,
    dimension: int | None,
    split: Callable[[str], list[Piece]],
) -> Iterator[ExportPart]:
    """All of one pair of files."""
    total, found = tensors.require("embeddings", ("F32",), (None, dimension)).shape
    if found == 0:
        raise tensors.wrong("embeddings have no dimension")
    memories = memories_of(tensors, total, manifest.shape)
    for name in tensors.tensors:
        if name not in ("embeddings", *memories.names):
            raise tensors.wrong(f"unknown tensor {short(name)} beside {', '.join(memories.names)}")
        tensors.check(name)
    require_regular(path)
    try:
        file = path.open("rb")
    except OSError as error:
        raise cannot_read(path, error) from error
    with file:
        _check_lines(path, file, tensors.checksum("documents"))
        start = 0
        for entries in _runs(path, file, split):
            counts = np.array([len(entry.pieces) for entry in entries])
            ends = start + np.cumsum(counts)
            if ends[-1] > total:
                raise tensors.wrong(
                    f"it has embeddings of {total} references, '{path.name}' has more up to line "
                    f"{entries[-1].line}"
                )
            sizes = np.add.reduceat(memories.sizes(start, int(ends[-1])), ends - counts - start)
            for group in _groups(sizes + counts * (4 * found)):
                stop = int(ends[group.stop - 1])
                yield ExportPart(
                    file=str(path),
                    entries=entries[group],
                    embeddings=tensors.read("embeddings", start, stop),
                    memories=memories.read(start, stop),
                )
                start = stop
    if start != total:
        raise tensors.wrong(
            f"it has embeddings of {total} references, '{path.name}' has {start} references. "
            "Copy both files again, or export again"
        )
    memories.finish()


def _groups(sizes: NDArray[np.int64]) -> Iterator[slice]:
    """Consecutive documents, as many as fit into a part."""
    start, held = 0, 0
    for at, size in enumerate(sizes.tolist()):
        if at > start and held + size > _MOST_TENSOR_BYTES:
            yield slice(start, at)
            start, held = at, 0
        held += size
    yield slice(start, len(sizes))


def _check_lines(path: Path, file: BinaryIO, due: str | None) -> None:
    if due is None:
        return
    digest = xxhash.xxh3_64()
    try:
        while block := file.read(_BLOCK):
            digest.update(block)
        file.seek(0)
    except OSError as error:
        raise cannot_read(path, error) from error
    if digest.hexdigest() != due:
        raise InvalidInputError(
            f"'{path}' is damaged: the checksum in the .safetensors file beside it does not "
            "match. Export again, or copy both files again"
        )


def _runs(path: Path, file: BinaryIO, split: Callable[[str], list[Piece]]) -> Iterator[list[Entry]]:
    """The documents of a file, not too many at once."""
    run: list[Entry] = []
    references = held = 0
    for number, line in _lines(path, file):
        try:
            entry = decode_line(number, line, split)
        except InvalidInputError as error:
            raise CorpusError(str(path), number, str(error)) from error
        full = (
            references + len(entry.pieces) > _MOST_REFERENCES or held + len(line) > _MOST_LINE_BYTES
        )
        if run and full:
            yield run
            run, references, held = [], 0, 0
        run.append(entry)
        references += len(entry.pieces)
        held += len(line)
    if run:
        yield run


def _lines(path: Path, file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    number = 0
    while True:
        number += 1
        try:
            line = file.readline(LINE_LIMIT + 1)
        except OSError as error:
            raise cannot_read(path, error) from error
        if len(line) > LINE_LIMIT:
            raise CorpusError(str(path), number, f"it has more than {LINE_LIMIT} bytes")
        if not line:
            return
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line.strip():
            yield number, line
