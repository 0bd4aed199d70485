"""A corpus that every machine has: Python's own documentation.

The shorter articles of `pydoc_data.topics`, and the docstrings of what a few standard modules
export, as JSON lines that `memdb ingest` reads.

    python demo/python_docs.py > corpus.jsonl
"""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from collections.abc import Iterator
from pydoc_data.topics import topics
from typing import Any

LONGEST_TOPIC = 4000  # characters; the language reference's long chapters are left out
MODULES = (
    "bisect",
    "calendar",
    "collections",
    "contextlib",
    "copy",
    "csv",
    "difflib",
    "fnmatch",
    "functools",
    "glob",
    "heapq",
    "itertools",
    "json",
    "operator",
    "random",
    "shutil",
    "statistics",
    "string",
    "tempfile",
    "textwrap",
    "zipfile",
)


def documents() -> Iterator[dict[str, Any]]:
    """One document a topic, and one for each docstring of a module and of its functions."""
    for name, text in sorted(topics.items()):
        if len(text) <= LONGEST_TOPIC:
            yield {"id": f"topic/{name}", "text": text, "metadata": {"source": "topics"}}
    for name in MODULES:
        module = importlib.import_module(name)
        if module.__doc__:
            yield _document(name, name, f"The module {name}. {inspect.getdoc(module)}")
        for member in sorted(getattr(module, "__all__", [n for n in dir(module) if n[0] != "_"])):
            thing = getattr(module, member)
            doc = inspect.getdoc(thing)
            if callable(thing) and doc and len(doc) > 60:
                yield _document(f"{name}.{member}", name, f"{name}.{member}: {doc}")


def _document(identifier: str, module: str, text: str) -> dict[str, Any]:
    return {"id": identifier, "text": text, "metadata": {"source": "library", "module": module}}


if __name__ == "__main__":
    for document in documents():
        sys.stdout.write(json.dumps(document, ensure_ascii=False) + "\n")
