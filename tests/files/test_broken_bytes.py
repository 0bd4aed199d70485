"""Files whose bytes are broken at random: memdb's own errors, and nothing else."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from memdb import FORMATS, Files, InvalidInputError
from tests.files.made import NOTEBOOK, PAGE, pdf, write_docx, write_parquet

_TIMES = 60  # for each kind

SOUND: dict[str, bytes] = {
    "text": "Grüße\n\nmehr".encode(),
    "markdown": b"---\ntitle: a\n---\n# A\n\n- b\n\n```\nx\n```\n|a|b|\n|-|-|\n|c|d|\n",
    "rst": b"A\n=\n\nB\n--\n\ntext::\n\n  code\n",
    "html": PAGE.encode(),
    "notebook": json.dumps(NOTEBOOK).encode(),
    "csv": b'id,text,n\n1,"a, ""b""\nc",2\n2,x,3\n',
    "tsv": b'id\ttext\n1\t"a"\n2\tb\n',
    "json": b'[{"text":"a","n":[1,{"b":2.5e3}]},{"text":"b\\u00e9"}]',
    "jsonl": b'{"id":"a","text":"b","metadata":{"x":1}}\n{"text":"q"}\n',
    "BEIR": b'{"_id":"7","title":"t","text":"q","metadata":{}}\n',
    "pdf": pdf("One.", "Two."),
    "code": b"def f():\n  x\n\ny\n",
}


def broken(data: bytes, chance: random.Random) -> bytes:
    """Some bytes changed, left out, put in, or doubled."""
    found = bytearray(data)
    for _ in range(chance.choice([1, 1, 2, 5, 20])):
        place = chance.randrange(len(found) + 1)
        what = chance.random()
        if what < 0.5:
            found[place : place + 1] = bytes([chance.randrange(256)])
        elif what < 0.7:
            del found[place : place + chance.randrange(1, 30)]
        elif what < 0.85:
            found[place:place] = chance.randbytes(chance.randrange(1, 9))
        else:
            found[place:place] = found[max(0, place - chance.randrange(1, 60)) : place]
    return bytes(found)


@pytest.mark.parametrize("kind", [*FORMATS, "BEIR"])
def test_broken_bytes_are_read_or_refused(tmp_path: Path, kind: str) -> None:
    format = "jsonl" if kind == "BEIR" else kind
    if format == "docx":
        sound = write_docx(tmp_path / "sound").read_bytes()
    elif format == "parquet":
        rows = [{"text": "a", "n": n, "d": {"e": [1]}} for n in range(30)]
        sound = write_parquet(tmp_path / "sound", rows).read_bytes()
    else:
        sound = SOUND[kind]
    chance = random.Random(kind)
    path = tmp_path / "thing"
    refused: list[str] = []
    for _ in range(_TIMES):
        path.write_bytes(broken(sound, chance))
        try:
            for document in Files(path, format=format):
                if document.parts:
                    pieces = [document.text[part.start : part.end] for part in document.parts]
                    assert "".join(pieces) == document.text
        except InvalidInputError as error:
            refused.append(str(error))
    assert refused or format == "html"  # which reads anything
    assert [said for said in refused if not said.startswith((str(path), f"'{path}'"))] == []
    path.write_bytes(sound)
    assert len(list(Files(path, format=format))) > 0
