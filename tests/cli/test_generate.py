"""`memdb generate`: where the prompt comes from, what the options do, what is cited."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

import model_adapter
from memdb import InvalidInputError
from model_adapter import Options, SentenceEmbedder, open_database
from tests.cli.conftest import Run, rows
from tests.cli.small import make_database
from tests.cli.test_program import PROGRAM, TIMEOUT
from tests.helpers import FACTS

QUESTION = FACTS[0].question
SHORT = ("--max-new-tokens", "12")


@pytest.fixture(autouse=True)
def _database(run: Run, tmp_path: Path, minilm: SentenceEmbedder) -> None:
    make_database(tmp_path, minilm)


def expected(tmp_path: Path, prompt: Any, **options: Any) -> Any:
    with open_database(tmp_path / "db") as database:
        return model_adapter.generate(prompt, database, max_new_tokens=12, **options)


def test_the_answer_comes_on_stdout_and_the_rest_beside_it(run: Run, tmp_path: Path) -> None:
    answer = expected(tmp_path, QUESTION)
    shown = run("generate", QUESTION, *SHORT)
    assert (shown.stdout, shown.stderr) == (answer.text + "\n", "")
    shown = run("generate", QUESTION, *SHORT, "-v")
    assert shown.stdout == answer.text + "\n"
    assert "prompt, from token 0, with:" in shown.stderr
    assert f"{answer.prompt_tokens} prompt tokens and 12 new ones; retrieve" in shown.stderr
    assert "first token after" in shown.stderr
    (row,) = rows(run("generate", QUESTION, *SHORT, "--json"))
    assert (row["text"], row["token_ids"]) == (answer.text, answer.token_ids)
    assert (row["finished"], row["mode"]) == ("length", "memory")
    assert set(row["seconds"]) == {"retrieve", "read", "decode", "first_token"}
    assert "sources" not in row


def test_options_are_those_of_the_adapter(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Options] = []

    def stream(prompt: str, db: object, **options: Any) -> Any:
        seen.append(Options(**options))
        raise InvalidInputError("seen")

    monkeypatch.setattr(model_adapter, "stream", stream)
    run("generate", "x", code=2)
    assert seen == [Options()]
    given = {
        "max_new_tokens": 3,
        "memories": 2,
        "retrieve_every": 16,
        "min_score": -0.25,
        "max_overlap": 0.5,
        "prefetch": 4,
        "temperature": 0.5,
        "top_k": 7,
        "top_p": 0.9,
        "min_p": 0.05,
        "repetition_penalty": 1.5,
        "seed": 11,
    }
    arguments = [part for name, value in given.items() for part in (_option(name), str(value))]
    more = ("--where", "rank>=1", "--where", "rank<3", "--stop", "a", "--stop", "b", "--cite")
    more += ("--template", "enable_thinking=false", "--template", "mood=kind", "--hide-thinking")
    run("generate", "x", *arguments, *more, "--no-weigh", code=2)
    where = {"rank": {"$gte": 1, "$lt": 3}}
    given |= {"template": {"enable_thinking": False, "mood": "kind"}, "hide_thinking": True}
    assert seen[1] == Options(where=where, stop=("a", "b"), cite=True, weigh=False, **given)
    run("generate", "x", "--rag", code=2)
    run("generate", "x", "--no-memory", "--weigh", code=2)
    assert [options.mode for options in seen[2:]] == ["rag", "none"]
    assert all(options.weigh for options in seen[2:])


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def test_several_answers(run: Run, tmp_path: Path) -> None:
    drawn = {"temperature": 1.0, "seed": 3}
    answers = expected(tmp_path, QUESTION, n=3, **drawn)
    how = ("--n", "3", "--temperature", "1", "--seed", "3", *SHORT)
    shown = run("generate", QUESTION, *how)
    assert shown.stdout == "\n---\n".join(answer.text for answer in answers) + "\n"
    lines = rows(run("generate", QUESTION, *how, "--json", "--cite"))
    assert [line["token_ids"] for line in lines] == [answer.token_ids for answer in answers]
    assert all(line["sources"] for line in lines)
    assert "answers are the same" in run("generate", QUESTION, "--n", "2", code=2).stderr
    assert "--n" in run("generate", QUESTION, "--n", "0", code=2).stderr


def test_filters_and_stops(run: Run, tmp_path: Path) -> None:
    answer = expected(tmp_path, QUESTION, where={"rank": 2})
    stop = answer.text[4:6]
    (row,) = rows(run("generate", QUESTION, *SHORT, "--json", "--where", "rank=2", "--stop", stop))
    assert row["text"] == answer.text[: answer.text.index(stop)]
    assert row["finished"] == "stop"
    found = {hit["document"] for chunk in row["chunks"] for hit in chunk["references"]}
    assert found == {FACTS[2].id}


def test_sources_are_numbered_the_most_used_first(run: Run, tmp_path: Path) -> None:
    sources = expected(tmp_path, QUESTION, cite=True, weigh=False).sources()
    (row,) = rows(run("generate", QUESTION, *SHORT, "--json", "--cite", "--no-weigh"))
    assert [(source["id"], source["reference"], source["text"]) for source in row["sources"]] == [
        (s.reference.document_id, s.reference.id, s.reference.content) for s in sources
    ]
    for shown, source in zip(row["sources"], sources, strict=True):
        assert shown["share"] == pytest.approx(source.share, abs=1e-3)
        assert shown["attention"] == pytest.approx(source.attention, abs=1e-4)
    assert sum(source["share"] for source in row["sources"]) == pytest.approx(1, abs=1e-3)
    shown = run("generate", QUESTION, *SHORT, "--cite", "--no-weigh").stdout
    answer, _, listed = shown.partition("\nsources, by their share of the memories' attention")
    assert answer.strip() == row["text"].strip()
    lines = listed.splitlines()[1:]
    assert len(lines) == 5
    for place, (line, source) in enumerate(zip(lines, sources, strict=True), 1):
        assert line.split()[0] == f"{place}."
        assert f"{source.share:.1%} (" in line
        assert source.reference.document_id in line


def test_what_is_not_similar_enough_is_no_hit(run: Run, tmp_path: Path) -> None:
    def found(*arguments: str) -> list[list[str]]:
        (row,) = rows(run("generate", QUESTION, *SHORT, "--json", *arguments))
        answer = expected(tmp_path, QUESTION, **asked)
        assert row["token_ids"] == answer.token_ids
        return [[hit["document"] for hit in chunk["references"]] for chunk in row["chunks"]]

    asked: dict[str, Any] = {"weigh": False}
    (whole,) = found("--no-weigh")
    asked["min_score"] = 0.5
    assert found("--no-weigh", "--min-score", "0.5") == [[FACTS[0].id]] == [whole[:1]]
    asked = {"min_score": 1.0}
    assert found("--min-score", "1") == [[]]
    asked = {"min_score": 0.5, "mode": "rag"}
    assert found("--min-score", "0.5", "--rag") == [[FACTS[0].id]]
    wrong = run("generate", "x", "--min-score", "1.5", code=2).stderr
    assert "min_score must be -1 to 1, got 1.5" in wrong


# --- where the prompt comes from ------------------------------------------------------------------


def test_a_prompt_from_standard_input(run: Run, tmp_path: Path) -> None:
    text = f"{QUESTION}\nAnd?"
    answer = expected(tmp_path, text).text
    for ending in ("", "\n", "\r\n"):
        assert run("generate", "-", *SHORT, input=text + ending).stdout == answer + "\n"
    assert "the prompt is empty" in run("generate", "-", input="\n", code=2).stderr
    assert "'<stdin>' is not UTF-8 (byte 3)" in run("generate", "-", input=b"Hi\xff", code=2).stderr


def test_messages_from_a_file_or_standard_input(run: Run, tmp_path: Path) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hm?"},
        {"role": "assistant", "content": "Höre!"},
        {"role": "user", "content": QUESTION},
    ]
    answer = expected(tmp_path, messages).text
    file = tmp_path / "talk.json"
    file.write_text(json.dumps(messages, indent=1, ensure_ascii=False), "utf-8-sig")
    assert run("generate", "--messages", "talk.json", *SHORT).stdout == answer + "\n"
    piped = run("generate", "--messages", "-", *SHORT, input=json.dumps(messages))
    assert piped.stdout == answer + "\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[\n {"role": "user",\n}]', "talk.json, line 3, column 1: not JSON: "),
        ("[" * 20_000, "talk.json, not JSON that can be read"),
        ("{}", 'talk.json, not a list; messages look like [{"role": "user"'),
        ("[]", "talk.json, an empty list; messages look like"),
        ('["Hi."]', "talk.json, message 1 is no object with 'role' and 'content'"),
        ('[{"role": "user", "content": "Hi."}, [1]]', "talk.json, message 2 is no object"),
        ('[{"role": "robot", "content": "Hi."}]', "message 1 needs a 'role'"),
        ('[{"role": "user", "content": "\\ud800"}]', "not a text"),
        (b"[\xff]", "'talk.json' is not UTF-8 (byte 2)"),
    ],
)
def test_messages_that_are_wrong(run: Run, tmp_path: Path, text: str | bytes, message: str) -> None:
    data = text if isinstance(text, bytes) else text.encode()
    (tmp_path / "talk.json").write_bytes(data)
    assert message in run("generate", "--messages", "talk.json", code=2).stderr
    piped = run("generate", "--messages", "-", input=data, code=2).stderr
    assert message.replace("talk.json", "<stdin>") in piped


def test_small_mistakes(run: Run, tmp_path: Path) -> None:
    message = run("generate", "--messages", "no.json", code=2).stderr
    assert "cannot read 'no.json': No such file or directory" in message
    for arguments in ((), ("x", "--messages", "no.json")):
        message = run("generate", *arguments, code=2).stderr
        assert "give either a PROMPT or --messages" in message
    for mode in ("--rag", "--no-memory"):
        assert "--cite goes with neither" in run("generate", "x", "--cite", mode, code=2).stderr
    assert "none empty" in run("generate", "x", "--stop", "", code=2).stderr
    assert "KEY=VALUE" in run("generate", "x", "--where", "x", code=2).stderr
    assert "NAME=VALUE" in run("generate", "x", "--template", "x", code=2).stderr
    twice = ("--template", "a=1", "--template", "a=2")
    assert "'a' is given twice" in run("generate", "x", *twice, code=2).stderr
    message = run("generate", "x", "--template", "enable_thinking=false", code=2).stderr
    assert "knows no option 'enable_thinking'" in message
    assert "prefetch must be less" in run("generate", "x", "--prefetch", "64", code=2).stderr
    assert "max_overlap must be" in run("generate", "x", "--max-overlap", "nan", code=2).stderr


def test_without_a_standard_input() -> None:
    done = subprocess.run(
        f"{PROGRAM} generate - <&-", shell=True, capture_output=True, text=True, timeout=TIMEOUT
    )
    assert done.returncode == 2
    assert "there is no standard input" in done.stderr
