"""Training: its numbers are those of writing and reading, its gradients reach all they should, it
learns, and it goes on where it was."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from memdb import InvalidInputError, pack
from memdb.errors import CorpusError
from model_adapter import Context, LanguageModel, Stretch, Writer
from model_adapter.adapters import load_adapter
from model_adapter.choice import kept_pairs
from model_adapter.training import Recipe, draw_log, read, read_log, train
from model_adapter.training.corpus import Corpus
from model_adapter.training.examples import Row
from model_adapter.training.live import Live
from model_adapter.training.passes import Remembered, encode, targets
from model_adapter.training.passes import read as read_rows
from model_adapter.training.record import provenance
from tests.helpers import FACTS, SAMPLE, tiny_model

TEXTS = ["The harbour of Veldmoor is old.", SAMPLE[:150], "Storms and whales."]
QUICK = {"self_questions": 0, "held_out": 0, "framings": ("plain",), "budgets": (200,)}


def recipe(**changes: Any) -> Recipe:
    """For a tiny model; 20 steps."""
    return Recipe(**{"steps": 20, **QUICK, **changes})


@pytest.fixture
def corpus_file(tmp_path: Path) -> Path:
    file = tmp_path / "corpus.jsonl"
    lines = [{"id": fact.id, "text": fact.text} for fact in FACTS]
    lines.append({"id": "long", "text": SAMPLE})
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def randomized(model: LanguageModel, how: Recipe, folder: Path) -> Live:
    """A live adapter that changes something, and the same as a folder."""
    live = Live(model, how)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in live.parameters().values():
            parameter.normal_(0, 0.15)
    told = provenance(model, how, {}, Corpus((), (), {}), 0, {})
    live.save(folder, told)
    return live


# --- the same numbers ---


@pytest.mark.parametrize("path", ["write", "both"])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "qwen3"])
def test_a_step_reads_what_writer_and_context_read(
    path: Any, architecture: str, tmp_path: Path
) -> None:
    how = recipe(path=path, dtype="float32", rank=4)
    base = tiny_model(architecture)
    live = randomized(base, how, tmp_path)
    with torch.no_grad():
        # As it is used: the adapter is loaded, memories are written, packed and read.
        made = tiny_model(architecture)
        adapter = load_adapter(str(tmp_path))
        loaded = LanguageModel(made.model, made.tokenizer, "loaded", adapter)
        writer = Writer(loaded, framing="plain", budget=200)
        memories = writer.write(TEXTS)
        prompt = loaded.tokens("\nWhere do ships come from? From many countries")
        start = len(writer.shape.prefix) + writer.shape.reference_length
        context = Context(loaded, writer.shape.prefix, start)
        stretch = Stretch(prompt, pack(memories, writer.shape))
        (expected,) = context.read([[stretch]], every=True)
        plain = Context(loaded, writer.shape.prefix, start)
        (without,) = plain.read([[Stretch(prompt)]], every=True)

    # As it is trained: by the live weights, among rows of other lengths.
    chooser = Writer(base, framing="plain", budget=200)
    references = [base.tokens(text) for text in TEXTS]
    choices = chooser.choices(chooser.scores(references), references)
    keys, values = encode(
        live.model, live.prefix(writer.shape.prefix), references, writer.shape.layers
    )
    kept = kept_pairs(keys, values, choices)
    remembered = Remembered(kept, writer.shape.layers, writer.shape.kv_heads, 2)
    rows = [Row(tuple(prompt), 3), Row(tuple(prompt[:5]), 1)]
    before = (
        base.prefix(writer.shape.prefix) if path == "write" else live.prefix(writer.shape.prefix)
    )
    logits = read_rows(live.reader, before, rows, start, remembered)
    count = len(prompt) - 1
    torch.testing.assert_close(logits[:count], expected[:-1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits[count:], expected[:4], atol=1e-4, rtol=1e-4)
    assert (expected - without).abs().max() > 1e-2  # memories are seen at all
    assert [token for row, token, _ in targets(rows) if row == 0] == prompt[1:]
    assert [answer for *_, answer in targets(rows)] == [False] * (count - 3) + [True] * 3 + [
        False,
        False,
        False,
        True,
    ]
