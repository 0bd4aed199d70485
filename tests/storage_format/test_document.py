"""storage_format.md names all that there is."""

from __future__ import annotations

import re
from dataclasses import asdict, fields

from memdb import CODECS, Rope, layout
from memdb.index.ann import IndexInfo
from tests.storage_format.databases import shape_of
from tests.storage_format.document import DOCUMENT, names, rows, section
from tests.storage_format.reader import Database


def test_the_document_names_every_table() -> None:
    flags = {row[0].strip("`"): row[1] for row in rows("Tables", columns=5)}
    assert tuple(flags) == layout.TABLES
    assert {name for name, flag in flags.items() if flag == "`MDB_INTEGERKEY`"} == (
        layout.INTEGER_TABLES
    )
    for table in layout.TABLES:
        assert section(table.capitalize())
    assert f"Format version {layout.FORMAT_VERSION}." in DOCUMENT


def test_the_document_names_every_setting(sound: Database) -> None:
    stored = {key.decode() for key in sound.records["settings"]}
    assert set(names("Settings", columns=3)) == stored | {"rewriting"}
    fields: dict[str, set[str]] = {}
    for setting, name, *_ in rows("Settings", columns=4):
        fields.setdefault(setting.strip("`"), set()).add(name.strip("`"))
    assert set(fields.pop("rewriting")) == {"after", "recut"}
    assert fields.keys() == stored - {"shape", "tokenizer"}
    for setting, stated in fields.items():
        assert set(sound.setting(setting)) == stated
    fields_of_both = sorted([*asdict(shape_of("float32")), *asdict(Rope(1.0))])
    assert sorted(names("Memory shape", columns=3)) == fields_of_both


def test_the_document_names_every_codec_and_change() -> None:
    assert set(names("Codecs", columns=3)) == set(CODECS)
    for codec in CODECS:
        assert section(codec)
    assert {row[1]: int(row[0]) for row in rows("Changes", columns=3)} == {
        "inserted": layout.INSERTED,
        "deleted": layout.DELETED,
        "remembered": layout.REMEMBERED,
        "forgotten": layout.FORGOTTEN,
    }


def test_the_document_names_every_field_of_the_index_file() -> None:
    stated = names("Index file", columns=3)
    assert stated == [*(field.name for field in fields(IndexInfo)), "checksum"]


def test_the_links_of_the_document_lead_somewhere() -> None:
    prose = re.sub(r"^```.*?^```$", "", DOCUMENT, flags=re.M | re.S)
    headings = {title.lower().replace(" ", "-") for title in re.findall(r"^#+ (.*)$", prose, re.M)}
    links = re.findall(r"\]\(#([^)]*)\)", prose)
    assert links
    assert set(links) <= headings
