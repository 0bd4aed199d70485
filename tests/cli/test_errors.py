"""Bad input: exit code 2, one clear message, nothing half-written."""

from __future__ import annotations

import json
import os
from pathlib import Path

import lmdb
import pytest

from cli.commands import COMMANDS as ENTRIES
from memdb.storage.record_layout import SETTINGS, seal
from memdb.types.canonical import json_payload
from model_adapter import SentenceEmbedder, create_database
from tests.cli.conftest import Run, rows
from tests.engine.test_waiting import WRITES, another_process
from tests.helpers import tiny_model


def line(**fields: object) -> str:
    return json.dumps(fields)


GOOD = line(id="a", text="Good.")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([GOOD, "{not json"], "corpus.jsonl, line 2: not JSON"),
        ([GOOD, "", "[1]"], "corpus.jsonl, line 3: not a JSON object"),
        ([GOOD, line(id="b")], "line 2: the field 'text' is missing"),
        ([GOOD, line(id="b", text="  ")], "line 2: 'text' is empty"),
        ([GOOD, line(id="b", text=5)], "line 2: 'text' must be a string, got a number"),
        ([GOOD, line(id="a", text="Again.")], "line 2: the id 'a' is already used in line 1"),
        ([GOOD, line(id=7, text="x")], "line 2: 'id' must be a string, got a number"),
        ([GOOD, line(id="x" * 481, text="x")], "line 2: 'id' has 481 bytes"),
        ([GOOD, line(id="b", text="x", title="y")], "line 2: unknown field 'title'"),
        ([GOOD, line(id="b", text="x", metadata=[1])], "line 2: 'metadata' must be an object"),
        ([GOOD, '{"text": "\\ud800"}'], "line 2: 'text' has half a surrogate pair"),
        ([GOOD, '{"text": "x", "metadata": {"n": NaN}}'], "line 2: 'metadata' cannot be kept"),
        ([], "holds no documents"),
    ],
)
def test_a_bad_line_is_named_and_nothing_is_written(
    run: Run, tmp_path: Path, database: None, lines: list[str], message: str
) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("\n".join(lines))
    result = run("ingest", str(corpus), code=2)
    assert message in result.stderr
    assert rows(run("stats", "--json"))[0]["documents"] == 0
    if lines:
        piped = run("ingest", "-", code=2, input="\n".join(lines))
        assert message.removeprefix("corpus.jsonl").removeprefix(", ") in piped.stderr
        assert "<stdin>" in piped.stderr


@pytest.fixture
def database(tmp_path: Path, minilm: SentenceEmbedder) -> None:
    """A database at `db` whose model is small, saved beside it."""
    model = tiny_model()
    model.model.save_pretrained(tmp_path / "model")
    model.tokenizer.save_pretrained(tmp_path / "model")
    model.name = str(tmp_path / "model")
    create_database(tmp_path / "db", model=model, embedder=minilm).close()


def test_a_corpus_that_is_not_there(run: Run) -> None:
    assert "there is no file 'no.jsonl'" in run("ingest", "no.jsonl", code=2).stderr


COMMANDS = [
    ("query", "x"),
    ("generate", "x"),
    ("chat",),
    ("get", "x"),
    ("inspect", "x"),
    ("list",),
    ("update", "x", "--text", "y"),
    ("delete", "x"),
    ("stats",),
    ("warm",),
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c[0])
def test_a_database_that_is_not_there(run: Run, command: tuple[str, ...]) -> None:
    message = run(*command, code=2).stderr
    assert "there is no database at" in message
    assert "memdb init" in message


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c[0])
def test_a_folder_that_is_no_database(run: Run, tmp_path: Path, command: tuple[str, ...]) -> None:
    (tmp_path / "db").mkdir()
    (tmp_path / "db" / "letter.txt").write_text("Dear Ada")
    assert "is no memdb database" in run(*command, code=2).stderr


def test_init_and_ingest_keep_off_other_peoples_folders(run: Run, tmp_path: Path) -> None:
    (tmp_path / "db").mkdir()
    (tmp_path / "db" / "letter.txt").write_text("Dear Ada")
    (tmp_path / "corpus.jsonl").write_text(GOOD)
    assert "'letter.txt'" in run("init", code=2).stderr
    assert "is no memdb database" in run("ingest", "corpus.jsonl", code=2).stderr
    assert [path.name for path in (tmp_path / "db").iterdir()] == ["letter.txt"]


def test_a_bad_corpus_makes_no_database(run: Run, tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text(GOOD + "\n{")
    assert "line 2" in run("ingest", "corpus.jsonl", code=2).stderr
    assert not (tmp_path / "db").exists()


def test_init_twice(run: Run, database: None) -> None:
    assert "there is already a database" in run("init", code=2).stderr


def test_a_newer_format(run: Run, tmp_path: Path, database: None) -> None:
    environment = lmdb.open(str(tmp_path / "db" / "gen-000001"), max_dbs=16)
    table = environment.open_db(SETTINGS.encode())
    with environment.begin(write=True) as transaction:
        payload = json_payload({"version": 99})
        transaction.put(b"format", seal(SETTINGS, b"format", 1, payload), db=table)
    environment.close()
    assert "has format version 99; this release reads version 2" in run("stats", code=2).stderr


def test_a_database_of_another_model(run: Run, tmp_path: Path, database: None) -> None:
    other = tiny_model("qwen2")
    other.model.save_pretrained(tmp_path / "model")  # in place of the one it was made with
    (tmp_path / "corpus.jsonl").write_text(GOOD)
    message = run("ingest", "corpus.jsonl", code=2).stderr
    assert "does not fit this database. model: the database has" in message


def test_small_mistakes(run: Run, database: None) -> None:
    assert (
        "k must be a whole number of at least 1, got 0"
        in run("query", "x", "-k", "0", code=2).stderr
    )
    assert "there is nothing to look for" in run("query", " ", code=2).stderr
    assert "there is no document 'x'" in run("get", "x", code=2).stderr
    assert "there is no document 'x'" in run("update", "x", "--text", "y", code=2).stderr
    assert "there is no document 'x'" in run("delete", "x", code=2).stderr
    assert "there is no document 'x'" in run("warm", "x", code=2).stderr
    assert "no document can have the id ''" in run("get", "", code=2).stderr
    assert "nothing to change" in run("update", "x", code=2).stderr
    assert "not JSON" in run("update", "x", "--metadata", "{", code=2).stderr
    assert "not a JSON object" in run("update", "x", "--metadata", "[]", code=2).stderr
    assert "either ids or --where" in run("delete", code=2).stderr
    assert "KEY=VALUE" in run("list", "--where", "x", code=2).stderr
    assert "the prompt is empty" in run("generate", "", code=2).stderr
    assert "max_new_tokens" in run("generate", "x", "--max-new-tokens", "0", code=2).stderr
    assert "exclude each other" in run("generate", "x", "--rag", "--no-memory", code=2).stderr
    assert "no model is called 'x'" in run("model", "pull", "x", code=2).stderr


def test_a_filter_is_read_to_the_letter(run: Run, tmp_path: Path, database: None) -> None:
    values: list[object] = [1, True, "1", [1], [True]]
    lines = [line(id=str(i), text=f"Text {i}.", metadata={"v": v}) for i, v in enumerate(values)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    run("ingest", "corpus.jsonl", "--cold")
    meant = {"=1": "03", "=true": "14", '="1"': "2", "=[1]": "3", "=[true]": "4", "!=1": "124"}
    for condition, ids in meant.items():  # an array is meant by each of its elements, too
        found = rows(run("list", "--json", "--where", f"v{condition}"))
        assert [row["id"] for row in found] == [*ids]
    for command in (("list",), ("delete", "--yes")):
        message = run(*command, "--where", "v=1", "--where", "v=2", code=2).stderr
        assert "the key 'v' is given twice" in message
        assert "nested too deep" in run(*command, "--where", "v=" + "[" * 20_000, code=2).stderr
    assert rows(run("stats", "--json"))[0]["documents"] == len(values)


def test_a_new_text_is_taken_byte_for_byte(run: Run, tmp_path: Path, database: None) -> None:
    (tmp_path / "corpus.jsonl").write_text(GOOD)
    run("ingest", "corpus.jsonl", "--cold")
    (tmp_path / "latin1.txt").write_bytes("Höre!".encode("latin1"))
    message = run("update", "a", "--file", "latin1.txt", code=2).stderr
    assert "'latin1.txt' is not UTF-8 (byte 2)" in message
    (tmp_path / "dos.txt").write_bytes(b"One.\r\nTwo.\r\n")
    run("update", "a", "--file", "dos.txt", "--cold")
    assert rows(run("get", "a", "--json"))[0]["text"] == "One.\r\nTwo.\r\n"


def test_values_that_are_too_much(run: Run, tmp_path: Path, database: None) -> None:
    (tmp_path / "corpus.jsonl").write_text(GOOD)
    long = "x" * 5000
    assert "--limit" in run("list", "--limit", str(10**20), code=2).stderr
    assert "nested too deep" in run("update", "a", "--metadata", "[" * 20_000, code=2).stderr
    for command in (("ingest", long), ("ingest", "corpus.jsonl", "--db", long)):
        message = run(*command, code=2).stderr
        assert "File name too long" in message


@pytest.mark.parametrize("command", ["generate", "query"])
def test_an_argument_that_is_no_text(run: Run, database: None, command: str) -> None:
    run(command, os.fsdecode(b"\xff"), code=2)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_entered(run: Run, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0)
    for command in (("ingest", "closed/c.jsonl"), ("stats", "--db", "closed/db")):
        assert "Permission denied" in run(*command, code=2).stderr


def test_a_folder_without_texts(run: Run, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    assert "'texts' holds no documents" in run("ingest", "texts", code=2).stderr
    assert not (tmp_path / "db").exists()


def test_no_model_from_the_environment(
    run: Run, database: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEMDB_MODEL", "no-such-model")
    monkeypatch.setenv("MEMDB_EMBEDDER", "no-such-embedder")
    run("warm")
    run("query", "x")


def test_parts_that_a_command_does_not_use(run: Run) -> None:
    assert "No such option" in run("query", "x", "--model", "y", code=2).stderr
    assert "No such option" in run("warm", "--embedder", "y", code=2).stderr


def test_init_options(run: Run) -> None:
    assert "among 0 to 29" in run("init", "--layers", "0-30", code=2).stderr
    assert "neither a layer nor a range" in run("init", "--layers", "a-b", code=2).stderr
    assert "the range '2-1' is empty" in run("init", "--layers", "0,2-1", code=2).stderr
    assert "no model has the layer" in run("init", "--layers", f"0-{10**20}", code=2).stderr
    assert "budget must be 1 to 11520" in run("init", "--budget", "0", code=2).stderr
    assert "there is no database at" in run("stats", code=2).stderr  # nothing was left behind


def test_a_write_for_another_version(run: Run, tmp_path: Path, database: None) -> None:
    (tmp_path / "corpus.jsonl").write_text(GOOD)
    run("ingest", "corpus.jsonl", "--cold")
    told = "document 'a' is at version 1, not 7"
    assert told in run("update", "a", "--metadata", "{}", "--if-version", "7", code=2).stderr
    assert told in run("delete", "a", "--if-version", "7", code=2).stderr
    run("update", "a", "--metadata", '{"n": 1}', "--if-version", "1")
    run("delete", "a", "--if-version", "2")


def test_delete_is_all_or_none(run: Run, tmp_path: Path, database: None) -> None:
    (tmp_path / "corpus.jsonl").write_text(GOOD)
    run("ingest", "corpus.jsonl", "--cold")
    assert "'b'; nothing was deleted" in run("delete", "a", "b", code=2).stderr
    assert len(rows(run("list", "--json"))) == 1
    assert rows(run("delete", "a", "a", "--json")) == [{"deleted": "a"}]


def test_a_damaged_record_is_named(run: Run, tmp_path: Path, database: None) -> None:
    (tmp_path / "corpus.jsonl").write_text(line(id="a", text="Zanzibar lies in the sea."))
    run("ingest", "corpus.jsonl", "--cold")
    file = tmp_path / "db" / "gen-000001" / "data.mdb"
    data = file.read_bytes()
    assert data.count(b"Zanzibar") >= 1
    file.write_bytes(data.replace(b"Zanzibar", b"Zanzibor"))
    message = run("get", "a", code=2).stderr
    assert "of table 'references' is damaged: its checksum does not match" in message


def test_the_commands_are_those_of_main() -> None:
    named = {command[0] for command in COMMANDS} | {"init", "ingest", "model"}
    assert {entry.name for entry in ENTRIES} >= named
    for entry in ENTRIES:
        assert entry.load().name == entry.name


def test_with_a_model_commands_wait_and_read_as_they_are_told(
    run: Run, tmp_path: Path, database: None
) -> None:
    (tmp_path / "corpus.jsonl").write_text(GOOD)
    run("ingest", "corpus.jsonl", "--cold", "--busy-timeout", "10")
    (tmp_path / "more.jsonl").write_text(line(id="new", text="A new text."))
    with another_process(WRITES, tmp_path / "db"):
        for command in (
            ("ingest", "more.jsonl"),
            ("update", "a", "--text", "Another text."),
            ("warm", "--all"),
            ("rewrite", "--budget", "20"),
        ):
            message = run(*command, "--busy-timeout", "0.05", code=2).stderr
            assert "is writing, and was not done after 0.05 s" in message
    for command in (
        ("query", "text"),
        ("query", "text", "--mode", "hybrid"),
        ("inspect", "a"),
        ("generate", "text", "--max-new-tokens", "1"),
    ):
        run(*command, "--read-only")
    run("chat", "--read-only", "--max-new-tokens", "1", input="text\n")
    assert rows(run("stats", "--json"))[0]["memories"] == 0  # what is cold stays so
    run("query", "text", "--mode", "keyword", "--read-only")
    assert rows(run("stats", "--json"))[0]["keywords"] is None
    run("generate", "text", "--max-new-tokens", "1")
    assert rows(run("stats", "--json"))[0]["memories"] > 0
