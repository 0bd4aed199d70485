"""The paper's codec: a residual product quantizer of FAISS, fitted to a database."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import faiss
import numpy as np
import xxhash
from numpy.typing import NDArray

from memdb.codecs.base import Family, FittedCodec, Layout, Part, Steps, joined, no_steps, put
from memdb.codecs.centre import Centre, Sample, angles_that_pay
from memdb.codecs.floor import Losses, keeps_rows, only, share
from memdb.codecs.parameters import fitted_name, read_parameters, write_parameters
from memdb.codecs.rope import Turns
from memdb.types.memory import from_float32, to_float32
from memdb.types.native import of_the_machine
from memdb.types.shape import MemoryShape

_COARSE_BITS = 14  # of each half of a vector, at most
_FINE_BITS = 10  # of each piece of what is left, at most
_FEWEST_BITS = 3  # FAISS has no fewer where a half is two numbers
_PIECES = 8  # of a vector, at most
_SAMPLE = 39  # vectors for each centre, as FAISS advises at least
_TRAINED = _SAMPLE << 13  # vectors: more take minutes
_OPQ_PIECE = 4  # numbers of each piece that OPQ turns a vector for, as in the paper
_OPQ_FEWEST = _SAMPLE << _FINE_BITS  # vectors: FAISS is slow at it with fewer
_ROUNDS = 10  # of k-means, and of OPQ
_STEPS = 2 + 2 * _ROUNDS  # of fitting keys, or values
_FARTHEST = 1e6  # over a row's scale: float32 holds the square of it
_LARGEST = np.finfo(np.float32).max

# FAISS finds the coarse centres of so many vectors at once, with a table of 2 * 2**bits distances
# for each. Its own number, 32,768, takes gigabytes.
faiss.cvar.multi_index_quantizer_search_bs = 256


@dataclass(frozen=True)
class Quantizer:
    """How the keys, or the values, of every row are coded.

    Attributes:
        centre: their statistics: what is quantized is a vector less its row's mean, over its scale.
        index: (bytes,) uint8; the FAISS index, serialized.
    """

    centre: Centre
    index: NDArray[np.uint8]

    @cached_property
    def coder(self) -> Any:
        """The FAISS index, without vectors; ValueError if it is not made for such vectors."""
        try:
            index = faiss.deserialize_index(self.index)
        except RuntimeError as error:
            damaged = ValueError(f"FAISS cannot read an index of it ({error})")
            raise (of_the_machine(error) or damaged) from error
        d = self.centre.means.shape[-1]
        if index.d != d or not isinstance(_layers(index), faiss.Index2Layer):
            raise ValueError(f"an index of it is not made for vectors of {d} numbers")
        return index

    @cached_property
    def width(self) -> int:
        """Bytes of a vector."""
        return int(self.coder.sa_code_size())

    @cached_property
    def last(self) -> tuple[int, int]:
        """The last byte of a vector's coarse code, and how many values it may have."""
        layers = _layers(self.coder)
        byte = layers.code_size_1 - 1
        return byte, layers.q1.nlist >> 8 * byte


class Paper(FittedCodec):
    """The codec of Memory3 (Yang et al., 2024, 3.1): OPQ, two coarse codes and a product quantizer.

    Keys are taken before RoPE where they are more alike there, and of each (layer, kv head) the
    mean is taken off and the scale divided out, so that one quantizer serves all. It turns a vector
    so that its pieces tell little of each other (Ge et al., 2013), replaces each half of it by the
    nearest of up to 2**13 centres (Babenko and Lempitsky, 2012; the paper: 2**14), and each of up
    to 8 pieces of what is left by the nearest of up to 2**10 (Jégou et al., 2011). 14 bytes a
    vector, as in the paper; 13 or less where there were less than 320,000 to fit it to: at head_dim
    64, 9.1 and 9.8 times smaller than bfloat16.

    Args:
        family: the name of its family.
        keys: how keys are coded.
        values: how values are coded.
    """

    def __init__(self, family: str, keys: Quantizer, values: Quantizer) -> None:
        self._quantizers: dict[Part, Quantizer] = {"keys": keys, "values": values}
        self.parameters = _written(self._quantizers)
        self.name = fitted_name(family, self.parameters)

    def encode(
        self, part: Part, vectors: NDArray[Any], layout: Layout, shape: MemoryShape
    ) -> list[bytes | None]:
        """The code that FAISS gives each vector: the coarse ones, then the fine ones."""
        own = self._quantizers[part]
        centre = own.centre
        x = to_float32(vectors, shape.dtype).astype(np.float64)
        _undo_rope(x, layout, centre.turns(shape))
        counts = layout.counts
        rows = np.repeat(np.tile(np.arange(counts.shape[1]), len(counts)), counts.ravel())
        means, scales = centre.means[rows], centre.scales[rows, None].astype(np.float64)
        losses = Losses.empty(layout.vectors)
        coded: list[bytes] = []
        at = 0
        for size in layout.sizes.tolist():  # each by itself: its codes depend on no other's
            memory = slice(at, at + size)
            about = x[memory] - means[memory]
            codes, found = _coded(own.coder, about / scales[memory])
            found *= scales[memory]
            losses.note(memory, x[memory], about, found)
            far = np.abs(found) + np.abs(means[memory]) > _LARGEST / 2  # RoPE may add a half
            losses.lost[memory][far.any(axis=1)] = np.inf
            coded.append(codes)
            at += size
        most = share(PaperFamily.name, part)
        return only(coded, keeps_rows(most, layout, shape, centre.scales, losses))

    def decode(
        self,
        part: Part,
        sections: Sequence[memoryview],
        layout: Layout,
        shape: MemoryShape,
        out: NDArray[Any],
    ) -> None:
        """See `Codec.decode`; what the codes stand for times scales, the mean, and RoPE."""
        own = self._quantizers[part]
        centre = own.centre
        codes = joined(sections, layout.sizes, [own.width])[0]
        if not len(codes):
            return
        codes = codes[layout.order]
        byte, values = own.last
        if codes[:, byte].max() >= values:
            raise ValueError("its vectors hold a code that stands for nothing")
        x: NDArray[np.float32] = own.coder.sa_decode(codes)
        x *= np.repeat(centre.scales, layout.row_sizes)[:, None]
        x += np.repeat(centre.means, layout.row_sizes, axis=0)
        turns = centre.turns(shape)
        if turns is not None:
            turns(x, layout.row_sizes, layout.positions[layout.order])
        put(from_float32(x, shape.dtype), layout.places[layout.order], out)


class PaperFamily(Family):
    """`Paper`, with a quantizer for keys and one for values."""

    name = "paper"
    enough = 256
    sample = 512

    def fit(
        self,
        keys: NDArray[np.float32],
        values: NDArray[np.float32],
        layout: Layout,
        shape: MemoryShape,
        told: Steps = no_steps,
    ) -> FittedCodec:
        """See `Family.fit`."""
        steps = 1 + 2 * _STEPS
        told(0, steps)
        angles = angles_that_pay(keys.astype(np.float64), layout, shape)
        fitted = [
            _fitted(keys, layout, shape, angles, lambda done: told(1 + done, steps)),
            _fitted(values, layout, shape, None, lambda done: told(1 + _STEPS + done, steps)),
        ]
        return Paper(self.name, *fitted)

    def load(self, parameters: bytes) -> FittedCodec:
        """See `Family.load`."""
        values, arrays = read_parameters(parameters)
        quantizers: list[Quantizer] = []
        try:
            parts: tuple[Part, Part] = ("keys", "values")
            for part in parts:
                centre = Centre.read(arrays, part)
                index = arrays[f"{part}.index"]
                # FAISS trusts what it reads: it is not given what is damaged.
                if values[part]["checksum"] != _checksum(index):
                    raise ValueError(f"the checksum of the index of its {part} does not match")
                quantizers.append(Quantizer(centre, index))
        except (KeyError, TypeError) as error:
            raise ValueError(f"a field is missing, or of a wrong type ({error!r})") from error
        for quantizer in quantizers:
            _ = quantizer.coder
        return Paper(self.name, *quantizers)


def factory_string(d: int, vectors: int) -> str:
    """What `faiss.index_factory` makes of that the quantizer for vectors of d numbers, given how
    many there are to fit it to. `OPQ20_80,Residual2x14,PQ8x10`, the paper's, if d is 80 and they
    are enough."""
    coarse, fine = _bits(vectors, _COARSE_BITS), _bits(vectors, _FINE_BITS)
    parts = [f"Residual{2 - d % 2}x{coarse}", f"PQ{_divisor(d, _PIECES)}x{fine}"]
    pieces = _divisor(d, d // _OPQ_PIECE)
    if pieces > 1 and vectors >= _OPQ_FEWEST:
        parts.insert(0, f"OPQ{pieces}_{d}")
    return ",".join(parts)


def _bits(vectors: int, most: int) -> int:
    """Of a code, such that there are enough vectors for each centre."""
    return min(most, max(_FEWEST_BITS, (vectors // _SAMPLE).bit_length() - 1))


def _divisor(d: int, most: int) -> int:
    """The largest divisor of d that is not more, or 1."""
    return max((i for i in range(1, most + 1) if d % i == 0), default=1)


def _fitted(
    vectors: NDArray[np.float32],
    layout: Layout,
    shape: MemoryShape,
    angles: NDArray[np.float64] | None,
    told: Callable[[int], None],
) -> Quantizer:
    told(0)
    found = Sample.of(vectors, layout, shape, angles)
    centre, x = found.centre, np.concatenate(found.rows)
    some = np.linspace(0, len(x) - 1, min(_TRAINED, len(x))).astype(np.int64)
    rows = np.repeat(np.arange(shape.rows), layout.row_sizes)[some]
    sample = ((x[some] - centre.means[rows]) / centre.scales[rows, None]).astype(np.float32)
    return Quantizer(centre, faiss.serialize_index(_trained(sample, told)))


def _trained(sample: NDArray[np.float32], told: Callable[[int], None]) -> Any:
    """A FAISS index without vectors. FAISS starts every k-means from the same seed. What its own
    `train` does in one call, minutes long, is done here round by round."""
    n, d = sample.shape
    if n < 1 << _FEWEST_BITS:  # as few as it has centres
        sample = np.resize(sample if n else np.zeros(d, np.float32), (1 << _FEWEST_BITS, d))
    index = faiss.index_factory(d, factory_string(d, n))
    layers = _layers(index)
    if layers is not index:
        turn = faiss.downcast_VectorTransform(index.chain.at(0))
        turn.niter = _ROUNDS
        turn.train(sample)
        sample = turn.apply(sample)
    coarse = faiss.downcast_index(layers.q1.quantizer)
    _train_rounds(coarse.pq, sample, lambda done: told(1 + done))
    coarse.is_trained, coarse.ntotal = True, coarse.pq.ksub**coarse.pq.M
    told(1 + _ROUNDS)
    nearest = coarse.search(sample, 1)[1][:, 0]
    rest = sample - coarse.reconstruct_batch(nearest)
    _train_rounds(layers.pq, rest, lambda done: told(1 + _ROUNDS + done))
    layers.is_trained = index.is_trained = True
    return index


def _train_rounds(quantizer: Any, sample: NDArray[np.float32], told: Callable[[int], None]) -> None:
    """Train FAISS's product quantizer, a round of k-means at a time."""
    quantizer.cp.niter = 1
    quantizer.cp.min_points_per_centroid = 1  # no warning where there are no more
    for done in range(_ROUNDS):
        told(done)
        quantizer.train(sample)
        quantizer.train_type = faiss.ProductQuantizer.Train_hot_start
    quantizer.train_type = faiss.ProductQuantizer.Train_default


def _layers(index: Any) -> Any:
    """The two quantizers, behind OPQ if that is there."""
    return faiss.downcast_index(index.index) if hasattr(index, "chain") else index


def _coded(coder: Any, x: NDArray[np.float64]) -> tuple[bytes, NDArray[np.float64]]:
    """The section of one memory, and what it is decoded as, given its vectors about the mean and
    over the scale of their rows."""
    if not len(x):
        return b"", x
    codes = coder.sa_encode(np.clip(x, -_FARTHEST, _FARTHEST).astype(np.float32))
    return bytes(codes), coder.sa_decode(codes).astype(np.float64)


def _undo_rope(x: NDArray[np.float64], layout: Layout, turns: Turns | None) -> None:
    """Turn keys back in place, memory after memory."""
    if turns is not None:
        ordered = x[layout.order]
        turns(ordered, layout.row_sizes, layout.positions[layout.order], back=True)
        x[layout.order] = ordered


def _written(quantizers: dict[Part, Quantizer]) -> bytes:
    values: dict[str, Any] = {}
    arrays: dict[str, NDArray[Any]] = {}
    for part, own in quantizers.items():
        values[part] = {"checksum": _checksum(own.index)}
        arrays[f"{part}.means"] = own.centre.means
        arrays[f"{part}.scales"] = own.centre.scales
        if own.centre.angles is not None:
            arrays[f"{part}.angles"] = own.centre.angles
        arrays[f"{part}.index"] = own.index
    return write_parameters(values, arrays)


def _checksum(data: NDArray[np.uint8]) -> str:
    return xxhash.xxh3_64_hexdigest(np.ascontiguousarray(data).tobytes())
