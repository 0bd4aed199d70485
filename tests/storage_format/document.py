"""storage_format.md as data: its sections, tables, and blocks of bytes."""

from __future__ import annotations

import re
from pathlib import Path

DOCUMENT = (Path(__file__).parents[2] / "storage_format.md").read_text("utf-8")


def section(title: str) -> str:
    """What stands between a heading and the next."""
    found = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#+ |\Z)", DOCUMENT, re.M | re.S)
    assert found, f"storage_format.md has no section '{title}'"
    return found[1]


def rows(title: str, columns: int) -> list[list[str]]:
    """The body rows of a section's tables that have so many columns."""
    lines = [line for line in section(title).splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    rules = [i for i, row in enumerate(cells) if set(row[0]) == {"-"}]
    heads = {i - 1 for i in rules} | set(rules)
    return [row for i, row in enumerate(cells) if i not in heads and len(row) == columns]


def names(title: str, columns: int) -> list[str]:
    return [row[0].strip("`") for row in rows(title, columns)]


def blocks(title: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", section(title), re.M | re.S)


def stanzas(title: str, language: str) -> list[dict[str, str]]:
    """`label hex # comment` lines, continued by lines without a label, in groups."""
    (block,) = blocks(title, language)
    found = []
    for stanza in block.split("\n\n"):
        fields: dict[str, str] = {}
        label = ""
        for line in stanza.splitlines():
            words = line.partition("#")[0].split()
            if not line.startswith(" "):
                label, *words = words
            fields[label] = fields.get(label, "") + "".join(words)
        found.append(fields)
    return found


def records_of(title: str) -> dict[str, dict[bytes, bytes]]:
    """Records in hexadecimal, by table and key."""
    found: dict[str, dict[bytes, bytes]] = {}
    for fields in stanzas(title, "records"):
        records = found.setdefault(fields["table"], {})
        records[bytes.fromhex(fields["key"])] = bytes.fromhex(fields["record"])
    return found
