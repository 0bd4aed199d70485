"""What becomes of a file of each kind."""

from __future__ import annotations

import csv
import datetime
import decimal
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pypdf import PdfReader, PdfWriter

from memdb import FORMATS, CorpusError, Files, InvalidInputError
from tests.files.made import (
    NOTEBOOK,
    PAGE,
    metadata,
    one,
    parts,
    passed_over,
    pdf,
    texts,
    write_docx,
    write_json,
    write_parquet,
)


def test_a_text_comes_as_it_is(tmp_path: Path) -> None:
    text = "  One.\r\n\r\nTwo…\t\n"
    (tmp_path / "a.txt").write_bytes(text.encode())
    document = one(tmp_path / "a.txt")
    assert (document.id, document.text, document.parts) == ("a.txt", text, ())
    origin = {"root": str(tmp_path), "path": "a.txt", "kind": "text"}
    assert document.metadata == {"origin": origin}


@pytest.mark.parametrize(
    ("encoding", "noted"),
    [
        ("utf-8", False),
        ("utf-8-sig", False),
        ("utf-16", False),
        ("utf-16-be", False),
        ("utf-32", False),
        ("latin-1", True),
    ],
)
def test_an_encoding_is_found_or_guessed_and_said(
    tmp_path: Path, encoding: str, noted: bool
) -> None:
    mark = b"\xfe\xff" if encoding == "utf-16-be" else b""
    for name, before in (("a.txt", ""), ("a.csv", "text\n"), ("a.html", "<p>")):
        (tmp_path / name).write_bytes(mark + f"{before}Grüße aus Mörel".encode(encoding))
        with Files(tmp_path / name).gather() as gathered:
            assert [document.text for document in gathered] == ["Grüße aus Mörel"]
            said = [f"{name}: not UTF-8; read as Latin-1" in note for note in gathered.notes]
            assert said == [True] * noted


def test_quotes_of_windows_are_quotes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("“So” – he said".encode("cp1252"))
    assert one(tmp_path / "a.txt").text == "“So” – he said"
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 \x81")  # what Windows-1252 does not have
    assert one(tmp_path / "a.txt").text == "café \x81"


def test_a_character_may_be_cut_by_a_chunk(tmp_path: Path) -> None:
    text = "a" * ((1 << 20) - 1) + "ü" + "b"
    path = tmp_path / "a.csv"
    path.write_text(f"text\n{text}\n")
    assert one(path).text == text


@pytest.mark.parametrize(
    "data",
    [
        b"a\0b",
        b"\x89PNG\r\n\x1a\n\0\0",
        bytes(range(1, 32)) * 9 + b"\xff",
        "a\0b".encode("utf-16"),
        b"x" * (1 << 20) + b"\0",
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.py", "a.csv", "a.json", "a.html"])
def test_what_is_binary_is_no_text(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / "folder").mkdir()
    path = tmp_path / "folder" / name
    path.write_bytes(data)
    with pytest.raises(InvalidInputError, match=f"{name}: it is binary"):
        list(Files(path))
    (item,) = passed_over(tmp_path / "folder")
    assert item.why == "binary"


def test_half_a_unit_of_utf_16_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("ab".encode("utf-16")[:-1])
    with pytest.raises(InvalidInputError, match=r"a\.txt: begins as utf-16 text and is none"):
        list(Files(tmp_path / "a.txt"))


def test_markdown_is_as_written_and_its_parts_are_known(tmp_path: Path) -> None:
    text = (
        "# Harbour\n\nOld.\n\n## Ships `x`\n\n- one\n- two\n\n```py\n# no heading\n```\n\n"
        "    indented\n\n> quoted\n\nUnder\n-----\nend\n"
    )
    (tmp_path / "a.md").write_text(text)
    document = one(tmp_path / "a.md")
    assert document.text == text
    assert metadata(document) == {"title": "Harbour"}
    ships = ("Harbour", "Ships `x`")
    assert parts(document) == [
        ("heading", ("Harbour",), "# Harbour"),
        ("text", ("Harbour",), "Old."),
        ("heading", ships, "## Ships `x`"),
        ("text", ships, "- one\n- two"),
        ("code", ships, "```py\n# no heading\n```"),
        ("code", ships, "indented"),
        ("text", ships, "> quoted"),
        ("heading", ("Harbour", "Under"), "Under\n-----"),
        ("text", ("Harbour", "Under"), "end"),
    ]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_front_matter_is_metadata(tmp_path: Path, end: str) -> None:
    lines = [
        "---",
        "title: 'On tides'",
        "tags: [a, b]",
        "author: Ines Wold",
        "---",
        "",
        "Text.",
        "",
    ]
    (tmp_path / "a.md").write_bytes(end.join(lines).encode())
    document = one(tmp_path / "a.md")
    assert document.text.strip() == "Text."
    assert metadata(document) == {"title": "On tides", "author": "Ines Wold"}
    assert parts(document)[-1] == ("text", ("On tides",), "Text.")


@pytest.mark.parametrize(
    ("text", "title"), [("#\n\n# A\n", "A"), ("#\nText.\n", None), ("## B\n\n###\n\nc\n", "B")]
)
def test_a_heading_may_say_nothing(tmp_path: Path, text: str, title: str | None) -> None:
    (tmp_path / "a.md").write_text(text)
    document = one(tmp_path / "a.md")
    assert metadata(document).get("title") == title
    assert "".join(document.text[p.start : p.end] for p in document.parts) == text


def test_a_rule_is_no_front_matter(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("---\n\nText: a\n")
    assert one(tmp_path / "a.md").text == "---\n\nText: a\n"


def test_headings_of_restructured_text(tmp_path: Path) -> None:
    text = "=======\nHarbour\n=======\n\nOld.\n\nShips\n-----\n\n.. code::\n\n   x\n\n"
    text += "Dues\n----\nPaid.\n"
    (tmp_path / "a.rst").write_text(text)
    document = one(tmp_path / "a.rst")
    assert document.text == text
    assert metadata(document) == {"title": "Harbour"}
    assert [(kind, place) for kind, place, _ in parts(document) if kind == "heading"] == [
        ("heading", ("Harbour",)),
        ("heading", ("Harbour", "Ships")),
        ("heading", ("Harbour", "Dues")),
    ]


def test_code_is_in_parts_at_the_margin(tmp_path: Path) -> None:
    text = "import x\n\n\ndef f():\n    a\n\n    b\n\n\nclass A:\n    pass\n"
    (tmp_path / "a.py").write_text(text)
    document = one(tmp_path / "a.py")
    assert document.text == text
    assert [part for _, _, part in parts(document)] == [
        "import x",
        "def f():\n    a\n\n    b",
        "class A:\n    pass",
    ]


def test_a_pages_main_part_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(PAGE)
    document = one(tmp_path / "a.html")
    assert metadata(document) == {"title": "Veldmoor"}
    code = "```python\ndef dues(ship):\n    return  3\n```"
    at = ("Veldmoor", "Code")
    assert parts(document) == [
        ("heading", ("Veldmoor",), "# Veldmoor"),
        ("text", ("Veldmoor",), "The harbour is old.\nIt freezes."),
        ("text", ("Veldmoor",), "- ships"),
        ("text", ("Veldmoor",), "- barges"),
        ("text", ("Veldmoor",), "- tugs"),
        ("heading", at, "## Code"),
        ("code", at, code),
        ("text", at, "ship | crowns"),
        ("text", at, "barge | 3"),
        ("text", at, "tail"),
    ]
    assert "- barges\n  - tugs" in document.text


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("<p>only this", "only this"),
        ("plain words", "plain words"),
        ("<body><header>top</header><p>words</p><footer>end</footer>", "words"),
        ("<main> </main><p>beside</p>", "beside"),
        ("<pre>a```b</pre>", "````\na```b\n````"),
        ('<?xml version="1.0" encoding="utf-8"?><html><body>x</body></html>', "x"),
        ("<article>one</article><article>two</article>", "one\n\ntwo"),
        ("<div>" * 400 + "deep" + "</div>" * 400, "deep"),
    ],
)
def test_pages_of_other_shapes(tmp_path: Path, page: str, text: str) -> None:
    (tmp_path / "a.html").write_text(page)
    assert one(tmp_path / "a.html").text == text


def test_a_page_of_any_depth_is_read_whole_or_refused(tmp_path: Path) -> None:
    """Releases of the library differ in how deep they go; below, they leave out the text."""
    (tmp_path / "a.html").write_text("<div>" * 9999 + "deep")
    try:
        assert [*texts(tmp_path).values()] == ["deep"]
    except InvalidInputError as error:
        with pytest.raises(InvalidInputError, match=r"a\.html: its elements are nested too deep"):
            raise error from None


def test_a_page_says_its_encoding(tmp_path: Path) -> None:
    page = '<meta http-equiv="Content-Type" content="text/html; charset=iso-8859-2"><p>Łódź'
    (tmp_path / "a.html").write_bytes(page.encode("iso-8859-2"))
    assert one(tmp_path / "a.html").text == "Łódź"
    for said in ("no-such", "utf-16", "ascii", "hex"):  # and is it not
        (tmp_path / "a.html").write_bytes(f'<meta charset="{said}"><p>Łódź'.encode())
        assert one(tmp_path / "a.html").text == "Łódź"


@pytest.mark.parametrize("page", ["", " \n", "<html></html>", "<script>x</script>", "<!-- x -->"])
def test_a_page_without_text_is_empty(tmp_path: Path, page: str) -> None:
    (tmp_path / "a.html").write_text(page)
    (item,) = passed_over(tmp_path, skip_bad=True)
    assert item.why == "empty"


def test_a_notebook_is_markdown_and_code(tmp_path: Path) -> None:
    document = one(write_json(tmp_path / "a.ipynb", NOTEBOOK))
    assert document.text == (
        "# Tides\n\nThey come twice a day.\n\n```python\nprint('high')\n```\n\nas it is"
    )
    assert metadata(document) == {"title": "Tides"}
    assert [kind for kind, _, _ in parts(document)] == ["heading", "text", "code", "text"]


def test_a_notebook_of_version_3(tmp_path: Path) -> None:
    cells = [
        {"cell_type": "heading", "level": 2, "source": "Tides"},
        {"cell_type": "code", "input": ["a = 1\n", "b"], "language": "python"},
    ]
    path = write_json(tmp_path / "a.ipynb", {"nbformat": 3, "worksheets": [{"cells": cells}]})
    assert one(path).text == "## Tides\n\n```python\na = 1\nb\n```"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "no notebook: "),
        ("[]", "it has no list of cells"),
        ('{"cells": [5]}', "cell 1 has no text"),
        ('{"cells": [{"source": 5}]}', "cell 1 has no text"),
        ('{"cells": {}}', "it has no list of cells"),
        ('{"cells": []}', "it has no cell with a text"),
    ],
)
def test_a_notebook_that_is_none(tmp_path: Path, content: str, problem: str) -> None:
    (tmp_path / "a.ipynb").write_text(content)
    with pytest.raises(InvalidInputError, match=f"a.ipynb: .*{problem}"):
        list(Files(tmp_path / "a.ipynb"))


def test_a_pdf_says_its_pages(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(pdf("The harbour.", "", "The town.", info="Veldmoor"))
    document = one(tmp_path / "a.pdf")
    assert document.text == "The harbour.\n\nThe town."
    assert metadata(document) == {"title": "Veldmoor"}
    assert [place for _, place, _ in parts(document)] == [
        ("Veldmoor", "page 1"),
        ("Veldmoor", "page 3"),
    ]


@pytest.mark.parametrize("algorithm", ["RC4-128", "AES-256"])
def test_an_encrypted_pdf(tmp_path: Path, algorithm: str) -> None:
    (tmp_path / "plain.pdf").write_bytes(pdf("Secret."))
    for password in ("", "word"):
        writer = PdfWriter(PdfReader(tmp_path / "plain.pdf"))
        writer.encrypt(password, owner_password="owner", algorithm=algorithm)
        writer.write(tmp_path / f"closed{password}.pdf")
    assert one(tmp_path / "closed.pdf").text == "Secret."  # who may read it, may
    with pytest.raises(InvalidInputError, match=r"closedword\.pdf: it is encrypted"):
        list(Files(tmp_path / "closedword.pdf"))
    with Files(tmp_path).gather() as gathered:
        assert gathered.kinds == {"pdf": 2}
        assert [item.why for item in gathered.passed_over] == ["encrypted"]


def test_a_scan_has_no_text(tmp_path: Path) -> None:
    (tmp_path / "scan.pdf").write_bytes(pdf("", ""))
    with pytest.raises(InvalidInputError, match=r"scan\.pdf: it has no text: its pages"):
        list(Files(tmp_path / "scan.pdf"))
    (item,) = passed_over([tmp_path], skip_bad=True)
    assert (item.why, Path(item.name).name) == ("without text", "scan.pdf")


@pytest.mark.parametrize("name", ["a.pdf", "a.docx", "a.parquet"])
@pytest.mark.parametrize("data", [b"nonsense, and enough of it", b"%PDF-1.4\n", b"PK\3\4", b"PAR1"])
def test_what_is_damaged_is_named(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InvalidInputError, match=f"{name}: cannot be read as"):
        list(Files(tmp_path))


@pytest.mark.parametrize("name", ["a.pdf", "a.docx", "a.parquet"])
def test_what_is_cut_short_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "a.docx":
        write_docx(path)
    elif name == "a.parquet":
        write_parquet(path, [{"text": "a"}] * 1000)
    else:
        path.write_bytes(b"%PDF-1.4\n1 0 obj\n<< /Type /Catalog /Pages 2 0 R >>")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InvalidInputError, match=f"{name}: cannot be read as"):
        list(Files(path))


def test_a_word_document(tmp_path: Path) -> None:
    document = one(write_docx(tmp_path / "a.docx"))
    assert metadata(document) == {"title": "The harbour"}
    ships, dues = ("The harbour", "Ships"), ("The harbour", "Ships", "Dues")
    assert parts(document) == [
        ("heading", ships, "# Ships"),
        ("text", ships, "Ships come from many countries."),
        ("text", ships, "- barges"),
        ("text", ships, "- tugs"),
        ("heading", dues, "## Dues"),
        ("text", dues, "ship | crowns"),
        ("text", dues, "barge | 3"),
        ("text", dues, "Paid at once."),
    ]


def test_words_old_format_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.docx").write_bytes(b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1")
    with pytest.raises(InvalidInputError, match="a password, or Word's old format"):
        list(Files(tmp_path / "a.docx"))


# --- tables ---------------------------------------------------------------------------------------


def test_a_table_is_a_document_a_row(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(
        'year,text,note\n1874,"The bridge, the last,\nfell ""down"".",\n\n1900,None built.,sad\n'
    )
    first, second = Files(tmp_path / "a.csv")
    assert (first.id, first.text) == ("a.csv#1", 'The bridge, the last,\nfell "down".')
    assert metadata(first) == {"year": "1874"}
    assert (second.id, metadata(second)) == ("a.csv#2", {"year": "1900", "note": "sad"})


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_whatever_separates_fields(tmp_path: Path, separator: str) -> None:
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.writer(file, delimiter=separator)
        writer.writerows([["id", "text", "n"], ["x", f"a, b; c|d\te{separator}", "1"]])
    document = one(tmp_path / "a.csv")
    assert (document.id, document.text) == ("a.csv#x", f"a, b; c|d\te{separator}")


def test_quotes_in_a_tsv_are_quotes_or_text(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text('id\ttext\n1\t"Quoted"" so"\n2\tnot\n')
    assert texts(path) == {"a.tsv#1": 'Quoted" so', "a.tsv#2": "not"}
    path.write_text('id\ttext\n1\t"Well, he said\n2\tas "ever\n')
    assert texts(path) == {"a.tsv#1": '"Well, he said', "a.tsv#2": 'as "ever'}


def test_a_huge_field(tmp_path: Path) -> None:
    text = "word " * 100_000
    (tmp_path / "a.csv").write_text(f'id,text\n1,"{text}"\n')
    assert one(tmp_path / "a.csv").text == text


@pytest.mark.parametrize(
    ("content", "line", "problem"),
    [
        ("id,text\n1,a\n2,b,c\n", 3, "3 fields, and 2 in the first line"),
        ("id,text\n1,a\n2\n", 3, "1 fields, and 2 in the first line"),
        ('id,text\n1,a\n2,"b\nc\n', 3, "no table: unexpected end of data"),
        ('id,text\n1,"a"b\n', 2, "no table: "),
        ('id,text\n1,"a\nb"\n1,c\n', 4, "the id 'a.csv#1' is already used in line 2"),
        ("id,text,x\n1,a," + "x\n2,b\n", 3, "2 fields, and 3"),
    ],
)
def test_a_bad_row_is_named_by_its_line(
    tmp_path: Path, content: str, line: int, problem: str
) -> None:
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(CorpusError, match=problem) as caught:
        list(Files(tmp_path))
    assert caught.value.line == line
    assert caught.value.source == str(tmp_path / "a.csv")


def test_columns_that_cannot_be_told_apart(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,x,x\na,b,c\n")
    with pytest.raises(InvalidInputError, match=r"a\.csv, line 1: two columns are called 'x'"):
        list(Files(tmp_path))


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """The same rows in any of the formats of rows."""
    ending = path.suffix
    if ending == ".parquet":
        return write_parquet(path, rows)
    if ending == ".json":
        return write_json(path, rows)
    if ending == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if ending == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
    return path


ROWS = [".csv", ".tsv", ".json", ".jsonl", ".parquet"]


@pytest.mark.parametrize("ending", ROWS)
def test_fields_may_be_named(tmp_path: Path, ending: str) -> None:
    rows = [
        {"slug": "tide", "answer": "Twice a day.", "topic": "sea"},
        {"slug": "quill", "answer": "It freezes.", "topic": "river"},
    ]
    path = write_rows(tmp_path / f"faq{ending}", rows)
    found = list(Files(path, text_field="answer", id_field="slug"))
    before = "" if ending == ".jsonl" else f"faq{ending}#"
    assert [document.id for document in found] == [f"{before}tide", f"{before}quill"]
    assert [document.text for document in found] == ["Twice a day.", "It freezes."]
    assert [metadata(document) for document in found] == [{"topic": "sea"}, {"topic": "river"}]
    numbered = list(Files(path, text_field="answer", id_field=""))
    assert [document.id for document in numbered] == [f"faq{ending}#1", f"faq{ending}#2"]
    assert metadata(numbered[0]) == {"topic": "sea", "slug": "tide"}


@pytest.mark.parametrize("ending", ROWS)
def test_without_the_text_field_the_fields_are_listed(tmp_path: Path, ending: str) -> None:
    path = write_rows(tmp_path / f"a{ending}", [{"answer": "Yes.", "topic": "sea"}])
    with pytest.raises(InvalidInputError) as caught:
        list(Files(path, text_field="body"))
    for word in (f"a{ending}", "'body'", "'answer'", "'topic'", "--text-field"):
        assert word in str(caught.value)
    with pytest.raises(InvalidInputError, match=r"no field 'slug'.*'answer'.*--id-field"):
        list(Files(path, text_field="answer", id_field="slug"))


@pytest.mark.parametrize("ending", ROWS)
def test_rows_without_text_are_passed_over_and_counted(tmp_path: Path, ending: str) -> None:
    rows = [{"text": "One.", "n": 1}, {"text": " ", "n": 2}, {"text": "", "n": 3}]
    path = write_rows(tmp_path / f"a{ending}", rows)
    with Files(path, id_field="n").gather() as gathered:
        assert [document.text for document in gathered] == ["One."]
        assert gathered.blank_rows == 2


@pytest.mark.parametrize("ending", ROWS)
@pytest.mark.parametrize("key", [1.5, True, None, ""])
def test_a_key_is_a_text_or_a_whole_number(tmp_path: Path, ending: str, key: object) -> None:
    if ending in (".csv", ".tsv") and key != "":
        pytest.skip("all fields are texts")
    path = write_rows(tmp_path / f"a{ending}", [{"text": "One.", "key": key}])
    with pytest.raises(InvalidInputError, match="the id field 'key' must be a text or a whole"):
        list(Files(path, id_field="key"))


def test_a_field_within_another(tmp_path: Path) -> None:
    rows = [{"body": {"text": "Deep."}, "about": {"key": 7}}]
    for path in (
        write_json(tmp_path / "a.json", rows),
        write_parquet(tmp_path / "a.parquet", rows),
    ):
        document = one(path, text_field="body.text", id_field="about.key")
        assert (document.id, document.text) == (f"{path.name}#7", "Deep.")


def test_a_column_called_origin_is_kept_beside(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,origin\nA Fiat.,Italy\n")
    assert one(tmp_path / "a.csv").metadata["origin_"] == "Italy"
    assert one(tmp_path / "a.csv").metadata["origin"]["path"] == "a.csv"


def test_values_of_parquet_are_json(tmp_path: Path) -> None:
    table = {
        "text": ["a"],
        "day": [datetime.date(2026, 12, 1)],
        "moment": [datetime.datetime(2026, 12, 1, 2, 3)],
        "price": [decimal.Decimal("1.50")],
        "bytes": [b"\xff"],
        "nan": [float("nan")],
        "list": [[1, None, 2]],
        "lasting": [datetime.timedelta(seconds=90)],
        "deep": [{"a": {"b": datetime.date(2026, 1, 2)}}],
    }
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    assert metadata(one(tmp_path / "a.parquet")) == {
        "day": "2026-12-01",
        "moment": "2026-12-01T02:03:00",
        "price": "1.50",
        "list": [1, None, 2],
        "lasting": 90.0,
        "deep": {"a": {"b": "2026-01-02"}},
    }


def test_a_bad_row_of_parquet_is_named(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [{"text": "a", "id": 1}, {"text": "b", "id": 1}])
    with pytest.raises(InvalidInputError, match=r"a.parquet: row 2: the id .* used in row 1"):
        list(Files(path))
    path = write_parquet(tmp_path / "a.parquet", [{"text": 5}])
    with pytest.raises(InvalidInputError, match="row 1: the field 'text' is no text, but 5"):
        list(Files(path))


# --- JSON -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ('[{"text": "a"}, {"text": "b", "id": 9}]', {"a.json#1": "a", "a.json#9": "b"}),
        ('["a", "b"]', {"a.json#1": "a", "a.json#2": "b"}),
        ('{"text": "a"}', {"a.json": "a"}),
        ('{"text": "a", "_id": "k"}', {"a.json#k": "a"}),
        ('{"text": "a", "n": 1}\n{"text": "b"}\n', {"a.json#1": "a", "a.json#2": "b"}),
        ('\ufeff [ {"text":"a"}\n\n ] \n', {"a.json#1": "a"}),
    ],
)
def test_forms_of_json(tmp_path: Path, content: str, found: dict[str, str]) -> None:
    (tmp_path / "a.json").write_text(content)
    assert texts(tmp_path) == found


@pytest.mark.parametrize(
    ("content", "line", "problem"),
    [
        ('[{"text": "a"},\n{"text": 5}]', 2, "the field 'text' is no text, but 5"),
        ('[{"text": "a"},\n{"txt": "b"}]', 2, "there is no field 'text'; it has 'txt'"),
        ('[{"text": "a"},\n5]', 2, "row 2 is no object"),
        ('[{"text": "a"}\n{"text": "b"}]', 2, "not JSON: a comma is missing"),
        ('[{"text": "a"},\n', 2, "not JSON: the array has no end"),
        ('[{"text": "a"},\n{"text": "b', 2, "not JSON: Unterminated string"),
        ('[{"text": "a"}]\nx', 2, "not JSON: there is more behind the array"),
        ('[{"text": "a"},\n{"text": "\\ud800"}]', 2, "half a surrogate pair"),
        ("\n{x}", 2, "not JSON: Expecting property name"),
        ("[" * 100_000, 1, "not JSON"),
        ('[{"text": "a", "n": ' + "9" * 5000 + "}]", 1, "not JSON"),
    ],
)
def test_bad_json_is_named_by_its_line(
    tmp_path: Path, content: str, line: int, problem: str
) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(CorpusError, match=problem) as caught:
        list(Files(tmp_path))
    assert caught.value.line == line


@pytest.mark.parametrize("content", ['{"name": "x"}', "[1, 2]", "5", "null", '[{"a": 1}]', "[[]]"])
def test_json_that_holds_no_texts_is_passed_over_in_a_folder(tmp_path: Path, content: str) -> None:
    (tmp_path / "package.json").write_text(content)
    (tmp_path / "a.txt").write_text("Text.")
    with Files(tmp_path).gather() as gathered:
        assert gathered.kinds == {"text": 1}
        assert [item.why for item in gathered.passed_over] == ["without text"]
    with pytest.raises(InvalidInputError, match=r"package\.json: "):
        list(Files(tmp_path / "package.json"))


def test_a_long_array_is_read_in_pieces(tmp_path: Path) -> None:
    """Values lie over the ends of what is read at a time, escapes and numbers too."""
    rows = [{"text": f'{n} é\u2028 \\ " ' + "x" * (n % 977), "n": n * 1.5} for n in range(9000)]
    path = tmp_path / "a.json"
    for space in (None, 1):
        path.write_text(json.dumps(rows, indent=space))
        assert path.stat().st_size > 4 << 20
        found = list(Files(path))
        assert [document.text for document in found] == [row["text"] for row in rows]
        assert found[-1].metadata["n"] == rows[-1]["n"]
    long = {"text": "y" * (5 << 20)}
    assert one(write_json(path, [long])).text == long["text"]


# --- compressed -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.csv", "a.json", "a.jsonl", "a.html"])
def test_a_compressed_file_is_read_as_what_is_in_it(tmp_path: Path, name: str) -> None:
    content = {"a.csv": "text\nThe town.\n", "a.json": '["The town."]'}.get(name, "The town.")
    if name == "a.jsonl":
        content = '{"id": "t", "text": "The town."}\n'
    with gzip.open(tmp_path / f"{name}.gz", "wt") as file:
        file.write(content)
    assert [*texts(tmp_path).values()] == ["The town."]
    assert [*texts(tmp_path / f"{name}.gz").values()] == ["The town."]
    whole = (tmp_path / f"{name}.gz").read_bytes()
    for damaged in (whole[:-9], b"no gzip", whole[:-8] + bytes(8)):
        (tmp_path / f"{name}.gz").write_bytes(damaged)
        with pytest.raises(InvalidInputError, match=name):
            list(Files(tmp_path))
        with pytest.raises(InvalidInputError, match=name):
            list(Files(tmp_path / f"{name}.gz"))


def test_every_format_is_tried_here_by_name(tmp_path: Path) -> None:
    """A file of any name may be said to be of any kind."""
    made = {
        "text": b"The town.",
        "markdown": b"The town.",
        "rst": b"The town.",
        "html": b"<p>The town.",
        "notebook": b'{"cells": [{"cell_type": "markdown", "source": "The town."}]}',
        "csv": b"text\nThe town.\n",
        "tsv": b"text\nThe town.\n",
        "json": b'["The town."]',
        "jsonl": b'{"text": "The town."}',
        "pdf": pdf("The town."),
        "code": b"The town.",
    }
    write_parquet(tmp_path / "x.parquet", [{"text": "The town."}])
    made["parquet"] = (tmp_path / "x.parquet").read_bytes()
    for format in FORMATS:
        if format == "docx":
            write_docx(tmp_path / "thing")
            assert "Paid at once." in one(tmp_path / "thing", format=format).text
            continue
        (tmp_path / "thing").write_bytes(made[format])
        assert one(tmp_path / "thing", format=format).text == "The town."
