"""Small files of every kind, and what is read of files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import docx
import pyarrow as pa
import pyarrow.parquet as pq

from memdb import Document, Files, Gathered, PassedOver


def texts(paths: Any, **options: Any) -> dict[str, str]:
    """Texts by id."""
    return {str(document.id): document.text for document in Files(paths, **options)}


def one(path: Path, **options: Any) -> Document:
    """The one document of a file."""
    (document,) = Files(path, **options)
    return document


def metadata(document: Document) -> dict[str, Any]:
    """A document's metadata without its origin."""
    return {name: value for name, value in document.metadata.items() if name != "origin"}


def passed(gathered: Gathered) -> dict[str, str]:
    """Why files were passed over, by the last part of their names."""
    return {Path(item.name).name: item.why for item in gathered.passed_over}


def passed_over(paths: Any, **options: Any) -> list[PassedOver]:
    with Files(paths, **options).gather() as gathered:
        return gathered.passed_over


def parts(document: Document) -> list[tuple[str, tuple[str, ...], str]]:
    """Kind, place and text of a document's parts, which must tile it."""
    assert document.parts[0].start == 0
    assert document.parts[-1].end == len(document.text)
    for before, after in zip(document.parts, document.parts[1:], strict=False):
        assert before.end == after.start
    return [
        (part.kind, part.place, document.text[part.start : part.end].strip())
        for part in document.parts
    ]


def write_json(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value))
    return path


def pdf(*pages: str, info: str = "") -> bytes:
    """A PDF of one line a page; a blank one has none, as a scan has not."""
    kids = " ".join(f"{4 + 2 * n} 0 R" for n in range(len(pages)))
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for number, text in enumerate(pages):
        drawn = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET" if text else "0 0 9 9 re f"
        objects.append(
            "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] "
            f"/Resources << /Font << /F1 3 0 R >> >> /Contents {5 + 2 * number} 0 R >>"
        )
        objects.append(f"<< /Length {len(drawn)} >>\nstream\n{drawn}\nendstream")
    about = f"<< /Title ({info}) >>"
    objects.append(about)
    data = b"%PDF-1.4\n"
    places = []
    for number, body in enumerate(objects, 1):
        places.append(len(data))
        data += f"{number} 0 obj\n{body}\nendobj\n".encode()
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    size = len(objects) + 1
    end = f"xref\n0 {size}\n0000000000 65535 f \n{table}trailer\n"
    end += f"<< /Size {size} /Root 1 0 R /Info {size - 1} 0 R >>\nstartxref\n{len(data)}\n%%EOF\n"
    return data + end.encode()


def write_docx(path: Path) -> Path:
    document = docx.Document()
    document.core_properties.title = "The harbour"
    document.add_heading("Ships", 1)
    document.add_paragraph("Ships come from many countries.")
    document.add_paragraph("barges", style="List Bullet")
    document.add_paragraph("tugs", style="List Bullet")
    document.add_heading("Dues", 2)
    table = document.add_table(2, 2)
    for cell, text in zip(table._cells, ["ship", "crowns", "barge", "3"], strict=True):
        cell.text = text
    document.add_paragraph("Paid at once.")
    document.save(str(path))
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


NOTEBOOK = {
    "nbformat": 4,
    "nbformat_minor": 5,
    "metadata": {"language_info": {"name": "python"}},
    "cells": [
        {"cell_type": "markdown", "source": ["# Tides\n", "\n", "They come twice a day."]},
        {"cell_type": "code", "source": "print('high')", "outputs": [{"text": "high"}]},
        {"cell_type": "code", "source": ""},
        {"cell_type": "raw", "source": "as it is"},
    ],
}

PAGE = """<!doctype html><html><head><title>Veldmoor</title><style>p {}</style></head><body>
<nav><a href="/">home</a></nav>
<main>
<h1>Veldmoor<a class="headerlink" href="#v">¶</a></h1>
<p>The harbour is <b>old</b>.<!-- not this --><br>It freezes.</p>
<ul><li>ships</li><li><p>barges</p><ul><li>tugs</li></ul></li></ul>
<h2>Code</h2><div class="highlight-python"><pre>def dues(ship):
    return  3</pre></div>
<table><tr><th>ship</th><th>crowns</th></tr><tr><td>barge</td><td>3</td></tr></table>
<script>alert(1)</script><p hidden>unseen</p>tail
</main><footer>2026</footer></body></html>"""
