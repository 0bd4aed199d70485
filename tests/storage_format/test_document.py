"""storage_format.md names all that there is."""

from __future__ import annotations

import re
from dataclasses import asdict, fields

from memdb import CODECS, Rope
from memdb.codecs import FAMILIES, rotated, transform
from memdb.index.ann import IndexInfo
from memdb.storage import record_layout
from tests.storage_format import coded
from tests.storage_format.coded import LEVELS, PER_BYTE, PLAIN
from tests.storage_format.databases import shape_of
from tests.storage_format.document import DOCUMENT, names, rows, section
from tests.storage_format.reader import Database


def test_the_document_names_every_table() -> None:
    flags = {row[0].strip("`"): row[1] for row in rows("Tables", columns=5)}
    assert tuple(flags) == record_layout.TABLES
    assert {name for name, flag in flags.items() if flag == "`MDB_INTEGERKEY`"} == (
        record_layout.INTEGER_TABLES
    )
    for table in record_layout.TABLES:
        assert section(table.capitalize())
    assert f"Format version {record_layout.FORMAT_VERSION}." in DOCUMENT


def test_the_document_names_every_setting(fitted: Database) -> None:
    stored = {
        re.sub("^codec .*", "codec NAME", name.decode()) for name in fitted.records["settings"]
    }
    assert set(names("Settings", columns=3)) == stored | {"rewriting", "recoding", "unfitted"}
    fields: dict[str, set[str]] = {}
    for setting, name, *_ in rows("Settings", columns=4):
        fields.setdefault(setting.strip("`"), set()).add(name.strip("`"))
    assert set(fields.pop("rewriting")) == {"after", "recut"}
    assert set(fields.pop("unfitted")) == {"codec", "memories", "shape", "why"}
    assert set(fields.pop("recoding")) == {"codec"}
    assert fields.keys() == stored - {"shape", "tokenizer", "codec NAME"}
    fields["counters"].remove("trimmed_seal")  # there once the log was cut
    for setting, stated in fields.items():
        assert set(fitted.setting(setting)) == stated
    fields_of_both = sorted([*asdict(shape_of("float32")), *asdict(Rope(1.0))])
    assert sorted(names("Memory shape", columns=3)) == fields_of_both


def test_the_document_names_every_codec_and_change() -> None:
    assert names("Codecs", columns=3) == list(CODECS) == list(PLAIN)
    assert names("Codecs", columns=2) == list(FAMILIES) == list(coded.FAMILIES)
    for codec in CODECS:
        assert re.search(rf"^### (.*\W)?{codec}\b", DOCUMENT, re.M)
    assert {row[1]: int(row[0]) for row in rows("Changes", columns=3)} == {
        "inserted": record_layout.INSERTED,
        "deleted": record_layout.DELETED,
        "remembered": record_layout.REMEMBERED,
        "forgotten": record_layout.FORGOTTEN,
        "named": record_layout.NAMED,
    }


def test_the_document_names_every_field_of_the_index_file() -> None:
    stated = names("Index file", columns=3)
    assert stated == [*(field.name for field in fields(IndexInfo)), "head", "checksum"]


def test_the_links_of_the_document_lead_somewhere() -> None:
    prose = re.sub(r"^```.*?^```$", "", DOCUMENT, flags=re.M | re.S)
    headings = {title.lower().replace(" ", "-") for title in re.findall(r"^#+ (.*)$", prose, re.M)}
    links = re.findall(r"\]\(#([^)]*)\)", prose)
    assert links
    assert set(links) <= headings


def test_the_levels_of_the_document_are_those_of_the_code() -> None:
    stated = {
        int(bits): tuple(map(float, levels.split(", ")))
        for bits, levels in rows("rotated4, rotated3, rotated2", columns=2)
    }
    assert stated == LEVELS == rotated.LEVELS
    table = [row for row in rows("Transform codecs", columns=4) if all(map(str.isdigit, row))]
    of_bytes = [tuple(map(int, row)) for row in table]
    assert of_bytes == [
        (b, largest, 2 * largest + 1, (2 * largest + 1) ** b) for b, largest in PER_BYTE.items()
    ]
    assert transform.LARGEST == PER_BYTE
