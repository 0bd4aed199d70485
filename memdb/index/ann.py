"""The index file: a FAISS inverted file (IVF) over the embeddings, read-only and mapped.

Its vectors are cut into clusters; a query looks at those of the `nprobe` clusters whose centres
are nearest. Numbers are held as float16: the scores are the cosine similarity to within 1e-3.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import xxhash
from numpy.typing import NDArray

from memdb.errors import CorruptRecordError
from memdb.storage.durable import sync
from memdb.types.canonical import read_json
from memdb.types.native import of_the_machine

FILE = "index.faiss"
NEW = FILE + ".new"

_TAIL = struct.Struct("<QQ8s")  # bytes of the JSON, its checksum, the magic
_MAGIC = b"memdbidx"
_BLOCK = 1 << 20
_LARGEST_JSON = 1 << 16

Ids = NDArray[np.int64]
Vectors = NDArray[np.float32]
#: One bit for each reference id, from 0; set where the id may be found.
Bitmap = NDArray[np.uint8]


@dataclass(frozen=True)
class IndexInfo:
    """What an index file says of itself.

    Attributes:
        database: id of the database it was built from.
        change: the change up to which it is built.
        seal: what names that change (`Transaction.change_seal`); empty in a file of a release that
            gave none.
        references: how many vectors it holds.
        dimension: their length.
        lists: clusters.
        nprobe: clusters that a query looks at.
        recall: share of the true 5 nearest that were found when it was built.
        trained: references there were when its clusters were found.
    """

    database: str
    change: int
    seal: str
    references: int
    dimension: int
    lists: int
    nprobe: int
    recall: float
    trained: int


class AnnIndex:
    """An index file, open. Threads may search it at once.

    Attributes:
        info: what it says of itself.
        stamp: what tells this file from the next in its place.
    """

    def __init__(self, path: Path) -> None:
        """Open a file.

        Raises:
            OSError: there is none.
            CorruptRecordError: it is damaged, or none of ours.
        """
        # Another process may put a newer file in its place at any moment, between two looks too.
        while True:
            self.stamp = file_stamp(path)
            try:
                self.info, self._index = _read(path)
            except CorruptRecordError:
                if file_stamp(path) == self.stamp:
                    raise
            else:
                if file_stamp(path) == self.stamp:
                    break
        self._usual = search_parameters(self.info.nprobe)

    def search(
        self, queries: Vectors, k: int, allowed: Bitmap | None = None, nprobe: int | None = None
    ) -> tuple[Vectors, Ids]:
        """Scores and ids, each (queries, k), best first; id -1 where fewer were found.

        Args:
            queries: (n, dimension), each of length 1.
            k: at least 1.
            allowed: ids that may be found; default: all.
            nprobe: clusters to look at; default: as many as the recall asks for.
        """
        parameters = self._usual
        if allowed is not None or nprobe is not None:
            nprobe = min(nprobe or self.info.nprobe, self.info.lists)
            parameters = search_parameters(nprobe, allowed)
        queries = np.ascontiguousarray(queries)
        scores = np.empty((len(queries), k), np.float32)
        ids = np.empty((len(queries), k), np.int64)
        # What FAISS's Python wrapper calls, without its checks: these take as long as a few lists.
        pointers = faiss.swig_ptr(scores), faiss.swig_ptr(ids)
        self._index.search_c(len(queries), faiss.swig_ptr(queries), k, *pointers, parameters)
        return scores, ids

    def vectors(self) -> Iterator[tuple[Ids, Vectors]]:
        """Ids and vectors, (n,) and (n, dimension), as they are held, cluster by cluster.

        Raises:
            CorruptRecordError: they are held in another form.
        """
        lists = self._index.invlists
        width = 2 * self.info.dimension
        if lists.code_size != width:
            raise _damaged("its vectors are no float16")
        for cluster in range(lists.nlist):
            size = lists.list_size(cluster)
            if size:
                ids = faiss.rev_swig_ptr(lists.get_ids(cluster), size).copy()
                codes = faiss.rev_swig_ptr(lists.get_codes(cluster), size * width)
                vectors = codes.view("<f2").reshape(size, -1).astype(np.float32)
                yield ids, vectors

    def quantizer(self) -> Any:
        """The clusters' centres, as a FAISS index of its own."""
        return faiss.clone_index(faiss.downcast_index(self._index.quantizer))


def search_parameters(nprobe: int, allowed: Bitmap | None = None) -> Any:
    """What FAISS takes to look at so many clusters, for some ids or all."""
    coarse = faiss.SearchParametersHNSW(efSearch=max(16, nprobe))
    if allowed is None:
        return faiss.SearchParametersIVF(nprobe=nprobe, quantizer_params=coarse)
    selector = faiss.IDSelectorBitmap(allowed)
    return faiss.SearchParametersIVF(nprobe=nprobe, quantizer_params=coarse, sel=selector)


def file_stamp(path: Path) -> tuple[int, int, int]:
    """What changes when another file comes to a path; OSError if there is none."""
    file = os.stat(path)  # noqa: PTH116 (asked often)
    return file.st_ino, file.st_mtime_ns, file.st_size


def write_index(index: Any, info: IndexInfo, folder: Path) -> None:
    """Put an index file in the place of the one that is there, durably, in one step.

    Raises:
        OSError: the disk refuses.
    """
    new = folder / NEW
    try:
        faiss.write_index(index, str(new))
        _finish(new, info)
    except BaseException as error:
        new.unlink(missing_ok=True)
        if isinstance(error, RuntimeError):  # what FAISS says of a disk that refuses
            raise OSError(f"FAISS: {str(error).splitlines()[0]}") from error
        raise
    new.rename(folder / FILE)
    sync(folder)


def _finish(new: Path, info: IndexInfo) -> None:
    """Write what stands behind the FAISS index, and wait for the disk."""
    text = json.dumps({**asdict(info), "checksum": _checksum(new, new.stat().st_size)}).encode()
    with new.open("ab") as file:
        file.write(text + _TAIL.pack(len(text), xxhash.xxh3_64_intdigest(text), _MAGIC))
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path) -> tuple[IndexInfo, Any]:
    """What a file says of itself, and the FAISS index in it."""
    info = _read_info(path)
    try:
        index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
    except RuntimeError as error:
        raise (of_the_machine(error) or _damaged(str(error))) from error
    if (index.ntotal, index.d) != (info.references, info.dimension):
        raise _damaged("it does not hold what it says")
    return info, index


def _read_info(path: Path) -> IndexInfo:
    """What stands behind the FAISS index, once the checksums are right."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if size < _TAIL.size:
            raise _damaged("it is cut short")
        file.seek(size - _TAIL.size)
        length, checksum, magic = _TAIL.unpack(file.read(_TAIL.size))
        if magic != _MAGIC or length > min(_LARGEST_JSON, size - _TAIL.size):
            raise _damaged("its end is missing")
        end = size - _TAIL.size - length
        file.seek(end)
        text = file.read(length)
    if xxhash.xxh3_64_intdigest(text) != checksum:
        raise _damaged("its checksum does not match")
    try:
        values = read_json(text)
        of_the_index = values.pop("checksum")
        values.setdefault("seal", "")  # a file of a release that wrote none
        info = IndexInfo(**{field.name: values[field.name] for field in fields(IndexInfo)})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(f"its description does not decode ({error})") from error
    numbers = {
        name: value
        for name, value in asdict(info).items()
        if name not in ("database", "recall", "seal")
    }
    named = isinstance(info.database, str) and isinstance(info.seal, str)
    if not named or any(type(number) is not int or number < 0 for number in numbers.values()):
        raise _damaged("its description is not one of an index")
    if of_the_index != _checksum(path, end):
        raise _damaged("its checksum does not match")
    return info


def _checksum(path: Path, end: int) -> str:
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        left = end
        while left and (block := file.read(min(_BLOCK, left))):
            digest.update(block)
            left -= len(block)
    return str(digest.hexdigest())


def _damaged(problem: str) -> CorruptRecordError:
    return CorruptRecordError("index", FILE, problem)
