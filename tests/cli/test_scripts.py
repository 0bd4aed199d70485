"""What stands beside the command line: the demo, the benchmark, the Makefile."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

from click.testing import CliRunner

from tests.helpers import FACTS, tiny_model

ROOT = Path(__file__).parent.parent.parent


def script(path: str) -> ModuleType:
    name = Path(path).stem
    spec = importlib.util.spec_from_file_location(f"scripts_{name}", ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # dataclasses look there
    spec.loader.exec_module(module)
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


def test_a_quick_benchmark_keeps_its_limit(tmp_path: Path) -> None:
    model = tiny_model()
    model.model.save_pretrained(tmp_path / "model")
    model.tokenizer.save_pretrained(tmp_path / "model")
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"id": f.id, "text": f.text}) + "\n" for f in FACTS))
    questions = tmp_path / "questions.jsonl"
    asked = [{"question": f.question, "answers": [f.answer], "document": f.id} for f in FACTS]
    questions.write_text("".join(json.dumps(line) + "\n" for line in asked))
    files = ["--corpus", str(corpus), "--questions", str(questions)]
    options = [*files, "--model", str(tmp_path / "model"), "--quick", "--limit", "2"]
    result = CliRunner().invoke(script("benchmarks/selection.py").main, options)
    assert result.exit_code == 0, result.output
    assert ", 2 questions" in " ".join(result.output.split())


def test_the_makefile_promises_what_it_has() -> None:
    makefile = (ROOT / "Makefile").read_text()
    (promised,) = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    for name in promised.split():
        assert re.search(rf"^{name}:", makefile, re.MULTILINE), name
