"""Kinds of files: which there are, by which names files have them, and what reads each."""

from __future__ import annotations

from pathlib import PurePath

from memdb.files import docx, html, json_files, markdown, notebook, parquet, pdf, plain, tables
from memdb.files.found import Converter

CONVERTERS: dict[str, Converter] = {
    "text": plain.text,
    "markdown": markdown.markdown,
    "rst": plain.rst,
    "html": html.html,
    "notebook": notebook.notebook,
    "csv": tables.comma,
    "tsv": tables.tab,
    "json": json_files.json_file,
    "jsonl": json_files.json_lines,
    "parquet": parquet.parquet,
    "pdf": pdf.pdf,
    "docx": docx.docx,
    "code": plain.code,
}

#: What a file may be said to be.
FORMATS = tuple(CONVERTERS)

_ENDINGS = {
    "text": "txt text",
    "markdown": "md markdown mdown mkd",
    "rst": "rst rest",
    "html": "html htm xhtml",
    "notebook": "ipynb",
    "csv": "csv",
    "tsv": "tsv tab",
    "json": "json",
    "jsonl": "jsonl ndjson",
    "parquet": "parquet pq",
    "pdf": "pdf",
    "docx": "docx",
    "code": "adb ads asm awk bash c cc cfg clj cljs cmake conf cpp cs css cu cxx d dart diff el "
    "elm erl ex exs f f90 fish fs fsx gd go gradle graphql groovy h hcl hh hpp hs hxx idl ini ipp "
    "java jl js jsx kt kts less lisp lua m make mjs cjs mk ml mli mm mts nim nix pas patch php pl "
    "pm proto ps1 py pyi pyx r rb rkt rs s sass scala scm scss sh sol sql svelte swift tcl tex tf "
    "thrift toml ts tsx v vb vhd vim vue xml xsd xsl yaml yml zig zsh",
}
_BY_ENDING = {end: kind for kind, ends in _ENDINGS.items() for end in ends.split()}
_BY_NAME = {
    **dict.fromkeys(("readme", "license", "licence", "copying", "authors", "notice"), "text"),
    **dict.fromkeys(("changelog", "changes", "contributing", "install", "news", "todo"), "text"),
    **dict.fromkeys(("makefile", "dockerfile", "jenkinsfile", "rakefile", "gemfile"), "code"),
}
#: Kinds that may lie compressed, as `corpus.jsonl.gz`.
_PACKED = {"text", "markdown", "rst", "html", "csv", "tsv", "json", "jsonl", "code"}


def kind_of(name: str) -> str | None:
    """The kind of a file by its name; None: the name does not say."""
    path = PurePath(name.lower())
    packed = path.suffix == ".gz"
    if packed:
        path = path.with_suffix("")
    kind = _BY_ENDING.get(path.suffix[1:]) if path.suffix else _BY_NAME.get(path.name)
    return None if packed and kind not in _PACKED else kind
