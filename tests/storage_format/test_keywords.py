"""`keywords.db` is as storage_format.md says, read without memdb."""

from __future__ import annotations

import re
import sqlite3
import unicodedata
from collections import Counter
from itertools import pairwise
from pathlib import Path

from memdb import Hit, MemDB
from tests.storage_format.databases import filled
from tests.storage_format.document import blocks, rows, section
from tests.storage_format.reader import Database, is_kind, read_database

RANGES = re.compile(r"U\+([0-9A-F]+) to\s+U\+([0-9A-F]+)")
TEXTS = ("Le Café, déjà vu", "港は古い船 A港B", "हिन्दी में", "STRASSE Straße", "x" * 70, "ﬁn 2½")


def words(text: str, *, of_a_query: bool = False) -> list[str]:
    """Cut as the document says."""
    prose = section("Keyword index").split("In a word, a run of")[1]
    unspaced = [range(int(a, 16), int(b, 16) + 1) for a, b in RANGES.findall(prose)]
    assert len(unspaced) == 10
    plain = unicodedata.normalize("NFKD", text)
    plain = "".join(c for c in plain if not 0x300 <= ord(c) <= 0x36F)
    plain = unicodedata.normalize("NFKC", plain).casefold()
    kept = "".join(c if unicodedata.category(c)[0] in "LNM" else " " for c in plain)
    found = []
    for word in kept.split():
        parts: list[list[str]] = []
        kinds: list[bool] = []
        for character in word:
            kind = any(ord(character) in one for one in unspaced)
            if not kinds or kinds[-1] != kind:
                kinds.append(kind)
                parts.append([])
            parts[-1].append(character)
        for kind, part in zip(kinds, parts, strict=True):
            if not kind:
                found.append("".join(part)[:64])
                continue
            if not of_a_query or len(part) == 1:
                found += part
            found += [one + other for one, other in pairwise(part)]
    return found


def read(path: Path, database: Database) -> tuple[dict[str, object], dict[int, Counter[str]]]:
    """What a valid file says of itself, and the words of each row."""
    connection = sqlite3.connect(path)
    try:
        schema = dict(connection.execute("SELECT name, sql FROM sqlite_schema"))
        stated = blocks("Keyword index", "sql")[0].strip().splitlines()
        assert [schema["about"], schema["words"]] == stated
        assert all(name.startswith(("about", "words", "sqlite_auto")) for name in schema)
        said = dict(connection.execute("SELECT name, value FROM about"))
        listed = rows("Keyword index", columns=3)
        assert {name.strip("`") for name, _, _ in listed} == set(said)
        for name, kind, _ in listed:
            assert is_kind(said[name.strip("`")], "string" if kind == "text" else kind)
        connection.execute("CREATE VIRTUAL TABLE temp.every USING fts5vocab(main, words, instance)")
        held: dict[int, Counter[str]] = {
            number: Counter() for (number,) in connection.execute("SELECT id FROM words_docsize")
        }
        for word, number in connection.execute("SELECT term, doc FROM temp.every"):
            held[number][word] += 1
    finally:
        connection.close()
    assert said["database"] == database.setting("format")["id"]
    assert said["seal"] == database.name(said["change"])
    assert said["rows"] == len(held)
    assert said["words"] == sum(one.total() for one in held.values())
    return said, held


def text_of(database: Database) -> dict[int, str]:
    return {number: reference[-1] for number, reference in database.references().items()}


def test_the_keyword_index_is_as_the_document_says(tmp_path: Path) -> None:
    path = tmp_path / "a.memdb"
    with filled(path) as db:
        assert db.query("text 4", mode="keyword").hits
        first = db.stats()["changes"]
        for n, text in enumerate(TEXTS):
            db.insert(text, id=f"more {n}")
            db.query("text", mode="keyword")
        db.delete("more 0")
        assert db.query("港", mode="keyword").hits
        file = next(path.rglob("keywords.db"))
    database = read_database(path)
    said, held = read(file, database)
    assert said["since"] == first
    assert said["change"] == database.setting("counters")["last_change"]
    texts = text_of(database)
    assert set(texts) < set(held)  # what was deleted keeps its row
    assert {n: held[n] for n in texts} == {n: Counter(words(text)) for n, text in texts.items()}


def test_a_query_is_cut_as_the_document_says(tmp_path: Path) -> None:
    path = tmp_path / "a.memdb"
    with filled(path) as db:
        for n, text in enumerate(TEXTS):
            db.insert(text, id=f"more {n}")
        queries = (*TEXTS, "港", "古い", "cafe", "strasse", "A港", "text 7")
        found = {query: {hit.id for hit in ask(db, query)} for query in queries}
    held = {n: set(words(text)) for n, text in text_of(read_database(path)).items()}
    for query in queries:
        wanted = set(words(query, of_a_query=True))
        assert found[query] == {n for n, there in held.items() if there & wanted}, query
        assert found[query], query


def ask(db: MemDB, query: str) -> list[Hit]:
    return db.query(query, 500, mode="keyword").hits
