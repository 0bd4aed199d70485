"""A reference carries its place: whatever embeds it or writes its memory does so behind it, and
whatever gives its text back gives it without. A database that records nothing does as ever."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from memdb import (
    ConflictError,
    Cutting,
    Document,
    DocumentBatch,
    ExplicitMemory,
    FormatError,
    MemDB,
    MismatchError,
    backup,
    compact,
    import_database,
    repair,
    restore,
    rewrite,
    verify,
)
from memdb.ingest.chunking import Chunker
from memdb.storage.record_layout import seal
from tests.engine.helpers import (
    PAGE,
    TokenWriter,
    WordEmbedder,
    make_shape,
    raw,
    same_memory,
    tokenizer_json,
    write_corpus,
)

LENGTH = 48
GUIDE = (
    f"# Guide\n\nThe harbour is old.\n\n## Ships\n\n{PAGE}\n### North\n\n{PAGE}\n## End\n\n{PAGE}"
)
TITLED = {"title": "Veldmoor", "year": 3}


class Embedder(WordEmbedder):
    """That remembers what it embedded."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def embed(self, texts: Sequence[str], *, query: bool = False) -> NDArray[np.float32]:
        self.texts += [] if query else texts
        return super().embed(texts, query=query)


class Writer(TokenWriter):
    """That remembers what it wrote."""

    def __init__(self, length: int = LENGTH, model: str = "model-1") -> None:
        super().__init__(length)
        self.shape = make_shape(reference_length=length, model=model)
        self.texts: list[str] = []

    def write(self, texts: Sequence[str]) -> list[ExplicitMemory]:
        self.texts += texts
        return super().write(texts)


def make(path: Path, **options: Any) -> MemDB:
    return MemDB.create(
        path, embedder=Embedder(), writer=Writer(), codec="exact", **{"place": True, **options}
    )


def opened(path: Path) -> MemDB:
    return MemDB.open(path, embedder=Embedder(), writer=Writer())


@pytest.fixture
def db(tmp_path: Path) -> MemDB:
    return make(tmp_path / "db")


def placed(text: str, id: str, title: str = "", length: int = LENGTH) -> list[str]:
    """What is to be embedded and written of a document."""
    chunker = Chunker(tokenizer_json(), length, Cutting("structure", True))
    return [piece.placed for piece in chunker.split(text, id=id, title=title)]


def check(db: MemDB, id: str, title: str = "", *, warm: bool = True, length: int = LENGTH) -> None:
    """What is stored of a document is what its placed references give, and its text is its text."""
    document = db.get(id)
    contents = placed(document.text, id, title, length)
    there = db.memories(id)
    assert "".join(reference.text for reference, _ in there) == document.text
    own = [reference.content for reference, _ in there]
    places = db.places(id)
    assert [f"{p}\n{c}" if p else c for p, c in zip(places, own, strict=True)] == contents
    assert any(places)
    with db._store.read() as transaction:
        vectors = transaction.embeddings_of(document.references)
    np.testing.assert_allclose(vectors, WordEmbedder().embed(contents), atol=1e-6)
    assert document.warm == (len(there) if warm else 0)
    if warm:
        for (_, stored), memory in zip(there, TokenWriter(length).write(contents), strict=True):
            assert stored is not None
            assert same_memory(stored.memory, memory)


# --- every way in ---------------------------------------------------------------------------------


def _insert(db: MemDB, _: Path) -> None:
    db.insert(GUIDE, id="a", metadata=TITLED)


def _insert_many(db: MemDB, _: Path) -> None:
    db.insert_many([Document(GUIDE, "a", TITLED), Document(PAGE, "b")])


def _update(db: MemDB, _: Path) -> None:
    db.insert("Nothing yet.", id="a", metadata=TITLED)
    db.update("a", text=GUIDE)


def _upsert(db: MemDB, _: Path) -> None:
    db.insert("Nothing yet.", id="a")
    db.upsert(GUIDE, id="a", metadata=TITLED)


def _transaction(db: MemDB, _: Path) -> None:
    with db.transaction() as t:
        t.insert("Nothing yet.", id="a")
        t.update("a", text=GUIDE, metadata={"title": "Other"})
        t.update("a", metadata=TITLED)


def _ingest(db: MemDB, folder: Path) -> None:
    line = {"id": "a", "text": GUIDE, "metadata": TITLED}
    corpus = write_corpus(folder / "corpus.jsonl", [line, {"id": "b", "text": PAGE}])
    assert db.ingest(corpus).inserted == 2
    report = db.ingest(corpus)
    assert (report.unchanged, report.references, report.memories) == (2, 0, 0)


def _cold_then_warm(db: MemDB, _: Path) -> None:
    db.insert(GUIDE, id="a", metadata=TITLED, cold=True)
    check(db, "a", "Veldmoor", warm=False)
    db.warm()


def _cold_then_first_use(db: MemDB, _: Path) -> None:
    db.insert(GUIDE, id="a", metadata=TITLED, cold=True)
    hits = db.retrieve("The harbour", k=50).hits
    assert {hit.text for hit in hits} <= {one.text for one, _ in db.memories("a")}


def _title_changes(db: MemDB, _: Path) -> None:
    db.insert(GUIDE, id="a", metadata={"title": "Another name"})
    before = db.get("a").references
    db.update("a", metadata=TITLED)
    assert not set(before) & set(db.get("a").references)


def _title_comes_by_upsert(db: MemDB, _: Path) -> None:
    db.insert(GUIDE, id="a")
    db.upsert(GUIDE, id="a", metadata=TITLED)


def _title_comes_by_ingest(db: MemDB, folder: Path) -> None:
    db.insert(GUIDE, id="a", metadata={"year": 3})
    corpus = write_corpus(folder / "c.jsonl", [{"id": "a", "text": GUIDE, "metadata": TITLED}])
    assert db.ingest(corpus).updated == 1


WAYS_IN = [
    _insert,
    _insert_many,
    _update,
    _upsert,
    _transaction,
    _ingest,
    _cold_then_warm,
    _cold_then_first_use,
    _title_changes,
    _title_comes_by_upsert,
    _title_comes_by_ingest,
]


@pytest.mark.parametrize("way", WAYS_IN)
def test_every_way_in_embeds_and_writes_the_place(
    db: MemDB, tmp_path: Path, way: Callable[[MemDB, Path], None]
) -> None:
    way(db, tmp_path)
    check(db, "a", "Veldmoor")
    assert db.get("a").metadata == TITLED
    db.close()
    assert verify(db.path) == []
    with opened(db.path) as again:
        check(again, "a", "Veldmoor")


def test_other_metadata_leave_references_as_they_are(db: MemDB, tmp_path: Path) -> None:
    db.insert(GUIDE, id="a", metadata=TITLED)
    before = db.get("a").references
    db.update("a", metadata={"title": " Veldmoor\n", "year": 4})
    db.upsert(GUIDE, id="a", metadata={"title": "Veldmoor", "year": 5})
    line = {"id": "a", "text": GUIDE, "metadata": {"title": "Veldmoor"}}
    report = db.ingest(write_corpus(tmp_path / "c.jsonl", [line]))
    assert (report.updated, report.references) == (1, 0)
    assert db.get("a").references == before
    check(db, "a", "Veldmoor")


def test_a_title_that_another_writer_changed_meanwhile_is_a_conflict(db: MemDB) -> None:
    """Else references would stand under a title that is not theirs."""
    db.insert(GUIDE, id="a", metadata=TITLED)

    def write_both() -> None:
        with opened(db.path) as other, db.transaction() as t:
            t.upsert(GUIDE, id="a", metadata={**TITLED, "year": 4})
            other.update("a", metadata={"title": "Another"})

    with pytest.raises(ConflictError):
        write_both()
    check(db, "a", "Another")


def test_what_is_loaded_is_cut_with_room_for_the_place(db: MemDB) -> None:
    pieces = db.split(GUIDE, id="a", metadata=TITLED)
    contents = [piece.placed for piece in pieces]
    assert contents == placed(GUIDE, "a", "Veldmoor")
    batch = DocumentBatch([Document(GUIDE, "a", TITLED)], WordEmbedder().embed(contents))
    db.load([batch])
    check(db, "a", "Veldmoor", warm=False)
    db.warm()
    check(db, "a", "Veldmoor")


def test_a_reference_that_leaves_no_room_goes_without(db: MemDB) -> None:
    """Whoever cut it did not know of places."""
    pieces = Chunker(tokenizer_json(), LENGTH).split(PAGE)
    vectors = WordEmbedder().embed([piece.text.strip() for piece in pieces])
    db.load([DocumentBatch([Document(PAGE, "a", TITLED)], vectors, pieces=[pieces])])
    assert "" in db.places("a")
    db.warm()
    assert max(Chunker(tokenizer_json(), LENGTH).count(text) for text in db.writer.texts) <= LENGTH


# --- every copy, and every repair -----------------------------------------------------------------


def _exported(path: Path, folder: Path) -> Path:
    with MemDB.open(path) as database:
        database.export(folder / "export")
    import_database(folder / "export", folder / "copy")
    return folder / "copy"


def _backed_up(path: Path, folder: Path) -> Path:
    backup(path, folder / "copy")
    return folder / "copy"


def _restored(path: Path, folder: Path) -> Path:
    backup(path, folder / "kept")
    restore(folder / "kept", path)
    return path


def _compacted(path: Path, _: Path) -> Path:
    compact(path)
    return path


@pytest.mark.parametrize("copied", [_exported, _backed_up, _restored, _compacted])
def test_a_copy_knows_places(
    db: MemDB, tmp_path: Path, copied: Callable[[Path, Path], Path]
) -> None:
    db.insert(GUIDE, id="a", metadata=TITLED)
    db.insert(GUIDE, id="b", cold=True)
    db.close()
    with opened(copied(db.path, tmp_path)) as copy:
        assert copy.stats()["cutting"] == {"rule": "structure", "place": True}
        check(copy, "a", "Veldmoor")
        copy.warm()
        check(copy, "b")
        copy.insert(GUIDE, id="c", metadata=TITLED)
        check(copy, "c", "Veldmoor")


def test_a_namespace_has_places_as_its_database(db: MemDB) -> None:
    with db.namespace("n") as namespace:
        namespace.insert(GUIDE, id="a", metadata=TITLED)
        check(namespace, "a", "Veldmoor")


@pytest.mark.parametrize("length", [LENGTH, 64, 32])
def test_a_rewrite_writes_the_place(db: MemDB, length: int) -> None:
    db.insert(GUIDE, id="a", metadata=TITLED)
    db.insert(GUIDE, id="b", cold=True)
    db.close()
    report = rewrite(db.path, Writer(length, "model-2"), embedder=Embedder)
    assert report.recut == (0 if length == LENGTH else 2)
    writer = Writer(length, "model-2")
    with MemDB.open(db.path, embedder=Embedder(), writer=writer) as again:
        check(again, "a", "Veldmoor", length=length)
        check(again, "b", warm=False, length=length)
    assert verify(db.path) == []


def test_a_recode_leaves_what_places_gave(db: MemDB) -> None:
    db.insert(GUIDE, id="a", metadata=TITLED)
    before = [stored.memory.positions.tolist() for _, stored in db.memories("a") if stored]
    db.recode("int8")
    after = [stored.memory.positions.tolist() for _, stored in db.memories("a") if stored]
    assert before == after


def test_a_repair_embeds_and_writes_the_place(db: MemDB) -> None:
    db.insert(GUIDE, id="a", metadata=TITLED)
    number = db.get("a").references[2]
    db.close()
    key = number.to_bytes(8, "little")
    with raw(db.path) as (environment, tables), environment.begin(write=True) as transaction:
        for table in ("embeddings", "memories"):
            record = bytearray(transaction.get(key, db=tables[table]))
            record[-1] ^= 1
            transaction.put(key, bytes(record), db=tables[table])
    assert len(verify(db.path)) == 2
    assert repair(db.path, embedder=Embedder).left == []
    with opened(db.path) as again:
        again.warm()
        check(again, "a", "Veldmoor")


def test_a_damaged_setting_is_named_and_removed(db: MemDB) -> None:
    db.insert(GUIDE, id="a")
    db.close()
    with raw(db.path) as (environment, tables), environment.begin(write=True) as transaction:
        bad = json.dumps({"rule": "structure", "place": 1}).encode()
        transaction.put(b"cutting", seal("settings", b"cutting", 1, bad), db=tables["settings"])
    (problem,) = verify(db.path)
    assert (problem.table, problem.key) == ("settings", "'cutting'")
    assert "'place'" in problem.what
    (mended,) = repair(db.path).mended
    assert "'cutting' was damaged" in mended
    assert verify(db.path) == []
    with opened(db.path) as again:
        assert again.settings["cutting"] == {"rule": "sentences", "place": False}
        assert again.get("a").text == GUIDE


# --- databases that record nothing, or something else ---------------------------------------------


def forget(path: Path) -> None:
    """Make it a database of a release that knew nothing of all this."""
    with raw(path) as (environment, tables), environment.begin(write=True) as transaction:
        assert transaction.delete(b"cutting", db=tables["settings"])


def test_an_old_database_goes_on_as_it_was(db: MemDB, tmp_path: Path) -> None:
    db.close()
    forget(db.path)
    as_ever = [piece.text for piece in Chunker(tokenizer_json(), LENGTH).split(GUIDE)]
    assert as_ever != [piece.text for piece in db._chunker.split(GUIDE)]
    with opened(db.path) as old:
        old.insert(GUIDE, id="a", metadata=TITLED)
        assert [reference.text for reference, _ in old.memories("a")] == as_ever
        assert old.writer.texts == old.embedder.texts == [text.strip() for text in as_ever]
        assert set(old.places("a")) == {""}
        before = old.get("a").references
        old.update("a", metadata={"title": "Another"})
        assert old.get("a").references == before
        with old.namespace("n") as namespace:
            assert namespace.settings["cutting"] == {"rule": "sentences", "place": False}
    with opened(_exported(db.path, tmp_path)) as copy:
        assert copy.settings["cutting"] == {"rule": "sentences", "place": False}
        assert [reference.text for reference, _ in copy.memories("a")] == as_ever
    manifest = json.loads((tmp_path / "export" / "manifest.json").read_text())
    assert "cutting" not in manifest["settings"]
    assert verify(db.path) == []
    rewrite(db.path, Writer(32), embedder=Embedder)
    with MemDB.open(db.path, embedder=Embedder(), writer=Writer(32)) as old:
        again = [piece.text for piece in Chunker(tokenizer_json(), 32).split(GUIDE)]
        assert [reference.text for reference, _ in old.memories("a")] == again


def test_without_places_a_new_database_has_the_new_cuts(tmp_path: Path) -> None:
    with make(tmp_path / "db", place=False) as db:
        db.insert(GUIDE, id="a", metadata=TITLED)
        chunker = Chunker(tokenizer_json(), LENGTH, Cutting("structure"))
        texts = [piece.text for piece in chunker.split(GUIDE)]
        assert [reference.text for reference, _ in db.memories("a")] == texts
        assert db.writer.texts == db.embedder.texts == [text.strip() for text in texts]


def test_an_export_of_the_other_kind_is_refused(db: MemDB, tmp_path: Path) -> None:
    db.insert(GUIDE, id="a")
    db.export(tmp_path / "export")
    with make(tmp_path / "other", place=False):
        pass
    with pytest.raises(MismatchError, match="have a place, those of the database have no place"):
        import_database(tmp_path / "export", tmp_path / "other")
    with MemDB.open(tmp_path / "other") as other:
        assert len(other) == 0


def test_a_rule_of_a_later_release_is_refused(db: MemDB) -> None:
    db.close()
    with raw(db.path) as (environment, tables), environment.begin(write=True) as transaction:
        later = json.dumps({"rule": "meaning", "place": True}).encode()
        transaction.put(b"cutting", seal("settings", b"cutting", 1, later), db=tables["settings"])
    with pytest.raises(FormatError, match=r"rule 'meaning'.*newer release"):
        MemDB.open(db.path)
