from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from memdb import CorpusError, Document, InvalidInputError
from memdb.ingest.corpus import read_corpus
from memdb.types.checks import MAX_DEPTH


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "corpus.jsonl"


def line(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


def nested(depth: int) -> dict[str, Any]:
    """Objects within each other, `depth` of them."""
    value: dict[str, Any] = {}
    for _ in range(depth - 1):
        value = {"a": value}
    return value


BAD = {
    "not JSON": (b"{text: 1}", "not JSON: .* .column 2."),
    "cut short": (b'{"text": "a', "not JSON"),
    "two objects": (b'{"text": "a"} {"text": "b"}', "not JSON: Extra data"),
    "not UTF-8": (b'{"text": "\xff"}', "not UTF-8 .byte 11 of the line."),
    "UTF-16": ('{"text": "a"}'.encode("utf-16"), "not UTF-8"),
    "an array": (b'["text"]', "not a JSON object"),
    "a string": (b'"text"', "not a JSON object"),
    "null": (b"null", "not a JSON object"),
    "no text": (line(id="x"), "the field 'text' is missing"),
    "text is null": (line(text=None), "'text' must be a string, got null"),
    "text is a number": (line(text=5), "'text' must be a string, got a number"),
    "text is an array": (line(text=["a"]), "'text' must be a string, got an array"),
    "empty text": (line(text=""), "'text' is empty"),
    "blank text": (line(text=" \n\t\u3000"), "'text' is empty"),
    "half a surrogate in the text": (rb'{"text": "a\ud83d"}', "'text' has half a surrogate"),
    "id is a number": (line(text="a", id=7), "'id' must be a string, got a number"),
    "id is true": (line(text="a", id=True), "'id' must be a string, got a boolean"),
    "empty id": (line(text="a", id=""), "'id' is empty"),
    "long id": (line(text="a", id="ü" * 240 + "x"), "'id' has 481 bytes of UTF-8; at most 480"),
    "zero in the id": (line(text="a", id="a\0b"), "'id' contains a zero character"),
    "half a surrogate in the id": (rb'{"text": "a", "id": "\ud83d"}', "'id' has half a surrogate"),
    "metadata is an array": (line(text="a", metadata=[1]), "'metadata' must be an object"),
    "metadata is a string": (line(text="a", metadata="b"), "'metadata' must be an object"),
    "NaN": (b'{"text": "a", "metadata": {"x": NaN}}', "'metadata' cannot be kept as JSON"),
    "infinity": (b'{"text": "a", "metadata": {"x": 1e999}}', "'metadata' cannot be kept as JSON"),
    "half a surrogate in metadata": (
        rb'{"text": "a", "metadata": {"x": "\ud83d"}}',
        "'metadata' cannot be kept as JSON",
    ),
    "deep metadata": (line(text="a", metadata=nested(MAX_DEPTH + 1)), "nested more than"),
    "deep JSON": (b'{"text": "a", "metadata": ' + b"[" * 100_000, "not JSON"),
    "a huge number": (b'{"text": "a", "metadata": {"x": ' + b"9" * 5000 + b"}}", "not JSON"),
    "an unknown field": (line(text="a", titel="b"), "unknown field 'titel'; .*'metadata'"),
    "an unprintable field": (rb'{"text": "a", "\ud83d": 1}', r"unknown field '\\ud83d'"),
    "an id twice": (line(text="a", id="one"), "the id 'one' is already used in line 1"),
    "a text twice": (
        line(text="two", metadata={"x": 1}),
        "the same text as in line 3 with other metadata",
    ),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n", b'\n{"text": "last"}\n'])
def test_a_bad_line_is_named_with_file_and_number(path: Path, bad: str, end: bytes) -> None:
    content, problem = BAD[bad]
    if b"\n" in content:
        content, end = content.split(b"\n")[0], b"\n"
    path.write_bytes(b'{"text": "1", "id": "one"}\n  \n{"text": "two"}\n' + content + end)
    with pytest.raises(CorpusError, match=problem) as caught:
        list(read_corpus(path))
    assert caught.value.line == 4
    assert caught.value.source == str(path)
    assert str(caught.value).startswith(f"{path}, line 4: ")
    str(caught.value).encode()  # can be printed


def test_errors_call_the_file_what_the_caller_calls_it(path: Path) -> None:
    path.write_text("?")
    with pytest.raises(CorpusError, match=r"^<stdin>, line 1: not JSON"):
        list(read_corpus(path, "<stdin>"))


def test_lines_before_a_bad_one_come_out_first(path: Path) -> None:
    path.write_text('{"text": "a"}\n?\n')
    lines = read_corpus(path)
    assert next(lines)[2] == Document("a")
    with pytest.raises(CorpusError, match="line 2"):
        next(lines)


def test_lines_become_documents(path: Path) -> None:
    path.write_bytes(
        b'\xef\xbb\xbf{"text": " a \\n", "id": "x", "metadata": {"n": [1, null]}}\r\n'
        b"\n \t\r\n"
        b'{"text": "b", "id": null, "metadata": null}\n'
        + '{"text": "line\u2028separator"}'.encode()  # and no line end
    )
    assert [(number, document) for number, _, document in read_corpus(path)] == [
        (1, Document(" a \n", "x", {"n": [1, None]})),
        (4, Document("b")),
        (5, Document("line\u2028separator")),
    ]


def test_what_is_just_allowed_is_allowed(path: Path) -> None:
    lines = [line(text="a", id="ü" * 240), line(text="b", metadata=nested(MAX_DEPTH))]
    path.write_bytes(b"\n".join(lines))
    assert len(list(read_corpus(path))) == 2


def test_the_id_derived_from_a_text_depends_on_the_text_alone(path: Path) -> None:
    path.write_bytes(
        b"\n".join([line(text="a"), line(text="a "), line(text="b", metadata={"x": 1})])
    )
    keys = [key for _, key, _ in read_corpus(path)]
    assert len(set(keys)) == 3
    assert all(key.startswith("sha256:") for key in keys)
    path.write_bytes(b"\n".join([line(text="b"), line(text="a", metadata={"y": 2})]))
    assert [key for _, key, _ in read_corpus(path)] == [keys[2], keys[0]]


def test_the_same_line_twice_is_one_document(path: Path) -> None:
    path.write_bytes(b"\n".join([line(text="a", metadata={"x": 1})] * 3))
    assert len(list(read_corpus(path))) == 1


def test_the_same_text_under_two_ids_is_two_documents(path: Path) -> None:
    path.write_bytes(b"\n".join([line(text="a", id="1"), line(text="a", id="2"), line(text="a")]))
    assert len({key for _, key, _ in read_corpus(path)}) == 3


def test_an_empty_file_has_no_documents(path: Path) -> None:
    path.write_bytes(b"\n\n")
    assert list(read_corpus(path)) == []


@pytest.mark.parametrize("name", ["missing", "."])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidInputError, match="cannot read '"):
        list(read_corpus(tmp_path / name))
