"""A small corpus with questions on it, as files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from model_adapter import LanguageModel
from model_adapter.evaluation import Settings
from model_adapter.training import Corpus, read
from tests.helpers import FACTS, SAMPLE

MORE = ("How long is the book?", "Who sees a green light in the north?", "Why?")


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def corpus_lines() -> list[dict[str, Any]]:
    facts = [
        {"id": fact.id, "text": fact.text + " ", "metadata": {"title": "facts"}} for fact in FACTS
    ]
    return [*facts, *({"id": f"long {n}", "text": f"{n}. {SAMPLE}"} for n in range(3))]


def facts_corpus(model: LanguageModel, folder: Path) -> Corpus:
    """The facts, as what a model's heads are measured on."""
    lines = [{"id": fact.id, "text": fact.text} for fact in FACTS]
    return read(model, [write(folder / "corpus.jsonl", lines)])


def question_lines() -> list[dict[str, Any]]:
    asked = [
        {"question": fact.question, "answers": [fact.answer, "x"], "document": fact.id}
        for fact in FACTS
    ]
    return asked + [
        {"question": text, "answers": ["storms, whales"], "document": f"long {n}", "id": str(n)}
        for n, text in enumerate(MORE)
    ]


def asked_files(folder: Path) -> tuple[Path, Path]:
    """A corpus and questions; those of one document do not stand side by side."""
    asked = question_lines()
    asked += [{**line, "question": "Is it so? " + line["question"], "id": None} for line in asked]
    return write(folder / "corpus.jsonl", corpus_lines()), write(folder / "asked.jsonl", asked)


def settled(**changes: Any) -> Settings:
    return replace(Settings(framing="plain", codec="exact", max_new_tokens=5), **changes)
