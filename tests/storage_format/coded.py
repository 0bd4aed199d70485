"""Vectors under each codec, written from storage_format.md alone: nothing of memdb is used."""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import Any

import faiss
import numpy as np
import xxhash

PLAIN = ("exact", "int8", "int4", "rotated4", "rotated3", "rotated2")
TRANSFORMS = ("klt5", "klt8", "klt11")
FAMILIES = (*TRANSFORMS, "paper")
TOLERANCE = 1e-5  # of a vector's length, where sums of f32 are promised no closer


def f32(x: float) -> float:
    """Rounded to the nearest f32. From the f64 quotient or product of two f32 this is exact."""
    (rounded,) = struct.unpack("<f", struct.pack("<f", x))
    return float(rounded)


def widen(data: bytes, dtype: str) -> list[float]:
    if dtype == "bfloat16":
        data = b"".join(b"\0\0" + data[i : i + 2] for i in range(0, len(data), 2))
    code, size = ("e", 2) if dtype == "float16" else ("f", 4)
    return list(struct.unpack(f"<{len(data) // size}{code}", data))


def narrow(numbers: Sequence[float], dtype: str) -> bytes:
    if dtype == "float32":
        return struct.pack(f"<{len(numbers)}f", *numbers)
    if dtype == "float16":
        return struct.pack(f"<{len(numbers)}e", *[min(max(x, -65504), 65504) for x in numbers])
    most = 2.0**128 - 2.0**120
    clipped = [min(max(x, -most), most) for x in numbers]
    bits = struct.unpack(f"<{len(numbers)}I", struct.pack(f"<{len(numbers)}f", *clipped))
    return struct.pack(f"<{len(bits)}H", *[(b + 0x7FFF + ((b >> 16) & 1)) >> 16 for b in bits])


def matrix(data: bytes, d: int, dtype: str) -> np.ndarray:
    """(n, d) float64."""
    return np.array(widen(data, dtype), np.float64).reshape(-1, d)


def assert_close(data: bytes, other: bytes, d: int, dtype: str) -> None:
    """Vectors that are the same but for the rounding of f32 sums, and so of the dtype."""
    x, y = matrix(data, d, dtype), matrix(other, d, dtype)
    assert x.shape == y.shape
    unit = {"float32": 0.0, "float16": 2.0**-10, "bfloat16": 2.0**-7}[dtype]
    smallest = {"float32": 0.0, "float16": 2.0**-24, "bfloat16": 2.0**-133}[dtype]
    scale = np.abs(x).max(initial=1e-300)  # squares would overflow
    lengths = np.sqrt(np.square(x / scale).sum(axis=1, keepdims=True)) * scale
    assert (np.abs(x - y) <= TOLERANCE * lengths + unit * np.abs(x) + smallest).all()


# --- codecs that are ready ------------------------------------------------------------------------

LARGEST_SCALE = struct.unpack("<f", struct.pack("<I", 0x7C010203))[0]
LEVELS = {
    2: (0.45278, 1.51042),
    3: (0.24509, 0.75601, 1.34391, 2.15195),
    4: (0.12840, 0.38804, 0.65676, 0.94234, 1.25622, 1.61805, 2.06902, 2.73259),
}


def vector_bytes(codec: str, d: int, dtype: str) -> int:
    """Bytes of a vector under a codec that is ready."""
    if codec == "exact":
        return d * (4 if dtype == "float32" else 2)
    if codec == "int8":
        return d + 4
    return 2 + (bits_of(codec) * d + 7) // 8


def bits_of(codec: str) -> int:
    return int(codec[-1])


def write_vectors(codec: str, data: bytes, d: int, dtype: str) -> bytes:
    """Vectors of `dtype`, as `exact` bytes, to those of a codec that is ready."""
    if codec == "exact":
        return data
    if codec == "int8":
        return write_int8(data, d, dtype)
    write = write_int4 if codec == "int4" else write_rotated
    scales, codes = b"", b""
    numbers, bits = widen(data, dtype), bits_of(codec)
    for at in range(0, len(numbers), d):
        scale, own = write(numbers[at : at + d], bits)
        scales += struct.pack("<H", scale)
        number = sum(code << bits * i for i, code in enumerate(own))
        codes += number.to_bytes((bits * d + 7) // 8, "little")
    return scales + codes


def read_vectors(codec: str, data: bytes, d: int, dtype: str) -> bytes:
    """The inverse."""
    n, rest = divmod(len(data), vector_bytes(codec, d, dtype))
    assert rest == 0
    if codec == "exact":
        return data
    if codec == "int8":
        return read_int8(data, d, dtype)
    bits = bits_of(codec)
    width = (bits * d + 7) // 8
    found: list[float] = []
    for v in range(n):
        scale = bf16(*struct.unpack_from("<H", data, 2 * v))
        at = 2 * n + v * width
        number = int.from_bytes(data[at : at + width], "little")
        codes = [number >> bits * i & (1 << bits) - 1 for i in range(d)]
        if codec == "int4":
            found += [f32((code - 8) * scale) for code in codes]
        else:
            most = (2.0 - 2.0**-23) * 2.0**127
            back = rotation(d) @ np.array([all_levels(bits)[code] for code in codes])
            found += np.clip(back * scale, -most, most).tolist()
    return narrow(found, dtype)


def write_int8(data: bytes, d: int, dtype: str) -> bytes:
    """Vectors of `dtype`, as `exact` bytes, to `int8` bytes."""
    numbers = widen(data, dtype)
    scales, levels = [], []
    for at in range(0, len(numbers), d):
        x = numbers[at : at + d]
        s = min(f32(max(map(abs, x)) / 127), LARGEST_SCALE)
        scales.append(s)
        levels += [max(-127, min(127, round(x_i / s))) if s else 0 for x_i in x]
    return struct.pack(f"<{len(scales)}f{len(levels)}b", *scales, *levels)


def read_int8(data: bytes, d: int, dtype: str) -> bytes:
    """`int8` bytes to vectors of `dtype`, as `exact` bytes."""
    n = len(data) // (d + 4)
    fields = struct.unpack(f"<{n}f{n * d}b", data)
    return narrow([f32(q * fields[i // d]) for i, q in enumerate(fields[n:])], dtype)


def bf16(bits: int) -> float:
    (value,) = struct.unpack("<f", struct.pack("<I", bits << 16))
    return float(value)


def write_int4(x: Sequence[float], bits: int) -> tuple[int, list[int]]:
    """Scale and codes of one vector."""
    least = max(map(abs, x)) / 7
    scale, above = 0, 0x7E12  # the first bfloat16 that is not less, by halving
    while scale < above:
        middle = (scale + above) // 2
        scale, above = (scale, middle) if bf16(middle) >= least else (middle + 1, above)
    s = bf16(scale)
    return scale, [8 + (max(-7, min(7, round(x_i / s))) if s else 0) for x_i in x]


def write_rotated(x: Sequence[float], bits: int) -> tuple[int, list[int]]:
    """Scale and codes of one vector."""
    d = len(x)
    mean_square = math.sqrt(sum(x_i * x_i for x_i in x) / d)
    try:
        (b,) = struct.unpack("<I", struct.pack("<f", mean_square))
    except OverflowError:
        b = 0x7F800000
    scale = min((b + 0x7FFF + ((b >> 16) & 1)) >> 16, 0x7F7F)
    y = (np.array(x) / (bf16(scale) or 1.0)) @ rotation(d)
    y = [f32(y_i) for y_i in y.tolist()]
    return scale, [sum(border < y_i for border in borders(bits)) for y_i in y]


@cache
def borders(bits: int) -> list[float]:
    """Between two levels each, as f32."""
    levels = [np.float32(level) for level in all_levels(bits)]
    return [float((a + b) / np.float32(2)) for a, b in pairwise(levels)]


@cache
def all_levels(bits: int) -> list[float]:
    """Ascending, as f32."""
    positive = [f32(level) for level in LEVELS[bits]]
    return [-level for level in positive[::-1]] + positive


@cache
def rotation(d: int) -> np.ndarray:
    """(d, d) float64, from the sums that define it."""
    data = hashlib.shake_128(b"memdb rotation").digest((2 * d + 7) // 8)
    signs = [-1 if data[i // 8] >> i % 8 & 1 else 1 for i in range(2 * d)]
    c = np.empty((d, d))
    for i in range(d):
        for j in range(d):
            c[i, j] = math.sqrt((2 if j else 1) / d) * math.cos(math.pi * (i + 0.5) * j / d)
    return np.diag(signs[:d]) @ c @ np.diag(signs[d:]) @ c


# --- codecs that are fitted -----------------------------------------------------------------------

TYPES = {"f2": "<f2", "f4": "<f4", "f8": "<f8", "u1": "u1"}


@dataclass(frozen=True)
class Parameters:
    """A fitted codec's, which have to be those that its name says."""

    values: dict[str, Any]
    arrays: dict[str, np.ndarray]

    @classmethod
    def read(cls, name: str, data: bytes) -> Parameters:
        family, digits = split_name(name)
        assert family
        assert digits == f"{xxhash.xxh3_64_intdigest(data, seed=0):016x}"
        (h,) = struct.unpack_from("<I", data)
        header = data[4 : 4 + h]
        assert len(header) == h
        values = json.loads(header)
        canonical = json.dumps(values, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        assert canonical.encode() == header
        at, arrays = 4 + h, {}
        for entry in values.pop("arrays"):
            assert set(entry) == {"name", "shape", "type"}
            dtype = np.dtype(TYPES[entry["type"]])
            count = math.prod(entry["shape"])
            array = np.frombuffer(data, dtype, count, at).reshape(entry["shape"])
            arrays[entry["name"]] = array
            at += array.nbytes
        assert at == len(data)
        return cls(values, arrays)


def split_name(name: str) -> tuple[str, str]:
    """Family and digits of a fitted codec's name; empty if it is none."""
    found = re.fullmatch(r"([a-z0-9]+):([0-9a-f]{16})", name)
    return (found[1], found[2]) if found else ("", "")


def is_known(codec: str) -> bool:
    return codec in PLAIN or split_name(codec)[0] in FAMILIES


@dataclass(frozen=True)
class Place:
    """Which row and which token each vector of a memory belongs to."""

    shape: dict[str, Any]
    counts: Sequence[int]
    positions: Sequence[int]
    rows: list[int] = field(init=False)

    def __post_init__(self) -> None:
        rows = [row for row, count in enumerate(self.counts) for _ in range(count)]
        object.__setattr__(self, "rows", rows)

    @property
    def n(self) -> int:
        return len(self.positions)


def read_section(
    codec: str, part: str, data: bytes, place: Place, fitted: Mapping[str, bytes]
) -> bytes:
    """Keys, or values, of one memory as `exact` bytes."""
    d, dtype = place.shape["head_dim"], place.shape["dtype"]
    if codec in PLAIN:
        assert len(data) == place.n * vector_bytes(codec, d, dtype)
        return read_vectors(codec, data, d, dtype)
    family, _ = split_name(codec)
    parameters = Parameters.read(codec, fitted[codec])
    read = read_transform if family in TRANSFORMS else read_paper
    found = turned(read(parameters, part, data, place), parameters, part, place)
    return narrow(found.ravel().tolist(), dtype)


def turned(found: np.ndarray, parameters: Parameters, part: str, place: Place) -> np.ndarray:
    """The vectors, (n, d) float64, with RoPE as their layers' angles say."""
    if f"{part}.angles" not in parameters.arrays:
        return found
    assert part == "keys"
    angles, heads = parameters.arrays["keys.angles"], place.shape["kv_heads"]
    pairs = angles.shape[1]
    assert angles.shape[0] * heads == len(place.counts)
    assert 2 * pairs <= found.shape[1]
    for v, row in enumerate(place.rows):
        own = angles[row // heads]
        if np.isnan(own).any():
            continue
        for i in range(pairs):
            turn = (len(place.shape["prefix"]) + place.positions[v]) * own[i]
            a, b = found[v, i], found[v, i + pairs]
            found[v, i] = a * math.cos(turn) - b * math.sin(turn)
            found[v, i + pairs] = b * math.cos(turn) + a * math.sin(turn)
    return found


def centre_of(parameters: Parameters, part: str, place: Place) -> tuple[np.ndarray, np.ndarray]:
    """Means and scales of the rows."""
    means, scales = (parameters.arrays[f"{part}.{what}"] for what in ("means", "scales"))
    assert means.shape == (len(place.counts), place.shape["head_dim"])
    assert scales.shape == (len(place.counts),)
    return means.astype(np.float64), scales.astype(np.float64)


PER_BYTE = {1: 127, 2: 7, 3: 2, 5: 1}


def read_transform(parameters: Parameters, part: str, data: bytes, place: Place) -> np.ndarray:
    """Vectors without RoPE."""
    means, scales = centre_of(parameters, part, place)
    own, basis = parameters.values[part], parameters.arrays[f"{part}.basis"].astype(np.float64)
    rows, kept, d = basis.shape
    assert (rows, d) == means.shape
    levels = transform_levels(own["streams"], data, place.n)
    assert levels.shape == (place.n, kept)
    found = np.empty((place.n, d))
    for v, row in enumerate(place.rows):
        unit = f32(scales[row] * f32(own["step"]))
        found[v] = means[row] + levels[v] @ (basis[row] * unit)
    return found


def transform_levels(streams: Sequence[Sequence[int]], data: bytes, n: int) -> np.ndarray:
    """(n, kept) whole numbers."""
    kept = sum(count for _, count, _ in streams)
    levels = np.zeros((n, kept))
    if n == 0:
        assert data == b""
        return levels
    lengths = struct.unpack_from(f"<{len(streams)}I", data)
    at = 4 * len(streams)
    assert len(data) == at + sum(lengths)
    due = 0
    for (first, count, packed), length in zip(streams, lengths, strict=True):
        assert first == due
        due += count
        inflate = zlib.decompressobj(-15)
        content = inflate.decompress(data[at : at + length])
        assert inflate.eof
        assert not inflate.unused_data
        at += length
        width = -(-count // packed)
        assert len(content) == n * width
        largest = PER_BYTE[packed]
        base = 2 * largest + 1
        assert max(content) < base**packed
        for j in range(count):
            for v in range(n):
                byte = content[j // packed * n + v]
                levels[v, first + j] = byte // base ** (j % packed) % base - largest
    return levels


def read_paper(parameters: Parameters, part: str, data: bytes, place: Place) -> np.ndarray:
    """Vectors without RoPE, from the centres that FAISS has: its decoder is not used."""
    means, scales = centre_of(parameters, part, place)
    serialized = parameters.arrays[f"{part}.index"]
    assert serialized.dtype == np.uint8
    digits = f"{xxhash.xxh3_64_intdigest(serialized.tobytes(), seed=0):016x}"
    assert parameters.values[part] == {"checksum": digits}
    index = faiss.deserialize_index(serialized)
    d = means.shape[1]
    assert (index.d, index.ntotal) == (d, 0)
    back = np.eye(d)
    if isinstance(index, faiss.IndexPreTransform):
        assert index.chain.size() == 1
        opq = faiss.downcast_VectorTransform(index.chain.at(0))
        assert not opq.have_bias
        back = faiss.vector_to_array(opq.A).astype(np.float64).reshape(d, d)
        index = faiss.downcast_index(index.index)
    coarse = centres_of(faiss.downcast_index(index.q1.quantizer).pq)
    fine = centres_of(index.pq)
    coarse_bits, fine_bits = (int(one.shape[1]).bit_length() - 1 for one in (coarse, fine))
    front, behind = (
        (bits * len(centres) + 7) // 8
        for bits, centres in ((coarse_bits, coarse), (fine_bits, fine))
    )
    assert len(data) == place.n * (front + behind)
    found = np.empty((place.n, d))
    for v, row in enumerate(place.rows):
        code = data[v * (front + behind) : (v + 1) * (front + behind)]
        number = int.from_bytes(code[:front], "little")
        assert number < 1 << coarse_bits * len(coarse)
        y = pieces(coarse, number, coarse_bits)
        y = y + pieces(fine, int.from_bytes(code[front:], "little"), fine_bits)
        found[v] = means[row] + scales[row] * (y @ back)
    return found


def centres_of(quantizer: Any) -> np.ndarray:
    """(pieces, centres, numbers of a piece) of a product quantizer."""
    centroids = faiss.vector_to_array(quantizer.centroids).astype(np.float64)
    found: np.ndarray = centroids.reshape(quantizer.M, quantizer.ksub, quantizer.dsub)
    return found


def pieces(centres: np.ndarray, number: int, bits: int) -> np.ndarray:
    """The vector of the centres whose numbers are in one, least first."""
    own = [piece[number >> bits * m & (1 << bits) - 1] for m, piece in enumerate(centres)]
    return np.concatenate(own)
