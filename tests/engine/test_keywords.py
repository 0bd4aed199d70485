"""Keyword search: it finds what has the words, in exactly the state that is searched, whatever
happens to its file."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sqlite3
import subprocess
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from memdb import (
    BusyError,
    Document,
    DocumentBatch,
    InvalidInputError,
    MemDB,
    MissingPartError,
    StorageError,
    compact,
    repair,
    verify,
)
from memdb.keywords import Keywords, word_index
from memdb.keywords.words import query_words, words_of
from memdb.storage.store import Store
from tests.engine.helpers import TokenWriter, WordEmbedder, child, command, make_shape, unit

WORDS = ["harbour", "whale", "storm", "bridge", "light", "book", "ink", "town", "river", "keeper"]


@pytest.fixture
def db(bare_template: Path, tmp_path: Path) -> Iterator[MemDB]:
    shutil.copytree(bare_template, tmp_path / "db")
    with MemDB.open(tmp_path / "db") as database:
        yield database


def put(db: MemDB, name: str, text: str, **more: object) -> None:
    db.insert(text, id=name, embeddings=unit(1, len(name)), **more)  # type: ignore[arg-type]


def put_all(db: MemDB, texts: dict[str, str]) -> None:
    """Documents at once; each has its number among them as metadata."""
    documents = [Document(text, name, {"n": n}) for n, (name, text) in enumerate(texts.items())]
    db.load([DocumentBatch(documents, np.ones((len(texts), 2), np.float32))])


def found(db: MemDB, text: str, k: int = 10, **more: object) -> list[str]:
    hits = db.query(text, k, mode="keyword", **more).hits  # type: ignore[arg-type]
    return [hit.reference.document_id for hit in hits]


def file_of(db: MemDB) -> Path:
    return next(db.path.glob("gen-*")) / "keywords.db"


# --- what is found --------------------------------------------------------------------------------


def test_what_has_more_and_rarer_words_comes_first(db: MemDB) -> None:
    put(db, "both", "the whale and the storm")
    put(db, "rare", "the whale and the town")
    put(db, "none", "the town and the bridge")
    put(db, "long", "the storm " + "and the town and the bridge " * 10)
    put(db, "common", "a storm")
    assert found(db, "Whale, storm!") == ["both", "rare", "common", "long"]
    hits = db.query("whale storm", mode="keyword").hits
    scores = [hit.keyword_score for hit in hits]
    assert scores == sorted(scores, reverse=True)
    assert scores[-1] > 0
    assert [hit.score for hit in hits] == scores


@pytest.mark.parametrize(
    ("text", "query"),
    [
        ("Le Café de la Gare", "CAFE"),
        ("Le cafe\u0301 de la gare", "café"),
        ("Die Straße nach Köln", "STRASSE"),
        ("港は古い。船が来る。", "古い港"),
        ("港は古い。船が来る。", "船"),
        ("我们在北京大学学习", "北京"),
        ("กรุงเทพมหานคร", "กรุงเทพ"),
        ("서울에서 만나요", "서울"),
        ("Москва — столица России", "МОСКВА"),
        ("Το λιμάνι είναι παλιό", "λιμανι"),
        ("हिन्दी में लिखा हुआ", "हिन्दी"),
        ("كتاب قديم", "كتاب"),
        ("ﬁle １２３", "file 123"),
        ("error_code E-4042x in foo.bar()", "4042x"),
        ("tower東京2", "東京"),
    ],
)
def test_text_in_every_script_is_found(db: MemDB, text: str, query: str) -> None:
    put(db, "other", "a harbour, 山の上")
    put(db, "this", text)
    assert found(db, query) == ["this"]


@pytest.mark.parametrize(
    "query",
    [
        '"',
        "'",
        "whale AND storm",
        'whale" OR "x',
        "NOT whale",
        "whale*",
        "whale NEAR storm",
        "^whale",
        "text:whale",
        "(whale",
        "{whale}",
        "whale -storm",
        "whale\0storm",
        "%_\\;--",
        "words MATCH whale",
    ],
)
def test_operators_and_quotes_are_only_text(db: MemDB, query: str) -> None:
    put(db, "whale", "a whale in winter")
    put(db, "town", "and or not near: a town")
    assert ("whale" in found(db, query)) == ("whale" in query)


@pytest.mark.parametrize("query", ["?!", "—…。", "🐋", "xyzzy", "the"])
def test_a_query_without_words_that_are_there_finds_nothing(db: MemDB, query: str) -> None:
    put(db, "whale", "a whale in winter?!")
    assert found(db, query) == []
    assert db.query("whale", mode="keyword").hits


def test_stop_words_alone_are_words(db: MemDB) -> None:
    put(db, "play", "to be or not to be")
    put(db, "town", "a town on a river")
    assert found(db, "To be, or not to be?") == ["play"]


def test_a_very_long_query_is_a_query(db: MemDB) -> None:
    put_all(db, {f"d{n}": f"word{n} of a book" for n in range(300)})
    query = " ".join(f"word{n % 290}" for n in range(20_000))
    assert len(found(db, query, 400)) == 256  # words that count
    put(db, "blob", "x" * 5000)
    assert found(db, "x" * 5000) == ["blob"]


def test_words_are_the_same_on_both_sides() -> None:
    assert query_words("Big big, BIG-ger") == ["big", "ger"]
    assert words_of("東京都") == ["東", "京", "都", "東京", "京都"]
    assert query_words("東京都") == ["東京", "京都"]
    assert query_words("京") == ["京"]
    assert query_words("ﾃｽﾄ") == query_words("テスト")
    assert query_words("が") != query_words("か")


@given(st.text(max_size=60))
@settings(max_examples=200)
def test_any_text_is_words_that_sqlite_takes_as_they_are(text: str) -> None:
    connection = sqlite3.connect(":memory:")
    connection.execute("CREATE VIRTUAL TABLE words USING fts5(text, tokenize='ascii')")
    connection.execute("CREATE VIRTUAL TABLE terms USING fts5vocab(words, row)")
    connection.execute("INSERT INTO words VALUES (?)", (" ".join(words_of(text)),))
    assert {term for (term,) in connection.execute("SELECT term FROM terms")} == set(words_of(text))
    assert set(query_words(text)) <= set(words_of(text))
    connection.close()


def test_filters_and_accept_hold(db: MemDB) -> None:
    put_all(db, {f"d{n:02}": f"a storm in {n}" for n in range(60)})
    assert found(db, "storm 7", 3)[0] == "d07"
    assert len(found(db, "storm", 60, where={"n": {"$lt": 30}})) == 30
    assert found(db, "storm 8", 60, where={"n": {"$gt": 57}}) == ["d58", "d59"]
    assert found(db, "storm", 60, where={"n": 99}) == []
    asked = db.retrieve(
        "storm 7", 5, mode="keyword", accept=lambda one: one.document_id in ("d50", "d07")
    )
    assert [hit.reference.document_id for hit in asked.hits] == ["d07", "d50"]


def test_a_filter_finds_by_words_that_are_common_elsewhere(
    db: MemDB, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memdb.keywords.word_index._ROWS", 20)
    monkeypatch.setattr("memdb.keywords.word_index._FEW", 50)
    put_all(db, {f"d{n:03}": "a town" if n == 140 else "a storm" for n in range(150)})
    assert found(db, "storm", where={"n": {"$gte": 138, "$lte": 141}}) == ["d138", "d139", "d141"]
    assert len(found(db, "storm", 200)) == 20  # all that is looked at of so common a word
    assert found(db, "storm town") == ["d140"]
    assert len(found(db, "storm", 200, where={"n": {"$lt": 100}})) == 20


def test_words_that_most_have_count_where_the_best_differ(
    db: MemDB, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(1)
    texts = {
        f"d{n:03}": " ".join(rng.choice(WORDS, 6, p=np.arange(1, 11) / 55)) for n in range(400)
    }
    put_all(db, texts)
    queries = [" ".join(rng.choice(WORDS, 4)) for _ in range(20)]
    whole = [db.query(query, 5, mode="keyword").hits for query in queries]
    monkeypatch.setattr("memdb.keywords.word_index._ROWS", 150)
    monkeypatch.setattr("memdb.keywords.word_index._MANY", 10)
    found_ids = 0
    for query, due in zip(queries, whole, strict=True):
        hits = db.query(query, 5, mode="keyword").hits
        scores = {hit.id: hit.score for hit in due}
        for hit in hits:
            if hit.id in scores:
                found_ids += 1
                assert hit.score == pytest.approx(scores[hit.id], rel=1e-4)
    assert found_ids > 60


def test_hybrid_finds_what_one_search_alone_misses(full_template: Path, tmp_path: Path) -> None:
    shutil.copytree(full_template, tmp_path / "db")
    with MemDB.open(tmp_path / "db", embedder=WordEmbedder(), writer=TokenWriter()) as db:
        for n in range(40):
            db.insert(f"the ship {n} sails on", id=f"d{n}", cold=True)
        db.insert("E4042", id="code", cold=True)
        by_vector = db.query("the ship E4042", 41).hits
        hits = db.query("the ship E4042", 41, mode="hybrid").hits
        assert hits[0].reference.document_id == "code"
        assert by_vector[0].reference.document_id != "code"
        cosine = {hit.id: hit.score for hit in by_vector}
        assert {hit.id: hit.score for hit in hits} == pytest.approx(cosine, abs=1e-6)
        assert all(hit.keyword_score is None for hit in by_vector)
        assert hits[0].keyword_score is not None
        assert max(hits, key=lambda hit: hit.keyword_score or 0.0) is hits[0]
        assert len(db.query("the ship E4042", 3, mode="hybrid").hits) == 3
        # Words that nobody has: the order is the vectors'.
        unknown = db.query("xyzzy", 5, mode="hybrid").hits
        assert [hit.score for hit in unknown] == [hit.score for hit in db.query("xyzzy", 5).hits]
        assert all(hit.keyword_score == 0 for hit in unknown)
        memories = db.retrieve("the ship E4042", 2, mode="hybrid").memories
        assert len(memories) == 2


def test_what_cannot_be_searched_says_so(db: MemDB) -> None:
    put(db, "whale", "a whale")
    with pytest.raises(InvalidInputError, match=r"mode is one of .*; got 'words'"):
        db.query("whale", mode="words")  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="an embedding has no words"):
        db.retrieve(np.ones(2, np.float32), mode="hybrid")
    with pytest.raises(InvalidInputError, match="empty"):
        db.query(" ", mode="keyword")
    with pytest.raises(MissingPartError):
        db.query("whale", mode="hybrid")  # no embedder
    assert found(db, "whale") == ["whale"]  # which words do not need


def test_without_full_text_search_the_error_says_so(
    db: MemDB, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(db, "whale", "a whale")
    without = word_index._TABLES["words"].replace("fts5", "fts5_not_there")
    monkeypatch.setitem(word_index._TABLES, "words", without)
    with pytest.raises(MissingPartError, match="full-text search"):
        found(db, "whale")
    assert db.retrieve(np.ones(2, np.float32)).hits


# --- the state that is searched -------------------------------------------------------------------


def test_who_never_asks_pays_nothing(db: MemDB) -> None:
    code = (
        "import sys, memdb; db = memdb.MemDB.open(sys.argv[1]); db.insert('a whale', "
        "embeddings=[[1, 2]]); db.retrieve([0.5, 1.0]); db.stats(); db.index_if_due(); "
        "sys.exit('sqlite3' in sys.modules)"
    )
    done = child(code, db.path)
    assert done.returncode == 0, done.stderr
    assert db.stats()["keywords"] is None
    assert not list(db.path.rglob("keywords*"))


def test_it_is_in_step_with_every_change(db: MemDB) -> None:
    put(db, "a", "a whale")
    assert found(db, "whale") == ["a"]
    put(db, "b", "another whale")
    db.update("a", text="a storm", embeddings=unit(1, 1))
    assert found(db, "whale") == ["b"]
    assert found(db, "storm") == ["a"]
    db.delete("b")
    assert found(db, "whale storm") == ["a"]
    with suppress(ZeroDivisionError), db._store.write() as transaction:
        transaction.delete_references(db.get("a").references)
        raise ZeroDivisionError
    assert found(db, "whale storm") == ["a"]
    assert db.stats()["keywords"]["references"] == 3


def test_a_snapshot_sees_its_own_state(db: MemDB) -> None:
    put(db, "gone", "a whale")
    put(db, "old", "a whale too")
    with db.snapshot() as before_any:  # there is no index yet
        db.delete("gone")
        put(db, "new", "a new whale")
        assert sorted(found(db, "whale")) == ["new", "old"]
        with db.snapshot() as later:
            put(db, "short", "a whale of a moment")
            with db.snapshot() as between:
                db.delete("short", "old")
                assert found(db, "whale") == ["new"]
                for _ in range(2):
                    assert sorted(found(between, "whale")) == ["new", "old", "short"]  # type: ignore[arg-type]
                    assert sorted(found(later, "whale")) == ["new", "old"]  # type: ignore[arg-type]
                    assert sorted(found(before_any, "whale")) == ["gone", "old"]  # type: ignore[arg-type]
                    assert found(db, "whale") == ["new"]
    compact(db.path)
    assert found(db, "whale") == ["new"]


def test_a_snapshot_outlives_a_compaction(db: MemDB) -> None:
    put(db, "a", "a whale")
    with db.snapshot() as snapshot:
        db.delete("a")
        compact(db.path)
        assert found(db, "whale") == []
        assert found(snapshot, "whale") == ["a"]  # type: ignore[arg-type]
    assert b"whale" not in b"".join(
        file.read_bytes() for file in db.path.rglob("*") if file.is_file()
    )


def test_it_is_made_anew_once_more_than_half_is_gone(
    db: MemDB, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memdb.keywords.searcher._DEAD", 8)
    put_all(db, {f"d{n}": f"a whale {n}" for n in range(30)})
    assert len(found(db, "whale", 50)) == 30
    with db.snapshot() as snapshot:
        db.delete(*(f"d{n}" for n in range(25)))
        assert len(found(db, "whale", 50)) == 5
        assert db.stats()["keywords"]["references"] == 5
        assert len(found(snapshot, "whale", 50)) == 30  # type: ignore[arg-type]


class Steps(RuleBasedStateMachine):
    """Documents come, change and go, in two open databases; snapshots stay."""

    template: Path
    folder: Path

    def __init__(self) -> None:
        super().__init__()
        path = self.folder / f"db{len(list(self.folder.iterdir()))}"
        shutil.copytree(self.template, path)
        self.dbs = [MemDB.open(path), MemDB.open(path)]
        self.held: dict[str, str] = {}
        self.snapshots: list[tuple[object, object, dict[str, str]]] = []

    @rule(n=st.integers(0, 5), text=st.lists(st.sampled_from(WORDS), min_size=1, max_size=4))
    def put(self, n: int, text: list[str]) -> None:
        name, words = f"d{n}", " ".join(text)
        if name in self.held:
            self.dbs[n % 2].update(name, text=words, embeddings=unit(1, n))
        else:
            self.dbs[n % 2].insert(words, id=name, embeddings=unit(1, n))
        self.held[name] = words

    @precondition(lambda self: self.held)
    @rule(n=st.integers(0, 5))
    def delete(self, n: int) -> None:
        name = sorted(self.held)[n % len(self.held)]
        self.dbs[(n + 1) % 2].delete(name)
        del self.held[name]

    @rule()
    def snapshot(self) -> None:
        manager = self.dbs[0].snapshot()
        self.snapshots.append((manager, manager.__enter__(), dict(self.held)))

    @rule(which=st.integers(0, 9), word=st.sampled_from(WORDS))
    def search(self, which: int, word: str) -> None:
        places = [(self.dbs[0], self.held), (self.dbs[1], self.held)]
        places += [(one, held) for _, one, held in self.snapshots]  # type: ignore[misc]
        database, held = places[which % len(places)]
        expected = sorted(name for name, text in held.items() if word in text.split())
        assert sorted(found(database, word)) == expected

    @invariant()
    def few(self) -> None:
        while len(self.snapshots) > 3:
            self.snapshots.pop(0)[0].__exit__(None, None, None)  # type: ignore[attr-defined]

    def teardown(self) -> None:
        for manager, _, _ in self.snapshots:
            manager.__exit__(None, None, None)  # type: ignore[attr-defined]
        for database in self.dbs:
            database.close()


def test_every_state_is_found_exactly(
    bare_template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    monkeypatch.setattr("memdb.keywords.searcher._DEAD", 3)

    class Here(Steps):
        template = bare_template
        folder = tmp_path

    run_state_machine_as_test(
        Here,
        settings=settings(
            max_examples=15,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


# --- processes, threads, kills --------------------------------------------------------------------

WRITE = """
    import sys
    import numpy as np
    from memdb import MemDB
    with MemDB.open(sys.argv[1]) as db:
        for n in range(int(sys.argv[3])):
            db.insert(f"a whale {sys.argv[2]}{n}", id=f"{sys.argv[2]}{n}",
                      embeddings=np.ones((1, 2), np.float32))
            names = [hit.reference.document_id for hit in db.query(
                f"{sys.argv[2]}{n}", mode="keyword").hits]
            assert names == [f"{sys.argv[2]}{n}"], names
"""


def test_several_processes_write_and_search_at_once(db: MemDB) -> None:
    started = [subprocess.Popen(command(WRITE, db.path, name, 12)) for name in "abc"]
    seen = 0
    while any(process.poll() is None for process in started):
        now = len(found(db, "whale", 200))
        assert now >= seen
        seen = now
    assert [process.returncode for process in started] == [0, 0, 0]
    assert len(found(db, "whale", 200)) == 36
    assert file_of(db).exists()


def test_threads_search_at_once(db: MemDB) -> None:
    put_all(db, {f"d{n}": f"a whale {n}" for n in range(50)})
    wrong: list[object] = []

    def search(start: int) -> None:
        try:
            numbers = [n % 50 for n in range(start, start + 40)]
            wrong.extend(n for n in numbers if found(db, f"{n}") != [f"d{n}"])
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=search, args=(n * 7,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for n in range(20):
        put(db, f"more{n}", f"another storm{n}")
        assert found(db, f"storm{n}") == [f"more{n}"]
    for thread in threads:
        thread.join()
    assert not wrong


KILLED = """
    import os, signal, sys
    from memdb import MemDB
    from memdb.keywords.word_index import WordIndex
    when = sys.argv[2]
    if when == "before":
        WordIndex.commit = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    elif when == "adding":
        add = WordIndex.add
        def added(self, references):
            add(self, list(references)[:1])
            os.kill(os.getpid(), signal.SIGKILL)
        WordIndex.add = added
    elif when == "after":
        commit = WordIndex.commit
        def killed(self, about):
            commit(self, about)
            os.kill(os.getpid(), signal.SIGKILL)
        WordIndex.commit = killed
    MemDB.open(sys.argv[1]).query("whale", mode="keyword")
"""


@pytest.mark.parametrize("when", ["before", "adding", "after"])
@pytest.mark.parametrize("first", [True, False])
def test_a_kill_between_store_and_index_loses_nothing(db: MemDB, when: str, first: bool) -> None:
    put(db, "a", "a whale")
    if not first:
        assert found(db, "whale") == ["a"]
    put(db, "b", "b whale")
    put(db, "c", "c storm")
    assert child(KILLED, db.path, when).returncode == -signal.SIGKILL
    assert sorted(found(db, "whale")) == ["a", "b"]
    assert found(db, "storm") == ["c"]


def test_a_file_of_an_undone_past_is_not_believed(bare_template: Path, tmp_path: Path) -> None:
    """As after a power cut that undid the last changes of the store, but not the index."""
    shutil.copytree(bare_template, tmp_path / "db")
    with MemDB.open(tmp_path / "db") as db:
        put(db, "a", "a whale")
    shutil.copytree(tmp_path / "db", tmp_path / "before")
    with MemDB.open(tmp_path / "db") as db:
        put(db, "b", "a storm")
        assert found(db, "storm") == ["b"]
        name = file_of(db).relative_to(tmp_path / "db")
    shutil.copy(tmp_path / "db" / name, tmp_path / "before" / name)
    with MemDB.open(tmp_path / "before") as db:
        assert found(db, "whale storm") == ["a"]
    shutil.copy(tmp_path / "db" / name, tmp_path / "before" / name)
    with MemDB.open(tmp_path / "before") as db:
        put(db, "c", "a bridge")  # the same number, the same reference id
        assert found(db, "bridge") == ["c"]
        assert found(db, "storm") == []
        put(db, "d", "a river")
        assert found(db, "river bridge storm") == ["c", "d"]


# --- the file -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage",
    [
        "empty",
        "zeros",
        "text",
        "cut",
        "head",
        "schema",
        "tables",
        "values",
        "letters",
        "version",
        "other",
        "missing",
    ],
)
@pytest.mark.parametrize("open_now", [True, False])
def test_a_damaged_file_is_built_anew(db: MemDB, damage: str, open_now: bool) -> None:
    put_all(db, {f"d{n}": f"a whale {n} " + " ".join(WORDS[: n % 10]) for n in range(200)})
    assert len(found(db, "whale", 300)) == 200
    path = db.path
    if not open_now:
        db.close()
    file = next(path.glob("gen-*")) / "keywords.db"
    size = file.stat().st_size
    content = {
        "empty": b"",
        "zeros": bytes(max(size, 4096)),
        "text": b"no database at all" * 400,
    }
    if damage in content:
        _replace(file, content[damage])
    elif damage == "cut":
        _close_and(db, lambda: os.truncate(file, size // 2))
    elif damage == "head":
        _close_and(db, lambda: _overwrite(file, 0, bytes(100)))
    elif damage == "schema":  # what SQLite says of it is not UTF-8 itself
        _close_and(db, lambda: _overwrite(file, file.read_bytes().index(b"E about"), b"\xeb"))
    elif damage == "missing":
        file.unlink()
    else:
        statements = {
            "tables": "DROP TABLE about",
            "values": "UPDATE about SET value = 'x' WHERE name = 'change'",
            "letters": "UPDATE about SET value = CAST(x'eb' AS TEXT) WHERE name = 'seal'",
            "version": "UPDATE about SET value = 99 WHERE name = 'version'",
            "other": "UPDATE about SET value = 'another' WHERE name = 'database'",
        }
        connection = sqlite3.connect(file)
        connection.execute(statements[damage])
        connection.commit()
        connection.close()
    with MemDB.open(path) as again:
        assert len(found(again, "whale", 300)) == 200
        put(again, "new", "a new whale")
        assert found(again, "new") == ["new"]
    if open_now and damage not in ("cut", "head", "schema"):
        assert len(found(db, "whale", 300)) == 201


def _close_and(db: MemDB, then: object) -> None:
    db.close()
    then()  # type: ignore[operator]


def _replace(file: Path, content: bytes) -> None:
    for end in ("-wal", "-shm"):
        file.with_name(file.name + end).unlink(missing_ok=True)
    file.unlink()
    file.write_bytes(content)


def _overwrite(file: Path, place: int, content: bytes) -> None:
    with file.open("r+b") as handle:
        handle.seek(place)
        handle.write(content)


def test_flipped_bytes_are_never_a_crash_nor_a_wrong_document(db: MemDB, tmp_path: Path) -> None:
    put_all(db, {f"d{n}": " ".join([f"w{n}", *WORDS]) for n in range(120)})
    assert found(db, "w7") == ["d7"]
    path = db.path
    db.close()
    rng = np.random.default_rng(1)
    file = next(path.glob("gen-*")) / "keywords.db"
    whole = file.read_bytes()
    for _ in range(25):
        bad = bytearray(whole)
        for place in rng.integers(0, len(bad), 40):
            bad[place] ^= 1 << int(rng.integers(8))
        _replace(file, bytes(bad)) if file.exists() else file.write_bytes(bad)
        with MemDB.open(path) as again:
            for n in range(0, 120, 17):
                for hit in again.query(f"w{n} whale", 5, mode="keyword").hits:
                    assert hit.reference.document_id.startswith("d")


def test_verify_finds_what_is_wrong_and_repair_removes_it(db: MemDB) -> None:
    put_all(db, {f"d{n}": " ".join([f"w{n}", *WORDS]) for n in range(120)})
    assert found(db, "w7") == ["d7"]
    db.delete("d3")
    put(db, "new", "a new whale")
    assert verify(db.path) == []  # behind, but right
    path, file = db.path, file_of(db)
    assert found(db, "new") == ["new"]
    assert verify(path) == []
    connection = sqlite3.connect(file)
    connection.execute("DELETE FROM words_docsize WHERE id = 9")
    connection.commit()
    connection.close()
    [problem] = verify(path)
    assert (problem.table, problem.what) == ("keywords", "it lacks reference 9")
    assert repair(path).mended == ["the keyword index was damaged: removed"]
    assert not file.exists()
    assert found(db, "w8") == ["d8"]
    db.close()
    whole = file.read_bytes()
    at = whole.index(b"bridge") if b"bridge" in whole else whole.index(b"ridge")
    _overwrite(file, at, b"q")  # no structure is hurt: only the word is another
    problems = verify(path)
    assert [problem.table for problem in problems] == ["keywords"], problems
    assert repair(path).left == []
    with MemDB.open(path) as again:
        assert len(found(again, "bridge", 200)) == 119


def test_a_medium_that_cannot_be_written_searches_in_ram(
    db: MemDB, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    put(db, "a", "a whale")
    (file := file_of(db)).mkdir()  # nothing opens this
    with caplog.at_level(logging.WARNING, "memdb"):
        assert found(db, "whale") == ["a"]
        put(db, "b", "a whale")
        assert sorted(found(db, "whale")) == ["a", "b"]
        db.delete("a")
        assert found(db, "whale") == ["b"]
    assert len(caplog.records) == 1  # said once
    file.rmdir()
    assert found(db, "whale") == ["b"]
    assert file.is_file()


def test_a_file_that_cannot_be_written_is_searched_with_a_tail_in_ram(db: MemDB) -> None:
    put(db, "a", "a whale")
    assert found(db, "whale") == ["a"]
    file = file_of(db)
    db.close()
    _frozen(file)
    code = """
        import sys
        from memdb import MemDB
        import memdb.keywords.word_index as module
        whole = module.WordIndex.__init__
        def only_frozen(self, path, timeout=0.0, *, frozen=False):
            if path is not None and not frozen:
                raise module.Refused("attempt to write a readonly database")
            whole(self, path, timeout, frozen=frozen)
        module.WordIndex.__init__ = only_frozen
        def found():
            hits = db.query("whale", mode="keyword").hits
            print(*sorted(hit.reference.document_id for hit in hits))
        with MemDB.open(sys.argv[1]) as db:
            for name in "bc":
                db.insert(f"{name} whale", id=name, embeddings=[[1, 2]])
                found()
            db.delete("a")
            found()
    """
    done = child(code, db.path)
    assert done.stdout.splitlines() == ["a b", "a b c", "b c"], done.stderr


def _frozen(file: Path) -> None:
    """Leave nothing beside a file."""
    connection = sqlite3.connect(file)
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    assert not file.with_name("keywords.db-wal").exists()


def test_a_full_disk_searches_in_ram(db: MemDB, monkeypatch: pytest.MonkeyPatch) -> None:
    put(db, "a", "a whale")
    assert found(db, "whale") == ["a"]
    for index in db._keywords._free:
        index._connection.execute("PRAGMA max_page_count = 1")  # SQLite says: the disk is full
    put_all(
        db,
        {f"d{n}": f"a whale {n} " + " ".join(f"x{n}y{i}" for i in range(40)) for n in range(300)},
    )
    assert len(found(db, "whale", 400)) == 301
    assert db.stats()["keywords"]["references"] == 1


def test_a_writer_that_holds_the_file_is_waited_for(db: MemDB) -> None:
    put(db, "a", "a whale")
    assert found(db, "whale") == ["a"]
    other = sqlite3.connect(file_of(db), isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    assert found(db, "whale") == ["a"]  # who only reads waits for nobody
    timer = threading.Timer(0.2, other.rollback)
    timer.start()
    put(db, "b", "b whale")
    assert sorted(found(db, "whale")) == ["a", "b"]
    timer.join()
    other.close()


def test_an_index_that_is_just_being_made_is_no_damage(db: MemDB) -> None:
    put(db, "a", "a whale")
    word_index.WordIndex(file_of(db)).close()
    assert verify(db.path) == []
    assert found(db, "whale") == ["a"]


def test_a_writer_that_holds_it_too_long_is_said(db: MemDB) -> None:
    put(db, "a", "a whale")
    assert found(db, "whale") == ["a"]
    other = sqlite3.connect(file_of(db), isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    put(db, "b", "b whale")
    with MemDB.open(db.path, busy_timeout=0.05) as impatient:
        with pytest.raises(BusyError, match=r"is writing the keyword index.* 0\.05 s"):
            found(impatient, "whale")
        assert verify(db.path, busy_timeout=0.05) == []
    other.rollback()
    other.close()
    assert sorted(found(db, "whale")) == ["a", "b"]


def test_ingest_keeps_it_in_step_and_progress_is_told(
    full_template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(full_template, tmp_path / "db")
    monkeypatch.setattr("memdb.keywords.searcher._TOLD_EVERY", 10)
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(f'{{"id": "d{n}", "text": "a whale {n}"}}\n' for n in range(30)))
    with MemDB.open(tmp_path / "db", embedder=WordEmbedder(), writer=TokenWriter()) as db:
        db.ingest(corpus, cold=True)
        assert db.stats()["keywords"] is None
        told: list[tuple[str, int, int]] = []
        db.build_keywords(progress=lambda *step: told.append(step))
        assert told == [("indexing words", n, 30) for n in (0, 10, 20, 30)]
        corpus.write_text('{"id": "new", "text": "a new whale"}\n')
        db.ingest(corpus, cold=True)
        assert db.stats()["keywords"]["references"] == 31
        assert db.stats()["keywords"]["change"] == db.stats()["changes"]


def test_a_closed_database_says_so(bare_template: Path, tmp_path: Path) -> None:
    shutil.copytree(bare_template, tmp_path / "db")
    db = MemDB.open(tmp_path / "db")
    put(db, "a", "a whale")
    assert found(db, "whale") == ["a"]
    db.close()
    with pytest.raises(Exception, match="closed"):
        found(db, "whale")
    assert not list((tmp_path / "db").rglob("keywords.db-*"))


def test_it_works_without_an_open_database(bare_template: Path, tmp_path: Path) -> None:
    """The room needs a store alone."""
    shutil.copytree(bare_template, tmp_path / "db")
    store = Store(tmp_path / "db")
    keywords = Keywords(store)
    with store.read() as transaction:
        matched = keywords.search(transaction, "whale")
    assert not len(matched.ids)
    keywords.close()
    store.close()


def test_a_database_that_is_only_read_keeps_its_words_in_ram(tmp_path: Path) -> None:
    path = tmp_path / "db"
    with MemDB.create(path, shape=make_shape(), dimension=2, codec="exact") as database:
        database.insert("the harbour of Veldmoor", id="a", embeddings=unit(1, 1))
    before = sorted(file.name for file in path.rglob("*"))
    with MemDB.open(path, read_only=True) as database:
        for _ in range(2):
            (hit,) = database.query("harbour", mode="keyword").hits
            assert hit.reference.document_id == "a"
        with pytest.raises(StorageError, match="read_only"):
            database.build_keywords()
    assert sorted(file.name for file in path.rglob("*")) == before
