"""Files of JSON lines that are appended to as results come."""

from __future__ import annotations

from pathlib import Path

import pytest

from memdb import InvalidInputError, StorageError
from model_adapter.files.json_lines import JsonLines


def test_lines_are_read_back(tmp_path: Path) -> None:
    file = JsonLines(tmp_path / "lines.jsonl")
    assert file.read() == []
    file.append({"text": "é\n\ud800\u2028"})
    file.append({"n": 1}, {"n": 2.5})
    assert JsonLines(file.path).read() == [{"text": "é\n\ud800\u2028"}, {"n": 1}, {"n": 2.5}]
    file.replace([{"n": 3}])
    assert file.read() == [{"n": 3}]


@pytest.mark.parametrize("rest", [b"{", b'{"n": 2}', b'{"n": "\xc3', b"\xff"])
def test_a_line_that_was_cut_off_goes(tmp_path: Path, rest: bytes) -> None:
    file = JsonLines(tmp_path / "lines.jsonl")
    file.append({"n": 1})
    with file.path.open("ab") as opened:
        opened.write(rest)
    assert file.read() == [{"n": 1}]
    file.append({"n": 3})
    assert file.path.read_bytes() == b'{"n": 1}\n{"n": 3}\n'


def test_a_first_line_that_was_cut_off_goes(tmp_path: Path) -> None:
    file = JsonLines(tmp_path / "lines.jsonl")
    file.path.write_bytes(b'{"n"')
    file.append({"n": 1})
    assert file.path.read_bytes() == b'{"n": 1}\n'


@pytest.mark.parametrize("line", [b"no", b"[1]", b"\xff", b""])
def test_a_damaged_line_is_named(tmp_path: Path, line: bytes) -> None:
    file = JsonLines(tmp_path / "lines.jsonl")
    file.path.write_bytes(b"{}\n" + line + b"\n{}\n")
    with pytest.raises(InvalidInputError, match=r"lines\.jsonl, line 2: .*; delete the line"):
        file.read()


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="cannot read"):
        JsonLines(tmp_path).read()
    for write in (JsonLines(tmp_path).append, lambda line: JsonLines(tmp_path).replace([line])):
        with pytest.raises(StorageError, match="cannot write"):
            write({})
