"""Which files are found, what they are called, and what is passed over."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from memdb import CorpusError, Files, InvalidInputError, MemDB, MissingPartError
from memdb.files import markdown
from memdb.files.found import Converted, Source
from memdb.files.kinds import CONVERTERS
from memdb.types.checks import MAX_ID_BYTES
from tests.engine.helpers import ROOT, WordEmbedder, make_shape
from tests.files.made import (
    NOTEBOOK,
    metadata,
    passed,
    pdf,
    texts,
    write_docx,
    write_json,
    write_parquet,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tree(tmp_path / "docs", "a.md", "b/c.txt", "b/d/e.py", "f.rst")


def tree(root: Path, *names: str) -> Path:
    """Files whose text is their name."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"This is {name}.")
    return root


def test_ids_are_paths_from_the_folder_that_was_given(folder: Path) -> None:
    assert texts(folder) == {
        "a.md": "This is a.md.",
        "f.rst": "This is f.rst.",
        "b/c.txt": "This is b/c.txt.",
        "b/d/e.py": "This is b/d/e.py.",
    }
    assert [*texts(folder / "b")] == ["c.txt", "d/e.py"]
    assert [*texts(folder / "b" / "c.txt")] == ["c.txt"]
    with Files([folder, folder / "f.rst", folder / "b" / "c.txt"]).gather() as gathered:
        assert [document.id for document in gathered][:4] == [*texts(folder)]


def test_however_the_folder_is_written_its_documents_are_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(folder / "b")
    (tmp_path / "link").symlink_to(folder)
    for path in (folder, "..", str(folder) + "/", folder / "b" / "..", tmp_path / "link"):
        with Files(path).gather() as gathered:
            assert {d.metadata["origin"]["root"] for d in gathered} == {str(folder)}
            assert {d.id for d in gathered} == {*texts(folder)}
    assert [*texts(".")] == ["c.txt", "d/e.py"]
    assert [*texts("c.txt")] == ["c.txt"]


def test_a_file_that_comes_twice_comes_once(folder: Path) -> None:
    with Files([folder, folder, folder / "a.md", f"{folder}/../docs"]).gather() as gathered:
        assert gathered.kinds == {"markdown": 1, "rst": 1, "text": 1, "code": 1}


def test_two_files_of_one_id_are_named(folder: Path, tmp_path: Path) -> None:
    tree(tmp_path / "more", "a.md")
    with pytest.raises(InvalidInputError) as caught:
        list(Files([folder, tmp_path / "more"]))
    assert "more/a.md: the id 'a.md' is already used in " in str(caught.value)
    assert "docs/a.md; ids must differ" in str(caught.value)


def test_what_is_hidden_is_passed_over(folder: Path) -> None:
    tree(folder, ".env", ".git/config.txt", ".venv/a.py", "b/.x.md")
    with Files(folder).gather() as gathered:
        assert {document.id for document in gathered} == {"a.md", "f.rst", "b/c.txt", "b/d/e.py"}
        assert passed(gathered) == {".env": "hidden", ".venv": "hidden", ".x.md": "hidden"}
    assert [*texts(folder / ".env")] == [".env"]  # asked for


def test_what_git_ignores_is_passed_over(tmp_path: Path) -> None:
    root = tree(
        tmp_path / "repository",
        *("a.md", "a.txt", "build/x.md", "deep/keep.txt", "deep/b.txt", "deep/build/y.md"),
        *("deep/inner/c.rst", "deep/inner/d.rst"),
    )
    (root / ".gitignore").write_text("# notes\n*.txt\n/build/\n")
    (root / "deep" / ".gitignore").write_text("!keep.txt\ninner/c.*\n")
    found = {"a.md", "deep/keep.txt", "deep/build/y.md", "deep/inner/d.rst"}
    assert {*texts(root)} == found
    with Files(root).gather() as gathered:
        assert passed(gathered)["build"] == "ignored by .gitignore"
    assert len(texts(root, gitignore=False)) == 8
    # Of a folder within a repository, what is around it counts too.
    assert {*texts(root / "deep")} == {"keep.txt", "b.txt", "build/y.md", "inner/d.rst"}
    (root / ".git").mkdir()
    assert {*texts(root / "deep")} == {"keep.txt", "build/y.md", "inner/d.rst"}
    assert [*texts(root / "build")] == ["x.md"]  # asked for, so it is read
    assert [*texts(root / "a.txt")] == ["a.txt"]


def test_patterns(folder: Path) -> None:
    tree(folder, "notes.log", "b/c.md", "LICENSE")
    assert {*texts(folder, include=["*.md"])} == {"a.md", "b/c.md"}
    assert {*texts(folder, include=["/*.md", "d/"])} == {"a.md", "b/d/e.py"}
    assert {*texts(folder, include=["b/**"], exclude=["*.py"])} == {"b/c.txt", "b/c.md"}
    assert {*texts(folder, exclude=["b/"])} == {"a.md", "f.rst", "LICENSE"}
    assert {*texts(folder, exclude=["b/*", "!b/c.md"])} == {"a.md", "f.rst", "LICENSE", "b/c.md"}
    # What is asked for by a pattern is read, whatever it is called.
    assert texts(folder, include=["*.log"]) == {"notes.log": "This is notes.log."}
    with Files(folder, exclude=["d/", "*.rst"]).gather() as gathered:
        assert passed(gathered) == {
            "d": "not included",
            "f.rst": "not included",
            "notes.log": "of unknown kind",
        }
    with pytest.raises(InvalidInputError, match="no pattern: Invalid git pattern: '!'"):
        Files(folder, include=["!"])


def test_links(folder: Path, tmp_path: Path) -> None:
    tree(tmp_path / "far", "x.md")
    (folder / "again").symlink_to(folder)
    (folder / "b" / "up").symlink_to("..")
    (folder / "other").symlink_to(tmp_path / "far")
    (folder / "file.md").symlink_to(tmp_path / "far" / "x.md")
    (folder / "broken.md").symlink_to("nowhere")
    (folder / "self.md").symlink_to("self.md")
    with Files(folder).gather() as gathered:
        assert len(list(gathered)) == 5
        assert "file.md" in {document.id for document in gathered}
        assert passed(gathered) == {
            "again": "link to a folder",
            "up": "link to a folder",
            "other": "link to a folder",
            "broken.md": "link to nothing",
            "self.md": "link to nothing",
        }


def test_what_is_no_regular_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(folder / "pipe.txt")
    monkeypatch.chdir(folder)
    with socket.socket(socket.AF_UNIX) as one:
        one.bind("socket.md")
        (folder / "null.txt").symlink_to("/dev/null")
        with Files(folder).gather() as gathered:
            assert passed(gathered) == dict.fromkeys(
                ["pipe.txt", "socket.md", "null.txt"], "no regular file"
            )
    with pytest.raises(InvalidInputError, match=r"pipe\.txt' is no regular file"):
        list(Files(folder / "pipe.txt"))


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="there is no /proc")
def test_a_file_that_cannot_be_read_is_named(folder: Path) -> None:
    (folder / "bad.md").symlink_to("/proc/self/mem")  # whoever asks, its first page is not there
    with pytest.raises(InvalidInputError, match=r"bad\.md: cannot be read: Input/output error"):
        list(Files(folder))
    with Files(folder, skip_bad=True).gather() as gathered:
        assert len(list(gathered)) == 4
        assert passed(gathered) == {"bad.md": "cannot be read"}


SETS = ("bounding-set", "inh-caps")
#: Root may read everything, but for a program that is not allowed to.
NO_ROOT = ["setpriv", *(f"--{which}=-dac_override,-dac_read_search" for which in SETS)]

CLOSED = """
import sys
from memdb import Files, InvalidInputError
from tests.files.made import passed
try:
    list(Files(sys.argv[1]))
except InvalidInputError as error:
    print(error)
with Files(sys.argv[1], skip_bad=True).gather() as gathered:
    print([document.id for document in gathered], passed(gathered))
    for name in sys.argv[2:]:
        print(gathered.goes({"origin": {"root": sys.argv[1], "path": name}}))
"""


@pytest.mark.skipif(
    os.geteuid() == 0 and not shutil.which("setpriv"), reason="root may read everything"
)
def test_what_may_not_be_read_is_named_and_not_taken_for_gone(folder: Path) -> None:
    for name in ("a.md", "b/d", "b"):
        (folder / name).chmod(0)
    before = NO_ROOT if os.geteuid() == 0 else []
    names = ["a.md", "b/c.txt", "b/d/e.py", "bb.txt", "gone.md"]
    done = subprocess.run(
        [*before, sys.executable, "-c", CLOSED, str(folder), *names],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    for name in ("b", "b/d", "a.md"):
        (folder / name).chmod(0o755)
    *error, found, a, c, e, bb, gone = done.stdout.splitlines()
    assert done.stderr == ""
    assert error[0].startswith("2 files cannot be read")
    assert error[1].endswith("docs/b: cannot be read: Permission denied")
    assert error[2].endswith("docs/a.md: cannot be read: Permission denied")
    assert found == "['f.rst'] {'b': 'cannot be read', 'a.md': 'cannot be read'}"
    assert [a, c, e, bb, gone] == ["False", "False", "False", "True", "True"]


def test_names_of_all_kinds(tmp_path: Path) -> None:
    root = tmp_path / "docs"
    names = ["with space.txt", "line\nbreak.txt", "Ünïcödé.txt", "#1?.txt", "back\\slash.txt"]
    tree(root, *names)
    (root / os.fsdecode(b"caf\xe9.txt")).write_text("not UTF-8")
    (root / "empty\n.txt").write_text("")
    found = texts(root)
    assert {*found} == {*names, "caf\\xe9.txt"}
    with Files(root).gather() as gathered:
        (item,) = gathered.passed_over
        assert item.name.endswith("empty\\n.txt")
        for document in gathered:
            json.dumps(document.metadata, ensure_ascii=False).encode()
    assert [*texts(root / os.fsdecode(b"caf\xe9.txt"))] == ["caf\\xe9.txt"]


def test_a_name_that_is_too_long_for_an_id(tmp_path: Path) -> None:
    names = ["/".join(["ä" * 60] * 5) + f"/{end}.txt" for end in ("a", "b")]
    found = texts(tree(tmp_path, *names))
    assert len(found) == 2
    assert all(400 < len(id.encode()) <= MAX_ID_BYTES for id in found)
    assert {*found} == {*texts(tmp_path)}


def test_a_database_is_no_document(folder: Path) -> None:
    MemDB.create(folder / "db", embedder=WordEmbedder(), shape=make_shape()).close()
    with Files(folder).gather() as gathered:
        assert passed(gathered) == {"db": "database"}
    with (
        MemDB.open(folder / "db", embedder=WordEmbedder()) as database,
        pytest.raises(InvalidInputError, match=r"holds no documents \(passed over: 1 database\)"),
    ):
        database.ingest(folder / "db")


# --- JSON lines -----------------------------------------------------------------------------------


def lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize("name", ["corpus.jsonl", "corpus.json", "corpus.txt", "corpus", "c.dat"])
def test_lines_given_by_name_are_read_as_ever(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text(
        "\n" + lines({"text": "One."}, {"id": "b", "text": "Two.", "metadata": {"n": 1}})
    )
    one, two = Files(path)
    assert (str(one.id)[:7], one.metadata) == ("sha256:", {})
    assert (two.id, two.metadata) == ("b", {"n": 1})
    path.write_text(path.read_text() + lines({"id": "b", "text": "x"}))
    with pytest.raises(CorpusError, match="line 4: the id 'b' is already used in line 3; ids"):
        list(Files(path))
    with Files([path, tree(tmp_path / "t", "a.txt")], skip_bad=True).gather() as gathered:
        assert gathered.kinds == {"text": 1}


def test_other_fields_of_lines_are_refused_as_ever(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines({"id": "a", "text": "x", "titel": "y"}))
    for path in (tmp_path, tmp_path / "a.jsonl", [tmp_path / "a.jsonl", tmp_path]):
        with pytest.raises(CorpusError, match=r"a\.jsonl, line 1: unknown field 'titel'"):
            list(Files(path))
    assert metadata(next(iter(Files(tmp_path, text_field="text")))) == {"titel": "y"}


def test_lines_in_a_folder_have_their_ids_and_an_origin(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines({"id": "a", "text": "x"}, {"text": "y"}, {"text": "y"}))
    (tmp_path / "b.jsonl").write_text(lines({"text": "y"}, {"id": "c", "text": "x"}))
    one, two, three = Files(tmp_path)
    assert [one.id, three.id] == ["a", "c"]
    assert str(two.id).startswith("sha256:")
    assert one.metadata["origin"]["path"] == "a.jsonl"
    (tmp_path / "b.jsonl").write_text(lines({"text": "y", "metadata": {"n": 1}}))
    with pytest.raises(
        CorpusError, match=r"b\.jsonl, line 1: the same text as in .*a\.jsonl, line"
    ):
        list(Files(tmp_path))


def beir(root: Path) -> Path:
    root.mkdir()
    rows = [
        {"_id": "q1-4", "title": "The harbour", "text": "Old.", "metadata": {"url": "h"}},
        {"_id": "7", "title": "", "text": "No title.", "metadata": {}},
    ]
    (root / "corpus.jsonl").write_text(lines(*rows))
    (root / "queries.jsonl").write_text(lines({"_id": "1", "text": "How old?", "metadata": {}}))
    (root / "qrels").mkdir()
    (root / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n1\tq1-4\t1\n")
    return root


def test_a_folder_of_beir(tmp_path: Path) -> None:
    root = beir(tmp_path / "scifact")
    for path in (root, tmp_path, root / "corpus.jsonl"):
        one, two = Files(path)
        assert (one.id, one.text) == ("q1-4", "The harbour\n\nOld.")
        assert metadata(one) == {"title": "The harbour", "url": "h"}
        assert (two.id, two.text, metadata(two)) == ("7", "No title.", {})
    with Files(root).gather() as gathered:
        assert passed(gathered) == dict.fromkeys(["queries.jsonl", "qrels"], "questions of BEIR")


def test_queries_and_qrels_alone_are_no_beir(tmp_path: Path) -> None:
    (tmp_path / "queries.jsonl").write_text(lines({"id": "1", "text": "How old?"}))
    (tmp_path / "corpus.jsonl").write_text(lines({"id": "2", "text": "Old."}))
    assert texts(tmp_path) == {"1": "How old?", "2": "Old."}


# --- bad files, and files in motion ---------------------------------------------------------------


def test_all_bad_files_are_named_at_once(folder: Path) -> None:
    (folder / "x.json").write_text("[")
    (folder / "y.pdf").write_bytes(b"no PDF")
    (folder / "z.csv").write_text("other\nx\n")
    with pytest.raises(InvalidInputError) as caught:
        list(Files(folder))
    message = str(caught.value)
    assert message.startswith("3 files cannot be read, and nothing was written (--skip-bad")
    for name in ("x.json, line 1", "y.pdf: cannot be read as PDF", "z.csv: there is no field"):
        assert name in message
    with Files(folder, skip_bad=True).gather() as gathered:
        assert len(list(gathered)) == 4
        assert passed(gathered) == dict.fromkeys(["x.json", "y.pdf", "z.csv"], "cannot be read")


def test_of_a_bad_file_nothing_is_taken(folder: Path) -> None:
    (folder / "t.csv").write_text("id,text\n1,one\n2,two\n2,three\n")
    (folder / "u.csv").write_text("id,text\n1,one\n")
    with Files(folder, skip_bad=True).gather() as gathered:
        assert gathered.kinds["csv"] == 1
        assert [d.id for d in gathered if "csv" in str(d.id)] == ["u.csv#1"]


def test_a_given_file_without_text_is_an_error_beside_others(folder: Path) -> None:
    (folder / "e.txt").write_text(" \n")
    assert "e.txt" not in texts(folder)
    with pytest.raises(InvalidInputError, match=r"e\.txt: it is empty"):
        list(Files([folder / "a.md", folder / "e.txt"]))
    assert [*texts([folder / "a.md", folder / "e.txt"], skip_bad=True)] == ["a.md"]


def test_a_file_that_is_written_meanwhile_is_read_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = 0

    def changing(source: Source) -> Iterator[Converted]:
        nonlocal turns
        turns += 1
        yield Converted(source.found.path.read_text())
        if turns < changes:
            source.found.path.write_text(f"Turn {turns}.")

    monkeypatch.setitem(CONVERTERS, "rst", changing)
    changes = 3
    assert texts(folder)["f.rst"] == "Turn 2."
    turns, changes = 0, 99
    with pytest.raises(InvalidInputError, match=r"f\.rst: it changes while it is read"):
        list(Files(folder))
    assert turns == 3


def test_a_file_that_goes_meanwhile_is_passed_over(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def going(source: Source) -> Iterator[Converted]:
        (folder / "f.rst").unlink(missing_ok=True)
        yield from markdown.markdown(source)

    monkeypatch.setitem(CONVERTERS, "markdown", going)
    with Files(folder).gather() as gathered:
        assert passed(gathered) == {"f.rst": "gone meanwhile"}


def test_nothing_is_left_behind(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    with Files(folder).gather() as gathered:
        assert len(list(gathered)) == len(list(gathered)) == 4
        # Not even meanwhile: what has no name goes with the process, however that ends.
        assert list((tmp_path / "temporary").iterdir()) == []
        assert all(a == b for a, b in zip(gathered, gathered, strict=True))
    iterator = iter(Files(folder))
    next(iterator)
    iterator.close()
    (folder / "x.json").write_text("[")
    with pytest.raises(InvalidInputError):
        list(Files(folder))
    assert list((tmp_path / "temporary").iterdir()) == []


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\n" + "word\n" * 100_000)
    code = (
        "import resource, sys; from memdb import Files, StorageError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "try: list(Files(sys.argv[1]))\n"
        "except StorageError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert "cannot be kept in" in done.stdout
    assert "Set TMPDIR to a folder with room" in done.stdout
    assert done.stderr == ""


def test_only_chosen_files(folder: Path) -> None:
    assert {*texts(folder, only=[folder / "a.md", folder / "none.md"])} == {"a.md"}
    assert {*texts(folder, only=[folder / "b"])} == {"b/c.txt", "b/d/e.py"}
    assert texts(folder, only=[folder / "gone"]) == {}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="there is no /proc")
def test_a_table_is_not_held(tmp_path: Path) -> None:
    """64 MB of rows: what a process needs more for them than for a few is far less."""
    code = (
        "import re, sys; from pathlib import Path; from memdb import Files\n"
        "n = sum(len(d.text) for path in sys.argv[1:] for d in Files(path))\n"
        "peak = re.search('VmHWM: *(.+) kB', Path('/proc/self/status').read_text())\n"
        "print(n, int(peak[1]) // 1024)"
    )
    rows = [{"text": "word " * 800, "n": n} for n in range(4)]
    used = []
    for times in (1, 1000):
        many = rows * times
        (tmp_path / "a.csv").write_text("text,n\n" + "".join(f"{r['text']},1\n" for r in many))
        write_json(tmp_path / "a.json", many)
        write_parquet(tmp_path / "a.parquet", many)
        paths = [str(tmp_path / f"a.{end}") for end in ("csv", "json", "parquet")]
        done = subprocess.run(
            [sys.executable, "-c", code, *paths], capture_output=True, text=True, check=True
        )
        size, megabytes = map(int, done.stdout.split())
        assert size == 3 * 4 * times * 4000
        used.append(megabytes)
    assert used[1] - used[0] < 40


# --- the extra ------------------------------------------------------------------------------------


def test_importing_memdb_loads_no_converter() -> None:
    heavy = {"lxml", "pypdf", "docx", "pyarrow", "pathspec", "markdown_it", "watchfiles"}
    code = f"import sys, memdb; sys.exit(len({heavy} & {{*sys.modules}}))"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("name", "library"),
    [
        ("a.md", "markdown_it"),
        ("a.ipynb", "markdown_it"),
        ("a.html", "lxml"),
        ("a.pdf", "pypdf"),
        ("a.docx", "docx"),
        ("a.parquet", "pyarrow"),
        (".gitignore", "pathspec"),
    ],
)
def test_a_library_that_is_missing_is_named_with_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, library: str
) -> None:
    root = tree(tmp_path / "docs", "a.txt")
    if name == "a.pdf":
        (root / name).write_bytes(pdf("Text."))
    elif name == "a.docx":
        write_docx(root / name)
    elif name == "a.parquet":
        write_parquet(root / name, [{"text": "a"}])
    elif name == "a.ipynb":
        write_json(root / name, NOTEBOOK)
    else:
        (root / name).write_text("<p>text</p>")
    markdown._parser.cache_clear()
    for loaded in [module for module in sys.modules if module.partition(".")[0] == library]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, library, None)
    for skip_bad in (False, True):
        with pytest.raises(MissingPartError, match=library) as caught:
            list(Files(root, skip_bad=skip_bad))
        assert "pip install 'explicit-memdb[files]'" in str(caught.value)
    (root / name).unlink()
    assert {*texts(root)} == {"a.txt"}
    markdown._parser.cache_clear()
