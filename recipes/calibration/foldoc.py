"""The text that the catalogue's constants are fitted on: entries of FOLDOC, from Debian 12.

    python recipes/calibration/foldoc.py corpus.jsonl --documents 300

Needs `apt-get` and `dpkg-deb` (Debian or a relative of it, with package lists); `--packages FOLDER`
takes the package that is there already. Nothing of it is in a test or a benchmark.
"""

from __future__ import annotations

import json
import random
import runpy
import subprocess
import tempfile
from pathlib import Path

import click

_PACKAGE = "dict-foldoc"
_LEAST, _MOST = 300, 2000  # characters of an entry
_READ = runpy.run_path(str(Path(__file__).parents[1] / "smollm2-135m-memory3" / "corpus.py"))


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--packages", type=click.Path(exists=True, path_type=Path))
@click.option("--documents", default=300, show_default=True, help="Drawn at random (seed 0).")
def main(out: Path, packages: Path | None, documents: int) -> None:
    """Write the corpus as JSON lines of `id` and `text`."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = packages or Path(temporary)
        if packages is None:
            subprocess.run(["apt-get", "download", _PACKAGE], cwd=folder, check=True)
        (package,) = folder.glob(f"{_PACKAGE}_*.deb")
        unpacked = Path(temporary) / "unpacked"
        subprocess.run(["dpkg-deb", "-x", str(package), str(unpacked)], check=True)
        dictionary = unpacked / "usr/share/dictd/foldoc.dict.dz"
        entries = [
            {"id": key[:200], "text": text}
            for key, text in _READ["foldoc"](dictionary)
            if _LEAST <= len(text) <= _MOST
        ]
    drawn = sorted(random.Random(0).sample(range(len(entries)), min(documents, len(entries))))
    lines = [json.dumps(entries[place], ensure_ascii=False) + "\n" for place in drawn]
    out.write_text("".join(lines), encoding="utf-8")
    click.echo(f"{out}: {len(lines):,} documents of {len(entries):,}")


if __name__ == "__main__":
    main()
