"""Hooks of mkdocs: pages that lie above this folder, and links as they work in the repository.

A link to a page becomes one of the site; one to another file of the repository becomes its name;
one to nothing is an error.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

DOCS = Path(__file__).parent
ROOT = DOCS.parent
#: Pages of the site that lie elsewhere.
ABOVE = {"index.md": "README.md", "format.md": "storage_format.md", "changelog.md": "CHANGELOG.md"}
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#:]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that lie elsewhere."""
    for page, source in ABOVE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The page with links of the site."""
    name = page.file.src_uri
    at = ROOT if name in ABOVE else DOCS
    here = (DOCS / name).parent
    pages = {ROOT / source: DOCS / above for above, source in ABOVE.items()}

    def link(found: re.Match[str]) -> str:
        picture, text, target, place = found.groups()
        file = Path(os.path.normpath(at / target))
        if not file.exists():
            raise PluginError(f"{name} links to '{target}', which is not there")
        file = pages.get(file, file)
        if not file.is_relative_to(DOCS):
            return f"{text} (`{file.relative_to(ROOT)}`)"
        return f"{picture}[{text}]({os.path.relpath(file, here)}{place or ''})"

    return _LINK.sub(link, markdown)
