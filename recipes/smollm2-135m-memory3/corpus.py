"""The text that `smollm2-135m-memory3` is trained on: FOLDOC and documentation from Debian 12.

    python recipes/smollm2-135m-memory3/corpus.py corpus.jsonl --documents 2000

Needs `apt-get` and `dpkg-deb` (Debian or a relative of it, with package lists); `--packages FOLDER`
takes packages that are there already. Nothing of it is an encyclopaedia, and none of SQuAD.
"""

from __future__ import annotations

import gzip
import json
import random
import re
import subprocess
import tempfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import click

#: What is unpacked, and where in it the pages are.
PACKAGES = {
    "dict-foldoc": "",
    "anarchism": "usr/share/doc/anarchism/html",
    "python3.11-doc": "usr/share/doc/python3.11/html",
    "debian-reference-en": "usr/share/debian-reference",
    "debian-policy": "usr/share/doc/debian-policy/policy.html",
    "developers-reference": "usr/share/developers-reference",
    "debian-faq": "usr/share/doc/debian/FAQ",
    "debian-history": "usr/share/doc/debian-history/docs",
}
_LEAST, _MOST = 400, 4000  # characters of a document

_TRANSLATED = re.compile(r"\.(?!en\b)[a-z]{2}(-[a-z]{2})?\.html$")


class Prose(HTMLParser):
    """The paragraphs of a page."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.paragraphs: list[str] = []
        self._open: list[str] | None = None

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag == "p":
            self._close()
            self._open = []
        elif tag in ("pre", "table", "ul", "ol", "dl", "h1", "h2", "h3", "h4", "div"):
            self._close()

    def handle_endtag(self, tag: str) -> None:
        if tag == "p":
            self._close()

    def handle_data(self, data: str) -> None:
        if self._open is not None:
            self._open.append(data)

    def _close(self) -> None:
        text = " ".join("".join(self._open or []).replace("¶", "").split())
        if len(text) >= 80:
            self.paragraphs.append(text)
        self._open = None


def pages(folder: Path) -> Iterator[tuple[str, str]]:
    """Pages cut into documents of whole paragraphs."""
    for page in sorted(folder.rglob("*.html")):
        if _TRANSLATED.search(page.name):
            continue
        prose = Prose()
        prose.feed(page.read_text(encoding="utf-8", errors="replace"))
        held: list[str] = []
        number = 0
        for paragraph in [*prose.paragraphs, ""]:
            if held and (not paragraph or sum(map(len, held)) + len(paragraph) > _MOST):
                yield f"{page.relative_to(folder).as_posix()}#{number}", "\n\n".join(held)
                number, held = number + 1, []
            held.append(paragraph)


def foldoc(dictionary: Path) -> Iterator[tuple[str, str]]:
    """Entries: a headword at the margin, its text indented."""
    text = gzip.decompress(dictionary.read_bytes()).decode("utf-8", "replace")
    for number, entry in enumerate(re.split(r"\n\n(?=\S)", text)[3:]):
        word, _, body = entry.partition("\n\n")
        body = re.sub(r"[{}]|<[a-z, ]+>|\(https?:[^)]*\)", "", body)
        body = re.sub(r"\(\d{4}-\d\d-\d\d\)", "", body)
        paragraphs = [" ".join(part.split()) for part in body.split("\n\n")]
        name = word.splitlines()[0] if word else ""
        yield f"{number} {name}", f"{name}: " + "\n\n".join(part for part in paragraphs if part)


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--packages", type=click.Path(exists=True, path_type=Path))
@click.option(
    "--package",
    "names",
    multiple=True,
    type=click.Choice(list(PACKAGES)),
    help="That package alone; may be given again. Default: all.",
)
@click.option("--documents", type=int, help="That many, drawn at random (seed 0); default: all.")
def main(out: Path, packages: Path | None, names: tuple[str, ...], documents: int | None) -> None:
    """Write the corpus as JSON lines of `id`, `text` and `metadata`."""
    seen: set[str] = set()
    lines: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = packages or Path(temporary)
        if packages is None:
            wanted = names or tuple(PACKAGES)
            subprocess.run(["apt-get", "download", *wanted], cwd=folder, check=True)
        for name, where in PACKAGES.items():
            if names and name not in names:
                continue
            (package,) = folder.glob(f"{name}_*.deb")
            unpacked = Path(temporary) / name
            subprocess.run(["dpkg-deb", "-x", str(package), str(unpacked)], check=True)
            found = (
                pages(unpacked / where)
                if where
                else foldoc(unpacked / "usr/share/dictd/foldoc.dict.dz")
            )
            count = 0
            for key, text in found:
                if len(text) < _LEAST or text in seen:
                    continue
                seen.add(text)
                line = {"id": f"{name}/{key}"[:200], "text": text, "metadata": {"source": name}}
                lines.append(json.dumps(line, ensure_ascii=False) + "\n")
                count += 1
            click.echo(f"{name}: {count:,} documents")
    most = len(lines) if documents is None else min(documents, len(lines))
    kept = sorted(random.Random(0).sample(range(len(lines)), most))
    out.write_text("".join(lines[index] for index in kept), encoding="utf-8")
    click.echo(f"{out}: {len(kept):,} documents")


if __name__ == "__main__":
    main()
