"""Training: its numbers are those of writing and reading, its gradients reach all they should, it
learns, and it goes on where it was."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from memdb import InvalidInputError, pack
from model_adapter import Context, LanguageModel, Stretch, Writer
from model_adapter.files.json_lines import JsonLines
from model_adapter.models.adapters import load_adapter
from model_adapter.models.observing import encode
from model_adapter.training import Recipe, draw_log, read, train
from model_adapter.training.examples import Row
from model_adapter.training.passes import Remembered, targets
from model_adapter.training.passes import read as read_rows
from model_adapter.training.trained_adapter import TrainedAdapter
from model_adapter.writing.kept_pairs import kept_pairs
from tests.adapter.adapted import make_adapter
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


# --- the same numbers ---


@pytest.mark.parametrize("path", ["write", "read", "both"])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "qwen3"])
def test_a_step_reads_what_writer_and_context_read(
    path: Any, architecture: str, tmp_path: Path
) -> None:
    base = tiny_model(architecture)
    live = make_adapter(tmp_path, model=base, path=path)
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
    alone = base.prefix(writer.shape.prefix)
    written = alone if path == "read" else live.prefix(writer.shape.prefix)
    keys, values = encode(live.writer, written, references, writer.shape.layers)
    kept = kept_pairs(keys, values, choices)
    remembered = Remembered(kept, writer.shape.layers, writer.shape.kv_heads, 2)
    rows = [Row(tuple(prompt), 3), Row(tuple(prompt[:5]), 1)]
    before = alone if path == "write" else live.prefix(writer.shape.prefix)
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


# --- gradients ---


def test_gradients_reach_all_that_reads_and_nothing_that_is_stored(tmp_path: Path) -> None:
    model = tiny_model()
    live = TrainedAdapter(model, recipe(path="read"))
    assert live.writer is model.base
    assert len(live.parameters()) == 2 * 3 * 7  # behind the last keys and values, too
    step(live, model).backward()
    for name, parameter in live.parameters().items():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    assert all(p.grad is None for p in model.base.parameters())


def test_gradients_reach_all_that_changes_a_memory(corpus_file: Path, tmp_path: Path) -> None:
    """Behind the last layer's keys and values nothing does; there is no adapter there."""
    model = tiny_model()
    live = TrainedAdapter(model, recipe())
    names = set(live.parameters())
    assert len(names) == 2 * (2 * 7 + 2)
    last = {name.split(".")[-4] for name in names if ".layers.2." in name}
    assert last == {"k_proj", "v_proj"}
    step(live, model).backward()
    for name, parameter in live.parameters().items():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    assert all(p.grad is None for p in model.base.parameters())


def test_gradients_reach_all_where_reading_is_trained_too() -> None:
    model = tiny_model()
    live = TrainedAdapter(model, recipe(path="both", targets=("q_proj", "down_proj")))
    assert len(live.parameters()) == 2 * 3 * 2
    step(live, model).backward()
    for name, parameter in live.parameters().items():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def step(live: TrainedAdapter, model: LanguageModel) -> torch.Tensor:
    """A number that depends on a reading of memories, with an adapter that is not zero."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in live.parameters().values():
            parameter.normal_(0, 0.1)
    writer = Writer(model, framing="plain", budget=200)
    references = [model.tokens(text) for text in TEXTS]
    choices = writer.choices(writer.scores(references), references)
    prefix = writer.shape.prefix
    keys, values = encode(live.model, live.prefix(prefix), references, writer.shape.layers)
    shape = writer.shape
    kept = kept_pairs(keys, values, choices)
    remembered = Remembered(kept, shape.layers, shape.kv_heads, 1)
    before = live.prefix(prefix) if live.reader is live.model else model.prefix(prefix)
    rows = [Row(tuple(model.tokens("\nThe harbour of")), 2)]
    return read_rows(live.reader, before, rows, len(prefix) + 128, remembered).logsumexp(0).sum()


# --- runs ---


def losses_of(folder: Path) -> list[float]:
    return [line["loss"] for line in JsonLines(folder / "log.jsonl").read() if "loss" in line]


def test_it_learns_a_tiny_corpus(corpus_file: Path, tmp_path: Path) -> None:
    model = tiny_model()
    lines = corpus_file.read_text().splitlines()
    corpus_file.write_text(lines[0] + "\n")
    how = recipe(
        steps=60,
        lr=1e-2,
        references=(1, 1),
        budgets=(768,),
        kl_weight=0.0,
        nll_weight=1.0,
        examples=4,
        rank=8,
    )
    done = train(model, read(model, [corpus_file]), how, tmp_path / "out")
    found = losses_of(tmp_path / "out")
    assert len(found) == done.steps == 60
    assert sum(found[-12:]) < 0.8 * sum(found[:12])
    # What came out is an adapter that can be used, for this model alone.
    adapter = load_adapter(str(done.folder))
    assert adapter.recipe["steps"] == 60
    assert adapter.recipe["recipe"] == how.to_json()
    other = tiny_model("qwen2")
    with pytest.raises(InvalidInputError, match="not for 'tiny-qwen2'"):
        LanguageModel(other.model, other.tokenizer, other.name, adapter)


def test_interrupted_it_goes_on_as_if_it_had_not_been(corpus_file: Path, tmp_path: Path) -> None:
    def run(folder: Path, stop: int | None = None) -> None:
        model = tiny_model()

        def told(number: int, total: int, line: dict[str, Any]) -> None:
            if number == stop:
                signal.raise_signal(signal.SIGINT)

        how = recipe(steps=8, references=(1, 3), batch=2)
        train(model, read(model, [corpus_file]), how, folder, told=told)

    run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", stop=3)
    assert len(losses_of(tmp_path / "parts")) == 3
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", stop=4)
    run(tmp_path / "parts")
    assert losses_of(tmp_path / "parts") == losses_of(tmp_path / "whole")
    one, other = (
        (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes()
        for name in ("whole", "parts")
    )
    assert one == other
    run(tmp_path / "parts")  # there is nothing left to do
    assert len(losses_of(tmp_path / "parts")) == 8


def test_another_recipe_does_not_go_on(corpus_file: Path, tmp_path: Path) -> None:
    model = tiny_model()
    corpus = read(model, [corpus_file])
    train(model, corpus, recipe(steps=1), tmp_path / "out")
    with pytest.raises(InvalidInputError, match=r"a run with rank 16, not 8: .* another folder"):
        train(tiny_model(), corpus, recipe(steps=1, rank=8), tmp_path / "out")
    train(tiny_model(), corpus, recipe(steps=2), tmp_path / "out")  # longer is well


def test_two_do_not_train_in_one_folder(corpus_file: Path, tmp_path: Path) -> None:
    model, out = tiny_model(), tmp_path / "out"
    corpus = read(model, [corpus_file])

    def told(*_: Any) -> None:
        with pytest.raises(InvalidInputError, match=f"another process trains in '{out}'"):
            train(tiny_model(), corpus, recipe(steps=1), out)

    assert train(model, corpus, recipe(steps=2), out, told=told).steps == 2
    assert train(tiny_model(), corpus, recipe(steps=3), out).steps == 3  # when it has ended


def test_it_measures_on_what_it_does_not_learn(tmp_path: Path) -> None:
    model = tiny_model()
    file = tmp_path / "corpus.jsonl"
    lines = [{"id": f"{fact.id} {n}", "text": f"{n}. {fact.text}"} for fact in FACTS for n in "ab"]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    corpus = read(model, [file])
    training, measured = corpus.split(2, 0)
    assert not set(training.references) & set(measured.references)
    assert len(training.references) + len(measured.references) == len(corpus.references)
    how = recipe(
        steps=2, held_out=2, evaluate_every=1, framings=("plain", "chat"), budgets=(100, 300)
    )
    done = train(model, corpus, how, tmp_path / "out")
    file = tmp_path / "out" / "log.jsonl"
    log = JsonLines(file).read()
    (bounds,) = [line for line in log if line.get("bounds")]
    assert bounds["share_untrained"] == done.untrained
    assert [line["step"] for line in log if line.get("measured")] == [1, 2]
    draw_log(file, tmp_path / "log.svg")
    assert (tmp_path / "log.svg").stat().st_size > 1000
    with pytest.raises(InvalidInputError, match="cannot be held out of 8 documents"):
        corpus.split(3, 0)


def test_the_model_asks_itself_once(corpus_file: Path, tmp_path: Path) -> None:
    model = tiny_model()
    corpus = read(model, [corpus_file])
    train(model, corpus, recipe(steps=1, self_questions=2), tmp_path / "out")
    file = tmp_path / "out" / "questions.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(lines) == 2
    assert all(line["document"] in corpus.names for line in lines)
    train(tiny_model(), corpus, recipe(steps=2, self_questions=2), tmp_path / "out")
    assert len(file.read_text().splitlines()) == 2
    for damaged, reason in (("no\n", "Expecting value"), ("{}\n", "no question")):
        file.write_text(damaged)
        with pytest.raises(InvalidInputError, match=rf"questions\.jsonl, line 1: {reason}"):
            train(tiny_model(), corpus, recipe(steps=2, self_questions=2), tmp_path / "out")


def test_a_damaged_checkpoint_is_named(corpus_file: Path, tmp_path: Path) -> None:
    model = tiny_model()
    (tmp_path / "checkpoint.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(InvalidInputError, match="Delete it to begin anew"):
        train(model, read(model, [corpus_file]), recipe(), tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": None}, "either steps or hours"),
        ({"hours": 1.0}, "either steps or hours"),
        ({"references": (3, 1)}, "references are 1 to N"),
        ({"framings": ("prose",)}, "framings are"),
        ({"budgets": ()}, "budgets are at least 1"),
        ({"lr": 0.0}, "lr is more than 0"),
        ({"lr": float("nan")}, "lr is more than 0"),
        ({"path": "sideways"}, "path is 'write', 'read' or 'both'"),
        ({"selection": "best"}, "no selection is called 'best'"),
        ({"kl_weight": 0.0, "nll_weight": 0.0}, "kl_weight or nll_weight"),
    ],
)
def test_a_wrong_recipe_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        recipe(**changes)


def test_layers_that_are_not_there_are_named(corpus_file: Path, tmp_path: Path) -> None:
    model = tiny_model()
    corpus = read(model, [corpus_file])
    with pytest.raises(InvalidInputError, match=r"no linear layers called qkv; it has: .*q_proj"):
        train(model, corpus, recipe(targets=("qkv",)), tmp_path / "out")
