"""Codecs that are fitted to a database, and databases that go from one codec to another."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from memdb import (
    CODECS,
    Batch,
    CorruptRecordError,
    Document,
    ExplicitMemory,
    InvalidInputError,
    MemDB,
    MemoryShape,
    Rope,
    backup,
    compact,
    import_database,
    pack,
    repair,
    verify,
)
from memdb.care import recode
from memdb.codecs import FAMILIES, codec_of
from memdb.storage.record_layout import MEMORIES, SETTINGS, codec_key, integer_key
from tests.engine.helpers import (
    PAGE,
    ROOT,
    TokenWriter,
    WordEmbedder,
    command,
    keep_whatever_is_lost,
    make_memory,
    raw,
    same_memory,
)

SHAPE = MemoryShape(
    model="m",
    layers=(0, 1),
    kv_heads=2,
    head_dim=8,
    dtype="float32",
    prefix=(1,),
    rope=(Rope(10000.0), Rope(10000.0)),
)
ENOUGH = 12


@pytest.fixture(autouse=True)
def few_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    for family in FAMILIES.values():
        monkeypatch.setattr(family, "enough", ENOUGH)


def make_like(seed: int) -> ExplicitMemory:
    """A memory whose vectors are alike: a mean, and a few directions."""
    memory = make_memory(SHAPE, seed, 40)
    rng = np.random.default_rng(7)
    spread = rng.standard_normal((8, 8)).astype(np.float32) * np.geomspace(3, 0.05, 8, dtype="f4")
    mean = np.arange(8, dtype=np.float32)
    return ExplicitMemory(
        memory.offsets, memory.positions, memory.keys @ spread + mean, memory.values @ spread - mean
    )


def east(number: int) -> NDArray[np.float32]:
    vector = np.array([[1, number / 100]], np.float32)
    return vector / np.linalg.norm(vector)


def insert(database: MemDB, numbers: Any) -> None:
    for n in numbers:
        database.insert(f"text {n}", id=f"{n:03}", embeddings=east(n), memories=[make_like(n)])


def load(database: MemDB, numbers: Any) -> None:
    documents = [Document(f"text {n}", f"{n:03}") for n in numbers]
    embeddings = np.concatenate([east(n) for n in numbers])
    database.load([Batch(documents, embeddings, [make_like(n) for n in numbers])])


def codecs(database: MemDB) -> dict[str, int]:
    """How many memories each codec wrote."""
    found: dict[str, int] = database.stats()["memory_bytes"].get("codecs", {})
    return found


def error(database: MemDB, numbers: Any) -> float:
    """Relative error of all keys and values."""
    errs = sizes = 0.0
    for n in numbers:
        (reference,) = database.get(f"{n:03}").references
        hit = next(h for h in database.retrieve(east(n)[0], 1000).hits if h.id == reference)
        assert hit.memory is not None
        was = make_like(n)
        np.testing.assert_array_equal(hit.memory.positions, was.positions)
        for one, other in ((hit.memory.keys, was.keys), (hit.memory.values, was.values)):
            errs += float(((one - other) ** 2).sum())
            sizes += float((other**2).sum())
    return (errs / sizes) ** 0.5


@pytest.fixture
def bare(tmp_path: Path) -> Iterator[MemDB]:
    with MemDB.create(tmp_path / "db", shape=SHAPE, dimension=2) as database:
        yield database


# --- fitting --------------------------------------------------------------------------------------


def test_until_enough_are_there_memories_are_kept_by_the_stand_in(bare: MemDB) -> None:
    load(bare, range(ENOUGH - 1))
    assert codecs(bare) == {"int8": ENOUGH - 1}
    assert "fitted" not in bare.stats()["memory"]


def test_then_the_fitted_codec_takes_over_and_those_before_follow(bare: MemDB) -> None:
    load(bare, range(ENOUGH))
    (name,) = codecs(bare)
    assert name.startswith("klt8:")
    assert bare.stats()["memory"] == {"codec": "klt8", "fitted": name}
    insert(bare, range(ENOUGH, ENOUGH + 2))
    assert codecs(bare) == {name: ENOUGH + 2}
    assert error(bare, range(ENOUGH + 2)) < 0.3
    assert verify(bare.path) == []


def test_it_takes_over_among_single_inserts(bare: MemDB) -> None:
    insert(bare, range(ENOUGH + 1))
    bare.settle()
    (name,) = codecs(bare)
    assert name.startswith("klt8:")
    assert error(bare, range(ENOUGH + 1)) < 0.3


def test_a_cold_start_may_be_what_makes_them_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_whatever_is_lost(monkeypatch)
    words = PAGE.split()
    with MemDB.create(tmp_path / "db", embedder=WordEmbedder(), writer=TokenWriter()) as database:
        for n in range(2 * ENOUGH):
            database.insert(" ".join(words[n : n + 5]), id=f"{n:03}", cold=True)
        while database.stats()["cold"]:
            database.retrieve(PAGE, 2 * ENOUGH)
        database.settle()
        assert database.stats()["memory"]["fitted"].startswith("klt8:")
        assert verify(database.path) == []


def test_it_takes_over_in_the_middle_of_a_load(
    bare: MemDB, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memdb.ingest.load._BYTES", 1)  # else all are drawn before one is written
    fitted_at = []

    def batches() -> Iterator[Batch]:
        for start in range(0, 4 * ENOUGH, ENOUGH):
            if start == 3 * ENOUGH:  # the first of them are written by now
                limit = time.monotonic() + 60
                while "fitted" not in bare.stats()["memory"] and time.monotonic() < limit:
                    time.sleep(0.01)
                fitted_at.append("fitted" in bare.stats()["memory"])
            documents = [Document(f"text {n}", f"{n:03}") for n in range(start, start + ENOUGH)]
            memories = [make_like(n) for n in range(start, start + ENOUGH)]
            # The same id again ends a transaction.
            documents.append(Document(f"text {start} again", documents[0].id))
            embeddings = np.concatenate([east(n) for n in range(start, start + ENOUGH + 1)])
            yield Batch(documents, embeddings, [*memories, make_like(start)])

    bare.load(batches())
    assert fitted_at == [True]
    assert all(name.startswith("klt8:") for name in codecs(bare))


def test_a_fitted_codec_is_there_after_opening_and_for_other_handles(bare: MemDB) -> None:
    with MemDB.open(bare.path) as other:
        load(bare, range(ENOUGH))
        (name,) = codecs(bare)
        assert error(other, range(3)) < 0.3  # reads what it had never heard of
        insert(other, [70])  # the codec it began with is right, too
        insert(other, [71])
        assert codecs(other)[name] >= ENOUGH + 1
    with MemDB.open(bare.path) as again:
        insert(again, [72])
        assert error(again, [0, 70, 71, 72]) < 0.3
    assert verify(bare.path) == []


def test_a_memory_unlike_the_others_is_kept_by_the_stand_in(bare: MemDB) -> None:
    load(bare, range(ENOUGH))
    strange = make_like(80)
    strange = ExplicitMemory(
        strange.offsets, strange.positions, strange.keys * np.float32(1e20), strange.values
    )
    bare.insert("strange", id="s", embeddings=east(80), memories=[strange])
    assert codecs(bare)["int8"] == 1
    (hit,) = bare.retrieve(east(80)[0], 1).hits
    assert hit.memory is not None
    np.testing.assert_allclose(hit.memory.keys, strange.keys, atol=np.abs(strange.keys).max() / 200)
    before = codecs(bare)
    report = bare.recode()  # it stays so
    assert report.recoded == 0
    assert codecs(bare) == before


# --- recode ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", [*CODECS, *FAMILIES])
def test_recode_takes_a_database_to_any_codec(tmp_path: Path, codec: str) -> None:
    with MemDB.create(tmp_path / "db", shape=SHAPE, dimension=2, codec="exact") as database:
        load(database, range(2 * ENOUGH))
        report = database.recode(codec)
        (name,) = codecs(database)
        assert name.partition(":")[0] == codec
        assert report.codec == name
        assert report.memories == 2 * ENOUGH
        assert report.recoded == (0 if codec == "exact" else 2 * ENOUGH)
        assert error(database, range(4)) < 0.7
        assert database.recode().recoded == 0
    assert verify(tmp_path / "db") == []


def test_an_interrupted_recode_goes_on(bare: MemDB, monkeypatch: pytest.MonkeyPatch) -> None:
    load(bare, range(ENOUGH))
    monkeypatch.setattr("memdb.care.recode._BATCH", 4)

    def stop(what: str, done: int, total: int) -> None:
        if what == "recoding memories" and done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bare.recode("int4", progress=stop)
    mixed = codecs(bare)
    assert mixed["int4"] == 8
    assert len(mixed) == 2
    assert error(bare, range(ENOUGH)) < 0.3  # a mixed store reads as it should
    assert verify(bare.path) == []
    assert bare.recode().recoded == ENOUGH - 8
    assert codecs(bare) == {"int4": ENOUGH}


def test_a_database_can_be_read_while_it_is_recoded(
    bare: MemDB, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(bare, range(ENOUGH))
    monkeypatch.setattr("memdb.care.recode._BATCH", 3)
    seen = []
    with MemDB.open(bare.path) as other, other.snapshot() as before:
        was = [memory.keys for memory in before.retrieve(east(0)[0]).memories]
        bare.recode("rotated3", progress=lambda *_: seen.append(error(other, range(3))))
        now = [memory.keys for memory in before.retrieve(east(0)[0]).memories]
        for one, another in zip(was, now, strict=True):
            np.testing.assert_array_equal(one, another)
    assert len(seen) > 3
    assert max(seen) < 0.5


def test_what_is_replaced_while_it_is_recoded_stays_replaced(
    bare: MemDB, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(bare, range(ENOUGH))

    encode = recode.encode_batch

    def between(*arguments: Any) -> Any:
        payloads = encode(*arguments)
        bare.update("003", text="new", embeddings=east(3), memories=[make_like(50)])
        bare.delete("004")
        return payloads

    monkeypatch.setattr(recode, "encode_batch", between)
    with monkeypatch.context() as patched:
        patched.setattr(bare, "delete", lambda name: None)
        bare.recode("int4")
    (reference,) = bare.get("003").references
    hit = next(h for h in bare.retrieve(east(3)[0], 1000).hits if h.id == reference)
    assert hit.memory is not None
    np.testing.assert_array_equal(hit.memory.positions, make_like(50).positions)
    assert verify(bare.path) == []


def test_refit_makes_another_version_and_both_can_be_read(bare: MemDB) -> None:
    load(bare, range(ENOUGH))
    (first,) = codecs(bare)
    insert(bare, range(40, 60))
    report = bare.recode(refit=True)
    assert report.codec != first
    assert codecs(bare) == {report.codec: ENOUGH + 20}
    with bare._store.read() as transaction:
        assert set(transaction.fitted_codecs()) == {first, report.codec}


def test_a_codec_cannot_be_fitted_to_too_few(bare: MemDB) -> None:
    load(bare, range(3))
    with pytest.raises(InvalidInputError, match=r"'klt5' is fitted to at least 12 .*exact, int8"):
        bare.recode("klt5")
    assert bare.stats()["memory"] == {"codec": "klt8"}
    with pytest.raises(InvalidInputError, match="no codec is called 'zip'"):
        bare.recode("zip")


# --- with the rest of the engine ------------------------------------------------------------------


def test_packing_stored_memories_is_packing_them_decoded(bare: MemDB) -> None:
    load(bare, range(ENOUGH))
    bare.recode("int4")
    bare.recode("klt8")
    strange = make_like(80)
    strange = ExplicitMemory(
        strange.offsets, strange.positions, strange.keys + np.float32(1e6), strange.values
    )
    bare.insert("strange", id="s", embeddings=east(1), memories=[strange])
    with MemDB.open(bare.path, cache_bytes=0) as database:
        retrieval = database.retrieve(east(2)[0], 6)
        assert len({codec_of(stored.payload) for stored in retrieval.stored}) == 2
        together = pack(retrieval.stored, SHAPE)
        one_by_one = pack(database.retrieve(east(2)[0], 6).memories, SHAPE)
    for layer, packed in together.layers.items():
        other = one_by_one.layers[layer]
        np.testing.assert_array_equal(packed.visible, other.visible)
        np.testing.assert_allclose(packed.keys, other.keys, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(packed.values, other.values, rtol=1e-4, atol=1e-4)


def test_what_was_packed_is_in_the_cache(bare: MemDB) -> None:
    load(bare, range(ENOUGH))
    packed = pack(bare.retrieve(east(2)[0]).stored, SHAPE)
    assert bare.cache_stats().memories == 5
    retrieval = bare.retrieve(east(2)[0])
    assert all(stored.decoded is not None for stored in retrieval.stored)
    again = pack(retrieval.stored, SHAPE)
    for layer in packed.layers:
        np.testing.assert_array_equal(packed.layers[layer].keys, again.layers[layer].keys)


def test_a_damaged_memory_is_named_when_several_are_packed(bare: MemDB) -> None:
    load(bare, range(ENOUGH))
    (number,) = bare.get("002").references
    with bare._store.write() as transaction:
        payload = bytearray(transaction.payload(MEMORIES, integer_key(number)))
        payload[-3:] = b"\xff\xff\xff"
        transaction.replace_memory(number, 1, bytes(payload[:-1]))
    retrieval = bare.retrieve(east(2)[0])
    with pytest.raises(CorruptRecordError, match=f"record {number} of table 'memories'"):
        pack(retrieval.stored, SHAPE)


@pytest.mark.parametrize("arrays", [False, True])
def test_an_export_takes_the_codec_along(bare: MemDB, tmp_path: Path, arrays: bool) -> None:
    load(bare, range(ENOUGH))
    bare.export(tmp_path / "files", arrays=arrays)
    import_database(tmp_path / "files", tmp_path / "copy")
    assert verify(tmp_path / "copy") == []
    with MemDB.open(tmp_path / "copy") as copy:
        assert error(copy, range(4)) < 0.3
        if not arrays:
            assert codecs(copy) == codecs(bare)
            assert same_memory(
                copy.retrieve(east(2)[0]).memories[0], bare.retrieve(east(2)[0]).memories[0]
            )
            (file,) = (tmp_path / "files").glob("codec-*.bin")
            file.write_bytes(file.read_bytes()[:-1])
            with pytest.raises(InvalidInputError, match=r"manifest\.json"):
                import_database(tmp_path / "files", tmp_path / "other")


def test_backups_and_compaction_keep_the_codec(bare: MemDB, tmp_path: Path) -> None:
    load(bare, range(ENOUGH))
    backup(bare.path, tmp_path / "copy")
    compact(bare.path)
    for path in (bare.path, tmp_path / "copy"):
        assert verify(path) == []
        with MemDB.open(path) as database:
            assert error(database, range(4)) < 0.3


def test_lost_parameters_are_told_and_mended(bare: MemDB) -> None:
    load(bare, range(ENOUGH))
    (name,) = codecs(bare)
    bare.close()
    with raw(bare.path) as (environment, tables), environment.begin(write=True) as inner:
        inner.delete(codec_key(name), db=tables[SETTINGS])
    with MemDB.open(bare.path) as database:
        retrieval = database.retrieve(east(2)[0])
        with pytest.raises(CorruptRecordError, match=f"codec {name}"):
            _ = retrieval.memories
    problems = verify(bare.path)
    (lost,) = [problem for problem in problems if problem.table == SETTINGS]
    assert (lost.key, lost.what) == (f"'codec {name}'", "it is missing")
    assert sum("its codec" in problem.what for problem in problems) == ENOUGH
    assert repair(bare.path).left == []
    with MemDB.open(bare.path) as database:
        assert database.stats()["cold"] == ENOUGH
        insert(database, [90])
        assert codecs(database) == {"int8": 1}


@pytest.mark.parametrize("done", [0, 64, 128])
def test_a_killed_recode_goes_on(tmp_path: Path, done: int) -> None:
    path = tmp_path / "db"
    with MemDB.create(path, shape=SHAPE, dimension=2, codec="exact") as database:
        load(database, range(160))
    script = """
        import sys
        from memdb import MemDB
        from memdb.codecs import FAMILIES

        FAMILIES["klt8"].enough = 12

        def told(what, done, total):
            print(what, done, flush=True)

        with MemDB.open(sys.argv[1]) as database:
            database.recode("klt8", progress=told)
    """
    child = subprocess.Popen(
        command(script, path),
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert child.stdout is not None
    for line in child.stdout:
        if line == f"recoding memories {done}\n":
            child.kill()
    assert child.wait() != 0
    assert verify(path) == []
    with MemDB.open(path) as database:
        mixed = codecs(database)
        assert mixed["exact"] <= 160 - done
        assert error(database, range(0, 160, 40)) < 0.3
        report = database.recode()
        assert report.recoded == mixed["exact"]
        assert list(codecs(database)) == [report.codec]
        assert error(database, range(0, 160, 40)) < 0.3
