"""Adapters: loading, what they change and what they do not, and databases made with them."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from memdb import InvalidInputError, MemDB, MismatchError, pack
from model_adapter import (
    ADAPTERS,
    Context,
    LanguageModel,
    SentenceEmbedder,
    Stretch,
    Writer,
    create_database,
    generate,
    load_adapter,
    load_model,
    open_database,
    rewrite_database,
)
from model_adapter import catalog as catalogue
from model_adapter.evaluation import Settings, evaluate
from model_adapter.evaluation.likelihood import likelihoods
from model_adapter.measuring.head_weights import measure_head_weights
from model_adapter.measuring.memory_heads import measure_heads
from model_adapter.models.adapters import chosen_adapter
from model_adapter.warming import warm_database
from tests.adapter.adapted import make_adapter, model_folder
from tests.adapter.asked import asked_files, facts_corpus
from tests.helpers import FACTS, SAMPLE, tiny_model

TEXTS = ["The harbour of Veldmoor is old.", SAMPLE[:150], "Storms and whales."]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and adapters for it: `write`, `read`, `both`, and `other`, also for writing."""
    folder = tmp_path_factory.mktemp("adapters")
    model_folder(folder / "model")
    make_adapter(folder / "write")
    make_adapter(folder / "read", path="read")
    make_adapter(folder / "both", path="both")
    make_adapter(folder / "other", seed=5)
    return folder


def with_adapter(folder: Path) -> LanguageModel:
    made = tiny_model()
    return LanguageModel(made.model, made.tokenizer, made.name, load_adapter(str(folder)))


def reading(model: LanguageModel) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model.model(torch.tensor([model.tokens(SAMPLE[:60])])).logits
    return logits


# --- what they change ---


def test_a_writing_adapter_changes_memories_and_no_reading(folders: Path) -> None:
    plain, adapted = tiny_model(), with_adapter(folders / "write")
    assert adapted.model is adapted.base
    assert adapted.writing is not adapted.base
    torch.testing.assert_close(reading(adapted), reading(plain), atol=0, rtol=0)
    for one, other in zip(
        Writer(plain, budget=200).write(TEXTS),
        Writer(adapted, budget=200).write(TEXTS),
        strict=True,
    ):
        np.testing.assert_array_equal(one.offsets, other.offsets)  # the same pairs are kept
        np.testing.assert_array_equal(one.positions, other.positions)
        assert np.abs(one.values - other.values).max() > 1e-2


def test_a_reading_adapter_changes_reading_and_no_memories(folders: Path) -> None:
    plain, adapted = tiny_model(), with_adapter(folders / "read")
    assert adapted.writing is adapted.base
    assert (reading(adapted) - reading(plain)).abs().max() > 1e-2
    for one, other in zip(
        Writer(plain, budget=200).write(TEXTS),
        Writer(adapted, budget=200).write(TEXTS),
        strict=True,
    ):
        np.testing.assert_array_equal(one.positions, other.positions)
        np.testing.assert_array_equal(one.keys, other.keys)
        np.testing.assert_array_equal(one.values, other.values)


def test_an_adapter_for_both_changes_reading_and_not_what_is_kept(folders: Path) -> None:
    plain, adapted = tiny_model(), with_adapter(folders / "both")
    assert adapted.model is adapted.writing
    assert (reading(adapted) - reading(plain)).abs().max() > 1e-2
    assert adapted.fingerprint == plain.fingerprint
    for one, other in zip(
        Writer(plain, budget=200).write(TEXTS),
        Writer(adapted, budget=200).write(TEXTS),
        strict=True,
    ):
        np.testing.assert_array_equal(one.positions, other.positions)


def test_what_an_adapter_does_not_change_is_shared(folders: Path) -> None:
    adapted = with_adapter(folders / "write")
    base = dict(adapted.base.named_parameters())
    own = {
        name.split(".")[-2]
        for name, weight in adapted.writing.named_parameters()
        if weight is not base[name]
    }
    assert own == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    }


def test_a_batch_is_the_same_as_one_by_one(folders: Path) -> None:
    writer = Writer(with_adapter(folders / "write"), budget=200)
    for text, memory in zip(TEXTS, writer.write(TEXTS), strict=True):
        (alone,) = writer.write([text])
        np.testing.assert_array_equal(memory.positions, alone.positions)
        np.testing.assert_allclose(memory.keys, alone.keys, atol=1e-5)
        np.testing.assert_allclose(memory.values, alone.values, atol=1e-5)
        memory.require(writer.shape)


def test_threads_write_while_others_read(folders: Path) -> None:
    model = with_adapter(folders / "write")
    writer = Writer(model, budget=200)
    expected, (memory,) = reading(model), writer.write(TEXTS[:1])

    def work(number: int) -> bool:
        if number % 2:
            return bool(torch.equal(reading(model), expected))
        return bool(np.array_equal(writer.write(TEXTS[:1])[0].keys, memory.keys))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(24)))


def test_fingerprints_tell_adapters_apart(folders: Path, tmp_path: Path) -> None:
    names = ("write", "both", "other")
    prints = {load_adapter(str(folders / name)).fingerprint for name in names}
    assert len(prints) == 3
    shutil.copytree(folders / "write", tmp_path / "moved")
    moved = load_adapter(str(tmp_path / "moved"))
    assert moved.fingerprint in prints
    config = json.loads((tmp_path / "moved" / "adapter_config.json").read_text())
    (tmp_path / "moved" / "adapter_config.json").write_text(
        json.dumps({**config, "lora_alpha": config["lora_alpha"] + 1})
    )
    assert load_adapter(str(tmp_path / "moved")).fingerprint not in prints


# --- loading ---


def test_an_adapter_is_loaded_by_its_folder(folders: Path) -> None:
    model = load_model(str(folders / "model"), adapter=str(folders / "write"))
    assert model.adapter is not None
    assert model.adapter.name == str(folders / "write")
    assert model is load_model(str(folders / "model"), adapter=str(folders / "write"))
    assert load_model(str(folders / "model")).adapter is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, r"no adapter '.*': it is no folder, and the catalogue has: qwen2"),
        ({"adapter_model.safetensors": None}, r"incomplete: .* has no adapter_model\.safetensors"),
        ({"recipe.json": None}, r"incomplete: .* has no recipe\.json"),
        ({"recipe.json": b"{"}, r"cannot be read: "),
        ({"recipe.json": b"{}"}, r"cannot be read: no 'path'"),
        ({"recipe.json": b'{"path": "sideways", "fingerprint": ""}'}, "does not know"),
        ({"adapter_model.safetensors": b"nothing"}, r"cannot be read: "),
        ({"adapter_config.json": b'{"peft_type": "IA3"}'}, "does not know"),
    ],
)
def test_what_is_no_adapter_is_named(
    folders: Path, tmp_path: Path, change: dict[str, bytes | None] | None, message: str
) -> None:
    folder = tmp_path / "copy"
    if change is not None:
        shutil.copytree(folders / "write", folder)
        for name, data in change.items():
            (folder / name).unlink() if data is None else (folder / name).write_bytes(data)
    with pytest.raises(InvalidInputError, match=message):
        load_adapter(str(folder))


def test_an_adapter_for_another_model_is_refused(folders: Path) -> None:
    adapter = load_adapter(str(folders / "write"))
    made = tiny_model("qwen2")
    with pytest.raises(
        InvalidInputError, match=r"trained for the model 'tiny-llama' .* not for 'tiny-qwen2'"
    ):
        LanguageModel(made.model, made.tokenizer, made.name, adapter)


def test_the_catalogue_names_a_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    name, model = "tiny-memory3", "smollm2-135m"
    entry = catalogue.AdapterEntry(name, model)
    monkeypatch.setitem(ADAPTERS, name, entry)
    with pytest.raises(InvalidInputError, match="did not come with this installation"):
        load_adapter(name)
    found = catalogue.CATALOG[model]
    changed = type(found)(**{**vars(found), "default_adapter": name})
    monkeypatch.setitem(catalogue.CATALOG, model, changed)
    assert chosen_adapter(None, model, new=True) is None  # it is not there
    monkeypatch.setattr(catalogue.AdapterEntry, "folder", property(lambda _: tmp_path))
    assert chosen_adapter(None, model, new=True) == name
    assert chosen_adapter(None, model) is None  # a database that is there goes by what it records
    assert chosen_adapter("none", model, new=True) is None
    assert chosen_adapter("mine", model, new=True) == "mine"


def test_the_bundled_adapter_writes_better_memories(smollm: LanguageModel) -> None:
    """Of the paper's budget: right answers are likelier by a fifth at least."""
    adapter = load_adapter("smollm2-135m-memory3")
    adapted = LanguageModel(smollm.model, smollm.tokenizer, smollm.name, adapter)
    found: list[list[float]] = []
    for fact in FACTS:
        answer = smollm.tokens(" " + fact.answer)
        prompt = smollm.tokens(f"\nQuestion: {fact.question}\nAnswer:")
        nll = []
        for model in (smollm, adapted):
            writer = Writer(model, framing="plain", budget=360)
            packed = pack(writer.write([fact.text]), writer.shape)
            start = len(writer.shape.prefix) + writer.shape.reference_length
            context = Context(model, writer.shape.prefix, start)
            (logits,) = context.read([[Stretch([*prompt, *answer], packed)]], every=True)
            nll.append(float(likelihoods(logits[len(prompt) - 1 : -1], answer).mean()))
        found.append(nll)
    without, trained = np.mean(found, axis=0)
    assert trained < 0.8 * without


# --- databases ---


def make_database(folders: Path, path: Path, embedder: SentenceEmbedder, **options: Any) -> None:
    with create_database(
        path, model=str(folders / "model"), embedder=embedder, codec="exact", **options
    ) as database:
        for fact in FACTS:
            database.insert(fact.text, id=fact.id)


def memories(path: Path) -> dict[str, Any]:
    with MemDB.open(path) as database:
        settings, shape = database.settings, database.shape
    return {"adapter": settings["memory"].get("adapter"), "fingerprint": shape.adapter}


def test_a_database_loads_its_adapter_again(
    folders: Path, tmp_path: Path, minilm: SentenceEmbedder
) -> None:
    make_database(folders, tmp_path / "db", minilm, adapter=str(folders / "write"))
    recorded = memories(tmp_path / "db")
    assert recorded["adapter"] == str(folders / "write")
    assert recorded["fingerprint"] == load_adapter(str(folders / "write")).fingerprint
    with open_database(tmp_path / "db", embedder=minilm) as database:
        writer = database.writer
        assert isinstance(writer, Writer)
        assert writer.model.adapter is not None
        database.insert(SAMPLE, id="more")
        generate(FACTS[0].question, database, max_new_tokens=2)


def test_memories_of_another_adapter_are_refused(
    folders: Path, tmp_path: Path, minilm: SentenceEmbedder
) -> None:
    db = tmp_path / "db"
    make_database(folders, db, minilm)
    assert memories(db) == {"adapter": None, "fingerprint": None}
    write, other = str(folders / "write"), str(folders / "other")
    with pytest.raises(
        MismatchError, match=rf"written without an adapter.*memdb rewrite --db {db} --adapter"
    ):
        open_database(db, adapter=write)
    rewrite_database(db, adapter=write)
    assert memories(db)["adapter"] == write
    with pytest.raises(MismatchError, match=rf"with the adapter '{write}'.* has none.*"):
        open_database(db, adapter="none")
    with pytest.raises(MismatchError, match=rf"with the adapter '{write}'.* has '{other}'"):
        open_database(db, adapter=other)
    with pytest.raises(MismatchError, match="has none"):
        open_database(db, model=tiny_model())
    open_database(db, adapter=write).close()
    with pytest.raises(InvalidInputError, match="has its adapter already"):
        open_database(db, model=tiny_model(), adapter=write)


def test_a_rewrite_keeps_the_adapter_or_takes_another(
    folders: Path, tmp_path: Path, minilm: SentenceEmbedder
) -> None:
    db = tmp_path / "db"
    make_database(folders, db, minilm, adapter=str(folders / "write"), framing="plain")
    assert rewrite_database(db, budget=100).memories == len(FACTS)
    assert memories(db)["adapter"] == str(folders / "write")
    assert rewrite_database(db, adapter=str(folders / "both")).memories == len(FACTS)
    assert memories(db)["adapter"] == str(folders / "both")
    rewrite_database(db, adapter="none")
    assert memories(db) == {"adapter": None, "fingerprint": None}
    with open_database(db, embedder=minilm) as database:
        assert database.shape.framing == "plain"  # the model is the same


def test_a_reading_adapter_takes_the_memories_that_are_there(
    folders: Path, tmp_path: Path, minilm: SentenceEmbedder
) -> None:
    db, read = tmp_path / "db", str(folders / "read")
    make_database(folders, db, minilm)

    def answer(adapter: str | None) -> str:
        with open_database(db, embedder=minilm, adapter=adapter) as database:
            return generate(FACTS[0].question, database, max_new_tokens=8).text

    plain, read_so = answer(None), answer(read)
    assert memories(db) == {"adapter": None, "fingerprint": None}
    assert rewrite_database(db, adapter=read).memories == 0  # and nothing was written
    assert memories(db) == {"adapter": read, "fingerprint": None}
    assert answer(None) == read_so
    assert answer("none") == plain
    assert rewrite_database(db, adapter="none").memories == 0
    assert answer(None) == plain
    assert rewrite_database(db).memories == len(FACTS)


def test_an_adapter_that_moved_is_named(
    folders: Path, tmp_path: Path, minilm: SentenceEmbedder
) -> None:
    shutil.copytree(folders / "write", tmp_path / "here")
    db = tmp_path / "db"
    make_database(folders, db, minilm, adapter=str(tmp_path / "here"))
    (tmp_path / "here").rename(tmp_path / "there")
    with (
        open_database(db, embedder=minilm) as database,
        pytest.raises(
            InvalidInputError, match=r"adapter '.*here', which is no longer there.*--adapter"
        ),
    ):
        database.insert("Something new.", id="new")
    with open_database(db, embedder=minilm, adapter=str(tmp_path / "there")) as database:
        database.insert("Something new.", id="new")
    assert rewrite_database(db, adapter=str(tmp_path / "there")).memories == 0
    with open_database(db, embedder=minilm) as database:
        database.insert("And more.", id="more")


@pytest.mark.slow
def test_workers_write_with_the_adapter(
    folders: Path, tmp_path: Path, minilm: SentenceEmbedder
) -> None:
    make_database(folders, tmp_path / "db", minilm, adapter=str(folders / "write"))
    with open_database(tmp_path / "db", embedder=minilm) as database:
        database.insert(SAMPLE, id="cold", cold=True)
    assert warm_database(tmp_path / "db", workers=2) == 2


def test_an_evaluation_with_a_reading_adapter_takes_the_memories_that_are_there(
    folders: Path, tmp_path: Path, minilm: SentenceEmbedder
) -> None:
    corpus, questions = asked_files(tmp_path)
    settings = Settings(framing="plain", answers=False, text_limit=2)
    found = {}
    for name, model in (
        ("none", tiny_model()),
        ("read", with_adapter(folders / "read")),
        ("write", with_adapter(folders / "write")),
        ("none again", tiny_model()),
    ):
        parts: dict[str, Any] = {"model": model, "embedder": minilm, "work": tmp_path / "work"}
        found[name] = evaluate(corpus, questions, settings, **parts).to_json()["framings"]["plain"]
    assert len(list((tmp_path / "work").glob("*/database"))) == 2  # its own writes one of its own
    assert found["none again"] == found["none"]
    nll = {name: one["memory"]["nll"] for name, one in found.items()}
    assert len(set(nll.values())) == 3
    assert found["read"]["nothing"]["nll"] != found["none"]["nothing"]["nll"]
    assert found["write"]["nothing"]["nll"] == found["none"]["nothing"]["nll"]
    text = {name: one["running_text"]["perplexity_with"] for name, one in found.items()}
    assert len(set(text.values())) == 3


def test_heads_measured_with_a_reading_adapter_are_not_those_of_the_model(
    folders: Path, tmp_path: Path
) -> None:
    plain, file = tiny_model(), tmp_path / "heads.jsonl"
    how: dict[str, Any] = {"framing": "plain", "passages": 3, "examples": 3}
    corpus = facts_corpus(plain, tmp_path)
    for measure in (measure_heads, measure_head_weights):
        measure(plain, corpus, file, **how)
        with pytest.raises(InvalidInputError, match="adapter"):
            measure(with_adapter(folders / "read"), corpus, file, **how)
        file.unlink()
