from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import TensorSpec, serialize_file
from safetensors.numpy import save_file

from memdb import (
    CODECS,
    CorpusError,
    Document,
    DType,
    ExplicitMemory,
    InvalidInputError,
    MemDBError,
    MismatchError,
    StorageError,
)
from memdb.codecs import encode_memory
from memdb.exchange import Entry, ExportPart, ExportWriter, Manifest, read_export, reading
from memdb.exchange.manifest import part_names
from memdb.ingest.chunking import Piece
from memdb.types.memory_batch import MemoryBatch
from tests.engine.helpers import make_memory, make_shape, same_memory, time_limit, tokenizer_json

DTYPES: tuple[DType, ...] = ("float32", "float16", "bfloat16")
EXACT = CODECS["exact"]
SETTINGS: dict[str, dict[str, Any]] = {
    "embedder": {"dimension": 3, "fingerprint": None, "name": "mini"},
    "model": {"name": None},
    "memory": {"codec": "exact", "budget": 64},
}
ONE, TWO = (part_names(number) for number in (1, 2))


def make_documents() -> list[tuple[Document, list[Piece]]]:
    """Documents of one to three pieces."""
    return [
        (
            Document("".join(texts), f"d{number}", {"year": 1900 + number, "née": [1.5, None]}),
            [Piece(text, len(text.split())) for text in texts],
        )
        for number, texts in enumerate(
            [
                ["One piece."],
                ["Two pieces. ", "港は古い"],
                ["a ", "b\n", "c "],
                [" Last \u2028one."],
            ]
        )
    ]


def make_memories(dtype: DType) -> list[list[ExplicitMemory | None]]:
    """Memories of `make_documents`: warm, cold, and one that keeps nothing."""
    shape = make_shape(dtype)
    return [
        [make_memory(shape, 1)],
        [None, make_memory(shape, 2)],
        [make_memory(shape, 3, 0), None, make_memory(shape, 4)],
        [None],
    ]


def embeddings(seed: int, n: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(seed).standard_normal((n, 3), np.float32)


def write(folder: Path, dtype: DType, form: str, **options: Any) -> None:
    """An export of `make_documents`; `form`: stored, arrays, cold, or mixed."""
    shape = make_shape(dtype)
    options = {"settings": SETTINGS, "keys": ["year"], "tokenizer": tokenizer_json(), **options}
    with ExportWriter(folder, shape=shape, **options) as writer:
        for number, (document, pieces) in enumerate(make_documents()):
            memories = make_memories(dtype)[number]
            given: Any = None
            if form == "stored" or (form == "mixed" and number % 2):
                given = [m and encode_memory(m, shape, EXACT) for m in memories]
            elif form != "cold":
                given = MemoryBatch.of(memories, shape)
            writer.add(document, pieces, embeddings(number, len(pieces)), given, number + 1)


def values(folder: Path, split: Callable[[str], list[Piece]] | None = None) -> dict[str, Any]:
    """All that an export says; memories as payloads."""
    manifest, parts = read_export(folder, split)
    found: dict[str, Any] = {"manifest": manifest, "entries": [], "embeddings": b"", "memories": []}
    for part in parts:
        n = sum(len(entry.pieces) for entry in part.entries)
        assert len(part.embeddings) == n > 0
        found["entries"] += [(e.id, e.document, e.pieces, e.version) for e in part.entries]
        found["embeddings"] += part.embeddings.tobytes()
        found["memories"] += payloads(part, n, manifest)
    return found


def payloads(part: ExportPart, n: int, manifest: Manifest) -> list[bytes | None]:
    if part.memories is None:
        return [None] * n
    assert len(part.memories) == n
    if not isinstance(part.memories, MemoryBatch):
        return part.memories
    assert manifest.shape is not None
    part.memories.require(manifest.shape)
    found: list[bytes | None] = []
    for number in range(n):
        memory = part.memories.memory(number)
        # Not `encode_memory`, since damage may make numbers infinite, which is for others to see.
        found.append(
            memory
            and b"|".join(
                array.tobytes()
                for array in (memory.offsets, memory.positions, memory.keys, memory.values)
            )
        )
    return found


# --- there and back -------------------------------------------------------------------------------


@pytest.mark.parametrize("part_bytes", [1, 200, 1 << 26])
@pytest.mark.parametrize("form", ["stored", "arrays", "cold", "mixed"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_export_comes_back(tmp_path: Path, dtype: DType, form: str, part_bytes: int) -> None:
    folder = tmp_path / "new" / "export"
    write(folder, dtype, form, part_bytes=part_bytes)
    manifest, parts = read_export(folder)
    assert manifest.shape == make_shape(dtype)
    assert (manifest.settings, manifest.keys) == (SETTINGS, ("year",))
    assert manifest.tokenizer == tokenizer_json()
    assert (manifest.documents, manifest.references, manifest.dimension) == (4, 7, 3)
    assert manifest.parts == (4 if part_bytes == 1 else len([*folder.glob("*.jsonl")]))
    entries: list[Entry] = []
    memories: list[Any] = []
    vectors = []
    for part in parts:
        entries += part.entries
        vectors.append(part.embeddings)
        n = len(part.embeddings)
        if isinstance(part.memories, MemoryBatch):
            memories += [part.memories.memory(number) for number in range(n)]
        else:
            memories += part.memories or [None] * n
    assert [(e.id, e.document, e.pieces, e.version) for e in entries] == [
        (document.id, document, pieces, number)
        for number, (document, pieces) in enumerate(make_documents(), 1)
    ]
    due = np.concatenate([embeddings(n, len(e.pieces)) for n, e in enumerate(entries)])
    np.testing.assert_array_equal(np.concatenate(vectors), due)
    flat = [memory for some in make_memories(dtype) for memory in some]
    for found, memory in zip(memories, flat, strict=True):
        if form == "cold" or memory is None:
            assert found is None
        elif isinstance(found, bytes):
            assert found == encode_memory(memory, make_shape(dtype), EXACT)
        else:
            assert same_memory(found, memory)


def test_parts_are_about_as_long_as_asked_for(tmp_path: Path) -> None:
    payload = [b"x" * 10_000]
    with ExportWriter(tmp_path, shape=make_shape(), part_bytes=100_000) as writer:
        for number in range(50):
            writer.add(Document(f"Text {number}."), [Piece(f"Text {number}.", 3)], unit(), payload)
    sizes = [path.stat().st_size for path in tmp_path.glob("*.safetensors")]
    assert len(sizes) == 6
    assert max(sizes) < 101_000
    assert [len(part.entries) for part in read_export(tmp_path)[1]] == [9, 9, 9, 9, 9, 5]


def test_an_export_may_be_empty_and_may_have_no_shape(tmp_path: Path) -> None:
    with ExportWriter(tmp_path / "a", shape=None):
        pass
    assert values(tmp_path / "a")["entries"] == []
    with ExportWriter(tmp_path / "b", shape=None) as writer:
        writer.add(Document("Text."), [Piece("Text.", 0)], unit())
        with pytest.raises(InvalidInputError, match="no memory shape"):
            writer.add(Document("Text."), [Piece("Text.", 0)], unit(), [b"payload"])
    assert values(tmp_path / "b")["memories"] == [None]


def unit() -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.ones((1, 3), np.float32)


def test_a_document_without_id_has_the_derived_one(tmp_path: Path) -> None:
    with ExportWriter(tmp_path, shape=None) as writer:
        writer.add(Document("Text."), [Piece("Text.", 0)], unit())
    ((name, document, _, version),) = values(tmp_path)["entries"]
    assert name.startswith("sha256:")
    assert (document.id, version) == (None, None)


def test_after_an_error_nothing_is_left(tmp_path: Path) -> None:
    def fail() -> None:
        with ExportWriter(tmp_path, shape=None, part_bytes=1) as writer:
            for _ in range(3):
                writer.add(Document("Text."), [Piece("Text.", 0)], unit())
            assert (tmp_path / TWO[0]).exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert not any(tmp_path.iterdir())


def test_an_export_without_its_manifest_was_not_finished(tmp_path: Path) -> None:
    write(tmp_path, "float32", "stored")
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(InvalidInputError, match="not finished: it has no manifest"):
        read_export(tmp_path)
    with pytest.raises(InvalidInputError, match=r"not empty .it holds 'part-00001"):
        ExportWriter(tmp_path, shape=None)


@pytest.mark.parametrize("path", ["missing", "a\0b", "x" * 300, "file/below"])
def test_where_there_is_no_folder_there_is_no_export(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InvalidInputError, match="is no export"):
        read_export(tmp_path / path)


def test_an_export_needs_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot write an export"):
        ExportWriter(tmp_path / "file", shape=None)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"document": Document(" ")}, InvalidInputError, "'text' is empty"),
        ({"pieces": [Piece("One", 1)]}, InvalidInputError, "3 characters, the text has 8"),
        ({"pieces": [Piece("One Two!", 1)]}, InvalidInputError, "are not the document's text"),
        ({"pieces": []}, InvalidInputError, "'references' must be an array"),
        ({"pieces": [Piece("One Two.", 70000)]}, InvalidInputError, "entry 0"),
        ({"embeddings": np.ones(3, np.float32)}, InvalidInputError, r"of shape \(1, 3\), got"),
        ({"embeddings": np.ones((1, 3))}, InvalidInputError, "must be float32.*got float64"),
        ({"embeddings": np.ones((2, 3), np.float32)}, InvalidInputError, "must be float32"),
        ({"embeddings": np.ones((1, 2), np.float32)}, InvalidInputError, "must be float32"),
        ({"version": 0}, InvalidInputError, "version must be"),
        ({"memories": [None, None]}, InvalidInputError, "2 memories for 1 pieces"),
        ({"memories": [b""]}, InvalidInputError, "a memory of 0 bytes"),
        (
            {
                "memories": MemoryBatch.of(
                    [make_memory(make_shape(kv_heads=1), 1)], make_shape(kv_heads=1)
                )
            },
            MismatchError,
            "memory batch: counts",
        ),
    ],
)
def test_what_is_no_document_is_not_added(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    good = {
        "document": Document("One Two."),
        "pieces": [Piece("One Two.", 2)],
        "embeddings": unit(),
    }
    with ExportWriter(tmp_path, shape=make_shape(), settings=SETTINGS) as writer:
        with pytest.raises(error, match=message):
            writer.add(**{**good, **changes})
        writer.add(**good)
    assert len(values(tmp_path)["entries"]) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"settings": {"embedder": {"dimension": 0}}},
        {"settings": {"embeder": {}}},
        {"settings": {"model": {"name": float("nan")}}},
        {"settings": {"model": {"name": object()}}},
        {"keys": [""]},
    ],
)
def test_no_manifest_is_written_that_could_not_be_read(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    with pytest.raises(InvalidInputError, match="the manifest of an export"):
        ExportWriter(tmp_path / "export", shape=None, **options)
    assert not (tmp_path / "export").exists()


# --- by hand --------------------------------------------------------------------------------------


def by_hand(
    folder: Path,
    lines: Sequence[Mapping[str, Any] | bytes],
    tensors: Mapping[str, Any] | None = None,
    metadata: dict[str, str] | None = None,
    references: int | None = None,
    **fields: Any,
) -> None:
    """An export of one part as another program writes it: no checksums, only what must be there."""
    folder.mkdir(exist_ok=True)
    n = len(lines) if references is None else references
    manifest = {"format": "memdb-export", "version": 1, "parts": 1, "documents": len(lines)}
    manifest |= {"references": n, **fields}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    data = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    (folder / ONE[0]).write_bytes(b"\n".join(data))
    tensors = {"embeddings": np.ones((n, 3), np.float32), **(tensors or {})}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(tensors, folder / ONE[1], metadata)


def test_lines_that_say_no_more_than_their_text(tmp_path: Path) -> None:
    by_hand(tmp_path, [b"\xef\xbb\xbf" + b'{"text": "a b"}', {"text": "c d", "metadata": None}])
    assert [entry[2] for entry in values(tmp_path)["entries"]] == [
        [Piece("a b", 0)],
        [Piece("c d", 0)],
    ]
    by_hand(tmp_path, [{"text": "a b"}, b" ", {"text": "c"}], references=3, documents=2)

    def words(text: str) -> list[Piece]:
        return (
            [Piece(part, 1) for part in text.split(" ")]
            if " " not in text
            else [
                Piece(text[:2], 1),
                Piece(text[2:], 1),
            ]
        )

    found = values(tmp_path, words)["entries"]
    assert [[piece.text for piece in entry[2]] for entry in found] == [["a ", "b"], ["c"]]
    with pytest.raises(InvalidInputError, match=r"embeddings of 3 references, .* has 2 references"):
        values(tmp_path)


def arrays(dtype: DType = "float32", **changes: Any) -> dict[str, Any]:
    """The arrays of two references; without `warm`."""
    shape = make_shape(dtype)
    batch = MemoryBatch.of([make_memory(shape, 1), make_memory(shape, 2)], shape)
    made = {name: getattr(batch, name) for name in ("counts", "positions", "keys", "values")}
    return {**made, **changes}


TEXTS = [{"text": "a"}, {"text": "b"}]


@pytest.mark.parametrize("counts", ["u1", "<u2", "<i4", "<u8", "<i8"])
@pytest.mark.parametrize("warm", [None, np.ones(2, np.uint8), np.ones(2, bool)])
def test_arrays_of_other_integer_dtypes(tmp_path: Path, counts: str, warm: Any) -> None:
    given = arrays()
    given["counts"] = given["counts"].astype(counts)
    by_hand(tmp_path, TEXTS, {**given, "warm": warm}, shape=make_shape().to_json())
    (part,) = read_export(tmp_path)[1]
    assert isinstance(part.memories, MemoryBatch)
    for number in range(2):
        memory = part.memories.memory(number)
        assert memory is not None
        assert same_memory(memory, make_memory(make_shape(), number + 1))


def save_bfloat16(folder: Path, tensors: dict[str, Any]) -> None:
    """Keys and values as BF16, as torch writes them."""
    specs = {}
    for name, array in tensors.items():
        dtype = "bfloat16" if name in ("keys", "values") else array.dtype.name
        specs[name] = TensorSpec(
            dtype=dtype, shape=array.shape, data_ptr=array.ctypes.data, data_len=array.nbytes
        )
    serialize_file(specs, folder / ONE[1])


def test_bfloat16_of_torch_users_is_read(tmp_path: Path) -> None:
    shape = make_shape("bfloat16")
    by_hand(tmp_path, TEXTS, shape=shape.to_json())
    tensors = {"embeddings": np.ones((2, 3), np.float32), **arrays("bfloat16")}
    save_bfloat16(tmp_path, tensors)
    assert b"BF16" in (tmp_path / ONE[1]).read_bytes()
    (part,) = read_export(tmp_path)[1]
    assert isinstance(part.memories, MemoryBatch)
    second = part.memories.memory(1)
    assert second is not None
    assert same_memory(second, make_memory(shape, 2))


def test_uint16_is_bfloat16_only_where_it_says_so(tmp_path: Path) -> None:
    shape = make_shape("bfloat16").to_json()
    by_hand(tmp_path, TEXTS, arrays("bfloat16"), shape=shape)
    with pytest.raises(
        InvalidInputError, match=r"'keys' is U16\. If these are the bits of bfloat16"
    ):
        values(tmp_path)
    by_hand(tmp_path, TEXTS, arrays("bfloat16"), {"dtype": "bfloat16"}, shape=shape)
    assert None not in values(tmp_path)["memories"]


def test_a_part_with_many_references_comes_in_pieces(tmp_path: Path) -> None:
    shape = make_shape()
    n = 10_000
    counts = np.zeros((n, shape.rows), np.uint8)
    counts[:, 1] = np.arange(n) % 3
    pairs = int(counts.sum())
    positions = np.concatenate([np.arange(k) for k in counts[:, 1]]).astype(np.uint8)
    keys = np.arange(pairs * 4, dtype=np.float32).reshape(pairs, 4)
    by_hand(
        tmp_path,
        [{"text": f"Text {number}."} for number in range(n)],
        {"counts": counts, "positions": positions, "keys": keys, "values": keys + 1},
        shape=shape.to_json(),
    )
    parts = [*read_export(tmp_path)[1]]
    assert [len(part.entries) for part in parts] == [4096, 4096, 10_000 - 2 * 4096]
    batches = [part.memories for part in parts if isinstance(part.memories, MemoryBatch)]
    np.testing.assert_array_equal(np.concatenate([batch.keys for batch in batches]), keys)
    np.testing.assert_array_equal(np.concatenate([batch.counts for batch in batches]), counts)
    assert parts[1].entries[0].line == 4097


@pytest.mark.parametrize("form", ["stored", "arrays"])
def test_large_memories_come_a_few_at_a_time(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "bfloat16", form)
    whole = values(tmp_path)
    for most, parts in ((1, [1, 1, 1, 1]), (600, [2, 2]), (1 << 20, [4])):
        monkeypatch.setattr(reading, "_MOST_TENSOR_BYTES", most)
        assert [len(part.entries) for part in read_export(tmp_path)[1]] == parts
        assert values(tmp_path) == whole


# --- what is refused: lines -----------------------------------------------------------------------

LINES: dict[str, tuple[bytes, str]] = {
    "not JSON": (b"{text: 1}", "not JSON"),
    "not UTF-8": (b'{"text": "\xff"}', "not UTF-8 .byte 11"),
    "no object": (b"[1]", "not a JSON object"),
    "too deep": (b"[" * 100_000, "not JSON"),
    "a number too long": (b'{"text": "a", "version": ' + b"1" * 5000 + b"}", "not JSON"),
    "no text": (b'{"id": "a"}', "the field 'text' is missing"),
    "unknown field": (b'{"text": "a", "txt": "b"}', 'unknown field "txt"'),
    "text is a number": (b'{"text": 1}', "'text' must be a string"),
    "half a surrogate": (rb'{"text": "\ud800"}', "half a surrogate"),
    "metadata": (b'{"text": "a", "metadata": [1]}', "'metadata' must be an object"),
    "infinity": (b'{"text": "a", "metadata": {"a": 1e999}}', "'metadata' cannot be kept"),
    "version 0": (b'{"text": "a", "version": 0}', "'version' must be a number from 1"),
    "version true": (b'{"text": "a", "version": true}', "'version' must be a number from 1"),
    "version too large": (b'{"text": "a", "version": 4294967296}', "'version' must be"),
    "references no array": (b'{"text": "a", "references": 1}', "'references' must be an array"),
    "no references": (b'{"text": "a", "references": []}', "'references' must be an array"),
    "too short": (b'{"text": "abc", "references": [[2, 1]]}', "2 characters, the text has 3"),
    "too long": (b'{"text": "abc", "references": [[2, 1], [2, 1]]}', "entry 1 is .2, 2?1?"),
    "an empty piece": (b'{"text": "a", "references": [[0, 1], [1, 1]]}', "entry 0"),
    "a blank piece": (b'{"text": "a  ", "references": [[1, 1], [2, 1]]}', "piece 1 is only white"),
    "lengths alone": (b'{"text": "a", "references": [1]}', "entry 0 is 1, not .characters"),
    "three numbers": (b'{"text": "a", "references": [[1, 1, 1]]}', "entry 0"),
    "a fraction": (b'{"text": "a", "references": [[1.0, 1]]}', "entry 0"),
    "negative tokens": (b'{"text": "a", "references": [[1, -1]]}', "entry 0"),
    "too many tokens": (b'{"text": "a", "references": [[1, 65536]]}', "entry 0"),
    "tokens null": (b'{"text": "a", "references": [[1, null]]}', "entry 0"),
}


@pytest.mark.parametrize(("line", "message"), LINES.values(), ids=LINES)
def test_a_wrong_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    by_hand(tmp_path, [{"text": "fine"}, b"", line])
    with pytest.raises(CorpusError, match=message) as caught:
        values(tmp_path)
    assert caught.value.line == 3
    assert caught.value.source == str(tmp_path / ONE[0])


def test_a_line_that_never_ends_is_not_read_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_hand(tmp_path, [{"text": "a" * 2000}])
    monkeypatch.setattr(reading, "LINE_LIMIT", 1000)
    with pytest.raises(CorpusError, match="line 1: it has more than 1000 bytes"):
        values(tmp_path)


# --- what is refused: tensors ---------------------------------------------------------------------


def stored(payload: bytes, offsets: Any) -> dict[str, Any]:
    return {"memories": np.frombuffer(payload, np.uint8), "memory_offsets": np.array(offsets)}


TENSORS: dict[str, tuple[dict[str, Any], str]] = {
    "no embeddings": ({"embeddings": None}, "the tensor 'embeddings' is missing"),
    "float64": ({"embeddings": np.ones((2, 3))}, "dtype F64"),
    "float16": ({"embeddings": np.ones((2, 3), np.float16)}, "must be F32 of shape .*got F16"),
    "flat": (
        {"embeddings": np.ones(6, np.float32)},
        r"of shape \[\?, \?\], got F32 of shape \[6\]",
    ),
    "no numbers": ({"embeddings": np.ones((2, 0), np.float32)}, "no dimension"),
    "too few": ({"embeddings": np.ones((1, 3), np.float32)}, "1 references, .* more up to line 2"),
    "too many": ({"embeddings": np.ones((3, 3), np.float32)}, "3 references, .* has 2 references"),
    "unknown": ({"labels": np.ones(2, np.int64)}, 'unknown tensor "labels"'),
    "both forms": ({**arrays(), **stored(b"ab", [0, 1, 2])}, "in two forms"),
    "no offsets": ({"memories": np.ones(2, np.uint8)}, "'memory_offsets' is missing"),
    "no payloads": ({"memory_offsets": np.zeros(3, np.int64)}, "'memories' is missing"),
    "other offsets": (
        stored(b"ab", [0, 2]),
        r"'memory_offsets' must be I64 of shape \[3\], got I64 of shape \[2\]",
    ),
    "small offsets": (stored(b"ab", np.array([0, 1, 2], np.int32)), "must be I64"),
    "not from 0": (stored(b"ab", [1, 1, 2]), "must ascend from 0"),
    "falling": (stored(b"ab", [0, 2, 1]), "must ascend from 0"),
    "past the end": (stored(b"ab", [0, 1, 3]), "must ascend from 0 to the 2 bytes"),
    "negative": (stored(b"ab", [0, -1, 2]), "must ascend from 0"),
    "huge": (stored(b"ab", [0, 1 << 62, 1 << 63 - 1]), "must ascend from 0"),
    "before the end": (stored(b"ab", [0, 1, 1]), "end at 1, 'memories' has 2 bytes"),
    "no counts": ({**arrays(), "counts": None}, "'counts' is missing"),
    "no values": ({**arrays(), "values": None}, "'values' is missing"),
    "other rows": (arrays(counts=np.zeros((2, 5), np.int32)), r"'counts' must be .* \[2, 6\]"),
    "counts of floats": (arrays(counts=np.zeros((2, 6), np.float32)), "'counts' must be U8"),
    "one count more": (arrays(counts=arrays()["counts"] + 1), "entries where .* are due"),
    "one count less": (
        arrays(counts=np.zeros((2, 6), np.int32)),
        r"'counts' sum up to 0 pairs, 'positions' has \d+",
    ),
    "negative counts": (arrays(counts=np.full((2, 6), -1)), "reference 0, layer 0.* -1 pairs"),
    "counts that overflow": (
        arrays(counts=np.full((2, 6), 1 << 62), positions=np.zeros(0, np.uint8)),
        "'keys' must be",
    ),
    "wide positions": (
        arrays(positions=arrays()["positions"].astype(np.uint16)),
        "'positions' must be U8",
    ),
    "positions outside": (
        arrays(positions=np.full(len(arrays()["positions"]), 128, np.uint8)),
        "memory batch: reference 0.*keeps position 128",
    ),
    "positions twice": (
        arrays(positions=np.zeros(len(arrays()["positions"]), np.uint8)),
        "memory batch: reference 0.*must ascend",
    ),
    "half keys": (arrays(keys=arrays()["keys"].astype(np.float16)), "'keys' must be F32"),
    "short keys": (arrays(keys=arrays()["keys"][:, :2].copy()), "'keys' must be F32 of shape"),
    "warm for one": (arrays(warm=np.ones(1, np.uint8)), "'warm' must be U8 or BOOL"),
    "warm by half": (arrays(warm=np.array([1, 2], np.uint8)), "'warm' must be 0 or 1, got 2"),
    "cold with pairs": (arrays(warm=np.array([1, 0], np.uint8)), "reference 1 is cold, and has"),
}


@pytest.mark.parametrize(("tensors", "message"), TENSORS.values(), ids=TENSORS)
def test_a_wrong_tensor_is_named(tmp_path: Path, tensors: dict[str, Any], message: str) -> None:
    by_hand(tmp_path, TEXTS, tensors, shape=make_shape().to_json())
    with pytest.raises(InvalidInputError, match=f"{ONE[1]}': .*{message}"):
        values(tmp_path)


def test_embeddings_have_the_dimension_of_the_embedder(tmp_path: Path) -> None:
    by_hand(tmp_path, TEXTS, settings={"embedder": {"dimension": 4}})
    with pytest.raises(InvalidInputError, match=r"must be F32 of shape \[\?, 4\]"):
        values(tmp_path)


def test_memories_need_a_shape(tmp_path: Path) -> None:
    by_hand(tmp_path, TEXTS, arrays())
    with pytest.raises(InvalidInputError, match="the manifest has no 'shape'"):
        values(tmp_path)


HEADERS = {
    "empty": b"",
    "short": b"\1\0\0",
    "a huge header": struct.pack("<Q", 1 << 62),
    "a header longer than the file": struct.pack("<Q", 100) + b"{}",
    "no JSON": struct.pack("<Q", 2) + b"{x",
    "no object": struct.pack("<Q", 2) + b"[]",
    "a huge tensor": {
        "embeddings": {"dtype": "F32", "shape": [1 << 40, 3], "data_offsets": [0, 24]}
    },
    "a shape that overflows": {
        "embeddings": {"dtype": "F32", "shape": [1 << 63, 1 << 63], "data_offsets": [0, 24]}
    },
    "past the end": {"embeddings": {"dtype": "F32", "shape": [4, 3], "data_offsets": [0, 48]}},
    "a gap": {"embeddings": {"dtype": "F32", "shape": [1, 3], "data_offsets": [12, 24]}},
    "falling": {"embeddings": {"dtype": "F32", "shape": [2, 3], "data_offsets": [24, 0]}},
    "unknown dtype": {"embeddings": {"dtype": "X9", "shape": [2, 3], "data_offsets": [0, 24]}},
    "metadata": {"__metadata__": {"dtype": 1}},
    "a name alone": {"embeddings": None},
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_a_header_that_lies_is_refused(tmp_path: Path, header: Any) -> None:
    by_hand(tmp_path, TEXTS)
    if not isinstance(header, bytes):
        data = json.dumps(header).encode()
        header = struct.pack("<Q", len(data)) + data + bytes(24)
    (tmp_path / ONE[1]).write_bytes(header)
    with pytest.raises(InvalidInputError, match=f"{ONE[1]}': "):
        values(tmp_path)


@pytest.mark.parametrize("name", [*ONE, "tokenizer.json"])
@pytest.mark.parametrize("instead", ["nothing", "folder", "pipe"])
def test_a_file_that_is_missing_is_named(tmp_path: Path, name: str, instead: str) -> None:
    write(tmp_path, "float32", "stored")
    (tmp_path / name).unlink()
    if instead == "folder":
        (tmp_path / name).mkdir()
    elif instead == "pipe":
        os.mkfifo(tmp_path / name)
    with time_limit(), pytest.raises(InvalidInputError, match=f"{name}' is missing, or no file"):
        values(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", [*ONE, "tokenizer.json", "manifest.json"])
def test_a_file_that_may_not_be_read_is_named(tmp_path: Path, name: str) -> None:
    write(tmp_path, "float32", "stored")
    (tmp_path / name).chmod(0)
    with pytest.raises(InvalidInputError, match=f"cannot read .*{name}"):
        values(tmp_path)


# --- what is refused: the manifest ----------------------------------------------------------------

SHAPE = make_shape().to_json()
MANIFESTS: dict[str, tuple[dict[str, Any], str]] = {
    "another format": ({"format": "zip"}, "'format' is \"zip\""),
    "a later version": ({"version": 2}, "'version' is 2.*use a newer release"),
    "parts": ({"parts": "1"}, "'parts' must be a number"),
    "negative": ({"documents": -1}, "'documents' must be a number"),
    "true": ({"parts": True}, "'parts' must be a number"),
    "unknown": ({"tokeniser": True}, 'unknown field "tokeniser"'),
    "settings": ({"settings": []}, "'settings' must be an object"),
    "a setting": ({"settings": {"embedder": 3}}, "'settings' must be an object of objects"),
    "no calibration": ({"settings": {"calibration": {"date": "now"}}}, "its field 'adapter' is"),
    "unknown setting": ({"settings": {"counters": {}}}, 'unknown setting "counters"'),
    "dimension": ({"settings": {"embedder": {"dimension": 0}}}, "dimension is 0"),
    "NaN": ({"settings": {"model": {"name": float("nan")}}}, "not JSON compliant"),
    "keys": ({"keys": "year"}, "'keys' must be an array"),
    "a key": ({"keys": [1]}, "'keys' must be an array"),
    "tokenizer": ({"tokenizer": "yes"}, "'tokenizer' must be true or false"),
    "checksum": ({"checksum": 5}, "'checksum' must be 16 hexadecimal"),
    "another checksum": ({"checksum": "0" * 16}, "the checksum does not match"),
    "shape": ({"shape": 5}, "'shape' must be an object or null"),
    "no shape": ({"shape": {}}, "'model' is missing"),
    "later shape": ({"shape": {**SHAPE, "window": 1}}, "does not know the field 'window'"),
    "model": ({"shape": {**SHAPE, "model": 5}}, "'model' cannot be 5"),
    "layers": ({"shape": {**SHAPE, "layers": [0, 1.5]}}, "'layers' cannot be"),
    "falling layers": ({"shape": {**SHAPE, "layers": [2, 1]}}, "layers must be ascending"),
    "kv_heads": ({"shape": {**SHAPE, "kv_heads": 1 << 40}}, "'kv_heads' cannot be"),
    "head_dim": ({"shape": {**SHAPE, "head_dim": "4"}}, "'head_dim' cannot be"),
    "length": ({"shape": {**SHAPE, "reference_length": 0}}, "'reference_length' cannot be"),
    "dtype": ({"shape": {**SHAPE, "dtype": "int4"}}, "dtype is 'int4'"),
    "dtype null": ({"shape": {**SHAPE, "dtype": None}}, "'dtype' cannot be null"),
    "rope": ({"shape": {**SHAPE, "rope": [1]}}, "'rope' cannot be"),
    "ropes": ({"shape": {**SHAPE, "rope": [None]}}, "1 RoPE entries for 3"),
    "framing": ({"shape": {**SHAPE, "framing": "x"}}, "'framing' cannot be"),
    "prefix": ({"shape": {**SHAPE, "prefix": [-1]}}, "'prefix' cannot be"),
}


@pytest.mark.parametrize(("changes", "message"), MANIFESTS.values(), ids=MANIFESTS)
def test_a_wrong_manifest_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    by_hand(tmp_path, TEXTS, **changes)
    with pytest.raises(InvalidInputError, match=f"manifest.json': .*{message}"):
        read_export(tmp_path)


@pytest.mark.parametrize("field", ["format", "version", "parts", "documents", "references"])
def test_a_manifest_must_say_what_there_is(tmp_path: Path, field: str) -> None:
    by_hand(tmp_path, TEXTS)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    del manifest[field]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InvalidInputError, match=f"the field '{field}' is missing"):
        read_export(tmp_path)


@pytest.mark.parametrize("changes", [{"documents": 3}, {"references": 1}])
def test_all_parts_hold_what_the_manifest_says(tmp_path: Path, changes: dict[str, int]) -> None:
    by_hand(tmp_path, TEXTS)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, **changes}))
    with pytest.raises(InvalidInputError, match="hold 2 documents with 2 references, manifest"):
        values(tmp_path)


# --- damage ---------------------------------------------------------------------------------------

FORMS = ("stored", "arrays")
MUTATIONS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "set", "cut", "insert", "drop"]),
        st.floats(0, 1, exclude_max=True),
        st.integers(0, 255),
    ),
    min_size=1,
    max_size=3,
)


def damaged(data: bytes, mutations: list[tuple[str, float, int]], within: int) -> bytes:
    """The bytes, changed at some places among the first `within`."""
    changed = bytearray(data)
    for kind, place, value in mutations:
        at = int(place * min(within, len(changed)))
        if kind == "cut":
            del changed[at:]
        elif kind == "insert":
            changed.insert(at, value)
        elif kind == "drop":
            del changed[at : at + 1]
        elif changed:
            changed[at] = value if kind == "set" else changed[at] ^ 1 << value % 8
    return bytes(changed)


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Exports with checksums, by form, and by hand without."""
    made = {}
    for form in FORMS:
        made[form] = tmp_path_factory.mktemp("exports") / form
        write(made[form], "bfloat16", form, tokenizer='{"some": "tokenizer"}')
        made[f"bare {form}"] = bare = tmp_path_factory.mktemp("exports") / form
        shape, tensors = make_shape(), {"embeddings": np.ones((2, 3), np.float32)}
        memories = [encode_memory(make_memory(shape, n), shape, EXACT) for n in (1, 2)]
        offsets = [0, len(memories[0]), len(memories[0]) + len(memories[1])]
        tensors |= stored(b"".join(memories), offsets) if form == "stored" else arrays()
        lines = [{"text": "ab", "references": [[2, 3]], "version": 7}, {"id": "x", "text": "b"}]
        fields = {"settings": SETTINGS, "keys": ["year"], "shape": shape.to_json()}
        by_hand(bare, lines, tensors, **fields)
    return made


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damaged")


def with_damage(
    export: Path, scratch: Path, name: str, change: Callable[[bytes], bytes]
) -> dict[str, Any] | None:
    """What a damaged copy of an export says; None if it is refused as it should be."""
    copy = scratch / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(export, copy)
    (copy / name).write_bytes(change((copy / name).read_bytes()))
    try:
        return values(copy)
    except MemDBError:
        return None


FUZZED = settings(
    max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)


@pytest.mark.parametrize("name", ["manifest.json", "tokenizer.json", *ONE])
@pytest.mark.parametrize("form", FORMS)
@given(mutations=MUTATIONS)
@FUZZED
def test_a_damaged_export_says_the_same_or_is_refused(
    exports: dict[str, Path],
    scratch: Path,
    form: str,
    name: str,
    mutations: list[tuple[str, float, int]],
) -> None:
    found = with_damage(
        exports[form], scratch, name, lambda data: damaged(data, mutations, len(data))
    )
    assert found is None or found == values(exports[form])


@pytest.mark.parametrize("name", ["documents", "embeddings", "memories"])
def test_where_there_are_checksums_none_may_be_missing(
    exports: dict[str, Path], scratch: Path, name: str
) -> None:
    assert with_damage(exports["stored"], scratch, ONE[1], lambda data: data) is not None
    gone = f"xxh3.{name}".encode(), f"xxh2.{name}".encode()
    assert with_damage(exports["stored"], scratch, ONE[1], lambda d: d.replace(*gone)) is None


@pytest.mark.parametrize("name", ["manifest.json", *ONE])
@pytest.mark.parametrize("form", FORMS)
@given(mutations=MUTATIONS)
@FUZZED
def test_what_has_no_checksum_is_read_or_refused(
    exports: dict[str, Path],
    scratch: Path,
    form: str,
    name: str,
    mutations: list[tuple[str, float, int]],
) -> None:
    """Nothing but `MemDBError` comes out; headers are where most can go wrong."""
    export = exports[f"bare {form}"]
    with_damage(export, scratch, name, lambda data: damaged(data, mutations, 700))


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 70), 1 << 70)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["\ud800", "F32", 0, 1, 2, 3, 2**63]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["embedder", "dimension", "model", "a"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)


def replaced(values: Any, path: list[int], value: Any) -> Any:
    """JSON values with one that is deep inside replaced; `path` leads there."""
    if not path or not isinstance(values, (dict, list)) or not values:
        return value
    keys = sorted(values) if isinstance(values, dict) else range(len(values))
    key = keys[path[0] % len(keys)]
    changed: Any = values.copy()
    changed[key] = replaced(values[key], path[1:], value)
    return changed


PATHS = st.lists(st.integers(0, 20), min_size=1, max_size=4)


@pytest.mark.parametrize("form", FORMS)
@given(path=PATHS, value=JSON)
@FUZZED
def test_any_json_in_a_manifest_is_read_or_refused(
    exports: dict[str, Path], scratch: Path, form: str, path: list[int], value: Any
) -> None:
    def change(data: bytes) -> bytes:
        return json.dumps(replaced(json.loads(data), path, value)).encode()

    with_damage(exports[f"bare {form}"], scratch, "manifest.json", change)


@given(path=PATHS, value=JSON)
@FUZZED
def test_any_json_in_a_line_is_read_or_refused(
    exports: dict[str, Path], scratch: Path, path: list[int], value: Any
) -> None:
    def change(data: bytes) -> bytes:
        first, *others = data.split(b"\n")
        return b"\n".join([json.dumps(replaced(json.loads(first), path, value)).encode(), *others])

    with_damage(exports["bare arrays"], scratch, ONE[0], change)


@pytest.mark.parametrize("form", FORMS)
@given(path=PATHS, value=JSON)
@FUZZED
def test_any_json_in_a_tensors_header_is_read_or_refused(
    exports: dict[str, Path], scratch: Path, form: str, path: list[int], value: Any
) -> None:
    def change(data: bytes) -> bytes:
        length = struct.unpack("<Q", data[:8])[0]
        header = replaced(json.loads(data[8 : 8 + length]), path, value)
        changed = json.dumps(header).encode()
        return struct.pack("<Q", len(changed)) + changed + data[8 + length :]

    with_damage(exports[f"bare {form}"], scratch, ONE[1], change)


@pytest.mark.parametrize("dtype", ["<i8", "<u8", "u1", "i1"])
@given(numbers=st.lists(st.integers(-(1 << 63), (1 << 64) - 1), min_size=12, max_size=12))
@FUZZED
def test_any_counts_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, scratch: Path, dtype: str, numbers: list[int]
) -> None:
    size = np.dtype(dtype).itemsize
    data = b"".join((number % (1 << 64)).to_bytes(8, "little")[:size] for number in numbers)
    counts = np.frombuffer(data, dtype).reshape(2, 6)
    by_hand(scratch / "counts", TEXTS, arrays(counts=counts), shape=make_shape().to_json())
    with pytest.raises(InvalidInputError, match=r"part-00001.safetensors': "):
        values(scratch / "counts")
