"""What stands beside the command line: the demo, the benchmark, the Makefile."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner

from model_adapter import SentenceEmbedder, create_database, generate
from model_adapter.attention.weighing import EVEN
from tests.helpers import FACTS, SAMPLE, tiny_model

ROOT = Path(__file__).parent.parent.parent


def script(path: str) -> ModuleType:
    name = Path(path).stem
    spec = importlib.util.spec_from_file_location(f"scripts_{name}", ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # dataclasses look there
    sys.path.insert(0, str((ROOT / path).parent))  # as `python path` does
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.path[0]
    return module


def test_the_demo_shows_any_text() -> None:
    demo = script("demo/run.py")
    seconds = {"retrieve": 0.1, "read": 0.1, "decode": 0.1}
    result = {"text": "see [/docs]", "prompt_tokens": 3, "seconds": seconds}
    with demo.console.capture() as shown:
        demo.console.print(demo.comparison("What is [/this]?", result, result))
        demo.step("5. [/this]")
    assert shown.get().count("see [/docs]") == 2
    assert shown.get().count("[/this]") == 2


def test_the_demos_questions_are_answered_right(tmp_path: Path, minilm: SentenceEmbedder) -> None:
    """By the demo's model, on that part of its text which is about them."""
    demo = script("demo/run.py")
    text = subprocess.run(
        [sys.executable, ROOT / "demo" / "python_docs.py"], check=True, capture_output=True
    ).stdout
    lines = [json.loads(line) for line in text.splitlines()]
    about = [line for line in lines if line["id"].partition(".")[0] in ("tempfile", "shutil")]
    with create_database(tmp_path / "db", embedder=minilm) as database:
        for line in about:
            database.insert(line["text"], id=line["id"], cold=True)
        for question, right in demo.QUESTIONS.items():
            assert right in generate(question, database, max_new_tokens=demo.TOKENS).text
            alone = generate(question, database, max_new_tokens=demo.TOKENS, mode="none").text
            assert right not in alone


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Options of the benchmarks of quality: a tiny model, a corpus and its questions."""
    model = tiny_model()
    model.model.save_pretrained(tmp_path / "model")
    model.tokenizer.save_pretrained(tmp_path / "model")
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"id": f.id, "text": f.text}) + "\n" for f in FACTS))
    questions = tmp_path / "questions.jsonl"
    asked = [{"question": f.question, "answers": [f.answer], "document": f.id} for f in FACTS]
    questions.write_text("".join(json.dumps(line) + "\n" for line in asked))
    files = ["--corpus", str(corpus), "--questions", str(questions)]
    return [*files, "--model", str(tmp_path / "model")]


def test_a_quick_benchmark_keeps_its_limit(files: list[str]) -> None:
    options = [*files, "--quick", "--limit", "2"]
    result = CliRunner().invoke(script("benchmarks/selection.py").main, options)
    assert result.exit_code == 0, result.output
    assert ", 2 questions" in " ".join(result.output.split())


def test_the_benchmark_of_codecs_measures_each(files: list[str], tmp_path: Path) -> None:
    # klt8 finds few pairs here: all that is asked is that it gets through.
    options = [
        *files,
        "--limit",
        "2",
        "--budgets",
        "96,48",
        "--codecs",
        "int8,klt8",
        "--json",
        str(tmp_path / "out"),
    ]
    result = CliRunner().invoke(script("benchmarks/codec.py").main, options)
    assert result.exit_code == 0, result.output
    figures = json.loads((tmp_path / "out").read_text())
    names = [row["name"] for row in figures["rows"]]
    assert names == ["exact", "int8", "klt8", "klt8, keys after RoPE"]
    exact, int8 = figures["rows"][:2]
    assert exact["key_error"] == 0 < int8["key_error"] < 0.02
    assert (exact["bytes_per_vector"], int8["bytes_per_vector"]) == (32, 12)
    assert {(row["name"], row["budget"]) for row in figures["frontier"]} == {
        (name, budget) for name in ("exact", "klt8") for budget in (96, 48)
    }


def test_the_benchmark_beside_a_busy_program_measures_both_policies(files: list[str]) -> None:
    options = ["--model", files[files.index("--model") + 1], "--turns", "1", "--tokens", "2"]
    result = CliRunner().invoke(script("benchmarks/busy.py").main, [*options, "--busy", "1"])
    assert result.exit_code == 0, result.output
    assert result.output.count("1 of ") == 2
    assert "as installed" in result.output
    assert "torch's own" in result.output


def test_the_benchmark_of_generation_measures_all(files: list[str], tmp_path: Path) -> None:
    corpus = Path(files[1])
    long = [f"{fact.text} {SAMPLE * 3}" for fact in FACTS * 5]
    lines = [{"id": fact.id, "text": fact.text} for fact in FACTS]
    lines += [{"id": f"{n}", "text": f"{n} {text}"} for n, text in enumerate(long)]
    corpus.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = [*files, "--quick", "--limit", "2", "--json", str(tmp_path / "out")]
    result = CliRunner().invoke(script("benchmarks/generation.py").main, options)
    assert result.exit_code == 0, result.output
    figures = json.loads((tmp_path / "out").read_text())
    assert figures.keys() >= {
        "ttft_over_rag",
        "decode_over_no_memory_batch1",
        "retrieval_share",
        "tokens_per_s_over_transformers",
        "encode_over_prefill_paper",
        "encode_over_prefill_reconstruction",
    }
    assert all(value > 0 for value in figures.values())
    assert ("answer NLL" in result.output) == ("exact_tokens_per_s_over_transformers" in figures)


@pytest.mark.parametrize("installed", [True, False])
def test_the_benchmark_of_generation_runs_beside_llama_cpp(
    installed: bool, files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if installed:
        pytest.importorskip("xllamacpp")
    else:
        monkeypatch.setitem(sys.modules, "xllamacpp", None)
    corpus = Path(files[1])
    long = [f"{n} {fact.text} {SAMPLE * 3}" for n, fact in enumerate(FACTS * 5)]
    lines = [{"id": f"{n}", "text": text} for n, text in enumerate(long)]
    corpus.write_text("".join(json.dumps(line) + "\n" for line in lines))
    model = ["--model", files[files.index("--model") + 1], "--corpus", str(corpus)]
    options = [*model, "--quick", "--llama-only", "--threads", "1", "--json", str(tmp_path / "out")]
    result = CliRunner().invoke(script("benchmarks/generation.py").main, options)
    assert result.exit_code == 0, result.output
    figures = json.loads((tmp_path / "out").read_text())
    for kind in ("Q8_0", "Q4_1"):
        for cached in ("", "_cached"):
            names = {
                f"{what}_over_llama_{kind}_threads1{cached}" for what in ("decode", "answer64")
            }
            assert (names <= figures.keys()) == installed, result.output
    assert all(value > 0 for value in figures.values())
    assert ("not measured" in result.output) != installed
    assert result.output.count("of memdb's speed") == 4  # a table after each row


def test_the_benchmark_of_hybrid_reading_goes_on_where_it_was_interrupted(
    files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = script("benchmarks/hybrid.py")
    # The facts are so unlike each other that but for this all others are left out.
    monkeypatch.setattr(sys.modules["found"], "weighing_of", lambda *_: EVEN)
    options = [*files, "--limit", "3", "--work", str(tmp_path / "work")]
    asked: list[int] = []
    ask = module.outcomes

    def counted(arm: object, questions: list[object], new_tokens: int) -> object:
        asked.append(len(questions))
        return ask(arm, questions, new_tokens)

    monkeypatch.setattr(module, "outcomes", counted)
    for way in (["--way", "RAG", "--way", "memories"], []):
        out = str(tmp_path / "out")
        result = CliRunner().invoke(module.main, [*options, *way, "--json", out])
        assert result.exit_code == 0, result.output
    assert asked == [3] * 10  # each way once
    figures = json.loads((tmp_path / "out").read_text())
    assert len(figures) == 10
    # A second retrieval may find the same; of the others no two see the same.
    nll = {name: of["nll"][0] for name, of in figures.items() if name != "second retrieval"}
    assert len(set(nll.values())) == 9, nll


def test_the_benchmark_of_order_moves_memories(
    files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = script("benchmarks/order.py")
    monkeypatch.setattr(sys.modules["found"], "weighing_of", lambda *_: EVEN)
    out = str(tmp_path / "out")
    options = [*files, "--limit", "3", "--work", str(tmp_path / "work"), "--json", out]
    result = CliRunner().invoke(module.main, options)
    assert result.exit_code == 0, result.output
    figures = json.loads((tmp_path / "out").read_text())
    nll = {order.name: figures[order.name]["NLL"][0] for order in module.ORDERS}
    assert len(set(nll.values())) == len(nll), nll


def test_the_benchmark_of_one_pass_fits_measures_and_goes_on(
    files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = script("benchmarks/onepass.py")
    text = tmp_path / "text.jsonl"
    lines = [{"id": str(i), "text": SAMPLE[9 * i : 9 * i + 90]} for i in range(24)]
    text.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = [*files, "--fit", str(text), "--limit", "3"]
    options += ["--work", str(tmp_path / "work"), "--json", str(tmp_path / "out")]
    asked: list[int] = []
    ask = module.outcomes

    def counted(arm: object, questions: list[object], new_tokens: int) -> object:
        asked.append(len(questions))
        return ask(arm, questions, new_tokens)

    monkeypatch.setattr(module, "outcomes", counted)
    outputs = []
    for _ in range(2):
        result = CliRunner().invoke(module.main, options)
        assert result.exit_code == 0, result.output
        outputs.append(json.loads((tmp_path / "out").read_text()))
        assert len(asked) == 9  # 3 selections and text, of two sights, and nothing; each once
    first, second = outputs
    assert first["contribution"]["captured"] == pytest.approx(1)
    for name in ("predicted", "expected"):
        assert 0 < first[name]["captured"] < 1.0001
        assert first[name]["document"] == second[name]["document"]


def test_the_makefile_promises_what_it_has() -> None:
    makefile = (ROOT / "Makefile").read_text()
    (promised,) = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    for name in promised.split():
        assert re.search(rf"^{name}:", makefile, re.MULTILINE), name
