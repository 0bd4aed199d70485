"""`memdb eval`: from files to figures, on a small model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from model_adapter import SentenceEmbedder
from model_adapter.attention.weighing import SAFE
from model_adapter.evaluation import EVEN, framed
from tests.cli.conftest import Run, rows
from tests.cli.small import model_folder
from tests.helpers import FACTS

Evaluate = Callable[..., Result]


@pytest.fixture
def evaluate(
    run: Run,
    tmp_path: Path,
    corpus: Path,
    minilm: SentenceEmbedder,
    monkeypatch: pytest.MonkeyPatch,
) -> Evaluate:
    lines = [
        {"question": fact.question, "answers": [fact.answer], "document": fact.id} for fact in FACTS
    ]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    model = model_folder(minilm)

    def call(*arguments: str, **options: object) -> Result:
        files = ("--corpus", "corpus.jsonl", "--questions", "questions.jsonl")
        work = () if "--work" in arguments else ("--work", "work")
        return run("eval", *files, "--model", model, *work, *arguments, **options)

    return call


def test_figures_as_json(evaluate: Evaluate, tmp_path: Path) -> None:
    small = ("--max-new-tokens", "3", "--json")
    (found,) = rows(evaluate(*small, "--budget", "24", "--plot", "eval.svg"))
    for arm in ("nothing", "rag", "memory"):
        for name in (
            *("nll", "nll_first", "nll_rest", "tokens_right", "ranked_first", "answers_right"),
            *("em", "f1", "seconds"),
        ):
            low, high = found[arm][f"{name}_interval"]
            assert low <= found[arm][name] <= high
    assert found["share_interval"][0] <= found["share"] <= found["share_interval"][1]
    assert (found["questions"], found["references"], found["budget"]) == (4, "1", 24)
    assert (found["selection"], found["codec"]) == ("contribution", "klt8")
    assert found["seed"] == 0
    assert found["weighing"] == SAFE.to_json()
    assert found["stored_as"] == ["int8"]  # too few memories to fit a codec to
    assert set(found["framings"]) == {"plain", "chat"}
    best = found["framings"][found["framing"]]
    assert {name: found[name] for name in best} == best
    assert best["share"] == max(one["share"] for one in found["framings"].values())
    assert 0 < found["recall_at_1"] <= found["recall_at_5"] == 1
    assert found["bytes_per_reference"] < found["bytes_per_128_tokens"]
    assert (tmp_path / "eval.svg").read_text().startswith("<?xml")
    (plain,) = rows(evaluate(*small, "--budget", "24", "--framing", "plain", "--no-answers"))
    assert plain["nothing"]["nll"] == found["framings"]["plain"]["nothing"]["nll"]
    assert plain["memory"]["f1"] is plain["memory"]["f1_interval"] is None
    assert set(plain["framings"]) == {"plain"}
    more = ("--layers", "0-1", "--selection", "paper", "--references", "retrieved", "--limit", "2")
    (other,) = rows(evaluate(*small, *more, "--codec", "exact", "--seed", "3"))
    assert (other["layers"], other["selection"], other["seed"]) == ([0, 1], "paper", 3)
    assert (other["questions"], other["stored_as"]) == (2, ["exact"])
    assert other["kinds"] == {}


def test_memories_that_are_weighed_and_that_are_not(evaluate: Evaluate) -> None:
    small = ("--max-new-tokens", "2", "--references", "retrieved", "--text-limit", "0")
    (weighed,) = rows(evaluate(*small, "--json"))
    (even,) = rows(evaluate(*small, "--no-weigh", "--json"))
    for found, weighing in ((weighed, SAFE), (even, EVEN)):
        for one in (found, *found["framings"].values()):
            assert one["weighing"] == weighing.to_json()
            low, high = one["rag_near"]["nll_interval"]
            assert low <= one["rag_near"]["nll"] <= high
    for framing, one in even["framings"].items():
        other = weighed["framings"][framing]
        # Nothing is left out of the same retrieval.
        assert one["rag_near"]["nll"] == one["rag"]["nll"] == other["rag"]["nll"]
        assert other["rag_near"]["nll"] != other["rag"]["nll"]
        assert one["memory"]["nll"] != other["memory"]["nll"]
    assert "near references" in evaluate(*small).stdout
    assert "near references" not in evaluate("--max-new-tokens", "2").stdout


def test_controls_and_kinds_in_both_forms(evaluate: Evaluate, tmp_path: Path) -> None:
    names = [fact.id for fact in FACTS]
    lines = [
        {"question": "What is there?", "answers": ["a heron"], "documents": names[:2], "kind": "b"},
        {"question": "Who?", "answers": ["Agnes Okoro"], "document": names[3], "kind": "a"},
    ]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    small = ("--max-new-tokens", "2", "--framing", "plain", "--controls")
    (found,) = rows(evaluate(*small, "--references", "retrieved", "--json"))
    for arm in ("rag_1", "rag_near", "prefix", "other"):
        low, high = found[arm]["nll_interval"]
        assert low <= found[arm]["nll"] <= high
    assert found["share_prefix_interval"][0] <= found["share_prefix"]
    assert found["recall_all_at_5"] == found["recall_at_5"] == 1  # of four documents
    assert list(found["kinds"]) == ["a", "b"]
    for kind in found["kinds"].values():
        assert kind["n"] == 1
        assert kind["memory"]["nll_interval"] == [kind["memory"]["nll"]] * 2
    shown = evaluate(*small).stdout
    for word in (
        "prefix alone",
        "other memories",
        "of it the prefix alone has",
        "ranked first among eight: nothing",
        "NLL of first tokens: nothing",
        "a: 1 question, right answers: nothing",
    ):
        assert word in shown
    (without,) = rows(evaluate(*small[:4], "--no-ranking", "--json"))
    assert without["memory"]["ranked_first"] is without["share_other"] is None
    assert not {"rag_1", "rag_near", "prefix", "other"} & set(without)


def test_figures_as_tables(evaluate: Evaluate) -> None:
    shown = evaluate("--max-new-tokens", "3").stdout
    for framing in ("plain", "chat"):
        assert f"{framing} framing, 4 questions, references: 1" in shown
    for word in (
        "nothing",
        "memory",
        "exact match",
        "share of RAG's gain",
        "F1 of memory less RAG's",
        "recall of the document: @1",
        "bytes a reference",
        "(stored as int8)",
    ):
        assert word in shown
    assert "exact match" not in evaluate("--no-answers").stdout


def test_running_text_in_both_forms(evaluate: Evaluate, tmp_path: Path) -> None:
    lines = [{"id": fact.id, "text": fact.text * 3} for fact in FACTS]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    small = ("--max-new-tokens", "1", "--framing", "plain", "--text-limit", "3")
    (found,) = rows(evaluate(*small, "--json"))
    text = found["running_text"]
    assert text["documents"] == 3
    assert text["ratio"] == pytest.approx(text["perplexity_with"] / text["perplexity_without"])
    assert text["dropped"] > 0
    assert "running text: perplexity" in evaluate(*small).stdout
    without = ("--max-new-tokens", "1", "--framing", "plain", "--text-limit", "0", "--json")
    assert rows(evaluate(*without))[0]["running_text"] is None


def test_interrupted_it_goes_on(evaluate: Evaluate, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(framed, "outcomes", interrupted)
        stopped = evaluate(code=130)
        assert "interrupted; what was written stays, and the same command goes on" in stopped.stderr
    evaluate("--max-new-tokens", "2")
    monkeypatch.setattr(framed, "outcomes", interrupted)
    evaluate("--max-new-tokens", "2", "--json")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--limit", "0"), "limit must be a whole number of at least 1"),
        (("--seed", "-1"), "seed must be"),
        (("--references", "2"), "'2' is not one of"),
        (("--selection", "best"), "'best' is not one of"),
        (("--budget", "99999"), "the budget must be 1 to"),
        (("--layers", "7"), "memory layers must be among 0 to 2"),
        (("--heads", "nowhere"), "`memdb heads` makes one"),
        (("--head-weights", "nowhere"), "`memdb head-weights` makes one"),
        (("--plot", "a.pdf"), "ends with .png or .svg"),
        (("--plot", "nowhere/a.svg"), "no folder"),
        (("--model", "nowhere/model"), "cannot be loaded"),
        (("--corpus", "nowhere"), "there is no file 'nowhere'"),
        (("--questions", "corpus.jsonl"), "corpus.jsonl, line 1: the field 'question' is missing"),
        (("--work", "corpus.jsonl"), "work folder"),
    ],
)
def test_mistakes(evaluate: Evaluate, arguments: tuple[str, ...], problem: str) -> None:
    assert problem in " ".join(evaluate(*arguments, code=2).stderr.split())
