"""What a memory may lose, by any codec and whatever its numbers are: the codec's share."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from memdb import (
    CODECS,
    Document,
    DocumentBatch,
    DType,
    ExplicitMemory,
    InvalidInputError,
    MemDB,
    MemoryShape,
    from_float32,
    to_float32,
    verify,
)
from memdb.codecs import (
    FAMILIES,
    Part,
    codec_of,
    decode_memory,
    encode_batch,
    encode_memory,
    share,
)
from memdb.codecs.rotated import rotation
from memdb.storage.record_layout import UNFITTED
from memdb.types.memory_batch import MemoryBatch
from tests.engine.fitted import DTYPES, NAMES, codec_for, fit, make_like, roped_shape, with_stand_in
from tests.engine.helpers import make_memory, make_shape, same_memory

PARTS: tuple[Part, Part] = ("keys", "values")
DIMS = (1, 4, 64)
LOSSY = tuple(name for name in NAMES if name != "exact")

every_codec = pytest.mark.parametrize("name", NAMES)
every_lossy_codec = pytest.mark.parametrize("name", LOSSY)


def lost(given: ExplicitMemory, found: ExplicitMemory, shape: MemoryShape, part: Part) -> float:
    """Squared length of what keys or values lost, over their own."""
    x, y = (to_float32(getattr(m, part), shape.dtype).astype(np.float64) for m in (given, found))
    error, own = np.square(y - x).sum(), np.square(x).sum()
    return float(error / own) if error else 0.0


def changed(
    memory: ExplicitMemory,
    shape: MemoryShape,
    change: Callable[[NDArray[np.float32], NDArray[np.int64]], NDArray[np.float32]],
) -> ExplicitMemory:
    """Another memory, whose numbers are a function of these, and of the row of each vector."""
    rows = np.repeat(np.arange(shape.rows), np.diff(memory.offsets))
    keys, values = (
        from_float32(change(to_float32(x, shape.dtype), rows).astype(np.float32), shape.dtype)
        for x in (memory.keys, memory.values)
    )
    return ExplicitMemory(memory.offsets, memory.positions, keys, values)


def one_far_token(x: NDArray[np.float32], rows: NDArray[np.int64]) -> NDArray[np.float32]:
    x = x.copy()
    x[len(x) // 2] *= 200
    return x


def along_one_direction(x: NDArray[np.float32], rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """A vector that, rotated, is one number and zeros."""
    turned = rotation(x.shape[1])[:, 0].astype(np.float32)
    return np.outer(np.linspace(1, 2, len(x)), turned).astype(np.float32)


#: What the numbers of a memory may be, from those that codecs are fitted to on.
STRANGE: dict[str, Callable[[NDArray[np.float32], NDArray[np.int64]], NDArray[np.float32]]] = {
    "as fitted": lambda x, rows: x,
    "small": lambda x, rows: x * np.float32(0.2),
    "very small": lambda x, rows: x * np.float32(1e-6),
    "subnormal": lambda x, rows: x * np.float32(1e-44),
    "large": lambda x, rows: x * np.float32(500),
    "huge": lambda x, rows: np.clip(x * np.float32(1e37), -3e38, 3e38),
    "zero": lambda x, rows: x * 0,
    "a row of zeros": lambda x, rows: x * (rows != 1)[:, None],
    "a row much larger": lambda x, rows: x * np.where(rows == 2, 1e4, 1)[:, None],
    "a row much smaller": lambda x, rows: x * np.where(rows == 2, 1e-4, 1)[:, None],
    "one far token": one_far_token,
    "one far number": lambda x, rows: np.where(np.arange(x.size).reshape(x.shape) == 7, 1e4, x),
    "mirrored": lambda x, rows: -x,
    "reversed": lambda x, rows: x[:, ::-1],
    "noise": lambda x, rows: np.random.default_rng(1).standard_normal(x.shape).astype("f4"),
    "one number a vector": lambda x, rows: x * (np.arange(x.shape[1]) == x.shape[1] - 1),
    "all the same": lambda x, rows: np.full_like(x, 0.37),
    "along one direction": along_one_direction,
}


# --- what is kept ---------------------------------------------------------------------------------


@every_codec
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", DIMS)
def test_no_memory_loses_more_than_the_share_of_the_codec_that_keeps_it(
    name: str, dtype: DType, head_dim: int
) -> None:
    shape = roped_shape(dtype, head_dim)
    codec = codec_for(name, shape)
    memory = make_like(shape, 3, 30)
    for what, change in STRANGE.items():
        given = changed(memory, shape, change)
        payload = encode_memory(given, shape, codec)
        found = decode_memory(payload, shape, with_stand_in(codec))
        wrote = codec_of(payload).partition(":")[0]
        assert wrote in (name, "int8", "exact"), what
        if wrote == "exact":
            assert same_memory(found, given), what
            continue
        for part in PARTS:
            # A little more where float32 or the dtype round what is read back.
            assert lost(given, found, shape, part) <= 1.02 * share(wrote, part) + 1e-4, (what, part)


@every_lossy_codec
def test_a_row_of_large_numbers_does_not_hide_what_another_loses(name: str) -> None:
    """The rows are heads, and of each head its own numbers matter."""
    shape = make_shape(head_dim=64)
    codec = codec_for(name, roped_shape(head_dim=64))
    memory = make_memory(shape, 1, 50)
    rows = np.repeat(np.arange(shape.rows), np.diff(memory.offsets))
    assert len(set(rows.tolist())) == shape.rows
    for x in (memory.keys, memory.values):
        x *= np.where(rows == 0, np.float32(1e3), np.float32(1e-3))[:, None]
        x[rows > 0] = along_one_direction(x[rows > 0], rows[rows > 0]) * np.float32(1e-3)
    payload = encode_memory(memory, shape, codec)
    found = decode_memory(payload, shape, with_stand_in(codec))
    wrote = codec_of(payload).partition(":")[0]
    for part in PARTS:
        x, y = (getattr(m, part)[rows > 0].astype(np.float64) for m in (memory, found))
        assert np.square(y - x).sum() <= 2 * share(wrote, part) * np.square(x).sum()


@every_lossy_codec
def test_of_several_each_is_judged_by_itself(name: str) -> None:
    shape = roped_shape()
    codec = codec_for(name, shape)
    changes = [*STRANGE.values()]
    several = [
        changed(make_like(shape, seed, 20), shape, change) for seed, change in enumerate(changes)
    ]
    payloads = encode_batch(MemoryBatch.of(several, shape), shape, codec)
    assert payloads == [encode_memory(memory, shape, codec) for memory in several]
    assert len({codec_of(payload or b"") for payload in payloads}) > 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_int8_would_lose_is_kept_as_it_is(dtype: DType) -> None:
    shape = make_shape(dtype, head_dim=4)
    tiny = {"float32": 1e-44, "float16": 6e-8, "bfloat16": 1e-40}[dtype]
    memory = changed(make_memory(shape, 1), shape, lambda x, rows: np.sign(x) * np.float32(tiny))
    for name in ("int8", "int4", "rotated2"):
        payload = encode_memory(memory, shape, CODECS[name])
        found = decode_memory(payload, shape, CODECS)
        for part in PARTS:
            assert lost(memory, found, shape, part) < 0.01
    if dtype == "float32":
        assert codec_of(payload) == "exact"


def test_long_vectors_of_one_large_number_are_not_lost_by_int8() -> None:
    shape = make_shape(head_dim=4096)
    memory = make_memory(shape, 1)
    for x in (memory.keys, memory.values):
        x[:] = 0.49
        x[:, 0] = 127  # each of the others is rounded to 0
    payload = encode_memory(memory, shape, CODECS["int8"])
    assert codec_of(payload) == "exact"


@pytest.mark.parametrize("name", FAMILIES)
def test_vectors_that_are_all_the_same_are_kept_by_a_codec_fitted_to_them(name: str) -> None:
    shape = make_shape(head_dim=8)
    several = [
        changed(make_memory(shape, seed, 30), shape, STRANGE["all the same"]) for seed in range(12)
    ]
    codec = fit(FAMILIES[name], several, shape)
    for memory in several:
        payload = encode_memory(memory, shape, codec)
        assert codec_of(payload) == codec.name
        found = decode_memory(payload, shape, with_stand_in(codec))
        for part in PARTS:
            assert lost(memory, found, shape, part) < 1e-6


# --- what is not fitted ---------------------------------------------------------------------------

ENOUGH = 12


@pytest.fixture
def few_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    for family in FAMILIES.values():
        monkeypatch.setattr(family, "enough", ENOUGH)


def noise(shape: MemoryShape, seed: int, pairs: int = 3) -> ExplicitMemory:
    """A memory that nothing can be known of beforehand."""
    rng = np.random.default_rng(seed)
    size = pairs * shape.rows, shape.head_dim
    return ExplicitMemory(
        np.arange(0, size[0] + 1, pairs, dtype=np.int32),
        np.tile(np.arange(pairs), shape.rows).astype(shape.position_dtype),
        *(from_float32(rng.standard_normal(size, np.float32), shape.dtype) for _ in range(2)),
    )


def load(database: MemDB, numbers: range, memory: Callable[[int], ExplicitMemory]) -> None:
    vectors = np.random.default_rng(0).standard_normal((len(numbers), 4)).astype(np.float32)
    documents = [Document(f"text {n}", f"{n:04}") for n in numbers]
    database.load([DocumentBatch(documents, vectors, [memory(n) for n in numbers])])


def assert_kept(database: MemDB, numbers: range, most: float) -> None:
    for n in numbers:
        ((_, stored),) = database.memories(f"{n:04}")
        assert stored is not None
        given = noise(database.shape, n)
        for part in PARTS:
            assert lost(given, stored.memory, database.shape, part) <= most


@pytest.mark.parametrize(("head_dim", "pairs"), [(4, 3), (16, 8), (64, 16)])
@pytest.mark.usefixtures("few_are_enough")
def test_arrays_that_are_no_models_keys_are_kept(
    tmp_path: Path, head_dim: int, pairs: int, caplog: pytest.LogCaptureFixture
) -> None:
    shape = make_shape(head_dim=head_dim)
    with MemDB.create(tmp_path / "db", shape=shape, dimension=4) as database:
        with caplog.at_level(logging.WARNING, "memdb"):
            load(database, range(60), lambda n: noise(shape, n, pairs))
        stats = database.stats()
        assert stats["memory"] == {"codec": "klt8"}
        assert stats["memory_bytes"]["codecs"] == {"int8": 60}
        assert stats["unfitted"]["memories"] == 60
        assert "60 of 60 memories would lose" in stats["unfitted"]["why"]
        (record,) = (record for record in caplog.records if record.name == "memdb")
        assert "'klt8' is not fitted" in record.getMessage()
        for n in range(60):
            ((_, stored),) = database.memories(f"{n:04}")
            assert stored is not None
            for part in PARTS:
                assert lost(noise(shape, n, pairs), stored.memory, shape, part) < 1e-3
    assert verify(tmp_path / "db") == []


@pytest.mark.usefixtures("few_are_enough")
def test_a_codec_that_was_not_fitted_is_tried_again_at_twice_as_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = make_shape(head_dim=8)
    fits = []
    family = FAMILIES["klt8"]
    fit = type(family).fit

    def counted(self: object, *arguments: object, **named: object) -> object:
        fits.append(self)
        return fit(self, *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(type(family), "fit", counted)
    path = tmp_path / "db"
    with MemDB.create(path, shape=shape, dimension=4) as database:
        load(database, range(ENOUGH), lambda n: noise(shape, n))
        assert len(fits) == 1
    with MemDB.open(path) as database:  # nor does another handle
        load(database, range(ENOUGH, 2 * ENOUGH - 1), lambda n: noise(shape, n))
        assert len(fits) == 1
        assert database.stats()["unfitted"]["memories"] == ENOUGH
        load(database, range(2 * ENOUGH - 1, 2 * ENOUGH), lambda n: noise(shape, n))
        assert len(fits) == 2
        # Now most are alike.
        load(database, range(100, 100 + 9 * ENOUGH), lambda n: make_like(shape, n, 60))
        assert len(fits) == 3
        assert database.stats()["unfitted"] is None
        assert database.stats()["memory"]["fitted"].startswith("klt8:")
        assert_kept(database, range(ENOUGH), 0.2)
        with database._store.read() as transaction:
            assert transaction.setting(UNFITTED) is None
    assert verify(path) == []


@pytest.mark.usefixtures("few_are_enough")
@pytest.mark.parametrize("told", [{}, [], {"codec": "klt8", "memories": "x"}, "klt8", None])
def test_a_note_that_says_nothing_is_passed_over(tmp_path: Path, told: object) -> None:
    shape = make_shape(head_dim=8)
    with MemDB.create(tmp_path / "db", shape=shape, dimension=4) as database:
        with database._store.write() as transaction:
            transaction.put_setting(UNFITTED, told)
        load(database, range(ENOUGH), lambda n: make_like(shape, n, 60))
        assert database.stats()["memory"]["fitted"].startswith("klt8:")


@pytest.mark.usefixtures("few_are_enough")
@pytest.mark.parametrize("family", ["klt8", "klt11"])
def test_asked_for_a_codec_that_keeps_too_little_is_refused_and_nothing_is_changed(
    tmp_path: Path, family: str
) -> None:
    shape = make_shape(head_dim=4)
    with MemDB.create(tmp_path / "db", shape=shape, dimension=4, codec="exact") as database:
        load(database, range(20), lambda n: noise(shape, n))
        with pytest.raises(InvalidInputError, match=f"'{family}' is not fitted: 20 of 20 .*int8"):
            database.recode(family)
        assert database.stats()["memory"] == {"codec": "exact"}
        assert database.stats()["memory_bytes"]["codecs"] == {"exact": 20}
        assert database.stats()["unfitted"] is None
        assert_kept(database, range(20), 0.0)


@pytest.mark.usefixtures("few_are_enough")
@pytest.mark.parametrize("codec", [*LOSSY])
def test_a_recode_keeps_what_the_new_codec_would_lose(tmp_path: Path, codec: str) -> None:
    """Among memories that are alike, one that is like none of them."""
    shape = roped_shape()
    strange = changed(make_like(shape, 99, 30), shape, STRANGE["along one direction"])
    strange = changed(strange, shape, lambda x, rows: x * np.float32(0.05))
    with MemDB.create(tmp_path / "db", shape=shape, dimension=4, codec="exact") as database:
        load(database, range(3 * ENOUGH), lambda n: make_like(shape, n, 60))
        load(database, range(99, 100), lambda n: strange)
        try:
            database.recode(codec)
        except InvalidInputError as error:
            assert "would lose" in str(error)  # noqa: PT017 - refused as a whole is right, too
        for name, given in (("0099", strange), ("0003", make_like(shape, 3, 60))):
            ((_, stored),) = database.memories(name)
            assert stored is not None
            wrote = codec_of(stored.payload).partition(":")[0]
            for part in PARTS:
                assert lost(given, stored.memory, shape, part) <= (
                    0 if wrote == "exact" else share(wrote, part)
                )
