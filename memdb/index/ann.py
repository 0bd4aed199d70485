"""The index file: a FAISS inverted file (IVF) over the embeddings, read-only and mapped.

Its vectors are cut into clusters; a query looks at those of the `nprobe` clusters whose centres
are nearest. Numbers are held as float16: the scores are the cosine similarity to within 1e-3.

A vector's *row* is its place in the order of the reference ids, from 0. FAISS knows rows alone, so
that a bitmap of them is as long as there are vectors, whatever ids these have.

What FAISS reads when the file is opened is checked then; the content of a cluster, which is most of
the file, when it is first looked at.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from functools import cached_property
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
SPREAD_STEPS = 40  # of `IndexInfo.spread`

_TAIL = struct.Struct("<QQ8s")  # bytes of the JSON, its checksum, the magic
_MAGIC = b"memdbix2"
_OLDER_MAGIC = b"memdbidx"  # files of the release before, whose ids are reference ids
_LARGEST_JSON = 1 << 16
_ROW = 8  # bytes, behind a vector's float16 numbers
_PLACE = 8 + 4 + 4  # bytes: reference id, cluster, place in it
_SEAL = 8  # bytes, of a cluster's content

Ids = NDArray[np.int64]
Vectors = NDArray[np.float32]
#: One bit for each row, from 0; set where it may be found.
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
        nprobe: clusters that a query for few of all looks at.
        recall: share of the true 5 nearest that were found when it was built.
        hits: so many are few.
        trained: references there were when its clusters were found.
        spread: how far a vector's score is from that of its cluster's centre (root of the mean
            square), for centres of scores -1 to 1 in 40 equal steps.
    """

    database: str
    change: int
    seal: str
    references: int
    dimension: int
    lists: int
    nprobe: int
    recall: float
    hits: int
    trained: int
    spread: tuple[float, ...]


@dataclass(frozen=True)
class Built:
    """An index that is not yet a file.

    Attributes:
        index: of FAISS; its ids are rows.
        ids: (references,) reference ids by row, ascending.
    """

    index: Any
    ids: Ids


class OutdatedIndexError(CorruptRecordError):
    """An index file of an earlier release: no damage, and of no use."""


class AnnIndex:
    """An index file, open. Threads may search it at once.

    Attributes:
        info: what it says of itself.
        stamp: what tells this file from the next in its place.
        ids: (references,) reference ids by row, ascending.
        damaged: whether a cluster was found damaged.
    """

    def __init__(self, path: Path) -> None:
        """Open a file.

        Raises:
            OSError: there is none.
            CorruptRecordError: it is damaged, or none of ours.
            OutdatedIndexError: an earlier release wrote it.
        """
        # Another process may put a newer file in its place at any moment, between two looks too.
        while True:
            self.stamp = file_stamp(path)
            try:
                content = _content(path)
                self.info, self._head = _described(content)
                self._index = _faiss_index(path, self.info)
            except CorruptRecordError:
                if file_stamp(path) == self.stamp:
                    raise
            else:
                if file_stamp(path) == self.stamp:
                    break
        self.damaged = False
        self._content = np.frombuffer(content, np.uint8)
        info = self.info
        end = self._head + info.references * self._each
        self.ids: Ids = np.frombuffer(content, "<i8", info.references, end)
        end += self.ids.nbytes
        self._clusters, self._places = np.frombuffer(
            content, "<u4", 2 * info.references, end
        ).reshape(2, -1)
        end += 2 * self._places.nbytes
        self._seals = np.frombuffer(content, "<u8", info.lists, end)
        self._unchecked = np.ones(info.lists, np.bool_)
        self._left = info.lists  # how many of these
        self._quantizer = faiss.downcast_index(self._index.quantizer)
        self._nprobe = max(1, min(info.nprobe, info.lists))
        self._coarse = faiss.SearchParametersHNSW(efSearch=max(16, self._nprobe))
        self._usual = search_parameters(self._nprobe)

    # --- searching ---

    def nearest(self, queries: Vectors, k: int) -> tuple[Vectors, Ids]:
        """Scores and rows of the nearest in the `nprobe` nearest clusters, each (queries, k), best
        first; row -1 where fewer were found.

        Args:
            queries: (n, dimension), each of length 1.
            k: at least 1.

        Raises:
            CorruptRecordError: a cluster is damaged.
        """
        queries = np.ascontiguousarray(queries)
        count, nprobe = len(queries), self._nprobe
        # What FAISS's Python wrapper calls, without its checks: these take as long as a few lists.
        asked = faiss.swig_ptr(queries)
        scores, rows = np.empty((count, k), np.float32), np.empty((count, k), np.int64)
        found = faiss.swig_ptr(scores), faiss.swig_ptr(rows)
        if not self._left:
            self._index.search_c(count, asked, k, *found, self._usual)
            return scores, rows
        near, clusters = np.empty((count, nprobe), np.float32), np.empty((count, nprobe), np.int64)
        nearest = faiss.swig_ptr(near), faiss.swig_ptr(clusters)
        self._quantizer.search_c(count, asked, nprobe, *nearest, self._coarse)
        self._check(clusters)
        self._index.search_preassigned_c(
            count, asked, k, *reversed(nearest), *found, False, self._usual, None
        )
        return scores, rows

    def scan(
        self, query: Vectors, k: int, clusters: Ids, allowed: Bitmap | None
    ) -> tuple[Vectors, Ids]:
        """Scores and rows of the nearest in some clusters, each (1, k), best first; row -1 where
        fewer were found.

        Args:
            query: (1, dimension), of length 1.
            k: at least 1.
            clusters: (n,), which.
            allowed: rows that may be found; default: all.

        Raises:
            CorruptRecordError: a cluster is damaged.
        """
        self._check(clusters)
        parameters = faiss.SearchParametersIVF(nprobe=len(clusters))
        if allowed is not None:
            parameters = faiss.SearchParametersIVF(
                nprobe=len(clusters), sel=faiss.IDSelectorBitmap(allowed)
            )
        query, clusters = np.ascontiguousarray(query), np.ascontiguousarray(clusters)
        near = np.zeros(len(clusters), np.float32)  # asked for where vectors are residuals
        scores, rows = np.empty((1, k), np.float32), np.empty((1, k), np.int64)
        asked, *pointers = (
            faiss.swig_ptr(array) for array in (query, clusters, near, scores, rows)
        )
        self._index.search_preassigned_c(1, asked, k, *pointers, False, parameters, None)
        return scores, rows

    def vectors_of(self, rows: Ids) -> Vectors:
        """(n, dimension) float32, as they are held.

        Raises:
            CorruptRecordError: a cluster is damaged.
        """
        clusters = self._clusters[rows]
        self._check(clusters)
        width = 2 * self.info.dimension
        starts = self._starts[clusters] + self._places[rows] * np.int64(width)
        # A window on every byte of the file: numpy copies those asked for row by row.
        windows = np.lib.stride_tricks.as_strided(
            self._content, (len(self._content) - width + 1, width), (1, 1), writeable=False
        )
        vectors: Vectors = windows[starts].view("<f2").astype(np.float32)
        return vectors

    # --- what is where ---

    def rows_of(self, ids: Ids) -> Ids:
        """The rows of those of some ids that are in it; ids and rows ascend."""
        if not len(ids) or not len(self.ids):
            return np.zeros(0, np.int64)
        rows = np.minimum(np.searchsorted(self.ids, ids), len(self.ids) - 1)
        found: Ids = rows[self.ids[rows] == ids]
        return found

    def counts(self, rows: Ids) -> Ids:
        """(lists,) how many of some rows each cluster holds."""
        return np.bincount(self._clusters[rows], minlength=self.info.lists)

    @cached_property
    def sizes(self) -> Ids:
        """(lists,) how many vectors each cluster holds."""
        return np.bincount(self._clusters, minlength=self.info.lists)

    def vectors(self) -> Iterator[tuple[Ids, Vectors]]:
        """Ids and vectors, (n,) and (n, dimension), as they are held, cluster by cluster.

        Raises:
            CorruptRecordError: a cluster is damaged.
        """
        self.check()
        width = 2 * self.info.dimension
        for start, size in zip(self._starts.tolist(), self.sizes.tolist(), strict=False):
            if size:
                content = self._content[start : start + size * self._each]
                vectors = content[: size * width].view("<f2").reshape(size, -1)
                rows = content[size * width :].copy().view("<i8")
                yield self.ids[rows], vectors.astype(np.float32)

    def quantizer(self) -> Any:
        """The clusters' centres, as a FAISS index of its own."""
        return faiss.clone_index(self._quantizer)

    @cached_property
    def centres(self) -> Vectors:
        """(lists, dimension)."""
        return centres_of(self._index)

    @property
    def _each(self) -> int:
        """Bytes of a vector and its row."""
        return 2 * self.info.dimension + _ROW

    @cached_property
    def _starts(self) -> Ids:
        """(lists + 1,) where the content of each cluster begins in the file."""
        starts: Ids = self._head + self._each * np.concatenate([[0], np.cumsum(self.sizes)])
        return starts

    # --- checking ---

    def check(self) -> None:
        """Raise `CorruptRecordError` unless all clusters are as they were written."""
        self._check(np.arange(self.info.lists))

    def _check(self, clusters: Ids) -> None:
        """Raise `CorruptRecordError` unless clusters are as they were written; -1 is none."""
        if not self._left or not self._unchecked.take(clusters, mode="clip").any():
            return
        for cluster in sorted(set(clusters.ravel().tolist())):  # numpy's `unique` loads for 6 ms
            if cluster >= 0 and self._unchecked[cluster]:
                start, end = self._starts[cluster : cluster + 2].tolist()
                if xxhash.xxh3_64_intdigest(self._content[start:end].data) != self._seals[cluster]:
                    self.damaged = True
                    raise _damaged(f"the checksum of cluster {cluster} does not match")
                self._unchecked[cluster] = False
        self._left = int(np.count_nonzero(self._unchecked))
        if self._left <= self._nprobe:  # the last ones, which no query may ever come to
            self._check(np.flatnonzero(self._unchecked))


def search_parameters(nprobe: int) -> Any:
    """What FAISS takes to look at so many clusters."""
    coarse = faiss.SearchParametersHNSW(efSearch=max(16, nprobe))
    return faiss.SearchParametersIVF(nprobe=nprobe, quantizer_params=coarse)


def centres_of(index: Any) -> Vectors:
    """(lists, dimension) centres of a FAISS index's clusters, as a copy: in a file they lie where
    processors are slow to read."""
    flat = faiss.downcast_index(faiss.downcast_index(index.quantizer).storage)
    centres: Vectors = faiss.rev_swig_ptr(flat.get_xb(), flat.ntotal * flat.d)
    return centres.reshape(-1, flat.d).copy()


def file_stamp(path: Path) -> tuple[int, int, int]:
    """What changes when another file comes to a path; OSError if there is none."""
    file = os.stat(path)  # noqa: PTH116 (asked often)
    return file.st_ino, file.st_mtime_ns, file.st_size


# --- writing --------------------------------------------------------------------------------------


#: FAISS says nothing of a disk that was full when it closed the file.
_CUT_SHORT = "the file that it wrote does not hold the index; the disk may be full"


def write_index(built: Built, info: IndexInfo, folder: Path) -> None:
    """Put an index file in the place of the one that is there, durably, in one step.

    Raises:
        OSError: the disk refuses.
    """
    new = folder / NEW
    try:
        faiss.write_index(built.index, str(new))
        _finish(new, built, info)
    except BaseException as error:
        new.unlink(missing_ok=True)
        if isinstance(error, RuntimeError):  # what FAISS says of a disk that refuses
            raise OSError(f"FAISS: {str(error).splitlines()[0]}") from error
        raise
    new.rename(folder / FILE)
    sync(folder)


def _finish(new: Path, built: Built, info: IndexInfo) -> None:
    """Write what stands behind the FAISS index, and wait for the disk."""
    lists = built.index.invlists
    width = 2 * info.dimension
    clusters = np.full(info.references, info.lists, "<u4")
    places = np.zeros(info.references, "<u4")
    seals = np.zeros(info.lists, "<u8")
    with new.open("r+b") as file:
        head = new.stat().st_size - info.references * (width + _ROW)
        digest = xxhash.xxh3_64(file.read(head))
        for cluster in range(info.lists):
            size = lists.list_size(cluster)
            content = file.read(size * (width + _ROW))
            if len(content) != size * (width + _ROW):
                raise RuntimeError(_CUT_SHORT)
            seals[cluster] = xxhash.xxh3_64_intdigest(content)
            rows = np.frombuffer(content, "<i8", size, size * width)
            if size and not 0 <= rows.min() <= rows.max() < info.references:
                raise RuntimeError(_CUT_SHORT)
            clusters[rows], places[rows] = cluster, np.arange(size)
        if (clusters == info.lists).any():
            raise RuntimeError(_CUT_SHORT)
        for array in (built.ids.astype("<i8"), clusters, places, seals):
            digest.update(array.tobytes())
            file.write(array.tobytes())
        values = {**asdict(info), "head": head, "checksum": digest.hexdigest()}
        text = json.dumps(values).encode()
        file.write(text + _TAIL.pack(len(text), xxhash.xxh3_64_intdigest(text), _MAGIC))
        file.flush()
        os.fsync(file.fileno())


# --- reading --------------------------------------------------------------------------------------


def _content(path: Path) -> mmap.mmap:
    """A file's bytes, mapped."""
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size < _TAIL.size:
            raise _damaged("it is cut short")
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _described(content: mmap.mmap) -> tuple[IndexInfo, int]:
    """What a file says of itself, and where the clusters' contents begin in it, once the checksum
    of all but these is right."""
    length, checksum, magic = _TAIL.unpack_from(content, len(content) - _TAIL.size)
    if magic == _OLDER_MAGIC:
        raise OutdatedIndexError("index", FILE, "an earlier release wrote it")
    if magic != _MAGIC or length > min(_LARGEST_JSON, len(content) - _TAIL.size):
        raise _damaged("its end is missing")
    end = len(content) - _TAIL.size - length
    text = content[end : end + length]
    if xxhash.xxh3_64_intdigest(text) != checksum:
        raise _damaged("its checksum does not match")
    try:
        values = read_json(text)
        values.setdefault("seal", "")  # it is then of no state's past
        sealed, head, spread = values["checksum"], values["head"], values["spread"]
        values["spread"] = tuple(map(float, spread))
        info = IndexInfo(**{field.name: values[field.name] for field in fields(IndexInfo)})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(f"its description does not decode ({error})") from error
    numbers = {
        name: value
        for name, value in {**asdict(info), "head": head}.items()
        if name not in ("database", "recall", "seal", "spread")
    }
    named = isinstance(info.database, str) and isinstance(info.seal, str)
    if not named or any(type(number) is not int or number < 0 for number in numbers.values()):
        raise _damaged("its description is not one of an index")
    behind = head + info.references * (2 * info.dimension + _ROW)
    if (
        end != behind + info.references * _PLACE + info.lists * _SEAL
        or len(info.spread) != SPREAD_STEPS
        or not all(0 < step < math.inf for step in info.spread)
    ):
        raise _damaged("it does not hold what it says")
    digest = xxhash.xxh3_64()
    with memoryview(content) as view:
        for part in (view[:head], view[behind:end]):
            digest.update(part)
            part.release()
    if sealed != digest.hexdigest():
        raise _damaged("its checksum does not match")
    return info, head


def _faiss_index(path: Path, info: IndexInfo) -> Any:
    """The FAISS index in a file."""
    try:
        index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
    except RuntimeError as error:
        raise (of_the_machine(error) or _damaged(str(error))) from error
    held = index.ntotal, index.d, index.nlist
    if held != (info.references, info.dimension, info.lists):
        raise _damaged("it does not hold what it says")
    return index


def _damaged(problem: str) -> CorruptRecordError:
    return CorruptRecordError("index", FILE, problem)
