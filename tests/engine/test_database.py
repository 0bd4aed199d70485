"""The six verbs, without a model: embeddings and memories are given, or come from small parts."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from memdb import (
    DEFAULT_CODEC,
    ConflictError,
    DocumentExistsError,
    ExplicitMemory,
    InvalidInputError,
    MemDB,
    MismatchError,
    MissingPartError,
    StorageError,
    UnknownDocumentError,
    pack,
)
from tests.engine.helpers import (
    PAGE,
    TokenWriter,
    WordEmbedder,
    make_memory,
    make_shape,
    same_memory,
    time_limit,
    tokenizer_json,
    unit,
)

SHAPE = make_shape()
EAST, NORTH, WEST = unit(1, 0), unit(0, 1), unit(-1, 0)


@pytest.fixture
def bare(tmp_path: Path, bare_template: Path) -> Iterator[MemDB]:
    """A database without parts: every text is one reference, embeddings have 2 numbers."""
    with MemDB.open(shutil.copytree(bare_template, tmp_path / "bare")) as database:
        yield database


@pytest.fixture
def full(tmp_path: Path, full_template: Path) -> Iterator[MemDB]:
    """A database with an embedder, a writer and their tokenizer; 16 tokens a reference."""
    path = shutil.copytree(full_template, tmp_path / "full")
    with MemDB.open(path, embedder=WordEmbedder(), writer=TokenWriter()) as database:
        yield database


def ids(database: MemDB, query: Any, k: int = 5) -> list[str]:
    """Document ids that a query finds, best first."""
    return [hit.reference.document_id for hit in database.retrieve(query, k).hits]


# --- create and open ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [{}, {"shape": SHAPE}, {"dimension": 2}, {"shape": SHAPE, "dimension": 0}],
    ids=["nothing", "no dimension", "no shape", "dimension 0"],
)
def test_create_says_what_it_needs(tmp_path: Path, arguments: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError, match="memory shape and an embedding dimension"):
        MemDB.create(tmp_path / "db", **arguments)
    assert not (tmp_path / "db").exists()


def test_create_refuses_an_unknown_codec_before_it_writes(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="'zip'; there are: exact, int8"):
        MemDB.create(tmp_path / "db", shape=SHAPE, dimension=2, codec="zip")
    assert not (tmp_path / "db").exists()


def test_what_was_recorded_is_there_after_opening(full: MemDB) -> None:
    with MemDB.open(full.path) as again:
        assert again.shape == TokenWriter().shape
        assert again.settings == {
            "embedder": {"name": "words", "fingerprint": "words-64", "dimension": 64},
            "model": {"name": "tokens"},
            "memory": {"codec": DEFAULT_CODEC, "selection": "third"},
            "cutting": {"rule": "structure", "place": False},
        }


class OtherEmbedder(WordEmbedder):
    fingerprint = "other"


class ShortEmbedder(WordEmbedder):
    dimension = 32


@pytest.mark.parametrize("other", [OtherEmbedder, ShortEmbedder])
def test_another_embedder_is_refused(full: MemDB, other: type[WordEmbedder]) -> None:
    with pytest.raises(MismatchError, match=r"embedder 'words'.*is not the one"):
        MemDB.open(full.path, embedder=other())
    with (
        MemDB.open(full.path, embedder=lambda: other()) as database,
        pytest.raises(MismatchError, match="is not the one"),
    ):
        database.query("text")


def test_another_writer_is_refused_and_the_difference_named(full: MemDB) -> None:
    difference = 'dtype: the database has "float32", the model \'tokens\' has "float16"'
    with pytest.raises(MismatchError, match=difference):
        MemDB.open(full.path, writer=TokenWriter(dtype="float16"))
    with (
        MemDB.open(full.path, writer=lambda: TokenWriter(dtype="float16")) as database,
        pytest.raises(MismatchError, match=difference),
    ):
        database.writer  # noqa: B018


def test_parts_given_as_functions_are_made_when_first_needed(full: MemDB) -> None:
    made: list[str] = []

    def embedder() -> WordEmbedder:
        made.append("embedder")
        return WordEmbedder()

    def writer() -> TokenWriter:
        made.append("writer")
        return TokenWriter()

    with MemDB.open(full.path, embedder=embedder, writer=writer) as database:
        database.insert("The harbour is old.", id="a", cold=True)
        database.query("harbour")
        assert made == ["embedder"]
        database.retrieve("harbour")
        database.retrieve("harbour")
        assert made == ["embedder", "writer"]


def test_parts_may_be_given_as_classes(full: MemDB) -> None:
    with MemDB.open(full.path, embedder=WordEmbedder, writer=TokenWriter) as database:
        database.insert("A ship comes home.", id="ship")
        assert isinstance(database.embedder, WordEmbedder)
        assert isinstance(database.writer, TokenWriter)
        assert ids(database, "ship") == ["ship"]


def test_what_needs_a_part_says_so(bare: MemDB, full: MemDB) -> None:
    bare.insert("text", id="a", embeddings=EAST)
    with pytest.raises(MissingPartError, match="without an embedder"):
        bare.insert("other text")
    with pytest.raises(MissingPartError, match="without an embedder"):
        bare.query("text")
    with pytest.raises(MissingPartError, match="no tokenizer"):
        bare.retrieve([1, 2])
    with pytest.raises(MissingPartError, match="without a memory writer"):
        bare.warm()
    with pytest.raises(MissingPartError, match="without a memory writer"):
        bare.writer  # noqa: B018


def test_a_closed_database_says_so(bare: MemDB) -> None:
    bare.close()
    bare.close()
    with pytest.raises(StorageError, match="closed"):
        bare.get("x")


def test_a_closed_database_says_so_while_another_is_open(bare: MemDB) -> None:
    closed = MemDB.open(bare.path)
    closed.close()
    for call in (
        lambda: closed.insert("A.", embeddings=EAST),
        lambda: closed.retrieve(EAST),
        lambda: closed.delete("a"),
        lambda: list(closed.documents()),
        closed.stats,
        closed.warm,
    ):
        with pytest.raises(StorageError, match="is closed"):
            call()
    assert bare.stats()["documents"] == 0


@pytest.mark.parametrize("instead", ["nothing", "another"])
def test_nothing_is_written_to_a_folder_that_is_gone(
    bare: MemDB, bare_template: Path, instead: str
) -> None:
    shutil.rmtree(bare.path)
    if instead == "another":
        shutil.copytree(bare_template, bare.path)
    with pytest.raises(StorageError, match="deleted, moved or replaced while it was open"):
        bare.insert("A.", embeddings=EAST)


def test_a_tokenizer_that_does_not_load_makes_no_database(tmp_path: Path) -> None:
    writer = TokenWriter()
    writer.tokenizer = "{}"
    with pytest.raises(InvalidInputError, match="the tokenizer does not load"):
        MemDB.create(tmp_path / "db", embedder=WordEmbedder(), writer=writer)
    assert not (tmp_path / "db").exists()


def test_a_path_that_no_file_can_have_is_refused(tmp_path: Path) -> None:
    path = f"{tmp_path}/a\0b"
    with pytest.raises(InvalidInputError, match="zero character"):
        MemDB.open(path)
    with pytest.raises(InvalidInputError, match="zero character"):
        MemDB.create(path, shape=SHAPE, dimension=2)


def test_closing_one_of_two_leaves_the_other(bare: MemDB) -> None:
    other = MemDB.open(bare.path)
    other.close()
    other.close()
    bare.insert("text", id="a", embeddings=EAST)
    assert ids(bare, EAST[0]) == ["a"]


# --- insert and get -------------------------------------------------------------------------------


def test_what_is_inserted_comes_back(bare: MemDB) -> None:
    text = "  Text with spaces, \u2028 lines\r\n and 港 \U0001f6a2 \0 too.\n"
    metadata = {"n": 1, "ü": [None, True, 1.5, {"": ""}], "big": 10**30}
    memory = make_memory(SHAPE, 1)
    given = bare.insert(text, id="Ä/1", metadata=metadata, embeddings=NORTH, memories=[memory])
    with MemDB.open(bare.path) as again:
        found = again.get("Ä/1")
        hit = again.retrieve(NORTH[0], 1).hits[0]
    assert found == given
    assert (found.id, found.version, found.text, found.metadata) == ("Ä/1", 1, text, metadata)
    assert (len(found.references), found.warm) == (1, 1)
    assert hit.memory is not None
    assert same_memory(hit.memory, memory)
    assert hit.reference.text == text
    assert hit.reference.content == text.strip()
    assert (hit.reference.id, hit.reference.version, hit.reference.ordinal) == (
        *found.references,
        1,
        0,
    )
    assert (hit.reference.document_id, hit.metadata) == ("Ä/1", metadata)


def test_a_long_text_becomes_references_in_order(full: MemDB) -> None:
    document = full.insert(PAGE, id="page")
    pieces = full.split(PAGE)
    assert len(pieces) == len(document.references) > 5
    assert full.get("page").text == PAGE
    assert document.warm == len(pieces)
    hits = full.retrieve("ships", 100).hits
    by_ordinal = sorted(hits, key=lambda hit: hit.reference.ordinal)
    assert [hit.reference.id for hit in by_ordinal] == list(document.references)
    assert [hit.reference.text for hit in by_ordinal] == [piece.text for piece in pieces]
    assert [hit.reference.tokens for hit in by_ordinal] == [piece.tokens for piece in pieces]


def test_the_writer_writes_the_memory_of_each_reference(full: MemDB) -> None:
    full.insert(PAGE, id="page")
    for hit in full.retrieve("ships", 100).hits:
        (wanted,) = TokenWriter().write([hit.reference.content])
        assert hit.memory is not None
        np.testing.assert_array_equal(hit.memory.offsets, wanted.offsets)
        np.testing.assert_array_equal(hit.memory.positions, wanted.positions)
        np.testing.assert_allclose(hit.memory.keys, wanted.keys, atol=1 / 254)


def test_an_id_is_derived_from_the_text(bare: MemDB) -> None:
    document = bare.insert("text", embeddings=EAST)
    assert document.id.startswith("sha256:")
    with pytest.raises(DocumentExistsError, match=document.id):
        bare.insert("text", metadata={"x": 1}, embeddings=EAST)
    assert bare.insert("text ", embeddings=EAST).id != document.id


def test_an_id_that_is_taken_is_refused(bare: MemDB) -> None:
    bare.insert("one", id="a", embeddings=EAST)
    with pytest.raises(DocumentExistsError, match="already a document 'a'; `update` replaces it"):
        bare.insert("two", id="a", embeddings=NORTH)
    assert bare.get("a").text == "one"
    assert bare.stats()["references"] == 1


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"text": ""}, "'text' is empty"),
        ({"text": " \n"}, "'text' is empty"),
        ({"text": None}, "'text' must be a string"),
        ({"text": "\ud83d"}, "'text' has half a surrogate pair"),
        ({"id": ""}, "'id' is empty"),
        ({"id": 5}, "'id' must be a string"),
        ({"id": "a" * 481}, "'id' has 481 bytes"),
        ({"id": "a\0"}, "'id' contains a zero"),
        ({"metadata": []}, "'metadata' must be an object"),
        ({"metadata": {"x": {1, 2}}}, "'metadata' cannot be kept as JSON"),
        ({"metadata": {"x": float("nan")}}, "'metadata' cannot be kept as JSON"),
        ({"metadata": {(1, 2): 3}}, "'metadata' cannot be kept as JSON"),
        (
            {"metadata": {"x": [{1: 2}]}},
            "'metadata' cannot be kept as JSON: its key 1 is no string",
        ),
        ({"embeddings": [[1.0, 0.0]] * 2}, r"shape \(1, 2\).*got \(2, 2\)"),
        ({"embeddings": [1.0, 0.0]}, r"shape \(1, 2\).*got \(2,\)"),
        ({"embeddings": [[1.0, 0.0, 0.0]]}, r"shape \(1, 2\).*got \(1, 3\)"),
        ({"embeddings": [[0.0, 0.0]]}, "embedding 0 is zero or not finite"),
        ({"embeddings": [[np.nan, 1.0]]}, "embedding 0 is zero or not finite"),
        ({"embeddings": [[np.inf, 1.0]]}, "embedding 0 is zero or not finite"),
        ({"memories": []}, "0 memories for a text of 1 references"),
        ({"memories": [make_memory(SHAPE, 1)] * 2}, "2 memories for a text of 1 references"),
        ({"memories": [make_memory(make_shape(kv_heads=1), 1)]}, "explicit memory: offsets"),
        ({"memories": [make_memory(make_shape("float16"), 1)]}, "explicit memory: keys"),
    ],
)
def test_what_cannot_be_kept_is_refused_and_named(
    bare: MemDB, arguments: dict[str, Any], problem: str
) -> None:
    good = {"text": "text", "id": "a", "embeddings": EAST}
    with pytest.raises((InvalidInputError, MismatchError), match=problem):
        bare.insert(**{**good, **arguments})
    assert bare.stats()["changes"] == 0
    bare.insert("old", id="a", embeddings=EAST)
    if "id" not in arguments and arguments.get("text", "") is not None:
        with pytest.raises((InvalidInputError, MismatchError), match=problem):
            bare.update(**{**good, **arguments})
        assert bare.get("a").text == "old"
        assert bare.stats()["changes"] == 1


def test_a_memory_that_is_not_finite_is_refused_with_its_place(bare: MemDB) -> None:
    memory = make_memory(SHAPE, 1)
    memory.values[0, 2] = np.nan
    with pytest.raises(InvalidInputError, match=r"the value of layer 0, kv head .* not finite"):
        bare.insert("text", embeddings=EAST, memories=[memory])
    assert bare.stats()["documents"] == 0


def test_embeddings_are_scaled_to_length_1(bare: MemDB) -> None:
    for n, scale in enumerate((1e-30, 1.0, 3e38)):
        bare.insert("text", id=str(n), embeddings=unit(0.6, 0.8) * np.float32(scale))
    hits = bare.retrieve(np.array([0.3, 0.4]), 5).hits
    assert [hit.score for hit in hits] == pytest.approx([1, 1, 1], abs=1e-6)


@pytest.mark.parametrize("name", ["", "missing", "a" * 2000, "a\0b", "\ud83d"])
def test_an_unknown_id_is_an_error_that_names_it(bare: MemDB, name: str) -> None:
    for call in (bare.get, bare.delete, lambda name: bare.warm([name])):
        with pytest.raises(UnknownDocumentError, match=r"no document") as caught:
            call(name)
        str(caught.value).encode()
    with pytest.raises(UnknownDocumentError):
        bare.update(name, text="text", embeddings=EAST)
    with pytest.raises(KeyError):  # for who thinks of a dict
        bare.get(name)


# --- update ---------------------------------------------------------------------------------------


def test_a_new_text_has_new_references_and_a_new_version(bare: MemDB) -> None:
    old = bare.insert("one", id="a", metadata={"x": 1}, embeddings=EAST)
    new = bare.update("a", text="two", embeddings=NORTH, memories=[make_memory(SHAPE, 1)])
    assert new == bare.get("a")
    assert (new.version, new.text, new.metadata, new.warm) == (2, "two", {"x": 1}, 1)
    assert not set(new.references) & set(old.references)
    hits = bare.retrieve(EAST[0]).hits
    assert [(hit.reference.text, hit.reference.version) for hit in hits] == [("two", 2)]
    assert bare.stats()["references"] == bare.stats()["memories"] == 1


def test_new_metadata_keeps_references_and_memories(full: MemDB) -> None:
    old = full.insert(PAGE, id="a", metadata={"x": 1})
    before = full.retrieve("ships", 3)
    new = full.update("a", metadata={"y": 2})
    after = full.retrieve("ships", 3)
    assert (new.version, new.metadata, new.text) == (2, {"y": 2}, PAGE)
    assert (new.references, new.warm) == (old.references, old.warm)
    assert [hit.metadata for hit in after.hits] == [{"y": 2}] * 3
    for one, other in zip(before.hits, after.hits, strict=True):
        assert one.reference == other.reference
        assert one.memory is not None
        assert other.memory is not None
        assert same_memory(one.memory, other.memory)


def test_the_same_content_changes_nothing(bare: MemDB) -> None:
    old = bare.insert("text", id="a", metadata={"x": [1, 2], "y": 1}, embeddings=EAST)
    assert bare.update("a") == old
    assert bare.update("a", text="text", metadata={"y": 1, "x": (1, 2)}) == old
    assert bare.stats()["changes"] == 1


def test_true_and_1_are_different_metadata(bare: MemDB) -> None:
    bare.insert("text", id="a", metadata={"x": 1}, embeddings=EAST)
    assert bare.update("a", metadata={"x": True}).metadata["x"] is True
    assert bare.get("a").version == 2


def test_a_write_for_another_version_is_refused(bare: MemDB) -> None:
    bare.insert("One.", id="a", embeddings=EAST)
    assert bare.update("a", metadata={"n": 1}, if_version=1).version == 2
    assert bare.update("a", text="Two.", embeddings=NORTH, if_version=2).version == 3
    before = bare.get("a")
    for call in (
        lambda: bare.update("a", metadata={"n": 2}, if_version=2),
        lambda: bare.update("a", text="Three.", embeddings=EAST, if_version=4),
        lambda: bare.delete("a", if_version=1),
    ):
        with pytest.raises(ConflictError, match="document 'a' is at version 3, not"):
            call()
    assert bare.get("a") == before
    bare.insert("Other.", id="b", embeddings=EAST)
    with pytest.raises(ConflictError, match="'a' is at version 3"):
        bare.delete("b", "a", if_version=1)
    assert bare.get("b").version == 1  # all or none
    bare.delete("a", if_version=3)


def test_text_and_metadata_change_together(bare: MemDB) -> None:
    bare.insert("one", id="a", metadata={"x": 1}, embeddings=EAST)
    new = bare.update("a", text="two", metadata={}, embeddings=EAST)
    assert (new.text, new.metadata, new.version) == ("two", {}, 2)


def test_memories_can_be_given_later(bare: MemDB) -> None:
    bare.insert("text", id="a", embeddings=EAST)
    memory = make_memory(SHAPE, 1)
    assert bare.update("a", embeddings=EAST, memories=[memory]).warm == 1
    (found,) = bare.retrieve(EAST[0]).memories
    assert same_memory(found, memory)


# --- delete ---------------------------------------------------------------------------------------


def test_what_is_deleted_is_gone_with_all_its_records(full: MemDB) -> None:
    full.insert(PAGE, id="page")
    full.insert("The harbour is old.", id="a")
    full.delete("page")
    with pytest.raises(UnknownDocumentError):
        full.get("page")
    assert ids(full, "ships", 100) == ["a"]
    stats = full.stats()
    assert (stats["documents"], stats["references"], stats["memories"]) == (1, 1, 1)
    full.delete("a")
    assert full.retrieve("ships").hits == []
    assert list(full.documents()) == []


def test_delete_takes_all_or_none(bare: MemDB) -> None:
    for n in range(3):
        bare.insert("text", id=str(n), embeddings=EAST)
    with pytest.raises(UnknownDocumentError, match="no document 'x', 'y'; nothing was deleted"):
        bare.delete("0", "x", "1", "y")
    assert [document.id for document in bare.documents()] == ["0", "1", "2"]
    bare.delete("0", "2", "0")
    assert [document.id for document in bare.documents()] == ["1"]
    bare.delete()
    assert bare.stats()["documents"] == 1


def test_ids_of_references_are_never_given_again(bare: MemDB) -> None:
    seen: set[int] = set()
    for round_ in range(3):
        for n in range(3):
            references = bare.insert("text", id=str(n), embeddings=EAST).references
            assert not seen.intersection(references)
            seen.update(references)
        bare.update("1", text=f"text {round_}", embeddings=EAST)
        bare.delete("0", "1", "2")
        bare.close()
        bare = MemDB.open(bare.path)
    with bare:
        assert min(bare.insert("text", embeddings=EAST).references) > max(seen)


def test_a_deleted_id_starts_again_at_version_1(bare: MemDB) -> None:
    bare.insert("one", id="a", embeddings=EAST)
    bare.update("a", text="two", embeddings=EAST)
    bare.delete("a")
    assert bare.insert("three", id="a", embeddings=EAST).version == 1


# --- list -----------------------------------------------------------------------------------------


def test_documents_come_in_the_order_of_their_bytes(bare: MemDB) -> None:
    names = ["b", "a", "ä", "a\x01", "aa", "B", "港", "a" * 480, "\U0001f6a2", "é"]
    for name in names:
        bare.insert("text", id=name, embeddings=EAST)
    assert [document.id for document in bare.documents()] == sorted(names, key=str.encode)


def test_a_walk_over_many_pages_finds_each_document_once(
    bare: MemDB, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memdb.readable._PAGE", 2)
    for n in range(7):
        bare.insert("text", id=f"{n}", metadata={"odd": n % 2}, embeddings=EAST)
    walk = bare.documents()
    assert [next(walk).id, next(walk).id] == ["0", "1"]
    bare.delete("1", "2")
    bare.insert("text", id="11", embeddings=EAST)
    assert [document.id for document in walk] == ["11", "3", "4", "5", "6"]
    assert [document.id for document in bare.documents({"odd": 1})] == ["3", "5"]
    assert list(bare.documents({"odd": 1, "other": 1})) == []


def test_stats_count_what_there_is(full: MemDB) -> None:
    full.insert(PAGE, id="page", cold=True)
    full.insert("The harbour is old.", id="a")
    stats = full.stats()
    references = len(full.split(PAGE)) + 1
    assert (stats["documents"], stats["references"]) == (2, references)
    assert (stats["memories"], stats["cold"]) == (1, references - 1)
    assert stats["shape"] == full.shape.to_json()
    assert stats["bytes"]["file"] >= sum(v for k, v in stats["bytes"].items() if k != "file") > 0


# --- retrieve -------------------------------------------------------------------------------------


def test_the_nearest_come_first(bare: MemDB) -> None:
    for name, embedding in (("west", WEST), ("north", NORTH), ("east", EAST)):
        bare.insert(name, id=name, embeddings=embedding)
    retrieval = bare.retrieve(np.array([2.0, 1.0]), 3)
    assert retrieval.query is None
    assert [hit.reference.text for hit in retrieval.hits] == ["east", "north", "west"]
    cosines = [2 / 5**0.5, 1 / 5**0.5, -2 / 5**0.5]
    assert [hit.score for hit in retrieval.hits] == pytest.approx(cosines, abs=1e-6)


def test_search_agrees_with_all_products(bare: MemDB) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((40, 2)).astype(np.float32)
    for n, vector in enumerate(vectors):
        bare.insert("text", id=f"{n}", embeddings=vector[None])
    bare.delete(*(f"{n}" for n in range(0, 40, 3)))
    left = [n for n in range(40) if n % 3]
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    for query in rng.standard_normal((5, 2)):
        best = sorted(left, key=lambda n: -(units[n] @ query))
        assert ids(bare, query, 7) == [str(n) for n in best[:7]]


def test_k_bounds_the_hits(bare: MemDB) -> None:
    for n in range(3):
        bare.insert("text", id=str(n), embeddings=unit(1, n))
    assert ids(bare, EAST[0], 1) == ["0"]
    assert ids(bare, EAST[0], np.int64(2)) == ["0", "1"]  # type: ignore[arg-type]
    with time_limit():
        for k in (3, 4, 10**6, 10**15):
            assert ids(bare, EAST[0], k) == ["0", "1", "2"]


@pytest.mark.parametrize("k", [0, -1, 2.0, "2", None, True])
def test_a_k_that_is_no_count_is_refused(bare: MemDB, k: Any) -> None:
    with pytest.raises(InvalidInputError, match="k must be a whole number of at least 1"):
        bare.retrieve(EAST[0], k)


def test_an_empty_database_finds_nothing(bare: MemDB, full: MemDB) -> None:
    assert bare.retrieve(EAST[0], 3).hits == []
    assert full.query("ships").hits == []
    assert full.retrieve("ships").memories == []


@pytest.mark.parametrize(
    ("query", "problem"),
    [
        ("", "query is empty"),
        (" \n\u3000", "query is empty"),
        ([], "query is empty"),
        (np.array([], np.int64), "query is empty"),
        (np.array([], np.float32), "query is empty"),
        ([-1], "-1 is no token id"),
        ([2**40], f"{2**40} is no token id"),
        ([0], "query is empty"),  # <|endoftext|> alone says nothing
        (np.zeros((1, 64), np.float32), r"an embedding must have shape \(64,\), got \(1, 64\)"),
        (np.ones(63), r"an embedding must have shape \(64,\), got \(63,\)"),
        (np.zeros(64), "zero or not finite"),
        (np.full(64, np.nan), "zero or not finite"),
        (np.zeros((2, 2), np.int64), "got int64 of shape"),
        (5, "got int64 of shape"),
        (None, "give a query or an embedding"),
        ([None], "got object of shape"),
        ([1, True], "some here are booleans"),
        (["a", "b"], "a query is a text, a sequence of token ids or an embedding"),
        ([[1], [1, 2]], "not one row of numbers"),
        ([True, False], "got bool of shape"),
        ("\ud83d", "half a surrogate"),
    ],
)
def test_a_query_that_says_nothing_is_refused(full: MemDB, query: Any, problem: str) -> None:
    full.insert("The harbour is old.", id="a")
    with pytest.raises(InvalidInputError, match=problem):
        full.retrieve(query)


def test_text_tokens_and_embedding_find_the_same(full: MemDB) -> None:
    full.insert(PAGE, id="page")
    text = "a green light in the north"
    tokens = Tokenizer.from_str(tokenizer_json()).encode(text).ids
    by_text = full.retrieve(text, 3)
    by_tokens = full.retrieve(tokens, 3)
    by_array = full.retrieve(np.array(tokens), 3)
    by_embedding = full.retrieve(WordEmbedder().embed([text])[0], 3)
    assert by_text.query == by_tokens.query == by_array.query == text
    assert by_embedding.query is None
    assert "light in the north" in by_text.hits[0].reference.text
    expected = [(hit.reference, hit.score) for hit in by_text.hits]
    for other in (by_tokens, by_array, by_embedding):
        assert [(hit.reference, hit.score) for hit in other.hits] == expected


def test_query_brings_no_memories_and_writes_none(full: MemDB) -> None:
    full.insert(PAGE, id="page", cold=True)
    assert full.query("ships", 3).memories == []
    assert full.stats()["memories"] == 0


def test_a_batch_answers_each_query_as_if_alone(full: MemDB) -> None:
    full.insert(PAGE, id="page")
    embedding = WordEmbedder().embed(["winter"])[0]
    queries = ["ships and storms", embedding, "the river Quill", "ships and storms"]
    together = full.retrieve_batch(queries, 2)
    for query, retrieval in zip(queries, together, strict=True):
        alone = full.retrieve(query, 2)
        assert retrieval.query == alone.query
        assert [hit.reference for hit in retrieval.hits] == [hit.reference for hit in alone.hits]
        for one, other in zip(retrieval.memories, alone.memories, strict=True):
            assert same_memory(one, other)
    assert full.retrieve_batch([]) == []
    array = np.stack([embedding, embedding])
    assert len(full.retrieve_batch(array, 2)) == 2  # type: ignore[arg-type]


def test_one_bad_query_spoils_the_batch_before_anything_is_written(full: MemDB) -> None:
    full.insert(PAGE, id="page", cold=True)
    with pytest.raises(InvalidInputError, match="query is empty"):
        full.retrieve_batch(["ships", ""])
    assert full.stats()["memories"] == 0


def test_what_is_retrieved_can_be_packed(full: MemDB) -> None:
    full.insert(PAGE, id="page")
    memories = full.retrieve("ships", 3).memories
    packed = pack(memories, full.shape)
    assert list(packed.layers) == list(full.shape.layers)
    visible = sum(int(layer.visible.sum()) for layer in packed.layers.values())
    assert visible == sum(memory.pairs for memory in memories)


# --- cold and warm --------------------------------------------------------------------------------


def test_a_cold_reference_is_warmed_by_its_first_retrieval(full: MemDB) -> None:
    full.insert("The harbour is old.", id="a", cold=True)
    assert full.get("a").warm == 0
    first = full.retrieve("harbour", 1)
    assert (first.written, full.get("a").warm) == (1, 1)
    again = full.retrieve("harbour", 1)
    assert again.written == 0
    assert same_memory(first.memories[0], again.memories[0])
    full.insert("The harbour is old.", id="b")  # warm from the start
    warm = next(hit for hit in full.retrieve("harbour").hits if hit.reference.document_id == "b")
    assert warm.memory is not None
    assert same_memory(warm.memory, first.memories[0])


def test_a_cold_reference_that_several_queries_find_is_written_once(full: MemDB) -> None:
    full.insert("The harbour is old.", id="a", cold=True)
    one, two = full.retrieve_batch(["harbour", "old"], 1)
    assert same_memory(one.memories[0], two.memories[0])
    assert full.stats()["changes"] == 2  # inserted, remembered


def test_without_a_writer_cold_references_stay_cold(full: MemDB) -> None:
    full.insert("The harbour is old.", id="a", cold=True)
    full.insert("The harbour is new.", id="b")
    with MemDB.open(full.path, embedder=WordEmbedder()) as database:
        retrieval = database.retrieve("old harbour", 2)
        assert [hit.memory is None for hit in retrieval.hits] == [True, False]
        assert (len(retrieval.memories), retrieval.written) == (1, 0)
        assert database.insert("Is there a bridge?", id="c").warm == 0
    assert full.get("a").warm == 0


def test_warm_writes_what_is_cold_and_nothing_twice(full: MemDB) -> None:
    full.insert(PAGE, id="page", cold=True)
    full.insert("The harbour is old.", id="a", cold=True)
    full.insert("The harbour is new.", id="b")
    told: list[tuple[str, int, int]] = []
    assert full.warm(["a", "b"]) == 1
    pieces = len(full.split(PAGE))
    assert full.warm(progress=lambda *step: told.append(step)) == pieces
    assert full.warm() == 0
    assert full.stats()["cold"] == 0
    assert told[0] == ("writing memories", 0, pieces)
    assert told[-1] == ("writing memories", pieces, pieces)


def test_warm_leaves_given_memories_alone(full: MemDB) -> None:
    mine = TokenWriter().write(["is"])
    embeddings = WordEmbedder().embed(["harbour"])
    full.insert("The harbour is old.", id="a", embeddings=embeddings, memories=mine)
    assert full.warm() == 0
    assert full.retrieve("harbour", 1).memories[0].pairs == mine[0].pairs


@pytest.mark.parametrize("codec", ["exact", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_memories_of_every_dtype_and_codec(tmp_path: Path, codec: str, dtype: Any) -> None:
    shape = make_shape(dtype)
    memory = make_memory(shape, 1)
    with MemDB.create(tmp_path / "db", shape=shape, dimension=2, codec=codec) as database:
        database.insert("text", embeddings=EAST, memories=[memory])
    with MemDB.open(tmp_path / "db") as database:
        (found,) = database.retrieve(EAST[0]).memories
    found.require(shape)
    assert same_memory(found, memory) == (codec == "exact")
    np.testing.assert_array_equal(found.positions, memory.positions)


def test_a_reference_of_which_nothing_is_kept_is_warm(bare: MemDB) -> None:
    nothing = make_memory(SHAPE, 1, 0)
    assert bare.insert("text", embeddings=EAST, memories=[nothing]).warm == 1
    retrieval = bare.retrieve(EAST[0])
    assert [memory.pairs for memory in retrieval.memories] == [0]


def test_a_writer_that_breaks_leaves_nothing_behind(full: MemDB) -> None:
    class Breaks(TokenWriter):
        def write(self, texts: Any) -> list[ExplicitMemory]:
            return super().write(texts)[1:]

    with MemDB.open(full.path, embedder=WordEmbedder(), writer=Breaks()) as database:
        with pytest.raises(InvalidInputError, match="0 memories for a text of 1 references"):
            database.insert("The harbour is old.", id="a")
        assert database.stats()["documents"] == 0
        database.insert("The harbour is old.", id="a", cold=True)
        with pytest.raises(InvalidInputError, match="0 memories"):
            database.retrieve("harbour")
        assert database.get("a").warm == 0
