"""Every argument of every public function, given wrong: an error of memdb, and nothing changed."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import memdb
from memdb import (
    Chunker,
    DocumentBatch,
    ExplicitMemory,
    InvalidInputError,
    MemDB,
    MemDBError,
    MemoryBatch,
    MemoryShape,
    MismatchError,
    NotADatabaseError,
    Rope,
    Snapshot,
    StorageError,
    UnknownDocumentError,
)
from memdb.maintainable import Maintainable
from memdb.searchable import Searchable
from memdb.types.shown import shown_value
from tests.engine.helpers import (
    TokenWriter,
    WordEmbedder,
    make_memory,
    make_shape,
    tokenizer_json,
    write_corpus,
)

NAN, INF = float("nan"), float("inf")
SHAPE = make_shape()
OTHER_SHAPE = make_shape(kv_heads=1)
MEMORY = make_memory(SHAPE, 1)
NOT_FINITE = make_memory(SHAPE, 1)
NOT_FINITE.values[0, 0] = NAN
VECTOR = np.eye(1, 64, dtype=np.float32)

COUNT = [
    0,
    -1,
    -(10**5000),
    1.0,
    "1",
    None,
    True,
    NAN,
    [1],
    np.float32(1),
    np.bool_(True),
    np.array([1]),
]
MAYBE_COUNT = [value for value in COUNT if value is not None]
FLAG = [None, 0, 1, "", "no", NAN, [], np.int64(1)]
FUNCTION = [None, 0, "print", []]
PATH = [None, 5, "", b"db", "a\0b", "\ud800", ["db"], True, NAN]
MAYBE_PATH_TEXT = [5, b"name", ["name"], True]
IDS = [5, b"a", True, None, NAN, ["a"], ("a",)]
TEXT = [None, 5, "", " \n", b"text", "\ud800", ["text"], NAN, True]
METADATA = [
    5,
    "text",
    [],
    [("a", 1)],
    {1: 2},
    {"a": NAN},
    {"a": INF},
    {"a": {1, 2}},
    {"a": b"x"},
    {"a": np.ones(2)},
    {"a": np.float32(NAN)},
    {"a": 1j},
    {"a": "\ud800"},
]
WHERE = [[], (), "", 0, False, "year", 5, {1: 2}, {"$foo": 1}, {"a": {"$gt": None}}, {"a": NAN}]
EMBEDDINGS = [
    5,
    "text",
    [],
    VECTOR[0],
    VECTOR[:, :5],
    np.zeros((1, 64)),
    np.full((1, 64), NAN),
    np.full((1, 64), INF),
    VECTOR.astype(complex),
    VECTOR.astype(bool),
    VECTOR.astype(object),
    VECTOR.astype(str),
    VECTOR[None],
    np.float32(1),
    [[1], [1, 2]],
]
ONE_EMBEDDING = [
    5,
    "text",
    [],
    np.zeros(64),
    np.full(64, NAN),
    VECTOR,
    VECTOR[0, :5],
    VECTOR[0].astype(complex),
    VECTOR[0].astype(bool),
    VECTOR[0].astype(object),
    [[1], [1, 2]],
    np.float32(1),
]
QUERY = [
    "",
    " ",
    5,
    b"text",
    [],
    ["a"],
    [None],
    [True, False],
    [1, True],
    [-1],
    [1 << 40],
    [1j],
    {"a": 1},
    VECTOR,
    VECTOR[0, :5],
    np.zeros(64),
    np.full(64, NAN),
    VECTOR[0].astype(complex),
    VECTOR[0].astype(bool),
    VECTOR[0].astype(object),
    np.float32(1),
    np.int64(1),
    np.ones((2, 2), int),
    "\ud800",
]
NUMBER = [0, -1, 1.5, NAN, INF, "0.9", True, None, [0.9]]
KIND = ["", "faiss", 5, True, ["auto"], np.array(["auto", "ivf"])]
CODEC = ["", "zip", 5, ["exact"], True]
NAMES = [5, "", "a" * 65, None, b"a", ["a"], "\ud800"]
PATTERNS = [None, 5, "*.md", b"*.md", [5], [None], [""], [b"*.md"]]
LIST = [5, "text", b"text", {"a": 1}]
PART = [5, "text", [], object()]


class TooOften:
    """What raises where it is asked for no more."""

    def __call__(self, *_: Any) -> Any:
        raise AssertionError("nothing of this may be called")


@dataclass
class Place:
    """A database with a few documents, and paths beside it."""

    db: MemDB
    path: Path
    folder: Path


#: What is called with which good arguments.
Call = Callable[[Place], tuple[Callable[..., Any], dict[str, Any]]]


def listed(call: Callable[..., Any]) -> Callable[..., Any]:
    """A function whose work is done when its iterator is asked."""

    def called(**given: Any) -> list[Any]:
        return list(call(**given))

    called.__signature__ = inspect.signature(call)  # type: ignore[attr-defined]
    return called


def corpus(place: Place) -> Path:
    return write_corpus(place.folder / "corpus.jsonl", [{"id": "new", "text": "A new text."}])


def gathering(files: memdb.Files) -> Callable[..., Any]:
    def gather(progress: Any = memdb.no_progress) -> list[memdb.Document]:
        with files.gather(progress) as gathered:
            return list(gathered)

    return gather


def exported(place: Place) -> Path:
    to = place.folder / "export"
    if not to.exists():
        place.db.export(to)
    return to


def copied(place: Place) -> Path:
    to = place.folder / "backup"
    if not to.exists():
        memdb.backup(place.path, to)
    return to


def named(place: Place) -> str:
    place.db.namespace("there").close()
    return "there"


NAMESPACES = [5, "", "a" * 81, None, b"a", "\ud800", ["a"], True]
NEW = {"shape": make_shape(), "dimension": 2}
CALIBRATION = {"adapter": None, "date": "2026", "model": "m", "questions": 3, "weighing": {"a": 1}}
BATCH = DocumentBatch([memdb.Document("A text.", "new")], VECTOR, [None])
SHAPE_FIELDS: dict[str, Any] = {
    "model": "m",
    "layers": (0, 2),
    "kv_heads": 2,
    "head_dim": 4,
    "dtype": "float32",
    "prefix": (1, 2),
    "framing": "plain",
    "reference_length": 16,
    "rope": (Rope(1e4), None),
    "adapter": None,
}

CALLS: dict[str, Call] = {
    "MemDB.create": lambda p: (MemDB.create, {"path": p.folder / "new", **NEW}),
    "MemDB.open": lambda p: (MemDB.open, {"path": p.path}),
    "MemDB.insert": lambda p: (p.db.insert, {"text": "A text.", "id": "new"}),
    "MemDB.insert_many": lambda p: (p.db.insert_many, {"documents": ["A text."]}),
    "MemDB.upsert": lambda p: (p.db.upsert, {"text": "A text.", "id": "new"}),
    "MemDB.upsert_many": lambda p: (p.db.upsert_many, {"documents": ["A text."]}),
    "MemDB.update": lambda p: (p.db.update, {"id": "a", "text": "Another text."}),
    "MemDB.delete": lambda p: (lambda ids, **more: p.db.delete(ids, **more), {"ids": "a"}),
    "MemDB.delete by filter": lambda p: (
        lambda where, if_version=None: p.db.delete(where=where, if_version=if_version),
        {"where": {"year": 3}},
    ),
    "MemDB.ingest": lambda p: (p.db.ingest, {"path": corpus(p)}),
    "Files": lambda p: (listed(memdb.Files), {"paths": corpus(p)}),
    "Files.gather": lambda p: (gathering(memdb.Files(corpus(p))), {}),
    "MemDB.load": lambda p: (p.db.load, {"batches": [BATCH]}),
    "MemDB.warm": lambda p: (p.db.warm, {}),
    "MemDB.warm_batches": lambda p: (p.db.warm_batches, {"batches": [[1]]}),
    "MemDB.recode": lambda p: (p.db.recode, {"codec": "exact"}),
    "MemDB.declare_keys": lambda p: (
        lambda names, **more: p.db.declare_keys(names, **more),
        {"names": "year"},
    ),
    "MemDB.undeclare_keys": lambda p: (
        lambda names: p.db.undeclare_keys(names),
        {"names": "kind"},
    ),
    "MemDB.record_calibration": lambda p: (
        p.db.record_calibration,
        {"calibration": {**CALIBRATION, "model": p.db.shape.model}},
    ),
    "MemDB.build_index": lambda p: (p.db.build_index, {}),
    "MemDB.build_keywords": lambda p: (p.db.build_keywords, {}),
    "MemDB.settle": lambda p: (p.db.settle, {}),
    "MemDB.index_if_due": lambda p: (p.db.index_if_due, {}),
    "MemDB.export": lambda p: (p.db.export, {"folder": p.folder / "out"}),
    "MemDB.split": lambda p: (p.db.split, {"text": "A text."}),
    "MemDB.namespace": lambda p: (p.db.namespace, {"name": "new"}),
    "MemDB.drop_namespace": lambda p: (p.db.drop_namespace, {"name": named(p)}),
    "create_namespace": lambda p: (memdb.create_namespace, {"path": p.path, "name": "new"}),
    "existing_namespace": lambda p: (memdb.existing_namespace, {"path": p.path, "name": named(p)}),
    "drop_namespace": lambda p: (memdb.drop_namespace, {"path": p.path, "name": named(p)}),
    "list_namespaces": lambda p: (memdb.list_namespaces, {"path": p.path}),
    "Readable.get": lambda p: (p.db.get, {"id": "a"}),
    "Readable.get_many": lambda p: (p.db.get_many, {"ids": ["a", "b"]}),
    "Readable.count": lambda p: (p.db.count, {}),
    "Readable.changes": lambda p: (listed(p.db.changes), {}),
    "Readable.memories": lambda p: (p.db.memories, {"id": "a"}),
    "Readable.places": lambda p: (p.db.places, {"id": "a"}),
    "Readable.documents": lambda p: (listed(p.db.documents), {}),
    "Readable.query": lambda p: (p.db.query, {"text": "harbour"}),
    "Readable.retrieve": lambda p: (p.db.retrieve, {"tokens": "harbour"}),
    "Readable.retrieve by embedding": lambda p: (
        lambda embedding, k=5: p.db.retrieve(embedding=embedding, k=k),
        {"embedding": np.arange(64)},
    ),
    "Readable.retrieve_batch": lambda p: (p.db.retrieve_batch, {"queries": ["harbour"]}),
    "verify": lambda p: (memdb.verify, {"path": p.path}),
    "repair": lambda p: (memdb.repair, {"path": p.path}),
    "compact": lambda p: (memdb.compact, {"path": p.path}),
    "migrate": lambda p: (memdb.migrate, {"path": copied(p)}),
    "backup": lambda p: (memdb.backup, {"path": p.path, "to": p.folder / "copy"}),
    "restore": lambda p: (memdb.restore, {"source": copied(p), "path": p.folder / "restored"}),
    "rewrite": lambda p: (memdb.rewrite, {"path": copied(p), "writer": TokenWriter()}),
    "import_database": lambda p: (
        memdb.import_database,
        {"source": exported(p), "path": p.folder / "imported"},
    ),
    "pack": lambda p: (memdb.pack, {"memories": [MEMORY], "shape": SHAPE}),
    "pack_coded": lambda p: (memdb.pack_coded, {"memories": [MEMORY], "shape": SHAPE}),
    "Chunker": lambda p: (Chunker, {"tokenizer": tokenizer_json(), "max_tokens": 16}),
    "Chunker.count": lambda p: (Chunker(tokenizer_json(), 16).count, {"text": "A text."}),
    "Chunker.decode": lambda p: (Chunker(tokenizer_json(), 16).decode, {"tokens": [5, 6]}),
    "Chunker.split": lambda p: (Chunker(tokenizer_json(), 16).split, {"text": "A text."}),
    "text_only": lambda p: (memdb.text_only, {"tokenizer": tokenizer_json()}),
    "text_tokenizer": lambda p: (memdb.text_tokenizer, {"tokenizer": tokenizer_json()}),
    "read_corpus": lambda p: (listed(memdb.read_corpus), {"path": corpus(p)}),
    "json_object": lambda p: (
        lambda line: memdb.json_object(line, "{}"),
        {"line": b'{"a": 1}'},
    ),
    "MemoryShape": lambda p: (MemoryShape, SHAPE_FIELDS),
    "MemoryShape.from_json": lambda p: (MemoryShape.from_json, {"values": SHAPE.to_json()}),
    "MemoryShape.require_equal": lambda p: (
        lambda other: SHAPE.require_equal(other, "this"),
        {"other": SHAPE},
    ),
    "Rope": lambda p: (Rope, {"base": 1e4}),
    "MemoryBatch.of": lambda p: (
        lambda memories: MemoryBatch.of(memories, SHAPE),
        {"memories": [MEMORY, None]},
    ),
    "to_float32": lambda p: (memdb.to_float32, {"vectors": VECTOR, "dtype": "float32"}),
    "from_float32": lambda p: (memdb.from_float32, {"vectors": VECTOR, "dtype": "bfloat16"}),
}

#: What is wrong for an argument of that name, wherever it is.
WRONG: dict[str, list[Any]] = {
    "path": PATH,
    "source": PATH,
    "to": PATH,
    "folder": PATH,
    "embedder": PART,
    "writer": [*PART, WordEmbedder()],
    "shape": [5, "shape", {}, SHAPE.to_json()],
    "dimension": [*MAYBE_COUNT, (1 << 31) + 1, 10**400],
    "codec": CODEC,
    "index": KIND,
    "kind": KIND,
    "recall": [value for value in NUMBER if value is not None],
    "keys": [*LIST, ["a", 5], [""], ["a" * 65], ["\ud800"], [None]],
    "durability": ["", "fast", None, 5, True, ["full"]],
    "cache_bytes": [-1, 1.0, "1", None, True, NAN, [1]],
    "busy_timeout": [-1, -(10**5000), NAN, INF, "1", None, True, [1]],
    "read_only": FLAG,
    "text": TEXT,
    "id": IDS,
    "ids": LIST,
    "metadata": METADATA,
    "cold": FLAG,
    "embeddings": EMBEDDINGS,
    "memories": [5, "m", [], [5], [None], [MEMORY] * 2, [make_memory(OTHER_SHAPE, 1)]],
    "if_version": MAYBE_COUNT,
    "prune": FLAG,
    "paths": [*PATH, [], [5], [None], "nowhere", ["nowhere", "there"]],
    "include": PATTERNS,
    "gitignore": FLAG,
    "text_field": [5, "", b"text", ["text"], True],
    "id_field": [5, b"id", ["id"], True],
    "format": [5, "", "word", b"text", ["text"], True],
    "skip_bad": FLAG,
    "only": [5, "text", b"text", {"a": 1}, [5], [None], ["a\0b"]],
    "progress": FUNCTION,
    "name": MAYBE_PATH_TEXT,
    "batches": [None, *LIST, BATCH, [None], [[BATCH]]],
    "top": MAYBE_COUNT,
    "warmer": [5, "warm", []],
    "refit": FLAG,
    "names": NAMES,
    "calibration": [
        5,
        "text",
        [],
        {},
        {**CALIBRATION, "questions": "3"},
        {**CALIBRATION, "weighing": {"a": NAN}},
        {**CALIBRATION, "weighing": {"a": "1"}},
        {**CALIBRATION, "more": {1, 2}},
    ],
    "arrays": FLAG,
    "where": WHERE,
    "documents": [None, *LIST, [5], [" "], [{}], ["A text."] * 2, [{"text": "a", "x": 1}]],
    "after": [5, "", "a" * 481, "\ud800", b"a", True, ["a"]],
    "limit": [-1, 1.5, "5", True, NAN, [1]],
    "since": [-1, 10**5000, 1.5, "5", True, NAN, [1], None, 1 << 40],
    "min_score": ["0.5", True, NAN, [0.5], 1j],
    "exclude": [None, *LIST, [5], [None]],
    "diversity": [10**5000, "0.5", True, NAN, [0.5], -0.1, 1.1, 1j],
    "rerank": [5, "a", []],
    "exact": FLAG,
    "k": COUNT,
    "tokens": QUERY,
    "embedding": ONE_EMBEDDING,
    "accept": [5, "a", []],
    "queries": [None, *LIST, [None], ["a", ""], np.ones(64), np.float32(1)],
    "drop": FLAG,
    "mode": [None, 5, "", "words", ["vector"], np.array(["vector", "keyword"])],
    "aside": [value for value in PATH if value is not None],
    "biases": [5, "a", [], [NAN], [INF], [1, 2], ["a"], [None], [1j]],
    "tokenizer": [5, "", "{}", b"{}", []],
    "max_tokens": COUNT,
    "line": [None, 5, '{"a": 1}', b"", b"[]", b"\xff"],
    "model": [None, 5, b"m"],
    "layers": [*LIST, (), (2, 0), (0, 0), (0, -1), (0, 1.0), (0, True), ("a",), None],
    "kv_heads": COUNT,
    "head_dim": COUNT,
    "dtype": [None, 5, "", "int8", ["float32"], np.float32],
    "prefix": [*LIST, (-1,), (1.0,), (True,), ("a",), None],
    "framing": [None, 5, "", "html", ["plain"]],
    "reference_length": [*COUNT, 65536],
    "rope": [*LIST, (5, None), (Rope(1e4),), ("a", "b"), None],
    "adapter": [5, b"a", ["a"]],
    "cutting": [None, 5, "structure", {}],
    "place": FLAG,
    "title": [None, 5, b"a", ["a"], True],
    "values": [None, 5, [], {}, {**SHAPE.to_json(), "layers": 5}, {**SHAPE.to_json(), "x": 1}],
    "other": [None, 5, SHAPE.to_json(), OTHER_SHAPE],
    "base": [*NUMBER[:2], NAN, INF, "1e4", True, None],
    "parameters": [None, 5, "a", []],
    "vectors": [None, 5, "a", [1.0], VECTOR.astype(np.float64), VECTOR.astype(int)],
}
#: And where another meaning has the same name.
WRONG_HERE: dict[tuple[str, str], list[Any]] = {
    ("Files", "exclude"): PATTERNS,
    ("MemDB.insert", "id"): [5, "", "a" * 481, "a\0b", "\ud800", b"a", True, ["a"]],
    ("MemDB.insert", "metadata"): METADATA,
    ("MemDB.upsert", "id"): [5, "", "a" * 481, "a\0b", "\ud800", b"a", True, ["a"]],
    ("MemDB.delete by filter", "where"): [*WHERE, {}, {"$or": [{}]}, {"kind": {"$nin": []}}],
    ("Readable.get_many", "ids"): [*LIST, [5], [None], ["a", "never"]],
    ("MemDB.update", "text"): [text for text in TEXT if text is not None],
    ("MemDB.delete", "ids"): IDS,
    ("MemDB.warm", "ids"): [*LIST, [5], [None], ["a", "never"]],
    ("MemDB.warm_batches", "batches"): [None, *LIST, [5], ["a"], [[0]], [[1.0]], [[True]], [[NAN]]],
    ("MemDB.recode", "codec"): [*CODEC, "klt8"],  # for which there are too few memories
    ("Readable.retrieve_batch", "memories"): FLAG,
    ("Readable.retrieve", "embedding"): [VECTOR[0]],  # beside `tokens`
    ("Readable.query", "text"): ["", " ", 5, None, b"text", "\ud800", VECTOR, [True], {"a": 1}],
    ("Chunker.decode", "tokens"): [5, "a", [-1], [1 << 32], [1.0], [True], ["a"], [None]],
    ("Chunker.count", "text"): [None, 5, b"text", ["text"]],
    ("pack", "memories"): [None, 5, "m", [5], [None], [make_memory(OTHER_SHAPE, 1)]],
    ("pack_coded", "memories"): [None, 5, "m", [5], [None], [make_memory(OTHER_SHAPE, 1)]],
    ("MemoryBatch.of", "memories"): [[5], ["m"], [make_memory(OTHER_SHAPE, 1)]],
    ("import_database", "source"): [*PATH, "nowhere"],
    ("MemDB.namespace", "name"): NAMESPACES,
    ("MemDB.drop_namespace", "name"): [*NAMESPACES, "never"],
    ("create_namespace", "name"): NAMESPACES,
    ("existing_namespace", "name"): [*NAMESPACES, "never"],
    ("drop_namespace", "name"): [*NAMESPACES, "never"],
    ("Rope", "kind"): [None, 5, b"a"],
    ("repair", "embedder"): [5, "a", []],
    ("Chunker.split", "id"): [5, "", "a" * 481, "a\0b", "\ud800", b"a", True, ["a"]],
    ("MemDB.split", "id"): [5, "", "a" * 481, "a\0b", "\ud800", b"a", True, ["a"]],
    ("MemDB.split", "metadata"): METADATA,
    ("Chunker", "tokenizer"): [5, b"{}", []],  # others are refused at their first use
}
#: What an argument may be refused with other than `InvalidInputError`; each is documented.
ALSO: dict[str, tuple[type[MemDBError], ...]] = {
    "id": (UnknownDocumentError,),
    "ids": (UnknownDocumentError,),
    "path": (NotADatabaseError, StorageError),
    "memories": (MismatchError,),
    "name": (memdb.UnknownNamespaceError,),
    "other": (MismatchError,),
    "values": (memdb.FormatError,),
}


@pytest.fixture(scope="module")
def template(full_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("arguments") / "db"
    shutil.copytree(full_template, path)
    with MemDB.open(path, embedder=WordEmbedder(), writer=TokenWriter()) as database:
        database.declare_keys("kind")
        database.insert("The harbour is old.", id="a", metadata={"kind": "x", "year": 3})
        database.insert("Ships come to it.", id="b", metadata={"kind": ["y"]}, cold=True)
    return path


@pytest.fixture
def place(template: Path, tmp_path: Path) -> Iterator[Place]:
    path = tmp_path / "here" / "db"
    shutil.copytree(template, path)
    with MemDB.open(path, embedder=WordEmbedder(), writer=TokenWriter()) as database:
        yield Place(database, path, tmp_path)


def parameters(name: str, call: Callable[..., Any]) -> list[str]:
    named = [n for n in inspect.signature(call).parameters if n not in ("self", "more")]
    if name == "MemDB.declare_keys":
        named.append("progress")
    if name == "MemDB.delete":
        named += ["if_version", "where"]
    return named


@pytest.mark.parametrize("name", list(CALLS))
def test_a_wrong_argument_is_refused_and_changes_nothing(place: Place, name: str) -> None:
    call, good = CALLS[name](place)
    before, files = place.db.stats(), sorted(place.folder.rglob("*"))
    documents = list(place.db.documents())
    failures = []
    for parameter in parameters(name, call):
        wrong = WRONG_HERE.get((name, parameter), WRONG.get(parameter))
        assert wrong is not None, f"say what is wrong for {parameter} of {name}"
        expected = (InvalidInputError, *ALSO.get(parameter, ()))
        for value in wrong:
            case = f"{name}({parameter}={shown_value(value)})"
            try:
                call(**{**good, parameter: value})
            except expected as error:
                if not str(error):
                    failures.append(f"{case} says nothing")
            except Exception as error:
                failures.append(f"{case} raised {type(error).__name__}: {error!s:.80}")
            else:
                failures.append(f"{case} was taken")
            if place.db.stats() != before:
                failures.append(f"{case} changed the database")
                before = place.db.stats()
    assert not failures, "\n" + "\n".join(failures)
    assert list(place.db.documents()) == documents
    assert sorted(place.folder.rglob("*")) == files
    assert memdb.verify(place.path) == []
    made = call(**good)  # it was not for another reason that they were refused
    if isinstance(made, MemDB):
        made.close()


#: Classes, and those that are parts of them.
PARTS: dict[type, tuple[type, ...]] = {
    MemDB: (memdb.Writable, Maintainable),
    memdb.Readable: (Searchable,),
    Chunker: (),
}


def test_every_public_call_is_here() -> None:
    """A new one has to say what is wrong for it."""
    methods = {
        f"{kind.__name__}.{name}"
        for kind, parts in PARTS.items()
        for part in (kind, *parts)
        for name, value in vars(part).items()
        if callable(getattr(part, name))
        and not name.startswith("_")
        and not getattr(value, "__isabstractmethod__", False)
        and len(inspect.signature(getattr(part, name)).parameters)
        > 1 - isinstance(value, classmethod)
    }
    functions = {name for name in memdb.__all__ if inspect.isfunction(getattr(memdb, name))}
    passive = {"Chunker.may_have", "Chunker.places", "no_progress"}
    assert (methods | functions) - passive <= {name.split(" ")[0] for name in CALLS}


def test_numbers_of_numpy_are_numbers(place: Place) -> None:
    db = place.db
    assert len(db.retrieve("harbour", np.int64(1)).hits) == 1
    assert db.warm(top=np.int32(3)) == 0
    assert db.build_index(recall=np.float32(0.5)) is None
    assert db.stats()["index"]["keys"] == ["kind"]
    stored = db.update("a", metadata={"n": np.int16(3), "flag": np.True_}, if_version=np.uint8(1))
    assert stored.metadata == {"n": 3, "flag": True}
    assert type(db.get("a").metadata["n"]) is int
    assert db.query("harbour", where={"n": np.float64(3)}).hits
    fields = {**SHAPE_FIELDS, "kv_heads": np.int64(2), "layers": np.array([0, 2])}
    shape = MemoryShape(**fields)
    assert shape == MemoryShape(**SHAPE_FIELDS)
    assert shape.fingerprint == MemoryShape(**SHAPE_FIELDS).fingerprint
    path = place.folder / "numpy"
    with MemDB.create(
        path, shape=shape, dimension=np.int64(2), recall=np.float32(0.5), cache_bytes=np.int64(0)
    ):
        pass
    assert memdb.verify(path) == []


def test_what_cannot_be_printed_is_refused_like_the_rest(place: Place) -> None:
    class Silent:
        def __repr__(self) -> str:
            raise RuntimeError("no words")

    for call in (place.db.get, place.db.count, place.db.query, place.db.namespace):
        with pytest.raises(InvalidInputError):
            call(Silent())  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="a Silent that cannot be printed"):
        place.db.retrieve("harbour", Silent())  # type: ignore[arg-type]


def test_the_number_of_hits_may_be_any(place: Place) -> None:
    for k in (10, 10**9, 10**30):
        assert len(place.db.retrieve("harbour", k).hits) == 2


def test_whole_numbers_are_an_embedding_only_by_name(place: Place) -> None:
    numbers = np.zeros(64, np.int64)
    numbers[3] = 7
    by_name = place.db.retrieve(embedding=numbers)
    assert by_name.query is None
    same = place.db.retrieve(numbers.astype(np.float32))
    assert [hit.id for hit in by_name.hits] == [hit.id for hit in same.hits]
    assert [hit.score for hit in by_name.hits] == pytest.approx([hit.score for hit in same.hits])
    assert place.db.retrieve(embedding=[1] * 64).query is None
    tokens = Chunker(tokenizer_json(), 16)
    assert place.db.retrieve(np.array([70, 71])).query == tokens.decode([70, 71])
    with place.db.snapshot() as snapshot:
        assert isinstance(snapshot, Snapshot)
        with pytest.raises(InvalidInputError, match="real numbers"):
            snapshot.retrieve(embedding=numbers.astype(complex))


# --- what a failed creation leaves ----------------------------------------------------------------


class Unwell(WordEmbedder):
    """An embedder whose name is no JSON."""

    name: Any = frozenset([1, 2])


@pytest.mark.parametrize(
    "arguments",
    [
        {**NEW, "durability": "fast"},
        {**NEW, "cache_bytes": -1},
        {**NEW, "codec": "zip"},
        {**NEW, "keys": ["a" * 65]},
        {**NEW, "recall": NAN},
        {"shape": SHAPE, "embedder": Unwell()},
        {"shape": SHAPE, "embedder": WordEmbedder(), "dimension": 3},
        {"writer": TokenWriter(), "dimension": 2, "shape": SHAPE},
    ],
)
@pytest.mark.parametrize("there", [False, True])
def test_a_creation_that_fails_leaves_nothing(
    tmp_path: Path, arguments: dict[str, Any], there: bool
) -> None:
    path = tmp_path / "some" / "where" / "db"
    if there:
        path.mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InvalidInputError):
        MemDB.create(path, **arguments)
    assert sorted(tmp_path.rglob("*")) == before
    MemDB.create(path, **NEW).close()


@pytest.mark.parametrize("there", [False, True])
def test_a_disk_that_refuses_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    path = tmp_path / "some" / "where" / "db"
    if there:
        path.mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))

    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    for part in ("memdb.storage.folder._write_current", "memdb.storage.folder._make"):
        with monkeypatch.context() as patched:
            patched.setattr(part, refuse)
            with pytest.raises(StorageError, match="No space"):
                MemDB.create(path, **NEW)
        assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(StorageError):
        MemDB.create(tmp_path / "some" / ("a" * 300) / "db", **NEW)
    assert sorted(tmp_path.rglob("*")) == before
    MemDB.create(path, **NEW).close()


def test_arrays_that_are_none_are_no_memory() -> None:
    fields = vars(MEMORY)
    for name in fields:
        for value in (None, 5, [1, 2], np.float32(1)):
            with pytest.raises(MismatchError, match=f"{name} must be an array"):
                ExplicitMemory(**{**fields, name: value}).require(SHAPE)
